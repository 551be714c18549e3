"""The work of a layer between its matrix products: RMSNorm, SwiGLU, unit vectors, gated sums.

On a CPU, in float32 and bfloat16, compiled code computes each in one pass over memory. Elsewhere,
and under torch.compile, which fuses them itself, PyTorch's operations are used.
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
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., D] floating.
        weight: [D], any floating dtype.
        eps: finite, >= 0.

    Returns:
        [..., D] in x's dtype.

    Raises:
        UserError: a bad shape, eps or device (a ValueError).
        UserTypeError: a dtype that is not floating (a TypeError).

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
        tensor([0.8485, 1.1314])
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
    """Return silu(gate) * up, both [..., N] and of one dtype.

    Example:
        >>> swiglu(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([0.0000, 1.7616])
    """
    return resolve("swiglu", "auto", gate, up).function(gate, up)


def unit(x: Tensor, shortest: float) -> Tensor:
    """Divide x by its length over the last dimension, or by `shortest` if it is shorter.

    Args:
        x: [..., N] floating.
        shortest: the smallest divisor.

    Returns:
        [..., N] in at least float32.

    Raises:
        UserTypeError: a dtype that is not floating (a TypeError).
    """
    if not x.is_floating_point():
        raise UserTypeError(f"x is {x.dtype} (unit): expected a floating dtype")
    return resolve("unit", "auto", x).function(x, shortest)


def gated_add(base: Tensor, x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    """Return base + gate * scale * x, in base's dtype.

    Args:
        base: [..., H N].
        x: [..., H, N], in at least float32.
        gate: [..., H], in at least float32.
        scale: [H N].

    Raises:
        UserError: shapes that do not fit (a ValueError).
        UserTypeError: a dtype that is not floating (a TypeError).
    """
    parts = base, x, gate, scale
    if (
        not is_recorded()
        and (  # a graph must not depend on sizes
            x.dim() < 2
            or base.shape != (*x.shape[:-2], x.shape[-2] * x.shape[-1])
            or gate.shape != x.shape[:-1]
            or scale.shape != base.shape[-1:]
        )
    ):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise UserError(
            f"base, x, gate, scale have shapes {shapes} (gated_add): expected [..., H N], "
            "[..., H, N], [..., H] and [H N]"
        )
    if not all(part.is_floating_point() for part in parts):
        raise UserTypeError(
            f"base, x, gate, scale are {', '.join(str(part.dtype) for part in parts)} (gated_add): "
            "expected floating dtypes"
        )
    return resolve("gated_add", "auto", base, x, gate, scale).function(base, x, gate, scale)


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


def _not_added(base: Tensor, *others: Tensor) -> Reason:
    for each in others[:2]:
        if each.dtype != torch.float32 or not (each.is_cpu and type(each) in PLAIN):
            return "it needs what is added, and its gate, in float32 on a CPU"
    return _not_compiled(base, *others[2:])


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
        if torch.is_grad_enabled():  # a second derivative is asked for
            with torch.enable_grad():
                y = F.rms_norm(x, weight.shape, weight.to(x.dtype), ctx.eps)
                return *torch.autograd.grad(y, (x, weight), grad, create_graph=True), None
        return *pointwise.rms_norm_backward(x, weight, ctx.eps, grad), None


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


def _unit(x: Tensor, shortest: float) -> Tensor:
    from spectral_window.ops.compiled import pointwise

    return pointwise.unit(x, shortest)


def _added(base: Tensor, x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    from spectral_window.ops.compiled import pointwise

    return pointwise.gated_add(base, x, gate, scale)


class _Unit(torch.autograd.Function):
    forward = staticmethod(_unit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.shortest = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from spectral_window.ops.compiled import pointwise

        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.enable_grad():
                y = _unit_by_torch(x, ctx.shortest)
                return *torch.autograd.grad(y, x, grad, create_graph=True), None
        return pointwise.unit_backward(x, ctx.shortest, grad), None


class _GatedAdd(torch.autograd.Function):
    forward = staticmethod(_added)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from spectral_window.ops.compiled import pointwise

        x, gate, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.enable_grad():
                g = grad.to(x.dtype).unflatten(-1, x.shape[-2:])
                weighted = g * scale.unflatten(-1, x.shape[-2:])
                dx, d_gate = weighted * gate[..., None], (weighted * x).sum(-1)
                d_scale = (g * gate[..., None] * x).flatten(0, -3).sum(0).flatten()
                return grad, dx, d_gate, d_scale.to(scale.dtype)
        return grad, *pointwise.gated_add_backward(grad, x, gate, scale)


def _norm_in_one_pass(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_RMSNorm.apply if torch.is_grad_enabled() else _norm)(x, weight, eps)


def _norm_by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _gated_in_one_pass(gate: Tensor, up: Tensor) -> Tensor:
    return (_SwiGLU.apply if torch.is_grad_enabled() else _gated)(gate, up)


def _gated_by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _unit_in_one_pass(x: Tensor, shortest: float) -> Tensor:
    return (_Unit.apply if torch.is_grad_enabled() else _unit)(x, shortest)


def _unit_by_torch(x: Tensor, shortest: float) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=shortest)


def _added_in_one_pass(base: Tensor, x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return (_GatedAdd.apply if torch.is_grad_enabled() else _added)(base, x, gate, scale)


def _added_by_torch(base: Tensor, x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return (base + (gate[..., None] * x).flatten(-2) * scale).to(base.dtype)


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
enrol(
    "unit",
    Method("compiled", _unit_in_one_pass, _COMPILED, _not_compiled),
    Method("torch", _unit_by_torch, _TORCH),
)
enrol(
    "gated_add",
    Method("compiled", _added_in_one_pass, _COMPILED, _not_added),
    Method("torch", _added_by_torch, _TORCH),
)
