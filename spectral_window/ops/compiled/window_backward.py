"""The backward pass of window attention in compiled code (numba).

The weights are found again tile by tile: that costs less than to keep them. Then, with G the
gradient of the output,

    dP^T = V G^T,   dS^T = P^T (dP^T - sum over the keys of P^T dP^T),
    dQ = (dS^T)^T K,   dK += dS^T Q,   dV += P^T G

A part is all of a head in one row: it goes through its segments in order, and the gradients of keys
that the next segment sees as well stay in the scratch until they are complete. They begin with what
the gradient of the new ring says of the keys it holds, and those of keys before the first column go
to the old ring.
"""

from __future__ import annotations

import math

import numpy as np

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import address, optional
from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    fused,
    load,
    spread,
    store,
    total,
)
from spectral_window.ops.compiled.threads import inner, kernel, take
from spectral_window.ops.compiled.window_rows import (
    D_RING_KEY,
    DK,
    DQ,
    HALF,
    HEADS,
    KEY_DIM,
    NEW_KEY,
    ONE,
    OUT,
    RING_KEY,
    TIME,
    VALUE_DIM,
    WINDOW,
    ZERO,
    aligned,
    blocks_of,
    clear,
    copy_row,
    expect_parts,
    fetch,
    last_token,
    oldest,
    out_row,
    position,
    put,
    ring_row,
    turns_at,
)
from spectral_window.ops.compiled.window_tiles import (
    SEGMENT,
    fetch_keys,
    fetch_queries,
    first_seen,
    flip,
    gather,
    mask,
    most_keys,
    scatter,
    score,
    softmax,
)


@inner
def open_gradients(job, b, h, begin, end, last, d_keys, d_values):
    """Where gradients of the keys of columns begin ... end - 1 add up: from what the new ring's
    gradient says of those that it holds (d_keys, d_values: the place of column `begin`)."""
    after = position(job, b, last) + 1 if last >= 0 else 0
    oldest_held = last + 1 - (after - oldest(after, job[WINDOW]))
    for c in range(begin, end):
        for which in range(2):
            size = job[KEY_DIM + which]
            step = blocks_of(size) * BYTES
            target = (d_values if which else d_keys) + (c - begin) * step
            if job[NEW_KEY] and oldest_held <= c <= last:
                source = ring_row(job, NEW_KEY + which, b, position(job, b, c), h, size)
                fetch(source, job[HALF], size, 0, ONE, target)
            else:
                clear(target, blocks_of(size))


@inner
def close_gradients(job, b, h, begin, end, d_keys, d_values):
    """Write the finished gradients of the keys of columns begin ... end - 1."""
    for c in range(begin, end):
        for which in range(2):
            size = job[KEY_DIM + which]
            source = (d_values if which else d_keys) + (c - begin) * blocks_of(size) * BYTES
            if c >= 0:
                target = out_row(job, DK + which, b, c, h, size)
                turns = 0 if which else turns_at(job, b, c)
            else:
                target = ring_row(job, D_RING_KEY + which, b, position(job, b, c), h, size)
                turns = 0
            put(source, job[HALF], size, turns, ONE, target)


@inner
def move(source, target, vectors):
    """Towards lower addresses: the two may overlap."""
    for i in range(vectors):
        store(target + i * BYTES, load(source + i * BYTES))


@inner
def fetch_given(job, b, h, c, count, rows):
    """The output's gradients of a tile as rows [16, V]; says whether all are finite."""
    doubt = spread(ZERO)
    for lane in range(LANES):
        target = rows + lane * blocks_of(job[VALUE_DIM]) * BYTES
        if lane < count and position(job, b, c + lane) >= 0:
            source = out_row(job, OUT, b, c + lane, h, job[VALUE_DIM])
            doubt = doubt + fetch(source, job[HALF], job[VALUE_DIM], 0, ONE, target)
        else:
            clear(target, blocks_of(job[VALUE_DIM]))
    return total(doubt) == ZERO


@inner
def through_softmax(weights, d_weights, scale, tile):
    """Scale the weights to sum 1, and turn their gradients into those of the scores."""
    mean = spread(ZERO)
    for j in range(tile.first, tile.last + 1):
        weight = load(weights + j * BYTES) * scale
        store(weights + j * BYTES, weight)
        mean = fused(weight, load(d_weights + j * BYTES), mean)
    for j in range(tile.first, tile.last + 1):
        at = d_weights + j * BYTES
        store(at, load(weights + j * BYTES) * (load(at) - mean))
    mask(weights, tile, ZERO)
    mask(d_weights, tile, ZERO)


def _words(parts, call, grad, grad_key, grad_value, dq, dk, dv, d_key, d_value):
    expect_parts(parts, call.q.shape[0] * call.q.shape[2])
    if (grad_key is None) != (grad_value is None):
        raise UserError("the gradient of one half of a ring (compiled window): pass both")
    dtype, q, v, keys, values = call.numbers
    given = address(grad, dtype, v), optional(grad_key, dtype, keys)
    keys, values = (keys, values) if call.key is not None else (0, 0)
    return (
        *call.words(),
        *given,
        optional(grad_value, dtype, call.numbers[4]),
        0,
        address(dq, dtype, q),
        address(dk, dtype, q),
        address(dv, dtype, v),
        address(d_key, dtype, keys),
        address(d_value, dtype, values),
    )


@kernel(_words)
def attend_backward(job):
    """Parts: (row, head)."""
    key_blocks, value_blocks = blocks_of(job[KEY_DIM]), blocks_of(job[VALUE_DIM])
    key_row, value_row = key_blocks * BYTES, value_blocks * BYTES
    most, tile_vectors = most_keys(job), LANES * (3 * key_blocks + 2 * value_blocks) + 4
    room = np.empty(LANES * (tile_vectors + 2 * most * (key_blocks + value_blocks + 1)), np.float32)
    lows = aligned(room)
    queries = lows + 2 * BYTES
    columns = queries + LANES * key_row
    d_queries = columns + LANES * key_row
    given = d_queries + LANES * key_row
    given_columns = given + LANES * value_row
    keys = given_columns + LANES * value_row
    d_keys = keys + most * key_row
    values = d_keys + most * key_row
    d_values = values + most * value_row
    weights = d_values + most * value_row
    d_scores = weights + most * BYTES
    scale = np.float32(1 / math.sqrt(job[KEY_DIM]))
    part = take(job)
    while part >= 0:
        b, h = part // job[HEADS], part % job[HEADS]
        last = last_token(job, b)
        begin = first_seen(job, b, 0, min(SEGMENT, job[TIME]))
        stop = begin  # gradients of the keys begin ... stop - 1 are adding up
        for start in range(0, job[TIME], SEGMENT):
            end = min(start + SEGMENT, job[TIME])
            first = first_seen(job, b, start, end)
            close_gradients(job, b, h, begin, min(first, stop), d_keys, d_values)
            ahead = first - begin
            move(d_keys + ahead * key_row, d_keys, max(stop - first, 0) * key_blocks)
            move(d_values + ahead * value_row, d_values, max(stop - first, 0) * value_blocks)
            begin, stop = first, max(stop, first)
            at = stop - begin
            open_gradients(
                job, b, h, stop, end, last, d_keys + at * key_row, d_values + at * value_row
            )
            stop = end
            clean = fetch_keys(job, b, h, begin, stop, keys, values)
            for c in range(start, end, LANES):
                count = min(LANES, end - c)
                sound = fetch_given(job, b, h, c, count, given) and clean
                tile = fetch_queries(job, b, h, c, count, begin, sound, lows, queries, columns)
                if tile.last < 0:
                    continue
                flip(given, given_columns, value_blocks)
                score(keys, columns, job[KEY_DIM], tile, weights)
                sums = softmax(weights, tile)
                score(values, given_columns, job[VALUE_DIM], tile, d_scores)
                mask(d_scores, tile, ZERO)
                through_softmax(weights, d_scores, sums, tile)
                clear(d_queries, LANES * key_blocks)
                gather(d_queries, d_scores, keys, key_blocks, tile)
                scatter(d_keys, d_scores, queries, key_blocks, tile)
                scatter(d_values, weights, given, value_blocks, tile)
                for lane in range(count):
                    if position(job, b, c + lane) >= 0:
                        target = out_row(job, DQ, b, c + lane, h, job[KEY_DIM])
                        row, turns = d_queries + lane * key_row, turns_at(job, b, c + lane)
                        put(row, job[HALF], job[KEY_DIM], turns, scale, target)
        close_gradients(job, b, h, begin, stop, d_keys, d_values)
        if last < 0 and job[NEW_KEY] and job[RING_KEY]:
            for slot in range(2 * job[WINDOW]):  # a row of padding keeps its ring
                for which in range(2):
                    size = job[KEY_DIM + which]
                    source = ring_row(job, NEW_KEY + which, b, slot, h, size)
                    target = ring_row(job, D_RING_KEY + which, b, slot, h, size)
                    copy_row(job, source, size, 0, target, lows)
        part = take(job)
    room[0] = 0
