"""`delta_memory` by its compiled method, with all that the operator checks before."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch

from spectral_window.ops import delta_memory
from spectral_window.ops.compiled import delta, delta_step
from spectral_window.ops.dispatch import may_bypass

MODULE = sys.modules["spectral_window.ops.delta_memory"]  # the package's name is the function
PLAIN_CHUNKED, PLAIN_STEP = MODULE.chunked, MODULE._step
DTYPES = (torch.float32, torch.bfloat16)


def _chunked(inputs, state, positions, known):
    run = delta.memory if inputs[0].dtype in DTYPES and inputs[0].is_cpu else PLAIN_CHUNKED
    return run(inputs, state, positions, known)


def _step(inputs, state, positions):
    compiled = inputs[0].dtype in DTYPES and may_bypass(*inputs, state)
    return (delta_step.step if compiled else PLAIN_STEP)(inputs, state, positions)


def compiled_memory(*tensors: torch.Tensor, method: str = "chunked", **options: Any) -> Any:
    with mock.patch.multiple(MODULE, chunked=_chunked, _step=_step):
        return delta_memory(*tensors, **options, method=method)
