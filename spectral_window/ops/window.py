"""The local branch: causal attention in chunks of W, each seeing itself and the chunk before.

The window grows and shrinks: a query at position t sees (t mod W) + 1 + W keys (fewer in the first
chunk); `reference.visible` is the rule and draws it. Because the chunk grid is anchored to each
document's position 0, the
memory of a row is at most 2W keys and values, kept in a ring: the key of position p lies in slot p
mod 2W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops import recorded, reference
from spectral_window.ops.dispatch import (
    is_exported,
    is_recorded,
    may_bypass,
    readable,
    resolve,
    runs_tiled,
)
from spectral_window.ops.documents import (
    Documents,
    chunk_grid,
    find_documents,
    given_positions,
    split_finite,
)
from spectral_window.ops.rotary import check_theta, rotate
from spectral_window.ops.window_state import WindowState, empty_state, held_positions


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    rope_theta: float | None = None,
    state: WindowState | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, WindowState]:
    """Softmax attention of every query to its own chunk, causally, and to the whole chunk before
    (paper section 1).

    q, k:       [B, T, H, K] floating; any T >= 0 and B >= 0.
    v:          [B, T, H, V].
    window:     W >= 1, the chunk length.
    rope_theta: turn q and k to their positions first (interleaved pairs); None where they are
                turned already.
    state:      as returned by an earlier call for the same rows; None for none.
    positions, cu_seqlens: documents and padding, see `spectral_window.ops`.
    method:     "auto", "tiled", "triton", "chunked" or "reference"; with "auto" a single token
                attends to the ring directly.

    Returns out [B, T, H, V] (0 at padding) and the state after each row's last token. Raises
    ValueError or TypeError before any work.
    """
    _check(q, k, v, window, rope_theta, state)
    method, _ = resolve("window", method, q)
    batch, time, heads, key_dim = q.shape
    positions = given_positions(positions, cu_seqlens, q, None if state is None else state.position)
    exported = method == "chunked" and is_exported()
    if method == "tiled" and q.numel():
        return _tiled(q, k, v, window, rope_theta, state, positions)
    if method == "triton" and q.numel():
        return _in_triton(q, k, v, window, rope_theta, state, positions)
    if state is None and (positions is not None or method == "step" or q.numel() == 0 or exported):
        state = empty_state(
            batch, window, heads, key_dim, v.shape[3], dtype=k.dtype, device=k.device
        )
    if q.numel() == 0:
        assert state is not None
        return q @ k.transpose(-1, -2) @ v if time else v.clone(), state
    if method == "step":
        assert state is not None
        bypass = runs_tiled(q) and may_bypass(q, k, v, *state[:2])
        step = _step_in_compiled_code if bypass else _step
        return step(q, k, v, window, rope_theta, state, positions)
    if state is None:
        where = torch.arange(time, dtype=torch.int64, device=q.device)
    else:
        if positions is None:
            positions = state.position[:, None] + torch.arange(
                time, dtype=torch.int64, device=q.device
            )
        where = positions
    if rope_theta is not None:
        q, k = rotate(q, where, rope_theta), rotate(k, where, rope_theta)
    exactly = method == "reference"
    if state is None:
        rows = _reference_rows if exactly else _chunked_rows
        return rows(q, k, v, window), _last_two_chunks(k, v, window)
    assert positions is not None
    if is_recorded():
        return _recorded_documents(q, k, v, window, state, positions)
    docs = find_documents(positions, state.position)
    documents = _reference_documents if exactly else _chunked_documents
    return documents(q, k, v, window, state, docs), _next_state(k, v, window, state, docs)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rope_theta: float | None,
    state: WindowState | None,
) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise UserError(f"window is {window!r} (window_attention): expected a whole number >= 1")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise UserError(
            f"q, k, v have shapes {shapes} (window_attention): expected [B, T, H, K] twice "
            "and [B, T, H, V]"
        )
    if not q.dtype.is_floating_point or q.dtype != k.dtype or q.dtype != v.dtype:
        raise UserTypeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype} (window_attention): "
            "expected one floating dtype"
        )
    if not (q.device == k.device == v.device):
        raise UserError(
            f"q, k, v are on {q.device}, {k.device}, {v.device} (window_attention): "
            "move them together"
        )
    if rope_theta is not None:
        check_theta(rope_theta)
        if q.shape[-1] % 2:
            raise UserError(
                f"head size {q.shape[-1]} is odd (window_attention): rotary needs an even one"
            )
    if state is not None:
        want = (q.shape[0], 2 * window, *q.shape[2:])
        if state.key.shape != want or state.value.shape != (*want[:3], v.shape[3]):
            raise UserError(
                f"state holds keys {tuple(state.key.shape)} (window_attention): expected {want}; "
                "it belongs to another batch, window or head size"
            )
        for name, held, dtype in zip(
            state._fields, state, (k.dtype, k.dtype, torch.int64), strict=True
        ):
            if held.dtype != dtype or held.device != k.device:
                raise UserError(
                    f"{name} of the state is {held.dtype} on {held.device} (window_attention): "
                    f"expected {dtype} on {k.device}"
                )
        if state.position.shape != want[:1]:
            raise UserError(
                f"position of the state is {tuple(state.position.shape)} (window_attention): "
                f"expected {want[:1]}, a row's next position"
            )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over [G, W, H, *] queries and [G, 2W, H, *] keys, mask [G, W, 2W].

    By PyTorch's fused kernel, except in float64, where it is not twice differentiable, and on a
    CPU: there its masked backward pass takes 2 to 5 times as long as plain products, and one way
    for training and inference gives both the same bits.
    """
    dtype, cpu = q.dtype, q.device.type == "cpu"
    if cpu and dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()  # as fast on a CPU, and rounded once
    softmax = _by_products if cpu or dtype == torch.float64 else _by_fused_kernel
    out = softmax(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask[:, None])
    return out.transpose(1, 2).to(dtype)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # which would round to bfloat16
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def _by_fused_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_chunks(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """Attention over G chunks laid end to end: [G, W, H, *] each, first [G] marks chunks with
    nothing before."""
    window = q.shape[1]
    place = torch.arange(2 * window, dtype=torch.int64, device=q.device)
    mask = reference.visible(
        place[window:, None], place, window
    )  # a query's chunk is the second of its two
    mask = mask & ~(first[:, None, None] & (place < window))

    def previous(x: Tensor) -> Tensor:
        # zeros and not the neighbour's values where a document begins: 0 * NaN would let a NaN
        # cross
        before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        return torch.where(first[:, None, None, None], 0.0, before)

    # nor may 0 * NaN bring one back from the future: what is not finite is added to those that see
    v, spoilt = split_finite(v)
    spoilt = spoilt.cumsum(1)
    out = _attend(q, torch.cat((previous(k), k), 1), torch.cat((previous(v), v), 1), mask)
    return out + spoilt + previous(spoilt)[:, -1:]


def _chunked_rows(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    batch, time = q.shape[:2]
    per_row = (time + window - 1) // window

    def grid(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, per_row * window - time)).reshape(-1, window, *x.shape[2:])

    first = torch.arange(batch * per_row, dtype=torch.int64, device=q.device) % per_row == 0
    out = _attend_chunks(grid(q), grid(k), grid(v), first)
    return out.reshape(batch, per_row * window, *out.shape[2:])[:, :time]


def _chunked_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int, state: WindowState, docs: Documents
) -> Tensor:
    key, value, key_document, key_position = _with_remembered(k, v, window, state, docs)
    tokens = len(docs.token)
    if not tokens:
        return torch.where((state.position < 0)[:, None, None, None], v, 0.0)  # padding alone
    slot, first = chunk_grid(key_document, key_position, window)

    def grid(x: Tensor, at: Tensor) -> Tensor:
        room = x.new_zeros(len(first) * window, *x.shape[1:])
        return room.index_copy(0, at, x).view(-1, window, *x.shape[1:])

    at = slot[-tokens:]  # remembered keys come first, then the tokens of this call
    query = q.flatten(0, 1).index_select(0, docs.token)
    out = _attend_chunks(grid(query, at), grid(key, slot), grid(value, slot), first)
    out = out.flatten(0, 1).index_select(0, at)
    return torch.zeros_like(v).flatten(0, 1).index_copy(0, docs.token, out).view(v.shape)


def _recorded_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int, state: WindowState, positions: Tensor
) -> tuple[Tensor, WindowState]:
    """`_chunked_documents` and `_next_state` where no shape may depend on positions."""
    context = recorded.remembered(k, v, window, state, positions)
    blocks = recorded.reachable(q, context, window)
    out = _attend(*(x.flatten(0, 1) for x in blocks)).unflatten(0, blocks.mask.shape[:2])
    return recorded.answered(out, context, window), recorded.next_state(context, window, state)


def _with_remembered(
    k: Tensor, v: Tensor, window: int, state: WindowState, docs: Documents
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in reach of this call's documents: those that `state` remembers, then the
    call's own.

    Returns (key [S, H, K], value [S, H, V], document [S], position [S]).
    """
    head_position = docs.position[docs.head]
    continued = (head_position > 0).nonzero().squeeze(1)
    row = docs.row[docs.head[continued]]
    held = held_positions(state.position[row], window)  # [continued, 2W], -1 where a slot is dead
    which, slot = (held >= 0).nonzero(as_tuple=True)
    key = torch.cat((state.key[row[which], slot], k.flatten(0, 1).index_select(0, docs.token)))
    value = torch.cat((state.value[row[which], slot], v.flatten(0, 1).index_select(0, docs.token)))
    document = torch.cat((docs.document[docs.head[continued]][which], docs.document))
    return key, value, document, torch.cat((held[which, slot], docs.position))


def _last_two_chunks(k: Tensor, v: Tensor, window: int) -> WindowState:
    """The state of rows that are one document from position 0, without padding."""
    batch, time = k.shape[:2]
    position = torch.full((batch,), time, dtype=torch.int64, device=k.device)
    held = held_positions(position[:1], window)[0]
    live = (held >= 0)[:, None, None]
    at = held.clamp(min=0)
    key = torch.where(live, k.index_select(1, at), 0.0)
    return WindowState(key, torch.where(live, v.index_select(1, at), 0.0), position)


def _next_state(
    k: Tensor, v: Tensor, window: int, state: WindowState, docs: Documents
) -> WindowState:
    """The state after each row's last document; rows without a token keep theirs."""
    if not len(docs.token):
        return state
    alive = docs.last >= 0
    last = docs.last.clamp(min=0)
    position = torch.where(alive, docs.position[last] + 1, state.position)
    held = held_positions(position, window)  # [B, 2W]
    begin = docs.position[
        docs.head[docs.document[last]]
    ]  # where this call's part of the last document begins
    recent = alive[:, None] & (held >= begin[:, None])
    index = (last[:, None] - (position[:, None] - 1 - held)).clamp(min=0)
    token = docs.token[torch.where(recent, index, 0)]

    def ring(new: Tensor, old: Tensor) -> Tensor:
        live, fresh = (held >= 0)[..., None, None], recent[..., None, None]
        return torch.where(fresh, new.flatten(0, 1)[token], torch.where(live, old, 0.0))

    return WindowState(ring(k, state.key), ring(v, state.value), position)


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState | None,
    positions: Tensor | None,
) -> tuple[Tensor, WindowState]:
    from spectral_window.ops.compiled.window import attention

    ring, begin = (None, None) if state is None else (state[:2], state.position)
    out, *after = attention(q, k, v, window, theta, ring, begin, positions)
    return out, WindowState(*after)


def _in_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState | None,
    positions: Tensor | None,
) -> tuple[Tensor, WindowState]:
    """On a GPU. Padding may lie anywhere."""
    from spectral_window.ops.triton_window import attention

    ring, begin = (None, None) if state is None else (state[:2], state.position)
    out, *after = attention(q, k, v, window, theta, ring, begin, positions)
    return out, WindowState(*after)


def _step_in_compiled_code(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState,
    positions: Tensor | None,
) -> tuple[Tensor, WindowState]:
    from spectral_window.ops.compiled.window_step import step

    if positions is not None:
        _check_step(positions[:, 0], state)
    out, *after = step(q, k, v, window, theta, state[:2], state.position, positions)
    return out, WindowState(*after)


def _check_step(position: Tensor, state: WindowState) -> None:
    wrong = (position > 0) & (position != state.position)
    if bool(wrong.any()):
        b = int(wrong.nonzero()[0, 0])
        raise UserError(
            f"position {int(position[b])} in row {b} (window_attention): "
            f"its state goes on at {int(state.position[b])}"
        )


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState,
    positions: Tensor | None,
) -> tuple[Tensor, WindowState]:
    """One token a row, straight from the ring; no data-dependent shape, so it compiles to one
    graph."""
    position = state.position if positions is None else positions[:, 0]
    if theta is not None:
        q, k = (rotate(x, position[:, None], theta) for x in (q, k))
    token = position >= 0
    if position.device.type == "cpu" and readable(position):
        _check_step(position, state)
    at = torch.where(token, position, state.position)
    slot = torch.arange(2 * window, dtype=torch.int64, device=q.device)
    here = (slot == (at % (2 * window))[:, None])[..., None, None]
    # a slot may be seen if it holds one of the last positions of this very document
    held = held_positions(at, window)
    live = held >= 0
    key = torch.where(here, k, torch.where(live[..., None, None], state.key, 0.0))
    value = torch.where(here, v, torch.where(live[..., None, None], state.value, 0.0))
    mask = live | here[..., 0, 0]
    out = _attend(q, key, value, mask[:, None])
    out = torch.where(token[:, None, None, None], out, 0.0)
    # then forget what the next query cannot see
    after = held_positions(at + 1, window)[..., None, None] >= 0
    kept = token[:, None, None, None]
    return out, WindowState(
        torch.where(kept, torch.where(after, key, 0.0), state.key),
        torch.where(kept, torch.where(after, value, 0.0), state.value),
        torch.where(token, at + 1, state.position),
    )


def _reference_rows(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return reference.window(q.double(), k.double(), v.double(), window).to(v.dtype)


def _reference_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int, state: WindowState, docs: Documents
) -> Tensor:
    """Every document alone, in a loop, with the remembered keys in order before its own."""
    key, value, document, position = _with_remembered(k, v, window, state, docs)
    query = q.flatten(0, 1).index_select(0, docs.token)
    out = torch.zeros_like(v).flatten(0, 1)
    for d in range(len(docs.head)):
        mine = (document == d).nonzero().squeeze(1)
        mine = mine[position[mine].argsort()]
        own = docs.document == d
        part = _reference_from(query[own], key[mine], value[mine], window, int(position[mine[0]]))
        out = out.index_copy(0, docs.token[own], part.to(v.dtype))
    return out.view(v.shape)


def _reference_from(q: Tensor, k: Tensor, v: Tensor, window: int, first: int) -> Tensor:
    return reference.window(q[None].double(), k[None].double(), v[None].double(), window, first)[0]
