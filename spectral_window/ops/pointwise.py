"""RMSNorm and the gate of SwiGLU: what a layer does between its matrix products.

On a CPU, in float32 and bfloat16, compiled code does each in one pass (`pointwise`);
everywhere else, and where torch.compile fuses such things itself, it is PyTorch's operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.dispatch import HAS_NUMBA, is_recorded, is_transformed


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
    if weight.is_floating_point() and _in_one_pass(x, weight):
        return (_RMSNorm.apply if torch.is_grad_enabled() else _norm)(x, weight, eps)
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise UserTypeError(
            f"x is {x.dtype}, weight {weight.dtype} (rms_norm): expected floating dtypes"
        )
    if x.device != weight.device:
        raise UserError(
            f"x is on {x.device}, weight on {weight.device} (rms_norm): move them together"
        )
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., N] each and of one dtype."""
    if up.dtype == gate.dtype and up.shape == gate.shape and _in_one_pass(gate, up):
        return (_SwiGLU.apply if torch.is_grad_enabled() else _gated)(gate, up)
    return F.silu(gate) * up


def _in_one_pass(x: Tensor, other: Tensor) -> bool:
    dtype = x.dtype
    return (
        HAS_NUMBA
        and (dtype is torch.float32 or dtype is torch.bfloat16)
        and x.is_cpu
        and other.is_cpu
        and type(x) in _PLAIN
        and type(other) in _PLAIN
        and x.numel() > 0
        and not is_recorded()
        and not is_transformed()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


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
