"""Sixteen neighbouring queries, a *tile*, and what is done with the keys that they see.

A query sees an unbroken run of columns, from the beginning of the chunk before its own up to itself
(`reference.visible`). A tile has one query a lane of a vector: with S^T = K Q^T scores stand key by
key, so the maximum, the exponentials and their sum need no step across lanes, and the mask is a
comparison at the two ragged ends alone. Keys that no query of the tile sees are never touched.

A masked weight is exactly 0, but 0 NaN is NaN: where anything in the scratch is not finite, the
products go query by query, over what each one sees.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    fused,
    inverse,
    larger,
    load,
    power_of_two,
    product,
    rounded,
    spread,
    store,
    total,
    transpose,
    where_between,
)
from spectral_window.ops.compiled.threads import float32s, inner
from spectral_window.ops.compiled.window_rows import (
    HALF,
    K_TIME,
    KEY_DIM,
    ONE,
    Q_TIME,
    RING_KEY,
    RING_VALUE,
    TIME,
    V_TIME,
    VALUE_DIM,
    WINDOW,
    ZERO,
    K,
    Q,
    V,
    ask,
    blocks_of,
    clear,
    fetch,
    oldest,
    position,
    ring_row,
    row_of,
    turns_at,
)

SEGMENT = 256  # queries whose keys and values are in the scratch at a time
AHEAD = 8  # rows of keys that are asked for early

scores_of = product(8, 1, fresh=True)
tile_4_4, tile_4_1, tile_1_1 = product(4, 4), product(4, 1), product(1, 1)

_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)  # few bits: n times it is exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
_INFINITY, _SMALLEST = np.float32(np.inf), np.float32(-87)


@inner
def exponential(x):
    """e^x for x <= 0, within 2 units of the last place; 0 below e^-87.

    e^x = 2^n e^r with |r| <= log(2) / 2, where Taylor's series to r^7 is exact to float32.
    """
    n = rounded(x * spread(_LOG2_E))
    r = fused(n, spread(-_LN2_LOW), fused(n, spread(-_LN2_HIGH), x))
    y = spread(_TAYLOR[7])
    y = fused(y, r, spread(_TAYLOR[6]))
    y = fused(y, r, spread(_TAYLOR[5]))
    y = fused(y, r, spread(_TAYLOR[4]))
    y = fused(y, r, spread(_TAYLOR[3]))
    y = fused(y, r, spread(_TAYLOR[2]))
    y = fused(y, r, spread(ONE))
    y = fused(y, r, spread(ONE))
    y = y * power_of_two(n)
    # a NaN is between no two numbers, and stays
    return where_between(spread(-_INFINITY), x, spread(_SMALLEST), spread(ZERO), y)


# ---------------------------------------------------------------- a segment


@inner
def first_seen(job, b, begin, end):
    """The first column that the queries of columns begin ... end - 1 see; `end` if none is one."""
    for c in range(begin, end):
        p = position(job, b, c)
        if p >= 0:
            return c - p + oldest(p, job[WINDOW])
    return end


@inner
def most_keys(job):
    """At most so many keys does a segment see; with room for products to run over the end."""
    before = job[TIME] + (2 * job[WINDOW] if job[RING_KEY] else 0)
    return min(job[TIME], SEGMENT) + min(2 * job[WINDOW], before) + 8


@inner
def fetch_keys(job, b, h, begin, end, keys, values):
    """Keys and values of columns begin ... end - 1; says whether all are finite."""
    key_row, value_row = blocks_of(job[KEY_DIM]) * BYTES, blocks_of(job[VALUE_DIM]) * BYTES
    doubt = spread(ZERO)
    for c in range(begin, end):
        at = c - begin
        if c >= 0 and position(job, b, c) < 0:  # padding: no query sees it
            clear(keys + at * key_row, blocks_of(job[KEY_DIM]))
            clear(values + at * value_row, blocks_of(job[VALUE_DIM]))
            continue
        if c < 0:
            p = position(job, b, c)
            k = ring_row(job, RING_KEY, b, p, h, job[KEY_DIM])
            v = ring_row(job, RING_VALUE, b, p, h, job[VALUE_DIM])
            turns = 0
        else:
            k, v = row_of(job, K, b, c, h), row_of(job, V, b, c, h)
            turns = turns_at(job, b, c)
            ask(k + AHEAD * job[K_TIME], job[HALF], job[KEY_DIM])
            ask(v + AHEAD * job[V_TIME], job[HALF], job[VALUE_DIM])
        doubt = doubt + fetch(k, job[HALF], job[KEY_DIM], turns, ONE, keys + at * key_row)
        doubt = doubt + fetch(v, job[HALF], job[VALUE_DIM], 0, ONE, values + at * value_row)
    return total(doubt) == ZERO


# ---------------------------------------------------------------- a tile and what it sees


class Tile(NamedTuple):
    """Sixteen queries and the keys they see, counted from the first key in the scratch.

    low ... high are the keys that all of them see, first ... last those that any sees; lows and
    highs are the addresses of what each sees (16 float32 numbers each); a lane without a query is
    given all. clean: everything that enters the products is finite.
    """

    first: int
    low: int
    high: int
    last: int
    lows: int
    highs: int
    clean: bool


@inner
def fetch_queries(job, b, h, c, count, begin, clean, lows, rows, columns):
    """The tile of columns c ... c + count - 1, its keys counted from column `begin`.

    The queries, scaled, become rows [16, K] and columns [K, 16], zeros in a lane without one.
    """
    window, blocks = job[WINDOW], blocks_of(job[KEY_DIM])
    scale = np.float32(1 / math.sqrt(job[KEY_DIM]))
    highs = lows + BYTES
    low, high = float32s(lows, LANES), float32s(highs, LANES)
    first, all_low, all_high, last = 1 << 40, -1, 1 << 40, -1
    before, chunk = -2, 0
    doubt = spread(ZERO)
    for lane in range(LANES):
        high[lane] = -ONE
        target = rows + lane * blocks * BYTES
        p = position(job, b, c + lane) if lane < count else -1
        if p < 0:
            clear(target, blocks)
            continue
        if p != before + 1 or p - chunk >= window:
            chunk = p // window * window
        before = p
        itself = c + lane - begin
        oldest_seen = itself - p + max(chunk - window, 0)
        low[lane], high[lane] = oldest_seen, itself
        first, all_low = min(first, oldest_seen), max(all_low, oldest_seen)
        all_high, last = min(all_high, itself), max(last, itself)
        source, turns = row_of(job, Q, b, c + lane, h), turns_at(job, b, c + lane)
        ask(source + LANES * job[Q_TIME], job[HALF], job[KEY_DIM])
        doubt = doubt + fetch(source, job[HALF], job[KEY_DIM], turns, scale, target)
    for lane in range(LANES):
        if high[lane] < 0:
            low[lane], high[lane] = first, last
    flip(rows, columns, blocks)
    clean = clean and total(doubt) == ZERO
    return Tile(first, all_low, all_high, last, lows, highs, clean)


@inner
def flip(rows, columns, blocks):
    """Rows [16, blocks vectors] to columns [16 blocks, 16]."""
    for i in range(blocks):
        transpose(rows + i * BYTES, blocks * BYTES, columns + i * LANES * BYTES)


@inner
def mask(scores, tile, hidden):
    """Write `hidden` over what a query does not see: only the ragged ends can hold any."""
    lows, highs = load(tile.lows), load(tile.highs)
    for j in range(tile.first, min(tile.low, tile.last + 1)):
        at = scores + j * BYTES
        store(at, where_between(lows, spread(np.float32(j)), highs, load(at), spread(hidden)))
    for j in range(max(tile.high + 1, tile.first), tile.last + 1):
        at = scores + j * BYTES
        store(at, where_between(lows, spread(np.float32(j)), highs, load(at), spread(hidden)))


@inner
def score(keys, columns, size, tile, scores):
    """scores [keys, 16] = keys [keys, size] columns [size, 16], over the keys of the tile."""
    row = blocks_of(size) * BYTES
    for j in range(tile.first, tile.last + 1, 8):
        ask(keys + (j + 8) * row, 0, 8 * row // 4)  # eight rows at once are hard to foresee
        scores_of(scores + j * BYTES, BYTES, keys + j * row, row, 4, columns, BYTES, size)


@inner
def softmax(scores, tile):
    """Scores become exp(score - max), 0 where masked. Returns the vector of 1 / their sums."""
    mask(scores, tile, -_INFINITY)
    most = spread(-_INFINITY)
    for j in range(tile.first, tile.last + 1):
        most = larger(load(scores + j * BYTES), most)
    sums = spread(ZERO)
    for j in range(tile.first, tile.last + 1):
        weight = exponential(load(scores + j * BYTES) - most)
        store(scores + j * BYTES, weight)
        sums = sums + weight
    return inverse(sums)


# ---------------------------------------------------------------- products


@inner
def multiply(c, c_row, a, a_row, a_step, b, b_step, rows, blocks, count):
    """c [rows, blocks vectors] += a b over `count`; rows are a multiple of 4. See `product`."""
    for begin in range(0, count, 64):  # so that this much of b stays in the nearest cache
        steps = min(64, count - begin)
        for i in range(0, rows, 4):
            left, right = a + begin * a_step + i * a_row, b + begin * b_step
            at = c + i * c_row
            j = 0
            while j + 4 <= blocks:
                tile_4_4(at, c_row, left, a_row, a_step, right, b_step, steps)
                at, right, j = at + 4 * BYTES, right + 4 * BYTES, j + 4
            while j < blocks:
                tile_4_1(at, c_row, left, a_row, a_step, right, b_step, steps)
                at, right, j = at + BYTES, right + BYTES, j + 1


@inner
def multiply_singly(c, c_row, a, a_row, a_step, b, b_step, rows, blocks, count):
    """The same for any number of rows."""
    for i in range(rows):
        for j in range(blocks):
            at = c + i * c_row + j * BYTES
            tile_1_1(at, 0, a + i * a_row, 0, a_step, b + j * BYTES, b_step, count)


@inner
def seen_by(tile, lane):
    """(first key, number of keys) that the query in `lane` sees."""
    low = int(float32s(tile.lows, LANES)[lane])
    return low, int(float32s(tile.highs, LANES)[lane]) - low + 1


@inner
def gather(out, weights, rows, blocks, tile):
    """out [16, *] += weights [keys, 16]^T rows [keys, *]."""
    size = blocks * BYTES
    if tile.clean:
        a, b, count = (
            weights + tile.first * BYTES,
            rows + tile.first * size,
            tile.last - tile.first + 1,
        )
        multiply(out, size, a, 4, BYTES, b, size, LANES, blocks, count)
        return
    for lane in range(LANES):
        low, count = seen_by(tile, lane)
        a, b = weights + low * BYTES + 4 * lane, rows + low * size
        multiply_singly(out + lane * size, 0, a, 0, BYTES, b, size, 1, blocks, count)


@inner
def scatter(out, weights, rows, blocks, tile):
    """out [keys, *] += weights [keys, 16] rows [16, *]; weights has 3 rows of room at its end."""
    size = blocks * BYTES
    if tile.clean:
        clear(weights + (tile.last + 1) * BYTES, 3)
        a, c, count = (
            weights + tile.first * BYTES,
            out + tile.first * size,
            tile.last - tile.first + 1,
        )
        multiply(c, size, a, BYTES, 4, rows, size, (count + 3) // 4 * 4, blocks, LANES)
        return
    for lane in range(LANES):
        low, count = seen_by(tile, lane)
        a, b = weights + low * BYTES + 4 * lane, rows + lane * size
        multiply_singly(out + low * size, size, a, BYTES, 0, b, 0, count, blocks, 1)
