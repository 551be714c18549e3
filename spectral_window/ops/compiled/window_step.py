"""One token a row, straight along the ring of 2W keys and values, in compiled code (numba).

A step reads the ring once and writes the new one beside it: the state that was given stays as it
was. Slots that no later query can see become zeros. A part is a share of one row's heads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import INT64, address, dense
from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    fused,
    load,
    spread,
    store,
    total,
)
from spectral_window.ops.compiled.threads import bfloat16s, float32s, inner, int64s, kernel, take
from spectral_window.ops.compiled.window_rows import (
    BATCH,
    FREQUENCY,
    HALF,
    HEADS,
    KEY_DIM,
    NEW_KEY,
    NEW_POSITION,
    NEW_VALUE,
    ONE,
    OUT,
    RING_KEY,
    SHARES,
    VALUE_DIM,
    WINDOW,
    ZERO,
    Call,
    K,
    Q,
    V,
    aligned,
    blocks_of,
    clear,
    expect_parts,
    fetch,
    fill_turns,
    oldest,
    position,
    put,
    ring_row,
    row_of,
)
from spectral_window.ops.compiled.window_tiles import exponential


@inner
def dot(x, y, blocks):
    sums = spread(ZERO)
    for i in range(blocks):
        sums = fused(load(x + i * BYTES), load(y + i * BYTES), sums)
    return total(sums)


@inner
def add_scaled(out, scale, x, blocks):
    for i in range(blocks):
        store(out + i * BYTES, fused(spread(scale), load(x + i * BYTES), load(out + i * BYTES)))


@inner
def normalise(scores, count):
    """Softmax over the first `count` scores, in place; what pads them to whole vectors is lost."""
    numbers = float32s(scores, count)
    most = numbers[0]
    for i in range(count):
        most = max(most, numbers[i])
    blocks = blocks_of(count)
    float32s(scores, blocks * BYTES // 4)[count:] = -np.inf
    sums = spread(ZERO)
    for i in range(blocks):
        weight = exponential(load(scores + i * BYTES) - spread(most))
        store(scores + i * BYTES, weight)
        sums = sums + weight
    scale = ONE / total(sums)
    for i in range(blocks):
        store(scores + i * BYTES, load(scores + i * BYTES) * spread(scale))


@inner
def copy(source, target):
    for i in range(target.shape[0]):
        target[i] = source[i]


@inner
def copy_ring(job, b, slot, first, stop, live, which):
    """The new ring's slot of these heads: as it was, or zeros."""
    size = job[KEY_DIM + which]
    target = ring_row(job, NEW_KEY + which, b, slot, first, size)
    count = (stop - first) * size * (1 if job[HALF] else 2)  # of 16 bits, whatever they mean
    if live:
        source = ring_row(job, RING_KEY + which, b, slot, first, size)
        copy(bfloat16s(source, count), bfloat16s(target, count))
    else:
        bfloat16s(target, count)[:] = 0


@inner
def held_row(job, which, b, slot, h, between):
    """The address of a remembered row in float32, padded: where it lies, or a copy `between`."""
    size = job[KEY_DIM + which]
    slots = 2 * job[WINDOW]
    place = (b * slots + (slot if slot < slots else slot - slots)) * job[HEADS] + h
    row = job[RING_KEY + which] + place * size * (2 if job[HALF] else 4)
    if job[HALF] or size % LANES:
        fetch(row, job[HALF], size, 0, ONE, between)
        return between
    return row


def _words(parts, call, out, new_key, new_value, after, shares):
    batch, time, heads, _ = call.q.shape
    if time != 1 or call.begin is None or not 0 < shares <= heads:
        raise UserError("no single token with a state (compiled window): see `step`")
    expect_parts(parts, batch * shares)
    dtype, _, outs, keys, values = call.numbers
    new = address(new_key, dtype, keys), address(new_value, dtype, values)
    return *call.words(), address(out, dtype, outs), *new, address(after, INT64, batch), shares


@kernel(_words)
def attend_once(job):
    """Parts: (row, share of the heads)."""
    window, slots = job[WINDOW], 2 * job[WINDOW]
    key_blocks, value_blocks = blocks_of(job[KEY_DIM]), blocks_of(job[VALUE_DIM])
    room = np.empty(LANES * (5 * key_blocks + 4 * value_blocks + blocks_of(slots) + 1), np.float32)
    angles = np.empty(2 * key_blocks * LANES)
    query = aligned(room)
    new_key = query + key_blocks * BYTES
    turns_room = new_key + key_blocks * BYTES
    between = turns_room + key_blocks * BYTES
    new_value = between + max(key_blocks, value_blocks) * BYTES
    out = new_value + value_blocks * BYTES
    weights = out + value_blocks * BYTES
    part = take(job)
    while part >= 0:
        b, share = part // job[SHARES], part % job[SHARES]
        first = job[HEADS] * share // job[SHARES]
        stop = job[HEADS] * (share + 1) // job[SHARES]
        p = position(job, b, 0)
        token = p >= 0
        if share == 0 and token:
            int64s(job[NEW_POSITION], job[BATCH])[b] = p + 1
        for slot in range(slots):
            held = p - 1 - (p - 1 - slot) % slots
            live = not token or held >= oldest(p + 1, window)
            copy_ring(job, b, slot, first, stop, live, 0)
            copy_ring(job, b, slot, first, stop, live, 1)
        turns = 0
        if token and job[FREQUENCY]:
            turns = turns_room
            fill_turns(job, b, 0, 1, turns, angles)
        for h in range(first, stop):
            clear(out, value_blocks)
            if token:
                key_row, value_row = row_of(job, K, b, 0, h), row_of(job, V, b, 0, h)
                scale = np.float32(1 / math.sqrt(job[KEY_DIM]))
                query_row = row_of(job, Q, b, 0, h)
                fetch(query_row, job[HALF], job[KEY_DIM], turns, scale, query)
                fetch(key_row, job[HALF], job[KEY_DIM], turns, ONE, new_key)
                fetch(value_row, job[HALF], job[VALUE_DIM], 0, ONE, new_value)
                held = p - oldest(p, window)
                scores, slot = float32s(weights, held + 1), (p - held) % slots
                for i in range(held):
                    row = held_row(job, 0, b, slot + i, h, between)
                    scores[i] = dot(query, row, key_blocks)
                scores[held] = dot(query, new_key, key_blocks)
                normalise(weights, held + 1)
                for i in range(held):
                    row = held_row(job, 1, b, slot + i, h, between)
                    add_scaled(out, scores[i], row, value_blocks)
                add_scaled(out, scores[held], new_value, value_blocks)
                target = ring_row(job, NEW_KEY, b, p, h, job[KEY_DIM])
                put(new_key, job[HALF], job[KEY_DIM], 0, ONE, target)
                target = ring_row(job, NEW_VALUE, b, p, h, job[VALUE_DIM])
                put(new_value, job[HALF], job[VALUE_DIM], 0, ONE, target)
            target = job[OUT] + (b * job[HEADS] + h) * job[VALUE_DIM] * (2 if job[HALF] else 4)
            put(out, job[HALF], job[VALUE_DIM], 0, ONE, target)
        part = take(job)
    room[0] = 0  # alive until here


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
    call = Call.of(q, k, v, window, theta, ring, begin, positions, turns=False)
    out, after = q.new_empty(v.shape), dense(begin).clone()
    new_key, new_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ring)
    shares = min(heads, -(-torch.get_num_threads() // batch))
    attend_once(batch * shares, call, out, new_key, new_value, after, shares)
    return out, new_key, new_value, after
