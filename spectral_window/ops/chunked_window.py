"""Window attention in chunks: one attention call over all chunks, in plain torch.

Linear time, on any device, twice differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops import recorded, reference
from spectral_window.ops.documents import Documents, Tokens, chunk_grid, split_finite
from spectral_window.ops.rotary import rotate
from spectral_window.ops.tracing import is_exported, is_recorded, without_autocast
from spectral_window.ops.window_state import WindowState, empty_state, slot_positions


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState | None,
    documents: Documents | None,
) -> tuple[Tensor, WindowState]:
    """`window_attention` for checked inputs that are not empty."""
    if state is None and (documents is not None or is_exported()):
        state = empty_of(k, v, window)
    if state is None:
        q, k = rotated(q, k, theta, torch.arange(q.shape[1], dtype=torch.int64, device=q.device))
        return _rows(q, k, v, window), last_two_chunks(k, v, window)
    documents = documents_from(state, documents, q)
    q, k = rotated(q, k, theta, documents.positions)
    if is_recorded():
        return _recorded(q, k, v, window, state, documents.positions)
    documents.check(state.position, wait=True)
    return _documents(q, k, v, window, state, documents), next_state(k, v, window, state, documents)


def empty_of(k: Tensor, v: Tensor, window: int) -> WindowState:
    """Return the state before any token, for keys and values like these."""
    batch, _, heads, size = k.shape
    return empty_state(batch, window, heads, size, v.shape[3], dtype=k.dtype, device=k.device)


def documents_from(state: WindowState, documents: Documents | None, q: Tensor) -> Documents:
    """Return `documents`, or those of rows that continue their states."""
    if documents is not None:
        return documents
    counting = torch.arange(q.shape[1], dtype=torch.int64, device=q.device)
    return Documents(state.position[:, None] + counting, checked=True)


def rotated(q: Tensor, k: Tensor, theta: float | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k to their positions; if theta is None, they are rotated already."""
    if theta is None:
        return q, k
    return rotate(q, positions, theta), rotate(k, positions, theta)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v.

    It calls PyTorch's fused kernel, except in float64, where that is not twice differentiable, and
    on a CPU. There its masked backward pass takes 2 to 5 times as long as plain products, and using
    them for inference too gives the same bits as in training.

    Args:
        q: queries [G, W, H, K].
        k: keys [G, 2W, H, K].
        v: values [G, 2W, H, V].
        mask: [G, W, 2W], whether a query sees a key.
    """
    dtype, cpu = q.dtype, q.device.type == "cpu"
    if cpu and dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()  # equally fast on a CPU, and rounded once
    softmax = _by_products if cpu or dtype == torch.float64 else _by_fused_kernel
    out = softmax(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask[:, None])
    return out.transpose(1, 2).to(dtype)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with without_autocast(q.device):
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def _by_fused_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_chunks(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """Attend over G chunks that stand one after the other.

    q, k, v: [G, W, H, *]; first [G] marks chunks with nothing before them.
    """
    window = q.shape[1]
    place = torch.arange(2 * window, dtype=torch.int64, device=q.device)
    mask = reference.visible(
        place[window:, None], place, window
    )  # a query's chunk is the second of its two
    mask = mask & ~(first[:, None, None] & (place < window))

    def previous(x: Tensor) -> Tensor:
        # zeros where a document starts: with the values of its neighbour 0 * NaN would be NaN
        before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        return torch.where(first[:, None, None, None], 0.0, before)

    # values that are not finite are added to the queries that see them: in the product 0 * NaN
    # would reach earlier queries
    v, spoilt = split_finite(v)
    spoilt = spoilt.cumsum(1)
    out = attend(q, torch.cat((previous(k), k), 1), torch.cat((previous(v), v), 1), mask)
    return out + spoilt + previous(spoilt)[:, -1:]


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    batch, time = q.shape[:2]
    per_row = (time + window - 1) // window

    def grid(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, per_row * window - time)).reshape(-1, window, *x.shape[2:])

    first = torch.arange(batch * per_row, dtype=torch.int64, device=q.device) % per_row == 0
    out = _attend_chunks(grid(q), grid(k), grid(v), first)
    return out.reshape(batch, per_row * window, *out.shape[2:])[:, :time]


class _Grid(NamedTuple):
    """The keys that the documents of a call can see, in chunks of W one after the other.

    First the keys of the states, then those of the call's own tokens.

    Attributes:
        row: [m], the row of each key of a state.
        slot: [m], its slot in the ring buffer.
        token: [n], the call's tokens among all B*T.
        place: [m + n], the places of the keys in the grid.
        first: [G] bool, chunks with nothing before them.
    """

    row: Tensor
    slot: Tensor
    token: Tensor
    place: Tensor
    first: Tensor


def _cut(tokens: Tokens, window: int) -> _Grid:
    heads = tokens.head[tokens.goes_on]
    # a row continues where its state stopped, so its position tells what is in the ring buffer
    slot_position = slot_positions(
        tokens.position[heads], window
    )  # [continued, 2W], -1: an unused slot
    which, slot = (slot_position >= 0).nonzero(as_tuple=True)
    document = torch.cat((tokens.document[heads][which], tokens.document))
    position = torch.cat((slot_position[which, slot], tokens.position))
    place, first = chunk_grid(document, position, window)
    return _Grid(tokens.row[heads][which], slot, tokens.token, place, first)


def _documents(
    q: Tensor, k: Tensor, v: Tensor, window: int, state: WindowState, documents: Documents
) -> Tensor:
    grid = documents.plan(("window", window), lambda tokens: _cut(tokens, window))
    tokens = len(grid.token)
    if not tokens:
        return torch.where((state.position < 0)[:, None, None, None], v, 0.0)  # padding alone

    def reached(x: Tensor, ring: Tensor) -> Tensor:
        own = x.flatten(0, 1).index_select(0, grid.token)
        return torch.cat((ring[grid.row, grid.slot], own))

    def cells(x: Tensor, at: Tensor) -> Tensor:
        places = x.new_zeros(len(grid.first) * window, *x.shape[1:])
        return places.index_copy(0, at, x).view(-1, window, *x.shape[1:])

    at = grid.place[-tokens:]
    query = q.flatten(0, 1).index_select(0, grid.token)
    out = _attend_chunks(
        cells(query, at),
        cells(reached(k, state.key), grid.place),
        cells(reached(v, state.value), grid.place),
        grid.first,
    )
    out = out.flatten(0, 1).index_select(0, at)
    return torch.zeros_like(v).flatten(0, 1).index_copy(0, grid.token, out).view(v.shape)


def _recorded(
    q: Tensor, k: Tensor, v: Tensor, window: int, state: WindowState, positions: Tensor
) -> tuple[Tensor, WindowState]:
    """`_documents` and `next_state` for recorded graphs, in fixed shapes."""
    context = recorded.with_state(k, v, window, state, positions)
    blocks = recorded.reachable(q, context, window)
    out = attend(*(x.flatten(0, 1) for x in blocks)).unflatten(0, blocks.mask.shape[:2])
    return recorded.from_blocks(out, context, window), recorded.next_state(context, window, state)


def last_two_chunks(k: Tensor, v: Tensor, window: int) -> WindowState:
    """Return the state of rows that are one document from position 0, without padding."""
    batch, time = k.shape[:2]
    position = torch.full((batch,), time, dtype=torch.int64, device=k.device)
    slot_position = slot_positions(position[:1], window)[0]
    live = (slot_position >= 0)[:, None, None]
    at = slot_position.clamp(min=0)
    key = torch.where(live, k.index_select(1, at), 0.0)
    return WindowState(key, torch.where(live, v.index_select(1, at), 0.0), position)


class _Ring(NamedTuple):
    """The content of the ring buffers after a call.

    Attributes:
        position: [B], of the next token of each row.
        alive: [B] bool, rows with any token.
        token: [B, 2W], the token that is written to a slot, among all B*T.
        recent: [B, 2W] bool, slots that are written to.
        live: [B, 2W] bool, slots that a later query sees.
    """

    position: Tensor
    alive: Tensor
    token: Tensor
    recent: Tensor
    live: Tensor


def _ring(tokens: Tokens, window: int) -> _Ring:
    alive = tokens.last >= 0
    last = tokens.last.clamp(min=0)
    position = torch.where(alive, tokens.position[last] + 1, 0)
    slot_position = slot_positions(position, window)  # [B, 2W]
    # the start of this call's part of the last document
    begin = tokens.position[tokens.head[tokens.document[last]]]
    recent = alive[:, None] & (slot_position >= begin[:, None])
    index = (last[:, None] - (position[:, None] - 1 - slot_position)).clamp(min=0)
    token = tokens.token[torch.where(recent, index, 0)]
    return _Ring(position, alive, token, recent, slot_position >= 0)


def next_state(
    k: Tensor, v: Tensor, window: int, state: WindowState, documents: Documents
) -> WindowState:
    """Return the state after the last document of each row; rows without tokens keep theirs."""
    if not len(documents.tokens.token):
        return state
    plan = documents.plan(("window ring", window), lambda tokens: _ring(tokens, window))
    alive = plan.alive[:, None, None, None]

    def ring(new: Tensor, old: Tensor) -> Tensor:
        live, fresh = plan.live[..., None, None], plan.recent[..., None, None]
        remaining = torch.where(alive, torch.where(live, old, 0.0), old)
        return torch.where(fresh, new.flatten(0, 1)[plan.token], remaining)

    position = torch.where(plan.alive, plan.position, state.position)
    return WindowState(ring(k, state.key), ring(v, state.value), position)
