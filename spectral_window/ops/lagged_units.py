"""Rows of length 1 beside those of their FIR filter: the queries and keys of a layer's memory.

Where `fir_conv` and `unit` would run compiled code, a single compiled pass computes both, and
another their gradients. Elsewhere they are called one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.checks import check_input, check_like, check_state
from spectral_window.ops.context_parallel import SpanDocuments
from spectral_window.ops.documents import Documents, anywhere, documents_after
from spectral_window.ops.fir import Taps, fir_conv, sources_of, state_after
from spectral_window.ops.methods import resolve
from spectral_window.ops.pointwise import unit


def lagged_units(
    u: Tensor,
    taps: Taps,
    heads: int,
    shortest: float,
    *,
    state: Tensor | None = None,
    positions: Tensor | Documents | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u and its convolution with `taps`, both with length 1 in each head.

    Differentiable any number of times in u, weights and state.

    Args:
        u: [B, T, D] floating; any T >= 0 and B >= 0.
        taps: `Taps` of shape [D, L].
        heads: H, a divisor of D.
        shortest: rows of a head that are shorter are divided by it, see `unit`.
        state: as in `fir_conv`.
        positions: documents and padding, see `spectral_window.ops`.
        method: of the convolution, a name in METHODS["fir"], or "auto".

    Returns:
        Two tensors [B, T, H, D / H] in at least float32, finite at padding if u is, and the state
        of the convolution after the last token of each row.

    Raises:
        UserError: a bad argument (a ValueError); raised before any work.
        UserTypeError: an argument of a wrong type or dtype (a TypeError).

    Example:
        >>> u = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
        >>> p, k, state = lagged_units(u, Taps(torch.tensor([[0.0, 1.0]]).expand(2, 2)), 1, 1e-4)
        >>> p.flatten(2), k.flatten(2)
        (tensor([[[0.6000, 0.8000],
                 [0.0000, 1.0000]]]), tensor([[[0.0000, 0.0000],
                 [0.6000, 0.8000]]]))
    """
    check_input(u, "lagged_units")
    if heads < 1 or u.shape[2] % heads:
        raise UserError(
            f"heads are {heads} for {u.shape[2]} channels (lagged_units): expected a divisor"
        )
    if not isinstance(positions, SpanDocuments) and _compiled(u, taps, method):
        return _in_one_pass(u, taps, heads, shortest, state, positions)
    return _one_by_one(u, taps, heads, shortest, state, positions, method)


def _compiled(u: Tensor, taps: Taps, method: str) -> bool:
    """Return whether both operators would run compiled code."""
    if not isinstance(taps, Taps):
        return False  # `fir_conv` refuses it
    filtered = resolve("fir", method, u, taps.weights)
    return filtered.name == "compiled" == resolve("unit", "auto", u).name


def _one_by_one(
    u: Tensor,
    taps: Taps,
    heads: int,
    shortest: float,
    state: Tensor | None,
    positions: Tensor | Documents | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, after = fir_conv(u, taps, state=state, positions=positions, method=method)
    p, k = (unit(x.unflatten(-1, (heads, -1)), shortest) for x in (u, y))
    return p, k, after


def _in_one_pass(
    u: Tensor,
    taps: Taps,
    heads: int,
    shortest: float,
    state: Tensor | None,
    positions: Tensor | Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = taps.validated(u.shape[2]).weights
    check_like(u, "lagged_units", ("weights", weights), ("state", state))
    check_state(state, taps, u, "lagged_units")
    documents = documents_after(state, positions, None, u)
    before = None if state is None else state.to(u.dtype)
    if documents is not None:
        documents.check(None if before is None else anywhere(len(u)), wait=True)
    run = _OnePass.apply if torch.is_grad_enabled() else _units
    p, k = run(u, weights, before, documents, heads, shortest)
    split = heads, u.shape[2] // heads
    return (
        p.unflatten(-1, split),
        k.unflatten(-1, split),
        state_after(u, weights, before, documents),
    )


def _units(
    u: Tensor,
    weights: Tensor,
    before: Tensor | None,
    documents: Documents | None,
    heads: int,
    shortest: float,
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.compiled import lagged_units

    sources = sources_of(documents, weights)
    return lagged_units.units(u, weights, before, sources, heads, shortest)


class _OnePass(torch.autograd.Function):
    """Second derivatives, and the gradient of the state, are those of the operators apart."""

    forward = staticmethod(_units)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.documents, ctx.heads, ctx.shortest = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from spectral_window.ops.compiled import lagged_units

        again = torch.is_grad_enabled()
        if again or ctx.needs_input_grad[2]:
            with torch.enable_grad():
                return *_gradients_apart(ctx, grads, again), None, None, None
        u, weights, before = ctx.saved_tensors
        sources = sources_of(ctx.documents, weights)
        found = lagged_units.units_backward(
            u, weights, before, sources, ctx.heads, ctx.shortest, *grads
        )
        return *found, None, None, None, None


def _gradients_apart(ctx: Any, grads: tuple[Tensor, ...], again: bool) -> list[Tensor | None]:
    """Return the gradients of u, weights and state; `again` if they are differentiated in turn."""
    # views, because one input may depend on another: a state computed from u
    inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
    u, weights, before = inputs
    assert u is not None
    assert weights is not None
    given = Taps(weights), ctx.heads, ctx.shortest, before, ctx.documents
    outputs = (x.flatten(-2) for x in _one_by_one(u, *given, "auto")[:2])
    pairs = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs:  # there is padding alone
        return [None, None, None]
    gradients = iter(
        torch.autograd.grad(
            *([pair[0] for pair in pairs], leaves, [pair[1] for pair in pairs]),
            create_graph=again,
            allow_unused=True,
        )
    )
    return [next(gradients) if needs else None for needs in ctx.needs_input_grad[:3]]
