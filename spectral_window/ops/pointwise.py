"""RMSNorm and the gate of SwiGLU: what a layer does between its matrix products.

On a CPU, in float32 and bfloat16, compiled code does each in one pass; everywhere else, and where
torch.compile fuses such things itself, it is PyTorch's operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.methods import (
    HAS_NUMBA,
    Method,
    Reason,
    enrol,
    resolve,
)
from spectral_window.ops.tracing import PLAIN, is_recorded, is_transformed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [..., D] in x's dtype.

    weight: [D], any floating dtype. eps: finite, >= 0. Raises TypeError or ValueError before any
    work.
    """
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise UserError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} (rms_norm): "
            "expected [..., D] and [D]"
        )
    if not 0 <= eps < math.inf:
        raise UserError(f"eps is {eps} (rms_norm): expected a finite number >= 0")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise UserTypeError(
            f"x is {x.dtype}, weight {weight.dtype} (rms_norm): expected floating dtypes"
        )
    if x.device != weight.device:
        raise UserError(
            f"x is on {x.device}, weight on {weight.device} (rms_norm): move them together"
        )
    return resolve("rms_norm", "auto", x, weight).function(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., N] each and of one dtype."""
    return resolve("swiglu", "auto", gate, up).function(gate, up)


def _not_compiled(x: Tensor, other: Tensor | None = None) -> Reason:
    dtype = x.dtype
    if not (HAS_NUMBA and (dtype is torch.float32 or dtype is torch.bfloat16) and x.is_cpu):
        return "it needs numba, and float32 or bfloat16 on a CPU"
    if is_recorded() or is_transformed():
        return "graphs and transformations need torch's operations"
    if type(x) not in PLAIN or not x.numel():
        return "it needs a plain tensor that is not empty"
    if other is not None and not (other.is_cpu and type(other) in PLAIN):
        return "it needs plain tensors on one device"
    return None


def _not_gated(gate: Tensor, up: Tensor | None = None) -> Reason:
    if up is not None and not (up.dtype == gate.dtype and up.shape == gate.shape):
        return "it needs one dtype and one shape"
    return _not_compiled(gate, up)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from spectral_window.ops.compiled import pointwise

    return pointwise.rms_norm(x, weight, eps)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    from spectral_window.ops.compiled import pointwise

    return pointwise.swiglu(gate, up)


class _RMSNorm(torch.autograd.Function):
    forward = staticmethod(_norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from spectral_window.ops.compiled import pointwise

        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            with torch.enable_grad():
                y = F.rms_norm(x, weight.shape, weight.to(x.dtype), ctx.eps)
                return *torch.autograd.grad(y, (x, weight), grad, create_graph=True), None
        found = pointwise.rms_norm_backward(x, weight, ctx.eps, grad)
        return *found, None


class _SwiGLU(torch.autograd.Function):
    forward = staticmethod(_gated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from spectral_window.ops.compiled import pointwise

        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.enable_grad():
                return torch.autograd.grad(F.silu(gate) * up, (gate, up), grad, create_graph=True)
        return pointwise.swiglu_backward(gate, up, grad)


def _norm_in_one_pass(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_RMSNorm.apply if torch.is_grad_enabled() else _norm)(x, weight, eps)


def _norm_by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _gated_in_one_pass(gate: Tensor, up: Tensor) -> Tensor:
    return (_SwiGLU.apply if torch.is_grad_enabled() else _gated)(gate, up)


def _gated_by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


_COMPILED, _TORCH = (
    "one pass over memory in compiled code (numba), on a CPU",
    "PyTorch's operations",
)
enrol(
    "rms_norm",
    Method("compiled", _norm_in_one_pass, _COMPILED, _not_compiled),
    Method("torch", _norm_by_torch, _TORCH),
)
enrol(
    "swiglu",
    Method("compiled", _gated_in_one_pass, _COMPILED, _not_gated),
    Method("torch", _gated_by_torch, _TORCH),
)
