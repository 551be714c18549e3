"""Calls that are recorded once as CUDA graphs, then replayed.

A step of a small model, or one token of any, launches hundreds of kernels that take a few
microseconds each; Python needs longer to launch them than the GPU to run them. A graph is launched
at once. It computes the same bits: the same kernels on the same memory, with the inputs copied into
the tensors that were recorded.

Inputs of different kinds (names, shapes, dtypes) have graphs of their own, which share their
memory. The first calls of a kind run as usual, so that all kernels are compiled before one is
recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
WARM = 3  # calls of a kind before it is recorded


class Recorder(Protocol):
    """What records calls: `CudaGraphs`, or in tests something for a CPU."""

    def warm(self, call: Callable[[], Any]) -> Any: ...

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]: ...


class CudaGraphs:
    """Records calls on the current CUDA device; all recordings share a pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm(self, call: Callable[[], Any]) -> Any:
        """Return call(), run beside the main stream: gradients must not be tied to that stream, or
        a backward pass could not be recorded."""
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            result = call()
        main.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return (what replays call(), what call() returned)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result


class _Recording(NamedTuple):
    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    result: Any


class Replayed:
    """`compute(inputs)` by graphs.

    Gradients that it adds to must keep their memory between calls: zero them, do not drop them.

    Args:
        compute: takes tensors by name on `device`; it must not wait for the device, and may return
            anything.
        device: where it runs.
        note: gets a line if a call cannot be recorded; it then runs as usual.
        most: kinds of inputs that are recorded; others run as usual.
        recorder: what records; None for CUDA graphs.
    """

    def __init__(
        self,
        compute: Callable[[dict[str, Tensor]], Any],
        device: torch.device,
        *,
        note: Callable[[str], None] = lambda line: None,
        most: int = 16,
        recorder: Recorder | None = None,
    ) -> None:
        self.compute, self.device, self.note, self.most = compute, device, note, most
        self.recorder: Recorder = CudaGraphs() if recorder is None else recorder
        self.refused = False
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, inputs: Inputs) -> Any:
        """Return what `compute` returns; tensors in it are overwritten by the next call.

        Args:
            inputs: tensors by name, on any device.
        """
        kind = tuple((name, tuple(x.shape), x.dtype) for name, x in inputs.items())
        if kind not in self._recordings:
            self._seen[kind] += 1
            ready = self._seen[kind] > WARM and len(self._recordings) < self.most
            if self.refused or not ready or not self._record(kind, inputs):
                here = {name: x.to(self.device) for name, x in inputs.items()}
                return self.recorder.warm(lambda: self.compute(here))
        recording = self._recordings[kind]
        kept = recording.inputs
        near = [name for name, x in inputs.items() if x.device == kept[name].device]
        torch._foreach_copy_([kept[name] for name in near], [inputs[name] for name in near])
        for name, x in inputs.items():
            if name not in near:
                kept[name].copy_(x, non_blocking=True)
        recording.replay()
        return recording.result

    def _record(self, kind: Hashable, inputs: Inputs) -> bool:
        kept = {name: x.to(self.device, copy=True) for name, x in inputs.items()}
        try:
            replay, result = self.recorder.record(lambda: self.compute(kept))
        except RuntimeError as error:
            self.refused = True
            self.note(f"without CUDA graphs: {str(error).splitlines()[0]}")
            return False
        self._recordings[kind] = _Recording(kept, replay, result)
        return True
