"""Which method computes an operator: resolved here and nowhere else, with a reason that can be
printed.

A method is a choice of speed, never of architecture: all methods of an operator compute the same
function, and no config file names one.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spectral_window.errors import UserError, unknown

HAS_NUMBA = find_spec("numba") is not None
HAS_TRITON = find_spec("triton") is not None
METHODS = {
    "spectral": {
        "reference": "direct sum in float64, O(T^2): the truth for the others",
        "fft": "the paper's zero-padded FFT in float32, O(T log T)",
        "scan": "the recurrence in compiled code (numba), O(T), float64 state, on a CPU",
        "triton": "the recurrence in Triton kernels, O(T), float64 between chunks, on a GPU",
        "chunked": "float64 chunk products and a scan over chunks, O(T), plain torch",
        "step": "the recurrence, for calls with one token: constant state, constant time",
    },
    "taps": {
        "reference": "direct sum in float64, O(T L): the truth for the others",
        "fft": "zero-padded FFT in float32, O(T log T)",
        "shifts": "a multiply-add of the whole input for each tap, O(T L), plain torch",
        "step": "a weighted sum of the last L inputs, for calls with one token",
    },
    "window": {
        "reference": "dense masked softmax in float64, O(T^2): the truth for the others",
        "tiled": "tiles of 16 queries in compiled code (numba), O(T W), RoPE inside, on a CPU",
        "triton": "tiles of queries on a GPU (Triton), O(T W), RoPE inside, on CUDA or ROCm",
        "chunked": "one attention call over all chunks, O(T W), plain torch",
        "step": "attention to the ring of 2W keys, for calls with one token",
    },
    "delta": {
        "reference": "the recurrence in float64, token by token: the truth for the others",
        "chunked": "a triangular system in each chunk, a scan over chunks, O(T), plain torch",
        "step": "the recurrence, for calls with one token: constant state, constant time",
    },
    "linear": {
        "matmul": "PyTorch's matrix product",
        "rows": "every row of the weights once, in compiled code (numba), for a few vectors",
    },
}
_HALF_TO_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)
TRITON_DTYPES = {"spectral": (*_HALF_TO_FLOAT32, torch.float64), "window": _HALF_TO_FLOAT32}
FEW = 4  # vectors at once; more are served better by a matrix product
FEW_TAPS = 16  # more are served better by an FFT


def resolve(op: str, method: str, tensor: Tensor, *, taps: int = 0) -> tuple[str, str]:
    """(method, reason) for operator `op` on inputs like `tensor` ([B, T, ...]); `method` may be
    "auto". `taps` is the length of the filter, for the operator "taps".

    Raises ValueError for an unknown operator or method, naming the nearest one.
    """
    if op not in METHODS:
        raise unknown("operator", op, METHODS)
    if op == "linear" and method in ("auto", "rows"):
        return _linear(tensor, method == "rows")
    one_token = tensor.dim() > 1 and tensor.shape[1] == 1
    if method == "auto":
        if one_token:
            return "step", "one token: constant state, constant time"
        if op == "taps":
            if taps <= FEW_TAPS:
                return "shifts", f"{taps} taps: few passes over memory"
            return "fft", f"{taps} taps: too many to add one by one"
        if op == "spectral" and tensor.device.type == "cpu":
            if is_exported():
                return "chunked", "in plain torch, because the graph may run elsewhere"
            if HAS_NUMBA:
                return "scan", "one pass over memory, compiled by numba for this CPU"
            return "chunked", "numba is not installed: linear time in plain torch"
        if op == "spectral" and tensor.device.type == "cuda":
            # torch.func's transformations and forward-mode derivatives know plain torch alone
            if runs_triton(op, tensor) and (is_recorded() or not is_transformed()):
                return "triton", "few passes over memory, in Triton kernels for this GPU"
            return "chunked", "linear time in plain torch: no Triton, or transformed by torch.func"
        if op == "window" and runs_tiled(tensor):
            return "tiled", "only what is seen, in compiled code (numba) for this CPU"
        if op == "window" and runs_triton(op, tensor) and tensor.is_cuda:
            return "triton", "only what is seen, in one kernel (Triton) for this GPU"
        return "chunked", "linear time in plain torch on any device"
    if method not in METHODS[op]:
        raise unknown(f"{op} method", method, [*METHODS[op], "auto"])
    if method == "step" and not one_token:
        raise UserError(f"method 'step' ({op}): it takes one token a call, not {tensor.shape[1]}")
    if method == "triton" and not runs_triton(op, tensor):
        raise UserError(
            f"method 'triton' ({op}): it needs the package triton and a GPU (or TRITON_INTERPRET=1 "
            f"on a CPU), not {tensor.dtype} on {tensor.device}: use 'chunked' or 'auto'"
        )
    if method == "tiled" and not runs_tiled(tensor):
        raise UserError(
            f"method 'tiled' (window): it needs numba, and float32 or bfloat16 on a CPU, not "
            f"{tensor.dtype} on {tensor.device}: use 'chunked' or 'auto'"
        )
    return method, "asked for by name"


def runs_triton(op: str, x: Tensor) -> bool:
    """Do operator `op`'s Triton kernels run on tensors like x? On a CPU only in the interpreter
    (TRITON_INTERPRET=1), slowly, for tests."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    there = HAS_TRITON and x.device.type == ("cpu" if interpreted else "cuda")
    if is_exported() or (op == "window" and is_transformed() and not is_recorded()):
        return False
    return there and x.dtype in TRITON_DTYPES[op]


def runs_tiled(q: Tensor) -> bool:
    """Is there compiled code for window attention on tensors like q?"""
    kind = HAS_NUMBA and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)
    return kind and not is_exported() and (is_recorded() or not is_transformed())


def may_bypass(*tensors: Tensor | None) -> bool:
    """May compiled code be called on these tensors' memory, past torch's dispatcher? Not where a
    gradient, a graph or a transformation of the call is wanted."""
    if is_recorded() or is_transformed():
        return False
    learns = torch.is_grad_enabled()
    return all(
        x is None or (type(x) in _PLAIN and not (learns and x.requires_grad)) for x in tensors
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def is_recorded() -> bool:
    """Is the call recorded as a graph, by torch.compile, torch.export or torch.jit.trace? Then
    values cannot be looked at, and no shape may depend on them."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_exported() -> bool:
    """Is it recorded to be run elsewhere, by torch.export or torch.jit.trace? Then the graph holds
    PyTorch's own operations alone."""
    return torch.compiler.is_exporting() or (
        not torch.compiler.is_compiling() and torch._C._is_tracing()
    )


def is_transformed() -> bool:
    """Is torch.func (vmap, jvp, ...) or forward-mode differentiation at work?"""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def readable(*tensors: Tensor | None) -> bool:
    """May Python look at the values of `tensors` now? Not while a graph is recorded or captured,
    and not where there are none."""
    if is_recorded():
        return False
    given = [x for x in tensors if x is not None]
    if any(type(x) not in _PLAIN or x.device.type == "meta" for x in given):
        return False
    return not (any(x.is_cuda for x in given) and torch.cuda.is_current_stream_capturing())


def _linear(x: Tensor, wanted: bool) -> tuple[str, str]:
    """`resolve` for linear maps of x [..., K]."""
    count, size = x.numel(), x.shape[-1] if x.dim() else 0
    if count > FEW * size and not wanted:
        return "matmul", "many vectors"
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not may_bypass(x):
        return "matmul", "differentiable, autocast, or in a graph"
    dtype = x.dtype
    if not (HAS_NUMBA and x.is_cpu and (dtype is torch.float32 or dtype is torch.bfloat16)):
        return "matmul", "compiled rows are for float32 and bfloat16 on a CPU with numba"
    if not count or (dtype is torch.bfloat16 and size % 2):
        return "matmul", "nothing to multiply, or an odd size: bfloat16 is read in pairs"
    return "rows", "asked for by name" if wanted else "a few vectors: bound by reading the weights"
