"""Window attention on a GPU: convert documents and states to streams of keys.

`triton_window_stream` attends to a stream of keys in which every query sees one interval. Here
positions and the ring buffer of the state are converted to such a stream, by tensor operations of
fixed shapes, so the CPU never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from spectral_window.ops import triton_window_kernels as kernels
from spectral_window.ops.operators import operator
from spectral_window.ops.rotary import rotate
from spectral_window.ops.triton_launch import launching
from spectral_window.ops.triton_window_stream import (
    find_turns,
    padded,
    rows_of,
    stream_attention,
)


class _Stream(NamedTuple):
    """Tokens in the order of the stream, padding last.

    Attributes:
        order: [B, T] int64, the column of each token.
        low: [B, T], the first place that each token sees.
        tokens: [B], the number of tokens that are not padding.
        last: [B], the position of the last of them, -1 for none.
    """

    order: Tensor
    low: Tensor
    tokens: Tensor
    last: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    ring: tuple[Tensor, Tensor] | None,
    begin: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`window_attention` for checked inputs.

    Positions are not checked: reading them would make the CPU wait.

    Args:
        q: [B, T, H, K], not rotated yet, T >= 1.
        k: [B, T, H, K], not rotated yet.
        v: [B, T, H, V].
        window: W.
        theta: base of the rotary embedding, or None.
        ring: keys and values of the state [B, 2W, H, *], or None.
        begin: [B] int64, the position of the next token of the state, or None.
        positions: [B, T] int64; None if rows continue the state, or are one document from
            position 0.

    Returns:
        out [B, T, H, V], and the state after the last token of each row: key, value
        [B, 2W, H, *], position [B].
    """
    batch, time = q.shape[:2]
    if positions is None and begin is None:
        out, _ = stream_attention(q, k, v, window, theta, None, None)
        position = torch.full((batch,), time, dtype=torch.int64, device=q.device)
        return out, *last_two_chunks(k, v, window, theta), position
    device = q.device
    if begin is None:
        begin = torch.zeros(batch, dtype=torch.int64, device=device)
    if positions is None:
        positions = begin[:, None] + torch.arange(time, dtype=torch.int64, device=device)
    keys, values = k, v
    if ring is not None:
        before = begin[:, None] + torch.arange(-2 * window, 0, dtype=torch.int64, device=device)
        slot = before.remainder(2 * window)[..., None, None]
        earlier = ring[0].take_along_dim(slot, 1)
        if theta is not None:  # the kernel rotates all keys
            earlier = rotate(earlier, -before, theta)
        keys = torch.cat((earlier, k), 1)
        values = torch.cat((ring[1].take_along_dim(slot, 1), v), 1)
    prefix = keys.shape[1] - time
    stream = _find_stream(positions, window, prefix)
    low, order = stream.low.to(torch.int32), stream.order.to(torch.int32)
    out, _ = stream_attention(q, keys, values, window, theta, low, order)
    return out, *_next_state(k, v, window, theta, ring, begin, stream)


def _find_stream(positions: Tensor, window: int, prefix: int) -> _Stream:
    token = positions >= 0
    count = token.sum(1)
    place = torch.arange(positions.shape[1], dtype=torch.int64, device=positions.device)
    target = torch.where(token, token.cumsum(1) - 1, count[:, None] + (~token).cumsum(1) - 1)
    order = torch.empty_like(target).scatter_(1, target, place.expand_as(target))
    position = positions.gather(1, order)
    back = position - (position // window - 1).clamp(min=0) * window
    low = (prefix + place - back).clamp(min=0)
    low = torch.where(position < 0, prefix + place + 1, low)
    last = position.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    return _Stream(order, low, count, last)


def _last_two_chunks(
    k: Tensor, v: Tensor, window: int, theta: float | None
) -> tuple[Tensor, Tensor]:
    """Return keys and values of the state [B, 2W, H, *] after rows without padding.

    Each row is one document from position 0.
    """
    k, v = rows_of(k), rows_of(v)
    batch, time, heads, size = k.shape
    slots, oldest = 2 * window, _oldest(time, window)
    key = k.new_empty(batch, slots, heads, size)
    value = v.new_empty(batch, slots, heads, v.shape[3])
    rows, tiles = time - oldest, triton.cdiv(slots, 16)
    turns = key if theta is None else find_turns(k, theta, size, rows, 0, 1, oldest)
    strides = [x.stride(i) for x in (k, v) for i in range(3)]
    sizes = (heads, time, slots, oldest, rows, tiles)
    with launching(k):
        # without fused multiply-adds the keys have the bits of `rotate`
        kernels.remember[(batch * heads * tiles,)](
            k,
            v,
            key,
            value,
            turns,
            *strides,
            *sizes,
            K=size,
            KP=padded(size),
            V=v.shape[3],
            VP=padded(v.shape[3]),
            R=16,
            ROPE=theta is not None,
            enable_fp_fusion=False,
        )
    return key, value


def _fake(k, v, window, theta):
    shapes = [(x.shape[0], 2 * window, *x.shape[2:]) for x in (k, v)]
    return k.new_empty(shapes[0]), v.new_empty(shapes[1])


def _keep_shapes(ctx, inputs, output):
    k, _, ctx.window, ctx.theta = inputs
    ctx.times, ctx.device = k.shape[1], k.device
    ctx.set_materialize_grads(False)


def _forget(ctx, d_key, d_value):
    """Return the gradients of the tokens in the ring buffer; zeros for all others."""
    time, slots = ctx.times, 2 * ctx.window
    oldest = _oldest(time, ctx.window)

    def tokens(d: Tensor | None, rotated: bool) -> Tensor | None:
        if d is None:
            return None
        d = d.roll(-(oldest % slots), 1)[:, : time - oldest]
        if rotated:
            d = rotate(
                d, -torch.arange(oldest, time, dtype=torch.int64, device=ctx.device), ctx.theta
            )
        return F.pad(d, (0, 0, 0, 0, oldest, 0))

    return tokens(d_key, ctx.theta is not None), tokens(d_value, False), None, None


last_two_chunks = operator("triton_window_ring", _last_two_chunks, _fake, _keep_shapes, _forget)


def _oldest(time: int, window: int) -> int:
    """Return the first position that the token at position `time` would see."""
    return max(time // window - 1, 0) * window


def _next_state(
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    ring: tuple[Tensor, Tensor] | None,
    begin: Tensor,
    stream: _Stream,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after the last token of each row; rows without tokens keep theirs."""
    slots = 2 * window
    alive = stream.tokens > 0
    position = torch.where(alive, stream.last + 1, begin)
    slot = torch.arange(slots, dtype=torch.int64, device=k.device)
    slot_position = position[:, None] - 1 - (position[:, None] - 1 - slot) % slots
    live = slot_position >= (position // window - 1).clamp(min=0)[:, None] * window
    index = stream.tokens[:, None] - (position[:, None] - slot_position)  # among this call's tokens
    fresh = (alive[:, None] & live & (index >= 0))[..., None, None]
    column = stream.order.gather(1, index.clamp(min=0))[..., None, None]
    key, value = k.take_along_dim(column, 1), v.take_along_dim(column, 1)
    if theta is not None:
        key = rotate(key, slot_position, theta)
    keeps_old = (live | ~alive[:, None])[..., None, None]

    def after(new: Tensor, old: Tensor | None) -> Tensor:
        before = 0.0 if old is None else torch.where(keeps_old, old, 0.0)
        return torch.where(fresh, new, before)

    old_key, old_value = ring or (None, None)
    return after(key, old_key), after(value, old_value), position
