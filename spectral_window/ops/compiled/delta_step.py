"""One token a row of the delta-rule memory in compiled code (numba).

A step reads the state once and writes the new one beside it: the state that was given stays as it
was. A part is a block of columns of one row and head, small enough that it is still in cache when
it is read for the second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.delta_products import add_products, add_row, scale_row
from spectral_window.ops.compiled.float32_lanes import BYTES, LANES, fused, load, spread, store
from spectral_window.ops.compiled.threads import float32s, inner, int64s, kernel, take
from spectral_window.ops.compiled.window_rows import (
    ONE,
    ZERO,
    aligned,
    blocks_of,
    clear,
    expect_parts,
    fetch,
    put,
)
from spectral_window.ops.compiled.window_tiles import exponential

_WIDTH = 4  # vectors of a block of columns
_TERMS = 64  # rows that stay in the nearest cache; of a sum, see `delta_products`

# the words of a job
Q, K, V, BETA, DECAY, POSITIONS = range(2, 8)  # addresses; DECAY, POSITIONS: 0 for none
HEADS, KEY_DIM, VALUE_DIM, HALF = range(8, 12)
OUT, STATE, NEW_STATE = range(12, 15)


def _words(parts, q, k, v, beta, decay, positions, out, state, new_state):
    batch, _, heads, key_dim = q.shape
    value_dim, dtype = v.shape[3], q.dtype
    if dtype is not FLOAT32 and dtype is not BFLOAT16:
        raise UserTypeError(f"{dtype} (compiled delta): expected float32 or bfloat16")
    if q.shape[1] != 1:
        raise UserError(f"{q.shape[1]} tokens (compiled delta): expected one, see `step`")
    expect_parts(parts, batch * heads * -(-value_dim // (LANES * _WIDTH)))
    count = batch * heads
    return (
        address(q, dtype, count * key_dim),
        address(k, dtype, count * key_dim),
        address(v, dtype, count * value_dim),
        address(beta, FLOAT32, count),
        optional(decay, FLOAT32, count),
        optional(positions, INT64, batch),
        *(heads, key_dim, value_dim, dtype is BFLOAT16),
        address(out, dtype, count * value_dim),
        address(state, FLOAT32, count * key_dim * value_dim),
        address(new_state, FLOAT32, count * key_dim * value_dim),
    )


@inner
def add_in_blocks(sums, numbers, rows, step, blocks, count):
    """sums += numbers [count] rows [count, 16 blocks], in sums of 64 terms."""
    for i in range(0, count, _TERMS):
        terms = min(_TERMS, count - i)
        add_products(sums, numbers + 4 * i, 4, rows + i * step, step, blocks, terms)


@kernel(_words)
def step_once(job):
    """Parts: (row, head, block of columns)."""
    key_dim, value_dim, wide = job[KEY_DIM], job[VALUE_DIM], LANES * _WIDTH
    number, cuts = (2 if job[HALF] else 4), (value_dim + wide - 1) // wide
    key_blocks = blocks_of(key_dim)
    room = np.empty(LANES * (2 * key_blocks + 3 * _WIDTH + 2 + key_dim * _WIDTH), np.float32)
    keys = aligned(room)
    queries = keys + key_blocks * BYTES
    values = queries + key_blocks * BYTES
    held = values + _WIDTH * BYTES
    found = held + _WIDTH * BYTES
    shrunk = found + _WIDTH * BYTES
    scratch = shrunk + BYTES
    part = take(job)
    while part >= 0:
        head, begin = part // cuts, part % cuts * wide
        size = min(wide, value_dim - begin)
        blocks = blocks_of(size)
        p = (
            int64s(job[POSITIONS], head // job[HEADS] + 1)[head // job[HEADS]]
            if job[POSITIONS]
            else 1
        )
        before, step = job[STATE] + 4 * (head * key_dim * value_dim + begin), 4 * value_dim
        after, after_step = before - job[STATE] + job[NEW_STATE], step
        target, out = after, job[OUT] + number * (head * value_dim + begin)
        clear(found, blocks)
        if p < 0:  # padding: nothing is written
            for i in range(key_dim):
                float32s(target + i * step, size)[:] = float32s(before + i * step, size)
            put(found, job[HALF], size, 0, ONE, out)
            part = take(job)
            continue
        if size % LANES:  # whole vectors would reach over the end of a row
            for i in range(key_dim):
                fetch(before + i * step, 0, size, 0, ONE, scratch + i * blocks * BYTES)
            before, step = scratch, blocks * BYTES
            after, after_step = before, step
        fetch(job[K] + number * head * key_dim, job[HALF], key_dim, 0, ONE, keys)
        fetch(job[Q] + number * head * key_dim, job[HALF], key_dim, 0, ONE, queries)
        fetch(job[V] + number * (head * value_dim + begin), job[HALF], size, 0, ONE, values)
        scale = spread(ZERO if p == 0 else ONE)
        if job[DECAY] and p != 0:
            scale = exponential(spread(-float32s(job[DECAY] + 4 * head, 1)[0]))
        store(shrunk, scale)
        if p != 0:
            clear(held, blocks)
            add_in_blocks(held, keys, before, step, blocks, key_dim)
            add_row(values, -float32s(shrunk, 1)[0], held, blocks)
        scale_row(values, values, float32s(job[BETA] + 4 * head, 1)[0], blocks)
        key = float32s(keys, key_dim)
        for first in range(0, key_dim, _TERMS):
            count = min(_TERMS, key_dim - first)
            for i in range(first, first + count):
                for j in range(blocks):
                    x = spread(key[i]) * load(values + j * BYTES)
                    if p != 0:
                        x = fused(scale, load(before + i * step + j * BYTES), x)
                    store(after + i * after_step + j * BYTES, x)
            row = after + first * after_step
            add_products(found, queries + 4 * first, 4, row, after_step, blocks, count)
        if size % LANES:
            for i in range(key_dim):
                row = float32s(after + i * after_step, size)
                float32s(target + 4 * i * value_dim, size)[:] = row
        put(found, job[HALF], size, 0, ONE, out)
        part = take(job)
    room[0] = ZERO  # alive until here


def step(
    inputs: Sequence[Tensor], state: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta.memory` for T = 1, without gradients. positions [B, 1] int64: 0 for a row that begins
    afresh, -1 for one that has no token and keeps its state."""
    q, k, v = (dense(x) for x in inputs[:3])
    beta, *decay = (dense(x.float()) for x in inputs[3:])
    state = dense(state)
    out, after = v.new_empty(v.shape), state.new_empty(state.shape)
    at = None if positions is None else dense(positions)
    step_into(q, k, v, beta, decay[0] if decay else None, at, out, state, after)
    return out, after


def step_into(q, k, v, beta, decay, positions, out, state, after) -> None:
    """`step` on tensors that are dense already, into given memory."""
    parts = q.shape[0] * q.shape[2] * -(-v.shape[3] // (LANES * _WIDTH))
    step_once(parts, q, k, v, beta, decay, positions, out, state, after)
