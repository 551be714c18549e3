"""One token a row of the delta-rule memory in compiled code (numba).

A step reads the state once and writes the new one beside it: the state that was given stays as it
was. A tile is a block of columns of one row and head, small enough that it is still in cache when
it is read for the second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    Address,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.delta_loops import TERMS, add_products
from spectral_window.ops.compiled.simd import (
    BYTES,
    LANES,
    ONE,
    ZERO,
    add_row,
    aligned,
    clear,
    exponential,
    float32s,
    fused,
    inner,
    int64s,
    load,
    load_row,
    scale_row,
    spread,
    store,
    store_row,
    vectors_of,
)
from spectral_window.ops.compiled.threads import claim_tile, expect_tiles, kernel

_WIDTH = 4  # vectors of a block of columns


class Step(NamedTuple):
    q: Address  # [B, H, K]
    k: Address
    v: Address  # [B, H, V]
    beta: Address  # float32 [B, H]
    decay: Address  # the same, or none
    positions: Address  # int64 [B], or none
    heads: int
    key_dim: int
    value_dim: int
    bfloat16: bool
    out: Address
    state: Address  # float32 [B, H, K, V]
    new_state: Address


def _once(tiles, q, k, v, beta, decay, positions, out, state, new_state):
    batch, _, heads, key_dim = q.shape
    value_dim, dtype = v.shape[3], q.dtype
    if dtype is not FLOAT32 and dtype is not BFLOAT16:
        raise UserTypeError(f"{dtype} (compiled delta): expected float32 or bfloat16")
    if q.shape[1] != 1:
        raise UserError(f"{q.shape[1]} tokens (compiled delta): expected one, see `step`")
    expect_tiles(tiles, batch * heads * -(-value_dim // (LANES * _WIDTH)))
    count = batch * heads
    return Step(
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
def add_in_blocks(sums, numbers, rows, step, vectors, count):
    """sums += numbers [count] rows [count, 16 vectors], in sums of 64 terms."""
    for i in range(0, count, TERMS):
        terms = min(TERMS, count - i)
        add_products(sums, numbers + 4 * i, 4, rows + i * step, step, vectors, terms)


@kernel(Step, _once)
def step_once(args):
    """Tiles: (row, head, block of columns)."""
    key_dim, value_dim, wide = args.key_dim, args.value_dim, LANES * _WIDTH
    number, cuts = (2 if args.bfloat16 else 4), (value_dim + wide - 1) // wide
    key_vectors = vectors_of(key_dim)
    buffer = np.empty(LANES * (2 * key_vectors + 3 * _WIDTH + 2 + key_dim * _WIDTH), np.float32)
    keys = aligned(buffer)
    queries = keys + key_vectors * BYTES
    values = queries + key_vectors * BYTES
    recall = values + _WIDTH * BYTES
    read = recall + _WIDTH * BYTES
    factor = read + _WIDTH * BYTES
    scratch = factor + BYTES
    tile = claim_tile(args)
    while tile >= 0:
        head, begin = tile // cuts, tile % cuts * wide
        size = min(wide, value_dim - begin)
        vectors = vectors_of(size)
        p = (
            int64s(args.positions, head // args.heads + 1)[head // args.heads]
            if args.positions
            else 1
        )
        before, step = args.state + 4 * (head * key_dim * value_dim + begin), 4 * value_dim
        after, after_step = before - args.state + args.new_state, step
        target, out = after, args.out + number * (head * value_dim + begin)
        clear(read, vectors)
        if p < 0:  # padding: nothing is written
            for i in range(key_dim):
                float32s(target + i * step, size)[:] = float32s(before + i * step, size)
            store_row(read, args.bfloat16, size, 0, ONE, out)
            tile = claim_tile(args)
            continue
        if size % LANES:  # whole vectors would reach over the end of a row
            for i in range(key_dim):
                load_row(before + i * step, False, size, 0, ONE, scratch + i * vectors * BYTES)
            before, step = scratch, vectors * BYTES
            after, after_step = before, step
        load_row(args.k + number * head * key_dim, args.bfloat16, key_dim, 0, ONE, keys)
        load_row(args.q + number * head * key_dim, args.bfloat16, key_dim, 0, ONE, queries)
        load_row(args.v + number * (head * value_dim + begin), args.bfloat16, size, 0, ONE, values)
        scale = spread(ZERO if p == 0 else ONE)
        if args.decay and p != 0:
            scale = exponential(spread(-float32s(args.decay + 4 * head, 1)[0]))
        store(factor, scale)
        if p != 0:
            clear(recall, vectors)
            add_in_blocks(recall, keys, before, step, vectors, key_dim)
            add_row(values, -float32s(factor, 1)[0], recall, vectors)
        scale_row(values, values, float32s(args.beta + 4 * head, 1)[0], vectors)
        key = float32s(keys, key_dim)
        for first in range(0, key_dim, TERMS):
            count = min(TERMS, key_dim - first)
            for i in range(first, first + count):
                for j in range(vectors):
                    x = spread(key[i]) * load(values + j * BYTES)
                    if p != 0:
                        x = fused(scale, load(before + i * step + j * BYTES), x)
                    store(after + i * after_step + j * BYTES, x)
            row = after + first * after_step
            add_products(read, queries + 4 * first, 4, row, after_step, vectors, count)
        if size % LANES:
            for i in range(key_dim):
                row = float32s(after + i * after_step, size)
                float32s(target + 4 * i * value_dim, size)[:] = row
        store_row(read, args.bfloat16, size, 0, ONE, out)
        tile = claim_tile(args)
    buffer[0] = ZERO  # alive until here


def step(
    inputs: Sequence[Tensor], state: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta.memory` for T = 1, without gradients.

    positions [B, 1] int64: 0 for a row that starts a document, -1 for one without a token, whose
    state stays.
    """
    q, k, v = (dense(x) for x in inputs[:3])
    beta, *decay = (dense(x.float()) for x in inputs[3:])
    state = dense(state)
    out, after = v.new_empty(v.shape), state.new_empty(state.shape)
    at = None if positions is None else dense(positions)
    step_into(q, k, v, beta, decay[0] if decay else None, at, out, state, after)
    return out, after


def step_into(q, k, v, beta, decay, positions, out, state, after) -> None:
    """`step` on tensors that are dense already, into given memory."""
    tiles = q.shape[0] * q.shape[2] * -(-v.shape[3] // (LANES * _WIDTH))
    step_once(tiles, q, k, v, beta, decay, positions, out, state, after)
