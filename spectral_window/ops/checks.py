"""Argument checks that both convolutions (`spectral_conv`, `fir_conv`) make before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.documents import Documents
from spectral_window.ops.tracing import readable


def check_input(u: Tensor, op: str) -> None:
    """Raise UserError or UserTypeError unless u is [B, T, D] of a floating dtype."""
    if u.dim() != 3:
        raise UserError(f"u has shape {tuple(u.shape)} ({op}): expected [batch, time, channels]")
    if not u.dtype.is_floating_point:
        raise UserTypeError(f"u is {u.dtype} ({op}): expected a floating dtype")


def check_like(u: Tensor, op: str, *others: tuple[str, Tensor | None]) -> None:
    """Raise UserError for a (name, tensor) pair whose tensor is on another device than u."""
    for name, part in others:
        if part is not None and part.device != u.device:
            raise UserError(f"{name} is on {part.device}, u on {u.device} ({op}): move one")


def check_state(state: Tensor | None, kernel: object, u: Tensor, op: str) -> None:
    """Raise UserError for a state of another kernel, batch or dtype."""
    if state is None:
        return
    shape, dtype = kernel.state_shape(u.shape[0]), kernel.state_dtype(u.dtype, u.device)  # type: ignore[attr-defined]
    if state.shape != shape or state.dtype not in (torch.float32, torch.float64, dtype):
        raise UserError(
            f"state is {tuple(state.shape)} {state.dtype} ({op}): expected {shape} in "
            f"{dtype}, as returned by a call with the same batch and modes or taps"
        )


def check_out(
    out: Tensor, u: Tensor, op: str, positions: Tensor | Documents | None, **others: Tensor | None
) -> None:
    """Raise UserError for an `out` that y cannot be written to."""
    if out.shape != u.shape or out.dtype != u.dtype or out.device != u.device:
        raise UserError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device} ({op}): expected "
            f"{tuple(u.shape)} {u.dtype} on {u.device}, like u"
        )
    if not out.is_contiguous():
        raise UserError(f"out is not contiguous ({op}): pass contiguous memory")
    at = positions.positions if isinstance(positions, Documents) else positions
    others = {"u": u, "positions": at, **others}
    present = {name: x for name, x in others.items() if x is not None}
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *present.values())):
        raise UserError(
            f"out with a gradient to record ({op}): leave it away, or use torch.no_grad()"
        )
    if not readable(out, *present.values()) or not out.numel():
        return
    if out.is_neg():
        raise UserError(f"out has its negative bit set ({op}): pass other memory")
    for name, x in present.items():
        distance = out.data_ptr() - x.data_ptr()
        span = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        if x.numel() and -out.nbytes < distance < span * x.element_size():
            raise UserError(f"out overlaps {name} ({op}): pass other memory")
