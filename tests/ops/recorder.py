"""A recorder for a CPU in the place of CUDA graphs: like a graph it runs with the tensors of the
recording alone, and writes its results into the same memory every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Records calls that return a tensor, or tuples and lists of tensors.

    fails: it cannot record. adds: the call changes something (gradients), so recording must not
    run it; it then returns a single number.
    """

    def __init__(self, *, fails: bool = False, adds: bool = False) -> None:
        self.fails, self.adds = fails, adds
        self.recorded, self.replayed = 0, 0

    def warm(self, call):
        return call()

    def record(self, call):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.recorded += 1
        result = torch.full((), torch.nan) if self.adds else _emptied(call())

        def replay():
            self.replayed += 1
            _copy(result, call())

        return replay, result


def _emptied(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone().fill_(torch.nan if result.is_floating_point() else -1)
    return type(result)(map(_emptied, result))


def _copy(into: Any, result: Any) -> None:
    if isinstance(result, Tensor):
        into.copy_(result)
    else:
        for one, other in zip(into, result, strict=True):
            _copy(one, other)
