"""What the kernels of the delta-rule memory stand on: the words of a job, the chunks of a row, rows
of a chunk in scratch memory, and the system of equations of a chunk.

A chunk is up to 64 tokens of one document of one row, padding left out. With G_t the sum of -decay
over the chunk's tokens up to t, S the state before the chunk and

    A[t, s] = e^(G_t - G_s) k_t . k_s,  s < t        P[t, s] = e^(G_t - G_s) q_t . k_s,  s <= t

what is written, u_t = beta_t e_t, and read follows from products of matrices (`chunked_delta`):

    R = V - diag(e^G) K S,   (I + A diag(beta)) E = R,   U = diag(beta) E
    out = diag(e^G) Q S + P U,   S after = e^(G_C) S + sum_s e^(G_C - G_s) k_s u_s^T

The system is solved by substitution, in blocks of 16 tokens: what earlier blocks wrote goes over to
the right-hand side by a product, inside a block token follows token. No inverse is formed: in
float32 one of 64 rows costs three times the error where keys nearly agree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.compiled.addresses import BFLOAT16, FLOAT32, INT64, address, optional
from spectral_window.ops.compiled.delta_products import (
    multiply,
    rounded_up,
    row_bytes,
    scale_row,
    transpose_rows,
)
from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    load,
    store,
)
from spectral_window.ops.compiled.threads import (
    float32s,
    float64s,
    inner,
    int64s,
    kernel,
    take,
)
from spectral_window.ops.compiled.window_rows import (
    ONE,
    ZERO,
    aligned,
    ask,
    blocks_of,
    clear,
    expect_parts,
    fetch,
    padded,
    put,
)
from spectral_window.ops.compiled.window_tiles import exponential

CHUNK = 64
_AHEAD = 8  # rows that are asked for early
FRESH, ENTERS = -1, -2  # a chunk begins with an empty state, or with the one that was given

# the words of a job: addresses and sizes
Q, K, V, BETA, DECAY = range(2, 7)  # DECAY: 0 for none
ORDER, CHUNKS, LENGTHS = 7, 8, 9  # see `plan`
BATCH, TIME, HEADS, KEY_DIM, VALUE_DIM, HALF = range(10, 16)  # HALF: 1 for bfloat16
MOST, FIRST, COUNT = 16, 17, 18  # chunks of a row in CHUNKS; the segment: chunks FIRST ...
SYSTEMS = 19  # of the chunks of a segment, see `SYSTEM`

# A chunk's system, in float32 numbers: -A and P [64, 64], e^G and e^(G_C - G) [64], and G in
# float64 [64]
_MINUS_A, _P, _GROWN = 0, CHUNK * CHUNK, 2 * CHUNK * CHUNK
_LEFT, _SINCE, SYSTEM = _GROWN + CHUNK, _GROWN + 2 * CHUNK, _GROWN + 4 * CHUNK
ROW = 4 * CHUNK  # bytes from one row of A or P to the next


# ---------------------------------------------------------------- chunks


class Chunk(NamedTuple):
    """begin: in ORDER; tokens: how many; entry: FRESH, ENTERS or the number of the
    state that is kept at its beginning."""

    begin: int
    tokens: int
    entry: int


@inner
def chunk_at(job, b, n):
    words = int64s(job[CHUNKS] + 24 * (b * job[MOST] + n), 3)
    return Chunk(words[0], words[1], words[2])


@inner
def chunks_of(job, b):
    """Of the segment, the chunks that row b has."""
    return max(min(int64s(job[LENGTHS], job[BATCH])[b] - job[FIRST], job[COUNT]), 0)


@inner
def token_of(job, b, chunk, t):
    """The index of the chunk's token t and head 0 in [B, T]."""
    return b * job[TIME] + int64s(job[ORDER] + 8 * (b * job[TIME] + chunk.begin), CHUNK)[t]


@inner
def number_at(job, which, token, h):
    return float32s(job[which] + 4 * (token * job[HEADS] + h), 1)[0]


@inner
def place(job, which, token, h, size):
    """The address of `size` numbers of a token and head in a tensor [B, T, H, size]."""
    return job[which] + (token * job[HEADS] + h) * size * (2 if job[HALF] else 4)


@inner
def fetch_rows(job, which, b, h, chunk, size, begin, end, target, step):
    """Columns begin ... end - 1 of the chunk's rows to `target`; what fills the blocks is zeros."""
    blocks = blocks_of(end - begin)
    for t in range(rounded_up(chunk.tokens)):
        if t < chunk.tokens:
            soon = min(t + _AHEAD, chunk.tokens - 1)
            offset = begin * (2 if job[HALF] else 4)
            ask(
                place(job, which, token_of(job, b, chunk, soon), h, size) + offset,
                job[HALF],
                end - begin,
            )
            source = place(job, which, token_of(job, b, chunk, t), h, size) + offset
            fetch(source, job[HALF], end - begin, 0, ONE, target + t * step)
        else:
            clear(target + t * step, blocks)


@inner
def put_rows(job, which, b, h, chunk, size, begin, end, source, step):
    """The reverse: rounded once to the tensor's dtype."""
    for t in range(chunk.tokens):
        target = place(job, which, token_of(job, b, chunk, t), h, size)
        target += begin * (2 if job[HALF] else 4)
        put(source + t * step, job[HALF], end - begin, 0, ONE, target)


@inner
def fetch_betas(job, b, h, chunk, target):
    """beta of the chunk's tokens, zeros behind them, as float32 [64]."""
    betas = float32s(target, CHUNK)
    for t in range(CHUNK):
        betas[t] = ZERO
        if t < chunk.tokens:
            betas[t] = number_at(job, BETA, token_of(job, b, chunk, t), h)
    return betas


# ---------------------------------------------------------------- a chunk's system


@inner
def system_at(job, b, h, n):
    """The address of the system of the segment's chunk n."""
    return job[SYSTEMS] + ((b * job[HEADS] + h) * job[COUNT] + n) * SYSTEM * 4


@inner
def minus_a(system):
    return system + 4 * _MINUS_A


@inner
def p_of(system):
    return system + 4 * _P


@inner
def grown(system):
    """e^G, by which the state before the chunk has shrunk at each token."""
    return float32s(system + 4 * _GROWN, CHUNK)


@inner
def left(system):
    """e^(G_C - G), what is left of each token's write after the chunk."""
    return float32s(system + 4 * _LEFT, CHUNK)


@inner
def since(system):
    """G."""
    return float64s(system + 4 * _SINCE, CHUNK)


@inner
def exponentials(target, numbers):
    """e^x of 64 numbers <= 0."""
    for i in range(CHUNK // LANES):
        store(target + i * BYTES, exponential(load(numbers + i * BYTES)))


@inner
def decays(system, t, target):
    """e^(G_t - G_s) of the tokens s, 0 behind t. The differences are exact to float32."""
    sums, row = since(system), float32s(target, CHUNK)
    for s in range(CHUNK):
        row[s] = min(sums[t] - sums[s], 0.0)
    exponentials(target, target)
    row[t + 1 :] = ZERO


@inner
def find_decays(job, b, h, chunk, system):
    """e^G, e^(G_C - G) and G of a chunk."""
    sums, at, after = since(system), grown(system), left(system)
    total = 0.0
    for t in range(CHUNK):
        if t < chunk.tokens:
            total -= number_at(job, DECAY, token_of(job, b, chunk, t), h)
        sums[t] = total
    for t in range(CHUNK):
        at[t] = sums[t]
        after[t] = total - sums[t]
    exponentials(system + 4 * _GROWN, system + 4 * _GROWN)
    exponentials(system + 4 * _LEFT, system + 4 * _LEFT)


@inner
def lower_product(c, a, a_row, b_panels, size, rows):
    """c [64, 64] = a [rows, size] b^T for the blocks on and below the diagonal, others zeros."""
    clear(c, CHUNK * CHUNK // LANES)
    depth = blocks_of(size) * LANES
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
def by_decays(job, system, rows, c, between):
    """c[t, s] *= e^(G_t - G_s)."""
    if job[DECAY]:
        for t in range(rows):
            decays(system, t, between)
            for i in range(CHUNK // LANES):
                at = c + t * ROW + i * BYTES
                store(at, load(at) * load(between + i * BYTES))


def _systems_words(parts, call, first, count, systems):
    expect_parts(parts, call.heads * count)
    return *call.words(first, count), address(systems, FLOAT32, parts * SYSTEM)


@kernel(_systems_words)
def find_systems(job):
    """The systems of the chunks of a segment. Parts: (row, head, chunk)."""
    size = job[KEY_DIM]
    step, vectors = row_bytes(size), blocks_of(size) * CHUNK
    room = np.empty(LANES * (2 * (CHUNK * step // BYTES) + vectors + 10), np.float32)
    keys = aligned(room)
    queries = keys + CHUNK * step
    panels = queries + CHUNK * step
    between = panels + vectors * BYTES
    part = take(job)
    while part >= 0:
        n, h, b = (
            part % job[COUNT],
            part // job[COUNT] % job[HEADS],
            part // job[COUNT] // job[HEADS],
        )
        if n < chunks_of(job, b):
            chunk, system = chunk_at(job, b, job[FIRST] + n), system_at(job, b, h, n)
            rows = rounded_up(chunk.tokens)
            fetch_rows(job, K, b, h, chunk, size, 0, size, keys, step)
            fetch_rows(job, Q, b, h, chunk, size, 0, size, queries, step)
            transpose_rows(keys, step, rows, size, panels)
            lower_product(minus_a(system), keys, step, panels, size, rows)
            lower_product(p_of(system), queries, step, panels, size, rows)
            keep_lower(minus_a(system), rows, True)
            keep_lower(p_of(system), rows, False)
            if job[DECAY]:
                find_decays(job, b, h, chunk, system)
            by_decays(job, system, rows, minus_a(system), between)
            by_decays(job, system, rows, p_of(system), between)
            for t in range(rows):
                scale_row(
                    minus_a(system) + t * ROW, minus_a(system) + t * ROW, -ONE, CHUNK // LANES
                )
        part = take(job)
    room[0] = 0  # alive until here


# ---------------------------------------------------------------- from Python


class Call(NamedTuple):
    """What all kernels begin with: q, k [B, T, H, K], v [B, T, H, V] float32 or bfloat16, beta and
    decay (or None) [B, T, H] float32, and the chunks of each row as `plan` found them.
    """

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

    def tokens(self, x: Tensor | None, dtype: Any = FLOAT32) -> int:
        """The address of x [B, T, H]; 0 for None."""
        return optional(x, dtype, self.heads * self.q.shape[1])

    def keys(self, x: Tensor) -> int:
        """The address of x [B, T, H, K] in the dtype of q."""
        return address(x, self.q.dtype, self.heads * self.q.shape[1] * self.q.shape[3])

    def values(self, x: Tensor) -> int:
        """The address of x [B, T, H, V] in the dtype of q."""
        return address(x, self.q.dtype, self.heads * self.q.shape[1] * self.v.shape[3])

    def words(self, first: int, count: int) -> tuple[int, ...]:
        """Q ... COUNT: of the segment of `count` chunks that begins with chunk `first`."""
        batch, time, heads, key_dim = self.q.shape
        dtype, most = self.q.dtype, self.chunks.shape[1]
        if dtype is not FLOAT32 and dtype is not BFLOAT16:
            raise UserTypeError(f"{dtype} (compiled delta): expected float32 or bfloat16")
        if first < 0 or count < 1:
            raise UserError(f"chunks {first} ... (compiled delta): expected a segment of a row")
        return (
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
        )


def _plan_words(parts, time, most, positions, order, chunks, lengths):
    return (
        *(time, most, optional(positions, INT64, parts * time)),
        address(order, INT64, parts * time),
        address(chunks, INT64, parts * most * 3),
        address(lengths, INT64, parts),
    )


@kernel(_plan_words)
def plan(job):
    """job: 2 T, 3 most chunks of a row, 4 positions [B, T] or 0, then what is found: 5 order
    [B, T], the columns of each row's tokens; 6 chunks [B, most, 3], see `Chunk`; 7 lengths [B], the
    chunks of each row. Parts: rows. Chunks end with their document or after 64 tokens."""
    part = take(job)
    while part >= 0:
        time, most = job[2], job[3]
        order = int64s(job[5] + 8 * part * time, time)
        chunks = int64s(job[6] + 24 * part * most, 3 * most)
        tokens = found = kept = 0
        for c in range(time):
            p = c + 1
            if job[4]:
                p = int64s(job[4] + 8 * part * time, time)[c]
            if p < 0:
                continue
            if found == 0 or p == 0 or chunks[3 * found - 2] == CHUNK:
                if found == most:
                    break
                entry = kept
                if p == 0:
                    entry = FRESH
                elif found == 0:
                    entry = ENTERS
                else:
                    kept += 1
                chunks[3 * found], chunks[3 * found + 1] = tokens, 0
                chunks[3 * found + 2] = entry
                found += 1
            order[tokens] = c
            chunks[3 * found - 2] += 1
            tokens += 1
        int64s(job[7], job[1])[part] = found
        part = take(job)
