"""Rows in spans: the state after a span, computed from the state before it and the span alone.

Where several processes share a row, each has a span of it: contiguous tokens. Every operator is a
recurrence whose state a span changes by an *affine map*, so that a process can compute its span's
map before it knows the state:

    state after = own + A(state before)

`own` is what the span leaves in a state that was empty. A depends on few numbers:

    convolution    A is z^n for each mode, n the span's tokens
    memory         A is a matrix [K, K] for each head, which the operator computes (`delta_map`)
    last inputs    A moves them n places towards the past: the inputs of FIR filters, and the keys
                   and values of the window

A is zero where a document starts inside the span, and padding counts no tokens. A process needs
`own` (and the memory's matrices) of the spans before its own, and their maps one after the other
give the state at which its span starts (`state_before`). The sizes do not depend on T.

These are pure functions of tensors. `context_parallel.py` exchanges the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.delta_memory import delta_memory, state_dtype
from spectral_window.ops.documents import Documents, Tokens
from spectral_window.ops.modes import Modes, powers, times
from spectral_window.ops.rotary import rotate
from spectral_window.ops.spectral import spectral_conv
from spectral_window.ops.tracing import without_autocast
from spectral_window.ops.window_state import WindowState, slot_positions


class Span(NamedTuple):
    """What the positions of a span of B rows tell about states.

    Attributes:
        length: [B] int64, the number of its tokens, without padding.
        cleared: [B] bool, whether a document starts inside, so that nothing passes through.
        position: [B] int64, the position of the row's next token after the span.
    """

    length: Tensor
    cleared: Tensor
    position: Tensor


def bounds(time: int, parts: int) -> list[slice]:
    """Cut `time` columns into `parts` spans whose lengths differ by at most one.

    Raises:
        UserError: fewer columns than parts.

    Example:
        >>> bounds(7, 3)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    if time < parts:
        raise UserError(
            f"rows of {time} tokens over {parts} processes (context_parallel): each needs at least "
            "one; use fewer processes, or longer rows"
        )
    return [slice(time * r // parts, time * (r + 1) // parts) for r in range(parts)]


def read_spans(positions: Tensor, parts: Sequence[slice]) -> list[Span]:
    """Return the spans of whole rows: positions [B, T] on the CPU, from the rows' start."""
    spans, position = [], positions.new_zeros(positions.shape[0])
    for part in parts:
        here = positions[:, part]
        token = here >= 0
        index = torch.arange(here.shape[1], dtype=torch.int64, device=here.device)
        last = torch.where(token, index, -1).amax(1)
        after = here.gather(1, last.clamp(min=0)[:, None])[:, 0] + 1
        position = torch.where(last >= 0, after, position)
        spans.append(Span(token.sum(1), (here == 0).any(1), position))
    return spans


# -------------------------------------------------------------------------- what a span hands over


class Share(NamedTuple):
    """What a span does to the state of one operator.

    Attributes:
        own: what the other spans need of it; of the same shape in every span.
        empty: the state before any token.
        after: (state before, own, span) -> state after, for any of the spans.
    """

    own: Tensor
    empty: Tensor
    after: Callable[[Tensor, Tensor, Span], Tensor]


def state_before(share: Share, earlier: Sequence[Tensor], spans: Sequence[Span]) -> Tensor:
    """Return the state after the spans before one's own, whose `own` are `earlier`."""
    state = share.empty
    for own, span in zip(earlier, spans, strict=False):  # spans: of the whole row
        state = share.after(state, own, span)
    return state


def _passed(state: Tensor, span: Span) -> Tensor:
    """Return the state without rows that a document clears; in a product NaN would cross."""
    return torch.where(span.cleared.view(-1, *[1] * (state.dim() - 1)), 0.0, state)


# ------------------------------------------------------------------------------- the convolution


def oscillators(u: Tensor, modes: Modes, documents: Documents, method: str = "auto") -> Share:
    """Return the share of a convolution by oscillators.

    Args:
        u: its input in this span, [B, T, D].
        modes: of shape [D] or [D, M].
        documents: of this span.
        method: of "spectral".
    """
    _, own = spectral_conv(u, modes, positions=documents, method=method)
    return Share(own, torch.zeros_like(own), partial(_decayed, modes=modes.shaped(u.shape[2])))


def _decayed(state: Tensor, own: Tensor, span: Span, *, modes: Modes) -> Tensor:
    factor = powers(modes, span.length).permute(2, 0, 1, 3)  # z^n: [B, D, M, 2]
    return own + times(factor, _passed(state, span))


# ---------------------------------------------------------------------------------- last inputs


class _Recent(NamedTuple):
    """The last n inputs of each row's last document: places among the B*T tokens, [B, n]."""

    place: Tensor
    filled: Tensor


def _recent(tokens: Tokens, count: int) -> _Recent:
    back = torch.arange(1 - count, 1, dtype=torch.int64, device="cpu")
    if not len(tokens.token):
        nothing = torch.zeros(len(tokens.last), count, dtype=torch.int64, device="cpu")
        return _Recent(nothing, nothing.bool())
    last = tokens.last.clamp(min=0)
    index = last[:, None] + back
    first = tokens.head[tokens.document[last]]
    filled = (index >= first[:, None]) & (tokens.last >= 0)[:, None]
    return _Recent(tokens.token[torch.where(filled, index, 0)], filled)


def last_inputs(x: Tensor, count: int, documents: Documents) -> Share:
    """Return the share of an operator whose state is the last `count` inputs x [B, T, ...].

    They are [B, count, ...], oldest first, of the row's current document alone; zeros where there
    are fewer.
    """
    plan = documents.plan(("last inputs", count), partial(_recent, count=count))
    own = torch.where(_like(plan.filled, x), x.flatten(0, 1)[plan.place], 0.0)
    return Share(own, torch.zeros_like(own), _moved)


def _moved(state: Tensor, own: Tensor, span: Span) -> Tensor:
    count = state.shape[1]
    place = torch.arange(count, dtype=torch.int64, device=state.device) + span.length[:, None]
    earlier = (place < count) & ~span.cleared[:, None]
    return torch.where(_like(earlier, own), _at(state, torch.where(earlier, place, 0)), own)


def _at(x: Tensor, place: Tensor) -> Tensor:
    """Return x[b, place[b, i]] for x [B, n, ...] and place [B, m]: [B, m, ...]."""
    row = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    return x[row[:, None], place]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (x.dim() - 2))


def ring(
    key: Tensor, value: Tensor, position: Tensor, window: int, rope_theta: float | None
) -> WindowState:
    """Return the window's state from the last 2W keys and values.

    Args:
        key: [B, 2W, H, K], not rotated, oldest first.
        value: [B, 2W, H, V].
        position: [B], the position of the next token of each row.
        window: W.
        rope_theta: as in `window_attention`.
    """
    slot_position = slot_positions(position, window)
    seen = slot_position >= 0
    place = torch.where(seen, 2 * window - (position[:, None] - slot_position), 0)
    key, value = (torch.where(_like(seen, x), _at(x, place), 0.0) for x in (key, value))
    if rope_theta is not None:
        key = rotate(key, slot_position.clamp(min=0), rope_theta)
    return WindowState(key, value, position)


# ------------------------------------------------------------------------------------ the memory


class DeltaMap(NamedTuple):
    """The memory of a span, as an affine map of the state S before it.

    Attributes:
        out: [B, T, H, V], what is read if S is zero.
        reach: [B, T, H, K]; reach_t^T S is read besides.
        share: `own` is [B, H, K, V + K], the state if S is zero and the matrix that multiplies S.
    """

    out: Tensor
    reach: Tensor
    share: Share


def delta_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    decay: Tensor | None = None,
    documents: Documents,
    method: str = "auto",
) -> DeltaMap:
    """Run the memory of a span once, for every state that it may start from.

    The columns of a state share nothing. So K more columns that start as the identity, and into
    which zeros are written, end as the product of all the span's changes.

    Args:
        q, k, v, beta, decay: as in `delta_memory`.
        documents: of this span.
        method: of "delta".
    """
    size, width = k.shape[-1], v.shape[-1]
    wide = torch.cat((v, v.new_zeros(*v.shape[:3], size)), -1)
    empty = v.new_zeros(v.shape[0], v.shape[2], size, width, dtype=state_dtype(v.dtype))
    identity = torch.eye(size, dtype=empty.dtype, device=v.device)
    begin = torch.cat((empty, identity.expand(*empty.shape[:2], -1, -1)), -1)
    out, own = delta_memory(
        q, k, wide, beta, decay=decay, state=begin, positions=documents, method=method
    )
    read, reach = out.split((width, size), -1)
    return DeltaMap(read, reach, Share(own, empty, _multiplied))


def _multiplied(state: Tensor, own: Tensor, span: Span) -> Tensor:
    written, matrix = own.split((state.shape[-1], state.shape[-2]), -1)
    exact = torch.float32 if state.device.type == "mps" else torch.float64
    with without_autocast(state.device):
        through = matrix.to(exact) @ _passed(state, span).to(exact)
    return (written.to(exact) + through).to(state.dtype)


def read_from(map: DeltaMap, state: Tensor, documents: Documents) -> Tensor:
    """Return what the span reads if it starts from `state` [B, H, K, V]: [B, T, H, V]."""
    positions = documents.positions
    goes_on = ((positions == 0).cumsum(1) == 0) & (positions >= 0)
    with without_autocast(state.device):
        before = torch.einsum("bthk,bhkv->bthv", map.reach.to(state.dtype), state)
    # elsewhere reach is 0, and a state that is not finite must not cross
    return map.out + torch.where(goes_on[..., None, None], before, 0.0).to(map.out.dtype)
