"""One token a row, straight along the ring of 2W keys and values, in compiled code (numba).

A step reads the ring once and writes the new one beside it: the state that was given stays as it
was. Reading and writing the rings takes the time of a step, not the products. Slots that no later
query can see become zeros. A tile is a share of one row's heads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import INT64, address, dense
from spectral_window.ops.compiled.simd import (
    BYTES,
    LANES,
    ONE,
    ZERO,
    add_row,
    aligned,
    bfloat16s,
    clear,
    dot_vectors,
    exponential,
    float32s,
    inner,
    int64s,
    load,
    load_row,
    spread,
    store,
    store_row,
    total,
    vectors_of,
)
from spectral_window.ops.compiled.threads import claim_tile, expect_tiles, kernel
from spectral_window.ops.compiled.window_loops import (
    Call,
    Window,
    fill_rotations,
    key_at,
    oldest,
    position,
    query_at,
    ring_row,
    value_at,
)


@inner
def normalise(scores, count):
    """Softmax over the first `count` scores, in place; what pads them to whole vectors is lost."""
    numbers = float32s(scores, count)
    most = numbers[0]
    for i in range(count):
        most = max(most, numbers[i])
    vectors = vectors_of(count)
    float32s(scores, vectors * BYTES // 4)[count:] = -np.inf
    sums = spread(ZERO)
    for i in range(vectors):
        weight = exponential(load(scores + i * BYTES) - spread(most))
        store(scores + i * BYTES, weight)
        sums = sums + weight
    scale = ONE / total(sums)
    for i in range(vectors):
        store(scores + i * BYTES, load(scores + i * BYTES) * spread(scale))


@inner
def copy(source, target):
    for i in range(target.shape[0]):
        target[i] = source[i]


@inner
def copy_slot(args, ring, new_ring, size, b, slot, first, stop, live):
    """The new ring's slot of these heads: as it was, or zeros."""
    target = ring_row(args, new_ring, b, slot, first, size)
    count = (stop - first) * size * (1 if args.bfloat16 else 2)  # of 16 bits, whatever they mean
    if live:
        copy(bfloat16s(ring_row(args, ring, b, slot, first, size), count), bfloat16s(target, count))
    else:
        bfloat16s(target, count)[:] = 0


@inner
def row_in_ring(args, ring, size, b, slot, h, between):
    """The address of a remembered row in float32, padded: where it lies, or a copy `between`."""
    slots = 2 * args.window  # a division less than `ring_row`: this is called for every key
    place = (b * slots + (slot if slot < slots else slot - slots)) * args.heads + h
    row = ring + place * size * (2 if args.bfloat16 else 4)
    if args.bfloat16 or size % LANES:
        load_row(row, args.bfloat16, size, 0, ONE, between)
        return between
    return row


def _once(tiles, call, out, new_key, new_value, after, shares):
    batch, time, heads, _ = call.q.shape
    if time != 1 or call.begin is None or not 0 < shares <= heads:
        raise UserError("no single token with a state (compiled window): see `step`")
    expect_tiles(tiles, batch * shares)
    dtype, _, outs, keys, values = call.numbers
    return call.record(
        out=address(out, dtype, outs),
        new_key=address(new_key, dtype, keys),
        new_value=address(new_value, dtype, values),
        new_position=address(after, INT64, batch),
        shares=shares,
    )


@inner
def copy_slots(args, b, slot, first, stop, live):
    """`copy_slot` of keys and values."""
    copy_slot(args, args.ring_key, args.new_key, args.key_dim, b, slot, first, stop, live)
    copy_slot(args, args.ring_value, args.new_value, args.value_dim, b, slot, first, stop, live)


@kernel(Window, _once)
def attend_once(args):
    """Tiles: (row, share of the heads). A slot of keys, and then of values, is read once: it goes
    to all heads and to the new ring."""
    window, slots, bfloat16 = args.window, 2 * args.window, args.bfloat16
    key_dim, value_dim = args.key_dim, args.value_dim
    key_vectors, value_vectors = vectors_of(key_dim), vectors_of(value_dim)
    key_row, value_row = key_vectors * BYTES, value_vectors * BYTES
    weight_row = vectors_of(slots) * BYTES
    most = (args.heads + args.shares - 1) // args.shares
    block_vectors = most * (key_vectors + value_vectors + vectors_of(slots)) + 1
    buffer = np.empty(LANES * (block_vectors + 3 * key_vectors + 2 * value_vectors), np.float32)
    angles = np.empty(2 * key_vectors * LANES)
    queries = aligned(buffer)
    outs = queries + most * key_row
    weights = outs + most * value_row
    new_key = weights + most * weight_row
    rotations_buffer = new_key + key_row
    between = rotations_buffer + key_row
    new_value = between + max(key_row, value_row)
    scale = np.float32(1 / math.sqrt(key_dim))
    tile = claim_tile(args)
    while tile >= 0:
        b, share = tile // args.shares, tile % args.shares
        first = args.heads * share // args.shares
        stop = args.heads * (share + 1) // args.shares
        p = position(args, b, 0)
        clear(outs, most * value_vectors)
        if p < 0:
            for slot in range(slots):
                copy_slots(args, b, slot, first, stop, True)
        else:
            if share == 0:
                int64s(args.new_position, args.batch)[b] = p + 1
            rotations = 0
            if args.frequency:
                rotations = rotations_buffer
                fill_rotations(args, b, 0, 1, rotations, angles)
            for h in range(first, stop):
                query = queries + (h - first) * key_row
                load_row(query_at(args, b, 0, h), bfloat16, key_dim, rotations, scale, query)
            past = p - oldest(p, window)
            begin, live = (p - past) % slots, oldest(p + 1, window) - (p - past)
            for i in range(past):
                for h in range(first, stop):
                    row = row_in_ring(args, args.ring_key, key_dim, b, begin + i, h, between)
                    score = dot_vectors(queries + (h - first) * key_row, row, key_vectors)
                    float32s(weights + (h - first) * weight_row, slots)[i] = score
                slot = (begin + i) % slots
                copy_slot(
                    args, args.ring_key, args.new_key, key_dim, b, slot, first, stop, i >= live
                )
            for h in range(first, stop):
                at = weights + (h - first) * weight_row
                load_row(key_at(args, b, 0, h), bfloat16, key_dim, rotations, ONE, new_key)
                score = dot_vectors(queries + (h - first) * key_row, new_key, key_vectors)
                float32s(at, slots)[past] = score
                normalise(at, past + 1)
            for i in range(past):
                for h in range(first, stop):
                    row = row_in_ring(args, args.ring_value, value_dim, b, begin + i, h, between)
                    weight = float32s(weights + (h - first) * weight_row, slots)[i]
                    add_row(outs + (h - first) * value_row, weight, row, value_vectors)
                slot = (begin + i) % slots
                copy_slot(
                    args,
                    args.ring_value,
                    args.new_value,
                    value_dim,
                    b,
                    slot,
                    first,
                    stop,
                    i >= live,
                )
            for i in range(1, slots - past):
                copy_slots(args, b, (p + i) % slots, first, stop, False)
            for h in range(first, stop):
                load_row(key_at(args, b, 0, h), bfloat16, key_dim, rotations, ONE, new_key)
                target = ring_row(args, args.new_key, b, p, h, key_dim)
                store_row(new_key, bfloat16, key_dim, 0, ONE, target)
                load_row(value_at(args, b, 0, h), bfloat16, value_dim, 0, ONE, new_value)
                weight = float32s(weights + (h - first) * weight_row, slots)[past]
                add_row(outs + (h - first) * value_row, weight, new_value, value_vectors)
                target = ring_row(args, args.new_value, b, p, h, value_dim)
                store_row(new_value, bfloat16, value_dim, 0, ONE, target)
        for h in range(first, stop):
            target = args.out + (b * args.heads + h) * value_dim * (2 if bfloat16 else 4)
            store_row(outs + (h - first) * value_row, bfloat16, value_dim, 0, ONE, target)
        tile = claim_tile(args)
    buffer[0] = 0  # alive until here


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    ring: tuple[Tensor, Tensor],
    begin: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`window.attention` for T = 1, without gradients. ring [B, 2W, H, *] and begin [B] are
    the state; positions [B, 1] int64, -1 for a row that has no token."""
    batch, _, heads, _ = q.shape
    call = Call.of(q, k, v, window, theta, ring, begin, positions, rotations=False)
    out, after = q.new_empty(v.shape), dense(begin).clone()
    new_key, new_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ring)
    shares = min(heads, -(-torch.get_num_threads() // batch))
    attend_once(batch * shares, call, out, new_key, new_value, after, shares)
    return out, new_key, new_value, after
