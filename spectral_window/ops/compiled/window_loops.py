"""The kernels of window attention over many tokens, for float32 and bfloat16 (see `window`).

A tile of work is a segment of the queries of one head. It brings its keys and values into a scratch
of its own, where they stay in cache, and goes through its queries in blocks of sixteen:

    P^T = exp(K Q^T - max),   O = (P^T)^T V / sum

The weights P never leave the scratch. Keys before the first column come from the ring of the state.
All sums run in the order of keys and dimensions, so a query's result has the same bits in any batch
or prefix.

In the scratch everything is float32, padded with zeros to whole vectors, and q and k are rotated to
their positions. The pairs (cos, sin) of a position are found once for all heads: from cos and sin
in float64 at the multiple of 64 below it, by at most 63 rotations of one step (an error of 1e-14),
then rounded. So they depend on the position alone, never on where a call starts.

A query sees an unbroken run of columns, from the start of the chunk before its own up to itself
(`reference.visible`). A block has one query per lane of a vector: with S^T = K Q^T scores stand key
by key, so the maximum, the exponentials and their sum need no step across lanes, and the mask is a
comparison at the two ragged ends alone. Keys that no query of the block sees are never touched.

A masked weight is exactly 0, but 0 NaN is NaN: where anything in the scratch is not finite, the
products go query by query, over what each one sees.

The backward pass finds the weights again, block by block: that costs less than to save them. Then,
with dO the gradient of the output,

    dP^T = V dO^T,   dS^T = P^T (dP^T - sum over the keys of P^T dP^T),
    dQ = (dS^T)^T K,   dK += dS^T Q,   dV += P^T dO

Its tile is all of a head in one row: it goes through the segments in order, and the gradients of
keys that the next segment sees as well stay in the scratch until they are complete. They start with
what the gradient of the new ring says of the keys it holds, and those of keys before the first
column go to the old ring.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    NOWHERE,
    Address,
    address,
    dense,
    optional,
    settled,
    strided,
)
from spectral_window.ops.compiled.simd import (
    AVX512,
    BYTES,
    LANES,
    ONE,
    ZERO,
    aligned,
    clear,
    copy_vectors,
    exponential,
    float32s,
    float64s,
    fused,
    inner,
    int64s,
    inverse,
    larger,
    load,
    load_row,
    padded,
    prefetch_row,
    product,
    spread,
    store,
    store_row,
    total,
    transpose,
    vectors_of,
    where_between,
)
from spectral_window.ops.compiled.threads import claim_tile, expect_tiles, kernel

ANCHOR = 64  # an angle is exact at multiples of 64, and follows from there in float64
SEGMENT = 256  # queries whose keys and values are in the scratch at a time
AHEAD = 8  # rows of keys that are prefetched
_INFINITY = np.float32(np.inf)

# Sums of a tile stay in registers: 16 of 32, or, where a vector takes two, 12 and 8 of 16.
_KEYS, _COLUMNS = (16, 4) if AVX512 else (6, 1)
scores_of = product(_KEYS, 1, fresh=True)
tile_wide, tile_4_1, tile_1_1 = product(4, _COLUMNS), product(4, 1), product(1, 1)


class Window(NamedTuple):
    """Strides are in bytes. A tensor [B, 2W, H, *] is a ring: position p lies in slot p mod 2W."""

    q: Address  # [B, T, H, K]
    q_row: int
    q_time: int
    q_head: int
    k: Address
    k_row: int
    k_time: int
    k_head: int
    v: Address  # [B, T, H, V]
    v_row: int
    v_time: int
    v_head: int
    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int
    window: int
    bfloat16: bool
    positions: Address  # int64 [B, T]; or none, then
    begin: Address  # int64 [B], where each row starts; or none, for 0
    frequency: Address  # of RoPE, or none: see `_frequencies`
    rotations: Address  # float32 (cos, sin) [rows, T, K / 2]
    ring_key: Address  # of the state before, or none
    ring_value: Address
    out: Address = NOWHERE  # backward: the gradients of these four, or none
    new_key: Address = NOWHERE
    new_value: Address = NOWHERE
    new_position: Address = NOWHERE
    # backward: what is written
    d_q: Address = NOWHERE
    d_k: Address = NOWHERE
    d_v: Address = NOWHERE
    d_ring_key: Address = NOWHERE
    d_ring_value: Address = NOWHERE
    # a step: into how many tiles the heads of a row are divided
    shares: int = 0


class Call(NamedTuple):
    """What all kernels of the window are given.

    q, k [B, T, H, K], v [B, T, H, V]; frequency and rotations: of RoPE, or None; key, value
    [B, 2W, H, *]: the ring of the state, or None; begin [B] int64: where a row goes on, only with a
    ring; positions [B, T] int64, which count on (see `Documents.check`), or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window: int
    frequency: Tensor | None
    rotations: Tensor | None
    key: Tensor | None
    value: Tensor | None
    begin: Tensor | None
    positions: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int,
        theta: float | None,
        ring: tuple[Tensor | None, Tensor | None],
        begin: Tensor | None,
        positions: Tensor | None,
        *,
        rotations: bool = True,
    ) -> Call:
        """From an operator's arguments. `rotations`: with memory for those of all columns."""
        q, k, v = (settled(x if x.stride(3) == 1 else x.contiguous()) for x in (q, k, v))
        frequency = None if theta is None else _frequencies(q.shape[3], theta)
        place = None
        if rotations and theta is not None:
            rows = 1 if positions is None and begin is None else q.shape[0]
            shape = rows, q.shape[1], padded(q.shape[3])
            place = torch.empty(shape, dtype=torch.float32, device=q.device)
        key, value, begin, positions = (
            x if x is None else dense(x) for x in (*ring, begin, positions)
        )
        return cls(q, k, v, window, frequency, place, key, value, begin, positions)

    @property
    def numbers(self) -> tuple[Any, int, int, int, int]:
        """(dtype, numbers of q, of v, of the ring's keys, of its values)."""
        batch, time, heads, key_dim = self.q.shape
        row, ring, value_dim = time * heads, 2 * self.window * heads, self.v.shape[3]
        sizes = (row * key_dim, row * value_dim, ring * key_dim, ring * value_dim)
        return self.q.dtype, *(batch * size for size in sizes)  # type: ignore[return-value]

    def record(self, **others: Any) -> Window:
        """The fields up to ring_value, and others."""
        q, k, v, window, frequency, rotations, key, value, begin, positions = self
        batch, time, heads, key_dim = shape = q.shape
        value_dim, dtype = v.shape[3], q.dtype
        if dtype is not FLOAT32 and dtype is not BFLOAT16:
            raise UserTypeError(f"{dtype} (compiled window): expected float32 or bfloat16")
        if window < 1 or (key is None) != (value is None) or (key is None) > (begin is None):
            raise UserError("a position without keys and values (compiled window): pass all three")
        rows = 1 if positions is None and begin is None else batch
        pairs, ring = padded(key_dim), batch * 2 * window * heads
        return Window(
            *strided(q, dtype, shape),
            *strided(k, dtype, shape),
            *strided(v, dtype, (batch, time, heads, value_dim)),
            batch,
            time,
            heads,
            key_dim,
            value_dim,
            window,
            dtype is BFLOAT16,
            optional(positions, INT64, batch * time),
            optional(begin, INT64, batch),
            optional(frequency, FLOAT64, 3 * pairs // 2),
            optional(rotations, FLOAT32, rows * time * pairs),
            optional(key, dtype, ring * key_dim),
            optional(value, dtype, ring * value_dim),
            **others,
        )


@lru_cache
def _frequencies(key_dim: int, theta: float) -> Tensor:
    """RoPE's frequencies, and cos and sin of one step: [3, K / 2 padded] float64."""
    frequency = np.zeros(padded(key_dim) // 2)
    frequency[: key_dim // 2] = theta ** -(np.arange(0, key_dim, 2) / key_dim)
    return torch.from_numpy(np.stack((frequency, np.cos(frequency), np.sin(frequency))))


# ---------------------------------------------------------------- positions and their rotations


@inner
def position(args, b, c):
    """The position of column c of row b: -1 for padding. Columns before 0 count on backwards."""
    if args.positions:
        return int64s(args.positions + 8 * b * args.time, args.time)[max(c, 0)] + min(c, 0)
    return c + (int64s(args.begin, args.batch)[b] if args.begin else 0)


@inner
def oldest(p, window):
    """The first position that a query at p sees."""
    return max(p // window - 1, 0) * window


@inner
def last_token(args, b):
    """The last column of row b that is no padding, or -1."""
    c = args.time - 1
    while c >= 0 and position(args, b, c) < 0:
        c -= 1
    return c


@inner
def advance(re, im, cos, sin):
    for i in range(re.shape[0]):
        real = re[i] * cos[i] - im[i] * sin[i]
        im[i] = re[i] * sin[i] + im[i] * cos[i]
        re[i] = real


@inner
def write_pairs(re, im, out):
    for i in range(re.shape[0]):
        out[2 * i] = re[i]
        out[2 * i + 1] = im[i]


@inner
def fill_rotations(args, b, begin, end, out, buffer):
    """RoPE's (cos, sin) of columns begin ... end - 1 at `out`. buffer: for 2 K numbers, padded."""
    pairs = vectors_of(args.key_dim) * LANES // 2
    frequency = float64s(args.frequency, pairs)
    cos = float64s(args.frequency + 8 * pairs, pairs)
    sin = float64s(args.frequency + 16 * pairs, pairs)
    re, im = buffer[:pairs], buffer[pairs : 2 * pairs]
    before = -2
    for c in range(begin, end):
        p = position(args, b, c)
        steps = 1
        if p != before + 1 or p % ANCHOR == 0:
            steps = max(p, 0) % ANCHOR
            for i in range(pairs):
                re[i] = math.cos((max(p, 0) - steps) * frequency[i])
                im[i] = math.sin((max(p, 0) - steps) * frequency[i])
        for _ in range(steps):
            advance(re, im, cos, sin)
        before = p
        write_pairs(re, im, float32s(out + 8 * pairs * (c - begin), 2 * pairs))


@inner
def rotations_row(args, b):
    """The row of `rotations` that row b uses: the first, where it starts at the same position."""
    return 0 if not args.positions and position(args, b, 0) == position(args, 0, 0) else b


@inner
def rotations_at(args, b, c):
    """The address of (cos, sin) of column c in row b; 0 without RoPE."""
    size = vectors_of(args.key_dim) * BYTES
    return args.rotations + (rotations_row(args, b) * args.time + c) * size if args.rotations else 0


def _rotations(tiles, call):
    if call.rotations is None or call.frequency is None:
        raise UserError("no angles (compiled window): nothing to rotate by")
    rows = 1 if call.positions is None and call.begin is None else call.q.shape[0]
    expect_tiles(tiles, rows * -(-call.q.shape[1] // ANCHOR))
    return call.record()


@kernel(Window, _rotations)
def find_rotations(args):
    """RoPE's (cos, sin) of all columns. Tiles: (row, ANCHOR columns)."""
    buffer = np.empty(2 * (args.key_dim + LANES))
    runs = (args.time + ANCHOR - 1) // ANCHOR
    tile = claim_tile(args)
    while tile >= 0:
        b, begin = tile // runs, tile % runs * ANCHOR
        if rotations_row(args, b) == b:
            end = min(begin + ANCHOR, args.time)
            fill_rotations(args, b, begin, end, rotations_at(args, b, begin), buffer)
        tile = claim_tile(args)


# ---------------------------------------------------------------- rows of tensors


@inner
def query_at(args, b, c, h):
    """The address of row b, column c, head h of q."""
    return args.q + b * args.q_row + c * args.q_time + h * args.q_head


@inner
def key_at(args, b, c, h):
    return args.k + b * args.k_row + c * args.k_time + h * args.k_head


@inner
def value_at(args, b, c, h):
    return args.v + b * args.v_row + c * args.v_time + h * args.v_head


@inner
def copy_row(args, source, size, rotations, target, between):
    """A row, rotated; zeros where `source` is 0. between: scratch of whole vectors."""
    if source:
        load_row(source, args.bfloat16, size, rotations, ONE, between)
    else:
        clear(between, vectors_of(size))
    store_row(between, args.bfloat16, size, 0, ONE, target)


@inner
def number_bytes(args):
    return 2 if args.bfloat16 else 4


@inner
def out_row(args, tensor, b, c, h, size):
    """The address of row b, column c, head h of a contiguous tensor [B, T, H, size]."""
    return tensor + ((b * args.time + c) * args.heads + h) * size * number_bytes(args)


@inner
def ring_row(args, ring, b, p, h, size):
    """The same of a ring [B, 2W, H, size] and position p."""
    slots = 2 * args.window
    return ring + ((b * slots + p % slots) * args.heads + h) * size * number_bytes(args)


# ---------------------------------------------------------------- a segment


@inner
def first_seen(args, b, begin, end):
    """The first column that the queries of columns begin ... end - 1 see; `end` if none is one."""
    for c in range(begin, end):
        p = position(args, b, c)
        if p >= 0:
            return c - p + oldest(p, args.window)
    return end


@inner
def most_keys(args):
    """The most keys that a segment sees, and space for products to run over the end."""
    before = args.time + (2 * args.window if args.ring_key else 0)
    return min(args.time, SEGMENT) + min(2 * args.window, before) + _KEYS + 4


@inner
def load_keys(args, b, h, begin, end, keys, values):
    """Keys and values of columns begin ... end - 1; says whether all are finite."""
    key_row, value_row = vectors_of(args.key_dim) * BYTES, vectors_of(args.value_dim) * BYTES
    zero_or_nan = spread(ZERO)
    for c in range(begin, end):
        at = c - begin
        if c >= 0 and position(args, b, c) < 0:  # padding: no query sees it
            clear(keys + at * key_row, vectors_of(args.key_dim))
            clear(values + at * value_row, vectors_of(args.value_dim))
            continue
        if c < 0:
            p = position(args, b, c)
            k = ring_row(args, args.ring_key, b, p, h, args.key_dim)
            v = ring_row(args, args.ring_value, b, p, h, args.value_dim)
            rotations = 0
        else:
            k, v = key_at(args, b, c, h), value_at(args, b, c, h)
            rotations = rotations_at(args, b, c)
            prefetch_row(k + AHEAD * args.k_time, args.bfloat16, args.key_dim)
            prefetch_row(v + AHEAD * args.v_time, args.bfloat16, args.value_dim)
        zero_or_nan = zero_or_nan + load_row(
            k, args.bfloat16, args.key_dim, rotations, ONE, keys + at * key_row
        )
        zero_or_nan = zero_or_nan + load_row(
            v, args.bfloat16, args.value_dim, 0, ONE, values + at * value_row
        )
    return total(zero_or_nan) == ZERO


# ---------------------------------------------------------------- a block of queries


class Visible(NamedTuple):
    """The keys that a block of queries sees, counted from the first key in the scratch.

    low ... high are the keys that all of them see, first ... last those that any sees; lows and
    highs are the addresses of what each sees (16 float32 numbers each); a lane without a query is
    given all. finite: everything that enters the products is finite.
    """

    first: int
    low: int
    high: int
    last: int
    lows: int
    highs: int
    finite: bool


@inner
def load_queries(args, b, h, c, count, begin, finite, lows, rows, columns):
    """The block of columns c ... c + count - 1, its keys counted from column `begin`.

    The queries, scaled, become rows [16, K] and columns [K, 16], zeros in a lane without one.
    """
    window, vectors = args.window, vectors_of(args.key_dim)
    scale = np.float32(1 / math.sqrt(args.key_dim))
    highs = lows + BYTES
    low, high = float32s(lows, LANES), float32s(highs, LANES)
    first, all_low, all_high, last = 1 << 40, -1, 1 << 40, -1
    before, chunk = -2, 0
    zero_or_nan = spread(ZERO)
    for lane in range(LANES):
        high[lane] = -ONE
        target = rows + lane * vectors * BYTES
        p = position(args, b, c + lane) if lane < count else -1
        if p < 0:
            clear(target, vectors)
            continue
        if p != before + 1 or p - chunk >= window:
            chunk = p // window * window
        before = p
        itself = c + lane - begin
        oldest_seen = itself - p + max(chunk - window, 0)
        low[lane], high[lane] = oldest_seen, itself
        first, all_low = min(first, oldest_seen), max(all_low, oldest_seen)
        all_high, last = min(all_high, itself), max(last, itself)
        source, rotations = query_at(args, b, c + lane, h), rotations_at(args, b, c + lane)
        prefetch_row(source + LANES * args.q_time, args.bfloat16, args.key_dim)
        zero_or_nan = zero_or_nan + load_row(
            source, args.bfloat16, args.key_dim, rotations, scale, target
        )
    for lane in range(LANES):
        if high[lane] < 0:
            low[lane], high[lane] = first, last
    to_columns(rows, columns, vectors)
    finite = finite and total(zero_or_nan) == ZERO
    return Visible(first, all_low, all_high, last, lows, highs, finite)


@inner
def to_columns(rows, columns, vectors):
    """Rows [16, vectors vectors] to columns [16 vectors, 16]."""
    for i in range(vectors):
        transpose(rows + i * BYTES, vectors * BYTES, columns + i * LANES * BYTES)


@inner
def mask(scores, visible, hidden):
    """Write `hidden` over what a query does not see: only the ragged ends can hold any."""
    lows, highs = load(visible.lows), load(visible.highs)
    for j in range(visible.first, min(visible.low, visible.last + 1)):
        at = scores + j * BYTES
        store(at, where_between(lows, spread(np.float32(j)), highs, load(at), spread(hidden)))
    for j in range(max(visible.high + 1, visible.first), visible.last + 1):
        at = scores + j * BYTES
        store(at, where_between(lows, spread(np.float32(j)), highs, load(at), spread(hidden)))


@inner
def score(keys, columns, size, visible, scores):
    """scores [keys, 16] = keys [keys, size] columns [size, 16], over the keys that are visible."""
    row = vectors_of(size) * BYTES
    for j in range(visible.first, visible.last + 1, _KEYS):
        prefetch_row(
            keys + (j + _KEYS) * row, False, _KEYS * row // 4
        )  # no processor foresees so many rows at once
        scores_of(scores + j * BYTES, BYTES, keys + j * row, row, 4, columns, BYTES, size)


@inner
def softmax(scores, visible):
    """Scores become exp(score - max), 0 where masked. Returns the vector of 1 / their sums."""
    mask(scores, visible, -_INFINITY)
    most = spread(-_INFINITY)
    for j in range(visible.first, visible.last + 1):
        most = larger(load(scores + j * BYTES), most)
    sums = spread(ZERO)
    for j in range(visible.first, visible.last + 1):
        weight = exponential(load(scores + j * BYTES) - most)
        store(scores + j * BYTES, weight)
        sums = sums + weight
    return inverse(sums)


# ---------------------------------------------------------------- products


@inner
def multiply(c, c_row, a, a_row, a_step, b, b_step, rows, vectors, count):
    """c [rows, vectors vectors] += a b over `count`; rows are a multiple of 4. See `product`."""
    for begin in range(0, count, 64):  # so that this much of b stays in the nearest cache
        steps = min(64, count - begin)
        for i in range(0, rows, 4):
            left, right = a + begin * a_step + i * a_row, b + begin * b_step
            at = c + i * c_row
            j = 0
            while j + _COLUMNS <= vectors:
                tile_wide(at, c_row, left, a_row, a_step, right, b_step, steps)
                at, right, j = at + _COLUMNS * BYTES, right + _COLUMNS * BYTES, j + _COLUMNS
            while j < vectors:
                tile_4_1(at, c_row, left, a_row, a_step, right, b_step, steps)
                at, right, j = at + BYTES, right + BYTES, j + 1


@inner
def multiply_singly(c, c_row, a, a_row, a_step, b, b_step, rows, vectors, count):
    """The same for any number of rows."""
    for i in range(rows):
        for j in range(vectors):
            at = c + i * c_row + j * BYTES
            tile_1_1(at, 0, a + i * a_row, 0, a_step, b + j * BYTES, b_step, count)


@inner
def seen_by(visible, lane):
    """(first key, number of keys) that the query in `lane` sees."""
    low = int(float32s(visible.lows, LANES)[lane])
    return low, int(float32s(visible.highs, LANES)[lane]) - low + 1


@inner
def gather(out, weights, rows, vectors, visible):
    """out [16, *] += weights [keys, 16]^T rows [keys, *]."""
    size = vectors * BYTES
    if visible.finite:
        a, b, count = (
            weights + visible.first * BYTES,
            rows + visible.first * size,
            visible.last - visible.first + 1,
        )
        multiply(out, size, a, 4, BYTES, b, size, LANES, vectors, count)
        return
    for lane in range(LANES):
        low, count = seen_by(visible, lane)
        a, b = weights + low * BYTES + 4 * lane, rows + low * size
        multiply_singly(out + lane * size, 0, a, 0, BYTES, b, size, 1, vectors, count)


@inner
def scatter(out, weights, rows, vectors, visible):
    """out [keys, *] += weights [keys, 16] rows [16, *]; weights has space for 3 rows at its end."""
    size = vectors * BYTES
    if visible.finite:
        clear(weights + (visible.last + 1) * BYTES, 3)
        a, c, count = (
            weights + visible.first * BYTES,
            out + visible.first * size,
            visible.last - visible.first + 1,
        )
        multiply(c, size, a, BYTES, 4, rows, size, (count + 3) // 4 * 4, vectors, LANES)
        return
    for lane in range(LANES):
        low, count = seen_by(visible, lane)
        a, b = weights + low * BYTES + 4 * lane, rows + lane * size
        multiply_singly(out + low * size, size, a, BYTES, 0, b, 0, count, vectors, 1)


# ---------------------------------------------------------------- forward


def _attend(tiles, call, out):
    batch, time, heads, _ = call.q.shape
    expect_tiles(tiles, batch * -(-time // SEGMENT) * heads)
    dtype, _, outs, _, _ = call.numbers
    return call.record(out=address(out, dtype, outs))


def _remember(tiles, call, new_key, new_value, new_position):
    batch, _, heads, _ = call.q.shape
    expect_tiles(tiles, batch * heads)
    dtype, _, _, keys, values = call.numbers
    return call.record(
        new_key=address(new_key, dtype, keys),
        new_value=address(new_value, dtype, values),
        new_position=address(new_position, INT64, batch),
    )


@kernel(Window, _attend)
def attend(args):
    """Tiles: (row, segment, head)."""
    key_vectors, value_vectors = vectors_of(args.key_dim), vectors_of(args.value_dim)
    most, block_vectors = most_keys(args), LANES * (2 * key_vectors + value_vectors) + 4
    buffer = np.empty(
        LANES * (block_vectors + most * (key_vectors + value_vectors + 1)), np.float32
    )
    lows = aligned(buffer)
    sums = lows + 2 * BYTES
    queries = sums + BYTES
    columns = queries + LANES * key_vectors * BYTES
    out = columns + LANES * key_vectors * BYTES
    keys = out + LANES * value_vectors * BYTES
    values = keys + most * key_vectors * BYTES
    scores = values + most * value_vectors * BYTES
    segments = (args.time + SEGMENT - 1) // SEGMENT
    tile = claim_tile(args)
    while tile >= 0:
        h, b = tile % args.heads, tile // args.heads // segments
        start = tile // args.heads % segments * SEGMENT
        stop = min(start + SEGMENT, args.time)
        begin = first_seen(args, b, start, stop)
        finite = load_keys(args, b, h, begin, stop, keys, values)
        for c in range(start, stop, LANES):
            count = min(LANES, stop - c)
            visible = load_queries(args, b, h, c, count, begin, finite, lows, queries, columns)
            clear(out, LANES * value_vectors)
            if visible.last >= 0:
                score(keys, columns, args.key_dim, visible, scores)
                store(sums, softmax(scores, visible))
                gather(out, scores, values, value_vectors, visible)
            for lane in range(count):
                row = out + lane * value_vectors * BYTES
                scale = float32s(sums, LANES)[lane]
                if position(args, b, c + lane) < 0:
                    clear(row, value_vectors)
                    scale = ONE
                target = out_row(args, args.out, b, c + lane, h, args.value_dim)
                store_row(row, args.bfloat16, args.value_dim, 0, scale, target)
        tile = claim_tile(args)
    buffer[0] = 0  # alive until here


@kernel(Window, _remember)
def remember(args):
    """The ring after each row's last token, and its position. Tiles: (row, head)."""
    slots = 2 * args.window
    buffer = np.empty(LANES * (1 + vectors_of(max(args.key_dim, args.value_dim))), np.float32)
    between = aligned(buffer)
    tile = claim_tile(args)
    while tile >= 0:
        b, h = tile // args.heads, tile % args.heads
        last = last_token(args, b)
        after = position(args, b, last) + 1
        if h == 0 and last >= 0:
            int64s(args.new_position, args.batch)[b] = after
        for slot in range(slots):
            p = after - 1 - (after - 1 - slot) % slots
            c = last - (after - 1 - p)
            live = last >= 0 and p >= oldest(after, args.window)
            key = value = rotations = 0
            if args.ring_key and (last < 0 or (live and c < 0)):
                key = ring_row(args, args.ring_key, b, slot, h, args.key_dim)
                value = ring_row(args, args.ring_value, b, slot, h, args.value_dim)
            elif live:
                key, value = key_at(args, b, c, h), value_at(args, b, c, h)
                rotations = rotations_at(args, b, c)
            target = ring_row(args, args.new_key, b, slot, h, args.key_dim)
            copy_row(args, key, args.key_dim, rotations, target, between)
            target = ring_row(args, args.new_value, b, slot, h, args.value_dim)
            copy_row(args, value, args.value_dim, 0, target, between)
        tile = claim_tile(args)
    buffer[0] = 0


# ---------------------------------------------------------------- backward


@inner
def open_rows(args, ring, size, b, h, begin, end, last, d_rows):
    """Where gradients of the keys, or values, of columns begin ... end - 1 add up: from what the
    new ring's gradient says of those that it holds. d_rows: the place of column `begin`."""
    after = position(args, b, last) + 1 if last >= 0 else 0
    oldest_in_ring = last + 1 - (after - oldest(after, args.window))
    for c in range(begin, end):
        target = d_rows + (c - begin) * vectors_of(size) * BYTES
        if ring and oldest_in_ring <= c <= last:
            source = ring_row(args, ring, b, position(args, b, c), h, size)
            load_row(source, args.bfloat16, size, 0, ONE, target)
        else:
            clear(target, vectors_of(size))


@inner
def close_rows(args, tensor, ring, size, is_key, b, h, begin, end, d_rows):
    """Write the finished gradients of columns begin ... end - 1: to `tensor`, or to `ring`."""
    for c in range(begin, end):
        source = d_rows + (c - begin) * vectors_of(size) * BYTES
        rotations = 0
        if c >= 0:
            target = out_row(args, tensor, b, c, h, size)
            if is_key:
                rotations = rotations_at(args, b, c)
        else:
            target = ring_row(args, ring, b, position(args, b, c), h, size)
        store_row(source, args.bfloat16, size, rotations, ONE, target)


@inner
def close_gradients(args, b, h, begin, end, d_keys, d_values):
    close_rows(args, args.d_k, args.d_ring_key, args.key_dim, True, b, h, begin, end, d_keys)
    close_rows(args, args.d_v, args.d_ring_value, args.value_dim, False, b, h, begin, end, d_values)


@inner
def load_d_out(args, b, h, c, count, rows):
    """The output's gradients of a block as rows [16, V]; says whether all are finite."""
    zero_or_nan = spread(ZERO)
    for lane in range(LANES):
        target = rows + lane * vectors_of(args.value_dim) * BYTES
        if lane < count and position(args, b, c + lane) >= 0:
            source = out_row(args, args.out, b, c + lane, h, args.value_dim)
            zero_or_nan = zero_or_nan + load_row(
                source, args.bfloat16, args.value_dim, 0, ONE, target
            )
        else:
            clear(target, vectors_of(args.value_dim))
    return total(zero_or_nan) == ZERO


@inner
def through_softmax(weights, d_weights, scale, visible):
    """Scale the weights to sum 1, and turn their gradients into those of the scores."""
    mean = spread(ZERO)
    for j in range(visible.first, visible.last + 1):
        weight = load(weights + j * BYTES) * scale
        store(weights + j * BYTES, weight)
        mean = fused(weight, load(d_weights + j * BYTES), mean)
    for j in range(visible.first, visible.last + 1):
        at = d_weights + j * BYTES
        store(at, load(weights + j * BYTES) * (load(at) - mean))
    mask(weights, visible, ZERO)
    mask(d_weights, visible, ZERO)


def _backward(tiles, call, grad, grad_key, grad_value, dq, dk, dv, d_key, d_value):
    expect_tiles(tiles, call.q.shape[0] * call.q.shape[2])
    if (grad_key is None) != (grad_value is None):
        raise UserError("the gradient of one bfloat16 of a ring (compiled window): pass both")
    dtype, q, v, keys, values = call.numbers
    ring = call.key is not None
    return call.record(
        out=address(grad, dtype, v),
        new_key=optional(grad_key, dtype, keys),
        new_value=optional(grad_value, dtype, values),
        d_q=address(dq, dtype, q),
        d_k=address(dk, dtype, q),
        d_v=address(dv, dtype, v),
        d_ring_key=address(d_key, dtype, keys if ring else 0),
        d_ring_value=address(d_value, dtype, values if ring else 0),
    )


@kernel(Window, _backward)
def attend_backward(args):
    """Tiles: (row, head)."""
    key_vectors, value_vectors = vectors_of(args.key_dim), vectors_of(args.value_dim)
    key_row, value_row = key_vectors * BYTES, value_vectors * BYTES
    most, block_vectors = most_keys(args), LANES * (3 * key_vectors + 2 * value_vectors) + 4
    buffer = np.empty(
        LANES * (block_vectors + 2 * most * (key_vectors + value_vectors + 1)), np.float32
    )
    lows = aligned(buffer)
    queries = lows + 2 * BYTES
    columns = queries + LANES * key_row
    d_queries = columns + LANES * key_row
    d_out = d_queries + LANES * key_row
    d_out_columns = d_out + LANES * value_row
    keys = d_out_columns + LANES * value_row
    d_keys = keys + most * key_row
    values = d_keys + most * key_row
    d_values = values + most * value_row
    weights = d_values + most * value_row
    d_scores = weights + most * BYTES
    scale = np.float32(1 / math.sqrt(args.key_dim))
    tile = claim_tile(args)
    while tile >= 0:
        b, h = tile // args.heads, tile % args.heads
        last = last_token(args, b)
        begin = first_seen(args, b, 0, min(SEGMENT, args.time))
        stop = begin  # gradients of the keys begin ... stop - 1 are adding up
        for start in range(0, args.time, SEGMENT):
            end = min(start + SEGMENT, args.time)
            first = first_seen(args, b, start, end)
            close_gradients(args, b, h, begin, min(first, stop), d_keys, d_values)
            ahead = first - begin
            # towards lower addresses, in order: the two may overlap
            copy_vectors(d_keys + ahead * key_row, d_keys, max(stop - first, 0) * key_vectors)
            copy_vectors(
                d_values + ahead * value_row, d_values, max(stop - first, 0) * value_vectors
            )
            begin, stop = first, max(stop, first)
            at = stop - begin
            open_rows(
                args, args.new_key, args.key_dim, b, h, stop, end, last, d_keys + at * key_row
            )
            open_rows(
                args,
                args.new_value,
                args.value_dim,
                b,
                h,
                stop,
                end,
                last,
                d_values + at * value_row,
            )
            stop = end
            finite = load_keys(args, b, h, begin, stop, keys, values)
            for c in range(start, end, LANES):
                count = min(LANES, end - c)
                both_finite = load_d_out(args, b, h, c, count, d_out) and finite
                visible = load_queries(
                    args, b, h, c, count, begin, both_finite, lows, queries, columns
                )
                if visible.last < 0:
                    continue
                to_columns(d_out, d_out_columns, value_vectors)
                score(keys, columns, args.key_dim, visible, weights)
                sums = softmax(weights, visible)
                score(values, d_out_columns, args.value_dim, visible, d_scores)
                mask(d_scores, visible, ZERO)
                through_softmax(weights, d_scores, sums, visible)
                clear(d_queries, LANES * key_vectors)
                gather(d_queries, d_scores, keys, key_vectors, visible)
                scatter(d_keys, d_scores, queries, key_vectors, visible)
                scatter(d_values, weights, d_out, value_vectors, visible)
                for lane in range(count):
                    if position(args, b, c + lane) >= 0:
                        target = out_row(args, args.d_q, b, c + lane, h, args.key_dim)
                        row, rotations = d_queries + lane * key_row, rotations_at(args, b, c + lane)
                        store_row(row, args.bfloat16, args.key_dim, rotations, scale, target)
        close_gradients(args, b, h, begin, stop, d_keys, d_values)
        if last < 0 and args.new_key and args.ring_key:
            for slot in range(2 * args.window):  # a row of padding keeps its ring
                source = ring_row(args, args.new_key, b, slot, h, args.key_dim)
                target = ring_row(args, args.d_ring_key, b, slot, h, args.key_dim)
                copy_row(args, source, args.key_dim, 0, target, lows)
                source = ring_row(args, args.new_value, b, slot, h, args.value_dim)
                target = ring_row(args, args.d_ring_value, b, slot, h, args.value_dim)
                copy_row(args, source, args.value_dim, 0, target, lows)
        tile = claim_tile(args)
    buffer[0] = 0
