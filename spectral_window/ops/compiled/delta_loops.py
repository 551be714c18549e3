"""The kernels of the delta-rule memory over many tokens (see `delta`).

A chunk is up to 64 tokens of one document of one row, padding left out. With g_t the sum of -decay
over the chunk's tokens up to t, g_C at its end, S the state before the chunk and

    A[t, s] = e^(g_t - g_s) k_t . k_s,  s < t        P[t, s] = e^(g_t - g_s) q_t . k_s,  s <= t

what is written, u_t = beta_t e_t, and read follows from products of matrices (`chunked_delta`):

    R = V - diag(e^g) K S,   (I + A diag(beta)) E = R,   U = diag(beta) E
    out = diag(e^g) Q S + P U,   S after = e^(g_C) S + sum_s e^(g_C - g_s) k_s u_s^T

The system is solved by substitution, in blocks of 16 tokens: what earlier blocks wrote goes over to
the right-hand side by a product, inside a block token follows token. No inverse is formed: in
float32 one of 64 rows costs three times the error where keys nearly agree.

The columns of a state never meet, so a tile of the forward pass (`advance`) is a block of columns
of one row and head: its state stays in the scratch from the first chunk of the segment to the last.
Every number is the same sum in the same order whatever the width of the blocks.

With dO and dS' the gradients of what a chunk reads and of the state behind it, and `.` products of
rows by numbers of each token,

    dU = P^T dO + e^(g_C - g) . K dS',      (I + A^T diag(beta)) Z = dU,   Y = diag(beta) Z
    dV = Y,   dbeta_t = e_t . z_t,          dS = e^(g_C) dS' + Q^T (e^g . dO) - K^T (e^g . Y)
    dP = dO U^T on and below the diagonal,  dA = -Y U^T below it
    dQ = e^g . dO S^T + (F dP) K,           F[t, s] = e^(g_t - g_s), element by element
    dK = -e^g . Y S^T + e^(g_C - g) . U dS'^T + (F dP)^T Q + (F dA + (F dA)^T) K

`retreat` runs from the last chunk to the first with a block of columns of dS, which never meet the
others; it finds E again from the checkpoint, and Z. `collect` then takes each chunk by itself, for
sums over all columns.

Matrices are row-major in scratch memory, rows an odd number of cache lines apart, so that neither
rows nor columns collide in a cache. States lie in *panels* [V / 16, K, 16], padded with zeros: the
sixteen columns of a vector lie side by side. A sum is a sum of sums of 64 terms: its error then
hardly grows with its length, and what it is added to is rounded once for 64 terms. It is the same
sum whatever the size of the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    NOWHERE,
    Address,
    address,
    optional,
)
from spectral_window.ops.compiled.simd import (
    AVX512,
    BYTES,
    LANES,
    ONE,
    ZERO,
    add_row,
    aligned,
    clear,
    copy_vectors,
    dot_vectors,
    exponential,
    float32s,
    float64s,
    inner,
    int64s,
    load,
    load_row,
    padded,
    prefetch_row,
    product,
    scale_row,
    spread,
    store,
    store_row,
    transpose,
    vectors_of,
)
from spectral_window.ops.compiled.threads import claim_tile, expect_tiles, kernel

CHUNK = 64
_AHEAD = 8  # rows that are prefetched
FRESH, ENTERS = -1, -2  # a chunk starts with an empty state, or with the one that was given

# Sums of a tile stay in registers: 12 of 16 with AVX2, where a vector takes two; of 32 elsewhere.
# Four rows by four vectors need the fewest loads, where there is space for them.
_TALL = 12 if AVX512 else 6
_tall, _short = product(_TALL, 1, apart=True), product(4, 1, apart=True)
_line, _dot = product(1, 4, apart=True), product(1, 1, apart=True)
_SQUARE = 4 if AVX512 else 1 << 40  # panels
_square = product(4, 4, apart=True, panels=True)
_STRIPS = 4  # sixteen columns of a transposed state each, for such a product
TERMS = 64  # are added up before they join the whole: many more would cost precision
_DEEP = 128 if AVX512 else 256  # terms for which what is read again stays in the nearest cache

# A chunk's system, in float32 numbers: -A and P [64, 64], e^g and e^(g_C - g) [64], and g in
# float64 [64]
_MINUS_A, _P, _FROM_START = 0, CHUNK * CHUNK, 2 * CHUNK * CHUNK
_TO_END, _LOG, SYSTEM = _FROM_START + CHUNK, _FROM_START + 2 * CHUNK, _FROM_START + 4 * CHUNK
ROW = 4 * CHUNK  # bytes from one row of A or P to the next


class Delta(NamedTuple):
    q: Address  # [B, T, H, K]
    k: Address
    v: Address  # [B, T, H, V]
    beta: Address  # float32 [B, T, H]
    decay: Address  # the same, or none
    order: Address  # int64, as `plan` found them
    chunks: Address
    lengths: Address
    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int
    bfloat16: bool
    most: int  # chunks of a row in `chunks`
    first: int  # of the segment: its first chunk
    chunk_count: int  # ... and how many
    systems: Address = NOWHERE  # float32 [B, H, count, SYSTEM], of the chunks of the segment
    width: int = 0  # vectors of a block of columns
    state: Address = NOWHERE  # float32, of each row and head, in panels
    checkpoints: Address = NOWHERE  # float32 [B, slots, H], in panels, or none
    slots: int = 0
    out: Address = NOWHERE  # [B, T, H, V]
    # backward
    d_out: Address = NOWHERE
    d_v: Address = NOWHERE
    d_q: Address = NOWHERE
    d_k: Address = NOWHERE
    d_beta: Address = NOWHERE  # float32, like d_decay
    d_decay: Address = NOWHERE
    d_state: Address = NOWHERE  # of the state behind the segment, becomes that of the one before
    d_states: Address = NOWHERE  # of the state behind each chunk of the segment, in panels
    errors: Address = NOWHERE  # E and Z of each chunk [64, V], rows padded to whole vectors
    d_written: Address = NOWHERE


class Call(NamedTuple):
    """What all kernels are given: q, k [B, T, H, K], v [B, T, H, V] float32 or bfloat16, beta and
    decay (or None) [B, T, H] float32, and the chunks of each row as `plan` found them."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None
    order: Tensor
    chunks: Tensor
    lengths: Tensor

    @property
    def heads(self) -> int:
        """Heads of all rows."""
        return self.q.shape[0] * self.q.shape[2]

    @property
    def state(self) -> int:
        """Numbers of a head's state in panels."""
        return padded(self.q.shape[3]) * padded(self.v.shape[3])

    def tokens(self, x: Tensor | None, dtype: Any = FLOAT32) -> Address:
        """The address of x [B, T, H]; 0 for None."""
        return optional(x, dtype, self.heads * self.q.shape[1])

    def keys(self, x: Tensor) -> Address:
        """The address of x [B, T, H, K] in the dtype of q."""
        return address(x, self.q.dtype, self.heads * self.q.shape[1] * self.q.shape[3])

    def values(self, x: Tensor) -> Address:
        """The address of x [B, T, H, V] in the dtype of q."""
        return address(x, self.q.dtype, self.heads * self.q.shape[1] * self.v.shape[3])

    def record(self, first: int, count: int, **others: Any) -> Delta:
        """The fields up to count, and others, for the chunks `first` ... `first` + `count` - 1."""
        batch, time, heads, key_dim = self.q.shape
        dtype, most = self.q.dtype, self.chunks.shape[1]
        if dtype is not FLOAT32 and dtype is not BFLOAT16:
            raise UserTypeError(f"{dtype} (compiled delta): expected float32 or bfloat16")
        if first < 0 or count < 1:
            raise UserError(f"chunks {first} ... (compiled delta): expected a segment of a row")
        return Delta(
            self.keys(self.q),
            self.keys(self.k),
            self.values(self.v),
            self.tokens(self.beta),
            self.tokens(self.decay),
            address(self.order, INT64, batch * time),
            address(self.chunks, INT64, batch * most * 3),
            address(self.lengths, INT64, batch),
            *(batch, time, heads, key_dim, self.v.shape[3], dtype is BFLOAT16),
            *(most, first, count),
            **others,
        )


# ---------------------------------------------------------------- products


@inner
def multiply(c, c_row, c_panel, a, a_row, a_step, b, b_step, b_panel, rows, panels, count):
    """c [rows, 16 panels] += a [rows, count] b [count, 16 panels], the sum in the order of `count`.

    Addresses, and bytes from one row, step or panel to the next; rows are a multiple of 4.
    """
    tall = rows // _TALL
    if (rows - tall * _TALL) % 4 and tall > 0:
        tall -= 1
    for begin in range(0, count, _DEEP):
        end = min(begin + _DEEP, count)
        j = 0
        while j + _SQUARE <= panels:
            for i in range(0, rows, 4):
                out = c + j * c_panel + i * c_row
                for k in range(begin, end, TERMS):
                    left, right = a + i * a_row + k * a_step, b + j * b_panel + k * b_step
                    terms = min(TERMS, end - k)
                    _square(out, c_row, left, a_row, a_step, right, b_step, terms, c_panel, b_panel)
            j += 4
        while j < panels:
            i = 0
            while i < rows:
                high = i < tall * _TALL
                out = c + j * c_panel + i * c_row
                for k in range(begin, end, TERMS):
                    left, right = a + i * a_row + k * a_step, b + j * b_panel + k * b_step
                    terms = min(TERMS, end - k)
                    if high:
                        _tall(out, c_row, left, a_row, a_step, right, b_step, terms)
                    else:
                        _short(out, c_row, left, a_row, a_step, right, b_step, terms)
                i += _TALL if high else 4
            j += 1


@inner
def add_products(c, a, a_step, b, b_step, vectors, count):
    """A single row: c [16 vectors] += a [count] b [count, 16 vectors]."""
    j = 0
    while j + 4 <= vectors:
        _line(c + j * BYTES, 0, a, 0, a_step, b + j * BYTES, b_step, count)
        j += 4
    while j < vectors:
        _dot(c + j * BYTES, 0, a, 0, a_step, b + j * BYTES, b_step, count)
        j += 1


@inner
def row_bytes(size):
    """Bytes from one row of `size` numbers in scratch memory to the next: an odd number of lines,
    so that neighbouring rows never share a place in the cache."""
    return (vectors_of(size) | 1) * BYTES


@inner
def rounded_up(count):
    """The rows that are computed for `count` tokens: whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@inner
def transpose_rows(source, step, rows, size, target):
    """Rows [rows, size] as panels [rows / 16, size, 16]."""
    vectors = vectors_of(size)
    for i in range(rows // LANES):
        for j in range(vectors):
            place = source + i * LANES * step + j * BYTES
            transpose(place, step, target + (i * vectors + j) * LANES * BYTES)


@inner
def scale_vectors(target, scale, vectors):
    for i in range(vectors):
        at = target + i * BYTES
        store(at, load(at) * spread(scale))


@inner
def scale_rows(target, step, scales, rows, vectors):
    for t in range(rows):
        scale_row(target + t * step, target + t * step, scales[t], vectors)


# ---------------------------------------------------------------- chunks


class Chunk(NamedTuple):
    """begin: in `order`; tokens: how many; entry: FRESH, ENTERS or the number of the
    checkpoint at its start."""

    begin: int
    tokens: int
    entry: int


@inner
def chunk_at(args, b, n):
    fields = int64s(args.chunks + 24 * (b * args.most + n), 3)
    return Chunk(fields[0], fields[1], fields[2])


@inner
def chunks_of(args, b):
    """Of the segment, the chunks that row b has."""
    return max(min(int64s(args.lengths, args.batch)[b] - args.first, args.chunk_count), 0)


@inner
def token_of(args, b, chunk, t):
    """The index of the chunk's token t and head 0 in [B, T]."""
    return b * args.time + int64s(args.order + 8 * (b * args.time + chunk.begin), CHUNK)[t]


@inner
def number_at(args, tensor, token, h):
    return float32s(tensor + 4 * (token * args.heads + h), 1)[0]


@inner
def row_at(args, tensor, token, h, size):
    """The address of `size` numbers of a token and head in a tensor [B, T, H, size]."""
    return tensor + (token * args.heads + h) * size * (2 if args.bfloat16 else 4)


@inner
def load_rows(args, tensor, b, h, chunk, size, begin, end, target, step):
    """Columns begin ... end - 1 of the chunk's rows to `target`; the rest of a vector is zeros."""
    vectors = vectors_of(end - begin)
    for t in range(rounded_up(chunk.tokens)):
        if t < chunk.tokens:
            soon = min(t + _AHEAD, chunk.tokens - 1)
            offset = begin * (2 if args.bfloat16 else 4)
            prefetch_row(
                row_at(args, tensor, token_of(args, b, chunk, soon), h, size) + offset,
                args.bfloat16,
                end - begin,
            )
            source = row_at(args, tensor, token_of(args, b, chunk, t), h, size) + offset
            load_row(source, args.bfloat16, end - begin, 0, ONE, target + t * step)
        else:
            clear(target + t * step, vectors)


@inner
def store_rows(args, tensor, b, h, chunk, size, begin, end, source, step):
    """The reverse: rounded once to the tensor's dtype."""
    for t in range(chunk.tokens):
        target = row_at(args, tensor, token_of(args, b, chunk, t), h, size)
        target += begin * (2 if args.bfloat16 else 4)
        store_row(source + t * step, args.bfloat16, end - begin, 0, ONE, target)


@inner
def load_betas(args, b, h, chunk, target):
    """beta of the chunk's tokens, zeros behind them, as float32 [64]."""
    betas = float32s(target, CHUNK)
    for t in range(CHUNK):
        betas[t] = ZERO
        if t < chunk.tokens:
            betas[t] = number_at(args, args.beta, token_of(args, b, chunk, t), h)
    return betas


# ---------------------------------------------------------------- a chunk's system


@inner
def system_at(args, b, h, n):
    """The address of the system of the segment's chunk n."""
    return args.systems + ((b * args.heads + h) * args.chunk_count + n) * SYSTEM * 4


@inner
def minus_a(system):
    return system + 4 * _MINUS_A


@inner
def p_of(system):
    return system + 4 * _P


@inner
def decay_from_start(system):
    """e^g, by which the state before the chunk has shrunk at each token."""
    return float32s(system + 4 * _FROM_START, CHUNK)


@inner
def decay_to_end(system):
    """e^(g_C - g), what is left of each token's write after the chunk."""
    return float32s(system + 4 * _TO_END, CHUNK)


@inner
def log_decays(system):
    """g."""
    return float64s(system + 4 * _LOG, CHUNK)


@inner
def exponentials(target, numbers):
    """e^x of 64 numbers <= 0."""
    for i in range(CHUNK // LANES):
        store(target + i * BYTES, exponential(load(numbers + i * BYTES)))


@inner
def decays(system, t, target):
    """e^(g_t - g_s) of the tokens s, 0 behind t. The differences are exact to float32."""
    sums, row = log_decays(system), float32s(target, CHUNK)
    for s in range(CHUNK):
        row[s] = min(sums[t] - sums[s], 0.0)
    exponentials(target, target)
    row[t + 1 :] = ZERO


@inner
def find_decays(args, b, h, chunk, system):
    """e^g, e^(g_C - g) and g of a chunk."""
    sums, at, after = log_decays(system), decay_from_start(system), decay_to_end(system)
    total = 0.0
    for t in range(CHUNK):
        if t < chunk.tokens:
            total -= number_at(args, args.decay, token_of(args, b, chunk, t), h)
        sums[t] = total
    for t in range(CHUNK):
        at[t] = sums[t]
        after[t] = total - sums[t]
    exponentials(system + 4 * _FROM_START, system + 4 * _FROM_START)
    exponentials(system + 4 * _TO_END, system + 4 * _TO_END)


@inner
def lower_product(c, a, a_row, b_panels, size, rows):
    """c [64, 64] = a [rows, size] b^T for the blocks on and below the diagonal, others zeros."""
    clear(c, CHUNK * CHUNK // LANES)
    depth = vectors_of(size) * LANES
    for j in range(rows // LANES):
        begin = j * LANES
        multiply(
            c + begin * ROW + j * BYTES,
            ROW,
            0,
            a + begin * a_row,
            a_row,
            4,
            b_panels + j * depth * BYTES,
            BYTES,
            0,
            rows - begin,
            1,
            size,
        )


@inner
def keep_lower(c, rows, strictly):
    """Zeros above the diagonal, and on it if `strictly`."""
    for t in range(rows):
        numbers = float32s(c + t * ROW, CHUNK)
        numbers[t + (0 if strictly else 1) :] = ZERO


@inner
def multiply_decays(args, system, rows, c, between):
    """c[t, s] *= e^(g_t - g_s)."""
    if args.decay:
        for t in range(rows):
            decays(system, t, between)
            for i in range(CHUNK // LANES):
                at = c + t * ROW + i * BYTES
                store(at, load(at) * load(between + i * BYTES))


class Plan(NamedTuple):
    time: int
    most: int  # chunks of a row
    positions: Address  # int64 [B, T], or none
    # written:
    order: Address  # int64 [B, T]: the columns of each row's tokens
    chunks: Address  # int64 [B, most, 3], see `Chunk`
    lengths: Address  # int64 [B]: the chunks of each row


def _plan(tiles, time, most, positions, order, chunks, lengths):
    return Plan(
        *(time, most, optional(positions, INT64, tiles * time)),
        address(order, INT64, tiles * time),
        address(chunks, INT64, tiles * most * 3),
        address(lengths, INT64, tiles),
    )


@kernel(Plan, _plan)
def plan(args):
    """Chunks end with their document or after 64 tokens. Tiles: rows."""
    tile = claim_tile(args)
    while tile >= 0:
        time, most = args.time, args.most
        order = int64s(args.order + 8 * tile * time, time)
        chunks = int64s(args.chunks + 24 * tile * most, 3 * most)
        tokens = count = checkpoints = 0
        for c in range(time):
            p = c + 1
            if args.positions:
                p = int64s(args.positions + 8 * tile * time, time)[c]
            if p < 0:
                continue
            if count == 0 or p == 0 or chunks[3 * count - 2] == CHUNK:
                if count == most:
                    break
                entry = checkpoints
                if p == 0:
                    entry = FRESH
                elif count == 0:
                    entry = ENTERS
                else:
                    checkpoints += 1
                chunks[3 * count], chunks[3 * count + 1] = tokens, 0
                chunks[3 * count + 2] = entry
                count += 1
            order[tokens] = c
            chunks[3 * count - 2] += 1
            tokens += 1
        int64s(args.lengths, args.tiles)[tile] = count
        tile = claim_tile(args)


def _systems(tiles, call, first, count, systems):
    expect_tiles(tiles, call.heads * count)
    return call.record(first, count, systems=address(systems, FLOAT32, tiles * SYSTEM))


@kernel(Delta, _systems)
def find_systems(args):
    """The systems of the chunks of a segment. Tiles: (row, head, chunk)."""
    size = args.key_dim
    step, panel_vectors = row_bytes(size), vectors_of(size) * CHUNK
    buffer = np.empty(LANES * (2 * (CHUNK * step // BYTES) + panel_vectors + 10), np.float32)
    keys = aligned(buffer)
    queries = keys + CHUNK * step
    panels = queries + CHUNK * step
    between = panels + panel_vectors * BYTES
    tile = claim_tile(args)
    while tile >= 0:
        n, h, b = (
            tile % args.chunk_count,
            tile // args.chunk_count % args.heads,
            tile // args.chunk_count // args.heads,
        )
        if n < chunks_of(args, b):
            chunk, system = chunk_at(args, b, args.first + n), system_at(args, b, h, n)
            rows = rounded_up(chunk.tokens)
            load_rows(args, args.k, b, h, chunk, size, 0, size, keys, step)
            load_rows(args, args.q, b, h, chunk, size, 0, size, queries, step)
            transpose_rows(keys, step, rows, size, panels)
            lower_product(minus_a(system), keys, step, panels, size, rows)
            lower_product(p_of(system), queries, step, panels, size, rows)
            keep_lower(minus_a(system), rows, True)
            keep_lower(p_of(system), rows, False)
            if args.decay:
                find_decays(args, b, h, chunk, system)
            multiply_decays(args, system, rows, minus_a(system), between)
            multiply_decays(args, system, rows, p_of(system), between)
            for t in range(rows):
                scale_row(
                    minus_a(system) + t * ROW, minus_a(system) + t * ROW, -ONE, CHUNK // LANES
                )
        tile = claim_tile(args)
    buffer[0] = 0  # alive until here


# ---------------------------------------------------------------- forward


def column_blocks(value_dim: int, width: int) -> int:
    return -(-padded(value_dim) // (LANES * width))


@inner
def columns_of(args, tile):
    """(row, head, first column, end column) of a tile."""
    wide = LANES * args.width
    cuts = (args.value_dim + wide - 1) // wide
    begin = tile % cuts * wide
    return (
        tile // cuts // args.heads,
        tile // cuts % args.heads,
        begin,
        min(begin + wide, args.value_dim),
    )


@inner
def panel_bytes(args):
    return vectors_of(args.key_dim) * LANES * BYTES


@inner
def state_at(args, b, h, begin):
    """The address of a head's state [V / 16, K, 16] in `state`, from column `begin` on."""
    return args.state + (
        (b * args.heads + h) * vectors_of(args.value_dim) + begin // LANES
    ) * panel_bytes(args)


@inner
def checkpoint_at(args, b, h, slot, begin):
    """The same of the checkpoint in slot `slot`."""
    head = (b * args.slots + slot) * args.heads + h
    return args.checkpoints + (head * vectors_of(args.value_dim) + begin // LANES) * panel_bytes(
        args
    )


@inner
def solve(system, betas, rows, right, written, step, vectors):
    """The right-hand sides R at `right` become E, and U = diag(beta) E at `written`."""
    for block in range(0, rows, LANES):
        target, above = right + block * step, minus_a(system) + block * ROW
        if block:
            multiply(
                target, step, BYTES, above, ROW, 4, written, step, BYTES, LANES, vectors, block
            )
        for t in range(LANES):
            row, before = target + t * step, written + block * step
            add_products(row, above + t * ROW + 4 * block, 4, before, step, vectors, t)
            scale_row(before + t * step, row, betas[block + t], vectors)


@inner
def subtract_recall(args, system, right, recall, rows, step, vectors):
    """R = V - diag(e^g) K S, of V at `right` and K S at `recall`."""
    for t in range(rows):
        scale = -decay_from_start(system)[t] if args.decay else np.float32(-1)
        add_row(right + t * step, scale, recall + t * step, vectors)


def _advance(tiles, call, first, count, systems, width, state, checkpoints, out):
    slots = 0 if checkpoints is None else checkpoints.shape[1]
    expect_tiles(tiles, call.heads * column_blocks(call.v.shape[3], width))
    return call.record(
        *(first, count),
        systems=address(systems, FLOAT32, call.heads * count * SYSTEM),
        width=width,
        state=address(state, FLOAT32, call.heads * call.state),
        checkpoints=optional(checkpoints, FLOAT32, call.heads * slots * call.state),
        slots=slots,
        out=call.values(out),
    )


@kernel(Delta, _advance)
def advance(args):
    """The chunks of a segment: `state` becomes the state behind it, the states at the start of
    chunks go to `checkpoints`, and what is read to `out`. Tiles: (row, head, block of columns)."""
    key_vectors, panel = vectors_of(args.key_dim), panel_bytes(args)
    key_step, step = row_bytes(args.key_dim), row_bytes(LANES * args.width)
    buffer = np.empty(
        (panel * args.width + 2 * CHUNK * key_step + 4 * CHUNK * step) // 4 + 8 * LANES,
        np.float32,
    )
    state = aligned(buffer)
    keys = state + args.width * panel  # then, without a gap, the queries
    recall = keys + 2 * CHUNK * key_step  # K S, then Q S
    right = recall + 2 * CHUNK * step
    written = right + CHUNK * step
    betas_buffer = written + CHUNK * step
    tile = claim_tile(args)
    while tile >= 0:
        b, h, begin, end = columns_of(args, tile)
        vectors = vectors_of(end - begin)
        count = chunks_of(args, b)
        if count:
            copy_vectors(state_at(args, b, h, begin), state, vectors * panel // BYTES)
        for n in range(count):
            chunk, system = chunk_at(args, b, args.first + n), system_at(args, b, h, n)
            rows = rounded_up(chunk.tokens)
            if chunk.entry == FRESH:
                clear(state, vectors * panel // BYTES)
            elif chunk.entry >= 0 and args.checkpoints:
                copy_vectors(
                    state, checkpoint_at(args, b, h, chunk.entry, begin), vectors * panel // BYTES
                )
            queries = keys + rows * key_step
            load_rows(args, args.k, b, h, chunk, args.key_dim, 0, args.key_dim, keys, key_step)
            load_rows(args, args.q, b, h, chunk, args.key_dim, 0, args.key_dim, queries, key_step)
            load_rows(args, args.v, b, h, chunk, args.value_dim, begin, end, right, step)
            betas = load_betas(args, b, h, chunk, betas_buffer)
            read = recall + rows * step
            clear(recall, 2 * rows * step // BYTES)
            if chunk.entry != FRESH:
                multiply(
                    recall, step, BYTES, keys, key_step, 4, state, BYTES, panel,
                    2 * rows, vectors, args.key_dim,
                )  # fmt: skip
                subtract_recall(args, system, right, recall, rows, step, vectors)
                if args.decay:
                    for t in range(rows):
                        scale_row(
                            read + t * step, read + t * step, decay_from_start(system)[t], vectors
                        )
            solve(system, betas, rows, right, written, step, vectors)
            for at in range(0, rows, LANES):
                multiply(
                    read + at * step, step, BYTES, p_of(system) + at * ROW, ROW, 4,
                    written, step, BYTES, LANES, vectors, at + LANES,
                )  # fmt: skip
            store_rows(args, args.out, b, h, chunk, args.value_dim, begin, end, read, step)
            if args.decay:
                scale_vectors(
                    state, decay_from_start(system)[chunk.tokens - 1], vectors * panel // BYTES
                )
                for t in range(rows):
                    scale_row(
                        written + t * step, written + t * step, decay_to_end(system)[t], vectors
                    )
            multiply(
                state, BYTES, panel, keys, 4, key_step, written, step, BYTES,
                key_vectors * LANES, vectors, chunk.tokens,
            )  # fmt: skip
        if count:
            copy_vectors(state, state_at(args, b, h, begin), vectors * panel // BYTES)
        tile = claim_tile(args)
    buffer[0] = ZERO  # alive until here


# ---------------------------------------------------------------- backward


@inner
def between_at(args, tensor, b, h, n):
    """The address of the segment's chunk n in `errors` or `d_written`."""
    head = (b * args.heads + h) * args.chunk_count + n
    return tensor + head * CHUNK * vectors_of(args.value_dim) * BYTES


@inner
def d_state_at(args, b, h, n):
    """The address of the segment's chunk n in `d_states`."""
    head = (b * args.heads + h) * args.chunk_count + n
    return args.d_states + head * vectors_of(args.value_dim) * panel_bytes(args)


@inner
def before_at(args, b, h, entry, begin):
    """The address of the state before a chunk that is not FRESH."""
    if entry == ENTERS:
        return state_at(args, b, h, begin)
    return checkpoint_at(args, b, h, entry, begin)


@inner
def solve_transposed(system, betas, rows, right, scaled, step, vectors):
    """dU at `right` becomes Z, and Y = diag(beta) Z at `scaled`."""
    for block in range(rows - LANES, -1, -LANES):
        target, after = right + block * step, block + LANES
        if after < rows:
            below = minus_a(system) + after * ROW + 4 * block
            multiply(
                target, step, BYTES, below, 4, ROW, scaled + after * step, step, BYTES,
                LANES, vectors, rows - after,
            )  # fmt: skip
        for t in range(LANES - 1, -1, -1):
            row, behind = target + t * step, scaled + (block + t + 1) * step
            below = minus_a(system) + (block + t + 1) * ROW + 4 * (block + t)
            add_products(row, below, ROW, behind, step, vectors, LANES - 1 - t)
            scale_row(behind - step, row, betas[block + t], vectors)


def _backward(call, first, count, systems, width, state, checkpoints, grad, gradients, scratch):
    slots, chunks = checkpoints.shape[1], call.heads * count
    dv, dq, dk, d_beta, d_decay, d_state = gradients
    d_states, errors, d_written = scratch
    values = chunks * CHUNK * padded(call.v.shape[3])
    if (d_decay is None) != (call.decay is None):
        raise UserError("the gradient of a decay (compiled delta): pass it where there is one")
    return call.record(
        *(first, count),
        systems=address(systems, FLOAT32, chunks * SYSTEM),
        width=width,
        state=address(state, FLOAT32, call.heads * call.state),
        checkpoints=address(checkpoints, FLOAT32, call.heads * slots * call.state),
        slots=slots,
        d_out=call.values(grad),
        d_v=call.values(dv),
        d_q=call.keys(dq),
        d_k=call.keys(dk),
        d_beta=call.tokens(d_beta),
        d_decay=call.tokens(d_decay),
        d_state=address(d_state, FLOAT32, call.heads * call.state),
        d_states=address(d_states, FLOAT32, chunks * call.state),
        errors=address(errors, FLOAT32, values),
        d_written=address(d_written, FLOAT32, values),
    )


def _retreat(tiles, call, first, count, systems, width, *rest):
    expect_tiles(tiles, call.heads * column_blocks(call.v.shape[3], width))
    return _backward(call, first, count, systems, width, *rest)


def _collect(tiles, call, first, count, *rest):
    expect_tiles(tiles, call.heads * count)
    return _backward(call, first, count, *rest)


@kernel(Delta, _retreat)
def retreat(args):
    """d_v, d_state, d_states, errors and d_written of a segment. Tiles: (row, head, block of
    columns)."""
    size, key_vectors, panel = args.key_dim, vectors_of(args.key_dim), panel_bytes(args)
    key_step, step = row_bytes(size), row_bytes(LANES * args.width)
    buffer = np.empty(
        (panel * args.width + 2 * CHUNK * key_step + 6 * CHUNK * step) // 4 + 8 * LANES,
        np.float32,
    )
    d_state = aligned(buffer)
    keys = d_state + args.width * panel  # then, without a gap, the queries
    recall = keys + 2 * CHUNK * key_step  # K S, then K dS'; then, without a gap, what enters dS
    errors = recall + 2 * CHUNK * step
    written = errors + CHUNK * step
    d_out = written + CHUNK * step
    d_v = d_out + CHUNK * step
    betas_buffer = d_v + CHUNK * step
    whole = vectors_of(args.value_dim) * BYTES
    tile = claim_tile(args)
    while tile >= 0:
        b, h, begin, end = columns_of(args, tile)
        vectors = vectors_of(end - begin)
        state_vectors, count = vectors * panel // BYTES, chunks_of(args, b)
        carried = args.d_state + state_at(args, b, h, begin) - args.state
        if count:
            copy_vectors(carried, d_state, state_vectors)
        for n in range(count - 1, -1, -1):
            chunk, system = chunk_at(args, b, args.first + n), system_at(args, b, h, n)
            rows = rounded_up(chunk.tokens)
            queries = keys + rows * key_step
            load_rows(args, args.k, b, h, chunk, size, 0, size, keys, key_step)
            load_rows(args, args.q, b, h, chunk, size, 0, size, queries, key_step)
            load_rows(args, args.v, b, h, chunk, args.value_dim, begin, end, errors, step)
            load_rows(args, args.d_out, b, h, chunk, args.value_dim, begin, end, d_out, step)
            betas = load_betas(args, b, h, chunk, betas_buffer)
            # E and U, as in the forward pass
            if chunk.entry != FRESH:
                before = before_at(args, b, h, chunk.entry, begin)
                clear(recall, rows * step // BYTES)
                multiply(
                    recall,
                    step,
                    BYTES,
                    keys,
                    key_step,
                    4,
                    before,
                    BYTES,
                    panel,
                    rows,
                    vectors,
                    size,
                )
                subtract_recall(args, system, errors, recall, rows, step, vectors)
            solve(system, betas, rows, errors, written, step, vectors)
            # dU, Z and Y
            d_written = recall
            clear(d_written, rows * step // BYTES)
            multiply(
                d_written,
                step,
                BYTES,
                keys,
                key_step,
                4,
                d_state,
                BYTES,
                panel,
                rows,
                vectors,
                size,
            )
            if args.decay:
                for t in range(rows):
                    scale_row(
                        d_written + t * step, d_written + t * step, decay_to_end(system)[t], vectors
                    )
            for at in range(0, rows, LANES):
                multiply(
                    d_written + at * step, step, BYTES, p_of(system) + at * ROW + 4 * at, 4, ROW,
                    d_out + at * step, step, BYTES, LANES, vectors, rows - at,
                )  # fmt: skip
            solve_transposed(system, betas, rows, d_written, d_v, step, vectors)
            for t in range(rows):
                row = t * whole + 4 * begin
                copy_vectors(
                    errors + t * step, between_at(args, args.errors, b, h, n) + row, vectors
                )
                copy_vectors(
                    d_written + t * step, between_at(args, args.d_written, b, h, n) + row, vectors
                )
            store_rows(args, args.d_v, b, h, chunk, args.value_dim, begin, end, d_v, step)
            # dS
            target = d_state_at(args, b, h, n) + begin // LANES * panel
            copy_vectors(d_state, target, state_vectors)
            if chunk.entry == FRESH:
                clear(d_state, state_vectors)
                continue
            for t in range(rows):
                scale = decay_from_start(system)[t] if args.decay else ONE
                scale_row(recall + t * step, d_v + t * step, -scale, vectors)
                scale_row(recall + (rows + t) * step, d_out + t * step, scale, vectors)
            if args.decay:
                scale_vectors(d_state, decay_from_start(system)[chunk.tokens - 1], state_vectors)
            multiply(
                d_state, BYTES, panel, keys, 4, key_step, recall, step, BYTES,
                key_vectors * LANES, vectors, 2 * rows,
            )  # fmt: skip
        if count:
            copy_vectors(d_state, carried, state_vectors)
        tile = claim_tile(args)
    buffer[0] = ZERO  # alive until here


@inner
def times_transposed(args, c, c_row, a, a_row, rows, state, strip):
    """c [rows, K] += a [rows, V] times the transpose of a state in panels."""
    values, panel, size = vectors_of(args.value_dim), panel_bytes(args), vectors_of(args.key_dim)
    strip_bytes = values * LANES * BYTES
    for first in range(0, size, _STRIPS):
        strips = min(_STRIPS, size - first)
        for i in range(strips):
            for j in range(values):
                source = state + j * panel + (first + i) * LANES * BYTES
                transpose(source, BYTES, strip + i * strip_bytes + j * LANES * BYTES)
        multiply(
            c + first * BYTES, c_row, BYTES, a, a_row, 4, strip, BYTES, strip_bytes,
            rows, strips, values * LANES,
        )  # fmt: skip


@inner
def through_decays(d_sums, d_matrix, matrix, rows, sign):
    """To the gradient of g: matrix[t, s] has the factor e^(g_t - g_s)."""
    for t in range(rows):
        x, y = float32s(d_matrix + t * ROW, CHUNK), float32s(matrix + t * ROW, CHUNK)
        for s in range(t):
            weight = sign * np.float64(x[s]) * np.float64(y[s])
            d_sums[t] += weight
            d_sums[s] -= weight


@kernel(Delta, _collect)
def collect(args):
    """d_q, d_k, d_beta and d_decay of a segment, after `retreat`. Tiles: (row, head, chunk)."""
    size, key_vectors, vectors = args.key_dim, vectors_of(args.key_dim), vectors_of(args.value_dim)
    key_step, step, whole = row_bytes(size), row_bytes(args.value_dim), vectors * BYTES
    buffer = np.empty(
        (CHUNK * (4 * key_step + 3 * step + whole + 2 * ROW) + _STRIPS * LANES * whole) // 4
        + 16 * LANES,
        np.float32,
    )
    keys = aligned(buffer)
    queries = keys + CHUNK * key_step
    dq = queries + CHUNK * key_step  # then, without a gap, dk
    d_out = dq + 2 * CHUNK * key_step  # then, without a gap, -Y
    written = d_out + 2 * CHUNK * step
    panels = written + CHUNK * step
    dp = panels + CHUNK * whole
    da = dp + CHUNK * ROW
    strip = da + CHUNK * ROW
    betas_buffer = strip + _STRIPS * LANES * whole
    between = betas_buffer + 4 * BYTES
    d_sums, dots = np.empty(CHUNK), np.empty(CHUNK)
    tile = claim_tile(args)
    while tile >= 0:
        n, h, b = (
            tile % args.chunk_count,
            tile // args.chunk_count % args.heads,
            tile // args.chunk_count // args.heads,
        )
        if n >= chunks_of(args, b):
            tile = claim_tile(args)
            continue
        chunk, system = chunk_at(args, b, args.first + n), system_at(args, b, h, n)
        rows, continues = rounded_up(chunk.tokens), chunk.entry != FRESH
        dk, minus_d_v = dq + rows * key_step, d_out + rows * step
        load_rows(args, args.k, b, h, chunk, size, 0, size, keys, key_step)
        load_rows(args, args.q, b, h, chunk, size, 0, size, queries, key_step)
        load_rows(args, args.d_out, b, h, chunk, args.value_dim, 0, args.value_dim, d_out, step)
        betas = load_betas(args, b, h, chunk, betas_buffer)
        for t in range(rows):
            e = between_at(args, args.errors, b, h, n) + t * whole
            z = between_at(args, args.d_written, b, h, n) + t * whole
            scale_row(written + t * step, e, betas[t], vectors)
            scale_row(minus_d_v + t * step, z, -betas[t], vectors)
            if t < chunk.tokens:
                at = token_of(args, b, chunk, t) * args.heads + h
                float32s(args.d_beta + 4 * at, 1)[0] = dot_vectors(e, z, vectors)
        transpose_rows(written, step, rows, args.value_dim, panels)
        lower_product(dp, d_out, step, panels, args.value_dim, rows)
        lower_product(da, minus_d_v, step, panels, args.value_dim, rows)
        keep_lower(dp, rows, False)
        keep_lower(da, rows, True)
        d_sums[:] = 0.0
        if args.decay:
            through_decays(d_sums, dp, p_of(system), rows, 1.0)
            through_decays(d_sums, da, minus_a(system), rows, -1.0)
            multiply_decays(args, system, rows, dp, between)
            multiply_decays(args, system, rows, da, between)
        # through the states before and behind the chunk
        clear(dq, 2 * rows * key_step // BYTES)
        behind = d_state_at(args, b, h, n)
        if continues:
            before = before_at(args, b, h, chunk.entry, 0)
            times_transposed(args, dq, key_step, d_out, step, 2 * rows, before, strip)
            if args.decay:
                scale_rows(dq, key_step, decay_from_start(system), rows, key_vectors)
                scale_rows(dk, key_step, decay_from_start(system), rows, key_vectors)
                shrunk = 0.0
                for j in range(vectors):
                    place = j * panel_bytes(args)
                    for i in range(key_vectors * LANES):
                        at = place + i * BYTES
                        shrunk += dot_vectors(before + at, behind + at, 1)
                d_sums[chunk.tokens - 1] += shrunk * decay_from_start(system)[chunk.tokens - 1]
        if args.decay:
            for t in range(rows):
                dots[t] = dot_vectors(dk + t * key_step, keys + t * key_step, key_vectors)
                d_sums[t] += dots[t] + dot_vectors(
                    dq + t * key_step, queries + t * key_step, key_vectors
                )
            scale_rows(written, step, decay_to_end(system), rows, vectors)
        times_transposed(args, dk, key_step, written, step, rows, behind, strip)
        if args.decay:
            for t in range(rows):
                weight = dot_vectors(dk + t * key_step, keys + t * key_step, key_vectors) - dots[t]
                d_sums[t] -= weight
                d_sums[chunk.tokens - 1] += weight
            later = 0.0
            for t in range(chunk.tokens - 1, -1, -1):
                later -= d_sums[t]
                at = token_of(args, b, chunk, t) * args.heads + h
                float32s(args.d_decay + 4 * at, 1)[0] = later
        # inside the chunk
        for t in range(rows):
            row = float32s(da + t * ROW, CHUNK)
            for s in range(t):
                float32s(da + s * ROW, CHUNK)[t] = row[s]
        for at in range(0, rows, LANES):
            multiply(
                dq + at * key_step, key_step, BYTES, dp + at * ROW, ROW, 4, keys, key_step, BYTES,
                LANES, key_vectors, at + LANES,
            )  # fmt: skip
            multiply(
                dk + at * key_step, key_step, BYTES, dp + at * ROW + 4 * at, 4, ROW,
                queries + at * key_step, key_step, BYTES, LANES, key_vectors, rows - at,
            )  # fmt: skip
        multiply(dk, key_step, BYTES, da, ROW, 4, keys, key_step, BYTES, rows, key_vectors, rows)
        store_rows(args, args.d_q, b, h, chunk, size, 0, size, dq, key_step)
        store_rows(args, args.d_k, b, h, chunk, size, 0, size, dk, key_step)
        tile = claim_tile(args)
    buffer[0] = ZERO
