"""The Triton kernels of the delta-rule memory forwards (see `triton_delta` for the maths).

    prepare   the inverse of each chunk's triangular system
    scan      the state before each chunk, and what each token writes
    outputs   what each token reads

Time is cut into chunks of C tokens on the grid of the row, so a chunk may hold several documents.
Its tokens are numbered by segments: those before the first position 0 are segment 0 and see the
state before the chunk; pairs of tokens meet only inside a segment; the last segment makes the state
after the chunk. Padding has beta 0 and decay 0, so it changes nothing.

The state is tiles [KB, VB] of float32 in registers. Columns of the state share nothing, so a block
of VB columns is a program of its own. `solved` [B, H, chunks, C, C] are the inverses; `states`
[B, H, chunks, K, V] and `writes` [B, H, chunks, C, V] are operands of products, in the dtype of the
inputs. `gates` [B, H, chunks, 5, C] exist where there is a decay or there are documents (GATED):

    FADE      G: the sum of -decay over the segment up to the token
    ENTER     exp(G) in segment 0, otherwise 0: how much of the state before the chunk is seen
    LEAVE     exp(G_last - G) in the last segment, otherwise 0: how much of a write remains
    SEGMENT   the segment's number
    WRITE     beta; NaN where k, beta or decay is not finite

With documents (DOCS) a NaN must not reach another document through a product with 0: the operand
that a product sums over is made finite, and the outputs that a NaN reaches are set to NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_window.ops import triton_interpreter

triton_interpreter.repair()

FADE = tl.constexpr(0)
ENTER = tl.constexpr(1)
LEAVE = tl.constexpr(2)
SEGMENT = tl.constexpr(3)
WRITE = tl.constexpr(4)
GATES = tl.constexpr(5)  # of them
BLOCK = tl.constexpr(16)  # rows of the systems that are solved row by row


@triton.jit
def tokens(positions, b, n, h, time, H: tl.constexpr, C: tl.constexpr, DOCS: tl.constexpr):
    """The tokens of chunk n: their numbers among all [B, T, H], and which are not padding."""
    t = n * C + tl.arange(0, C)
    live = t < time
    if DOCS:
        live = tl.load(positions + b * time + t, live, -1) >= 0
    return (b * time + t) * H + h, live


@triton.jit
def tile(x, row, live, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Elements first ... first + BLOCK of the rows [SIZE] of x; 0 where not `live` (None: all
    are)."""
    column = first + tl.arange(0, BLOCK)[None, :]
    at = x + row[:, None] * SIZE + column
    if SIZE % BLOCK == 0:
        if live is None:
            return tl.load(at)
        else:  # noqa: RET505 (the compiler follows what comes after a return)
            return tl.load(at, live[:, None], 0.0)
    elif live is None:
        return tl.load(at, column < SIZE, 0.0)
    else:
        return tl.load(at, live[:, None] & (column < SIZE), 0.0)


@triton.jit
def store_tile(x, row, first, value, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write rows that are all inside."""
    column = first + tl.arange(0, BLOCK)[None, :]
    at = x + row[:, None] * SIZE + column
    if SIZE % BLOCK == 0:
        tl.store(at, value.to(x.dtype.element_ty))
    else:
        tl.store(at, value.to(x.dtype.element_ty), column < SIZE)


@triton.jit
def load_state(
    x, number, k, v,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr
):  # fmt: skip
    """Tile (k, v) of state `number` of x [*, K, V]."""
    row = k + tl.arange(0, KB)[:, None]
    column = v + tl.arange(0, VB)[None, :]
    at = x + number * K * V + row * V + column
    if K % KB == 0 and V % VB == 0:
        return tl.load(at)
    else:  # noqa: RET505
        return tl.load(at, (row < K) & (column < V), 0.0)


@triton.jit
def store_state(
    x, value, number, k, v,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr
):  # fmt: skip
    row = k + tl.arange(0, KB)[:, None]
    column = v + tl.arange(0, VB)[None, :]
    at = x + number * K * V + row * V + column
    if K % KB == 0 and V % VB == 0:
        tl.store(at, value)
    else:
        tl.store(at, value, (row < K) & (column < V))


@triton.jit
def first_state(
    x, number, column,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """All tiles of the columns of a state, in float32; zeros if there is none."""
    state = ()
    for k in tl.static_range(0, K, KB):
        if GIVEN:
            state = state + (load_state(x, number, k, column, K, V, KB, VB).to(tl.float32),)  # noqa: RUF005
        else:
            state = state + (tl.zeros((KB, VB), tl.float32),)  # noqa: RUF005
    return state


@triton.jit
def gate(gates, chunk, which: tl.constexpr, C: tl.constexpr):
    return tl.load(gates + (chunk * GATES + which) * C + tl.arange(0, C))


@triton.jit
def amounts(beta, gates, chunk, row, live, C: tl.constexpr, GATED: tl.constexpr):
    """How much each token writes [C]."""
    if GATED:
        return gate(gates, chunk, WRITE, C)
    else:  # noqa: RET505
        return tl.load(beta + row, live, 0.0).to(tl.float32)


@triton.jit
def kept(gates, chunk, C: tl.constexpr, GATED: tl.constexpr):
    """How much of the state before the chunk is in the state after it."""
    if GATED:
        return tl.load(gates + (chunk * GATES + ENTER) * C + C - 1)
    else:  # noqa: RET505
        return 1.0


@triton.jit
def weighted(x, gates, chunk, which: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr):
    """The rows of x [C, *] times a gate; 0 where the gate is 0, whatever x is."""
    if GATED:
        w = gate(gates, chunk, which, C)[:, None]
        x = tl.where(w != 0.0, w * x, 0.0)
    return x


@triton.jit
def where_gate(x, gates, chunk, which: tl.constexpr, C: tl.constexpr, DOCS: tl.constexpr):
    """The rows of x [C, *] where a gate is not 0, and 0 elsewhere, whatever x is."""
    if DOCS:
        w = gate(gates, chunk, which, C)[:, None]
        x = tl.where(w != 0.0, x, tl.zeros_like(x))
    return x


@triton.jit
def scaled(state, factor, GATED: tl.constexpr):
    """A state times a number; 0 where that is 0, whatever the state is."""
    if GATED:
        state = tl.where(factor != 0.0, factor * state, 0.0)
    return state


@triton.jit
def pairs(gates, chunk, C: tl.constexpr, GATED: tl.constexpr):
    """Which tokens (row) see which (column), and exp(G_row - G_column) there."""
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    fade = 1.0
    if GATED:
        g = gate(gates, chunk, FADE, C)
        s = gate(gates, chunk, SEGMENT, C)
        seen = seen & (s[:, None] == s[None, :])
        fade = tl.exp(tl.where(seen, g[:, None] - g[None, :], 0.0))
    return seen, fade


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def finite(x, DOCS: tl.constexpr):
    """x as the operand that a product sums over: with 0 for what is not finite."""
    if DOCS:
        x = tl.where(is_finite(x), x, tl.zeros_like(x))
    return x


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def spoil(result, x, gates, chunk, C: tl.constexpr, DOCS: tl.constexpr):
    """`result` [C, *], NaN where a token sees one whose x in that column is not finite.

    The largest number of a segment that has lost a token, up to a token's place, is that of its own
    segment if that has. (As a product of matrices this was compiled wrongly for Hopper by the
    assembler of CUDA 12.8, see `triton_launch`.)
    """
    if DOCS:
        own = gate(gates, chunk, SEGMENT, C)[:, None] + 1.0
        lost = tl.associative_scan(tl.where(is_finite(x), 0.0, own), 0, larger)
        result = tl.where(lost == own, float("nan"), result)
    return result


@triton.jit
def invert(a, C: tl.constexpr, SOLVE: tl.constexpr):
    """(I + a)^-1 of a strictly lower a [C, C]: rows of the diagonal blocks by substitution, and
    from blocks of n to blocks of 2n by X - X a' X, with a' what couples the two.

    Never by powers of a, which overflow for equal keys.
    """
    i = tl.arange(0, C)
    row, column = i[:, None], i[None, :]
    PARTS: tl.constexpr = C // BLOCK
    # the diagonal blocks [PARTS, BLOCK, BLOCK]; other terms of the sum are 0
    blocks = tl.where(row // BLOCK == column // BLOCK, a, 0.0)
    blocks = tl.sum(tl.reshape(blocks, (PARTS, BLOCK, PARTS, BLOCK)), 2)
    r = tl.arange(0, BLOCK)[None, :, None]
    x = -blocks
    for m in tl.range(1, BLOCK, num_stages=1):
        here = r == m
        line = tl.sum(tl.where(here, blocks, 0.0), 1)  # [PARTS, BLOCK]: row m of each block
        more = tl.sum(tl.where(r < m, line[:, :, None] * x, 0.0), 1)
        x = tl.where(here, -line[:, None, :] - more[:, None, :], x)
    spread = tl.broadcast_to(x[:, :, None, :], (PARTS, BLOCK, PARTS, BLOCK))
    inverse = tl.where(row // BLOCK == column // BLOCK, tl.reshape(spread, (C, C)), 0.0)
    inverse = tl.where(row == column, 1.0, inverse)
    LEVELS: tl.constexpr = 0 if C == 16 else (1 if C == 32 else 2)
    for level in tl.static_range(LEVELS):
        size = BLOCK << level
        couples = (row // (2 * size) == column // (2 * size)) & (row // size != column // size)
        link = tl.dot(tl.where(couples, a, 0.0), inverse, input_precision=SOLVE)
        inverse = inverse - tl.dot(inverse, link, input_precision=SOLVE)
    return inverse


@triton.jit(do_not_specialize=["time", "chunks"])
def prepare(
    k, beta, decay, positions, solved, gates, time, chunks,
    H: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    DOCS: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr
):  # fmt: skip
    """Write the inverse of I + A for each chunk, A[i, j] = beta_i exp(G_i - G_j) k_i . k_j for
    j < i, and its gates."""
    GATED: tl.constexpr = DECAY or DOCS
    pid = tl.program_id(0)
    h, n, b = pid % H, pid // H % chunks, (pid // H // chunks).to(tl.int64)
    chunk = (b * H + h) * chunks + n
    row, live = tokens(positions, b, n, h, time, H, C, DOCS)
    overlap = tl.zeros((C, C), tl.float32)
    for first in range(0, K, KB):
        x = tile(k, row, live, first, K, KB)
        overlap = tl.dot(x, tl.trans(x), overlap, input_precision=PRECISION)
    amount = tl.load(beta + row, live, 0.0).to(tl.float32)
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    if GATED:
        loss = tl.zeros((C,), tl.float32)
        segment = tl.zeros((C,), tl.int32)
        if DECAY:
            loss = tl.load(decay + row, live, 0.0).to(tl.float32)
        if DOCS:
            t = n * C + i
            starts = tl.load(positions + b * time + t, t < time, -1) == 0
            segment = tl.cumsum(starts.to(tl.int32), 0)
            length = tl.sum(tl.where(i[:, None] == i[None, :], overlap, 0.0), 1)
            sound = is_finite(length) & is_finite(amount) & is_finite(loss)
            amount = tl.where(sound, amount, float("nan"))
            loss = tl.where(sound, loss, 0.0)
            seen = seen & (segment[:, None] == segment[None, :])
        last = tl.max(segment, 0)
        if DECAY:
            fade = -tl.sum(tl.where(seen, loss[None, :], 0.0), 1)
            end = -tl.sum(tl.where(segment == last, loss, 0.0), 0)
            overlap *= tl.exp(tl.where(seen, fade[:, None] - fade[None, :], 0.0))
        else:
            fade = tl.zeros((C,), tl.float32)
            end = 0.0
        to = gates + chunk * GATES * C + i
        tl.store(to + FADE * C, fade)
        tl.store(to + ENTER * C, tl.where(segment == 0, tl.exp(fade), 0.0))
        tl.store(to + LEAVE * C, tl.where(segment == last, tl.exp(end - fade), 0.0))
        tl.store(to + SEGMENT * C, segment.to(tl.float32))
        tl.store(to + WRITE * C, amount)
    a = finite(amount[:, None] * overlap, DOCS)
    a = tl.where(seen & (i[:, None] != i[None, :]), a, 0.0)
    at = chunk * C * C + i[:, None] * C + i[None, :]
    tl.store(solved + at, invert(a, C, SOLVE))


@triton.jit(do_not_specialize=["time", "chunks"])
def scan(
    k, v, beta, positions, solved, gates, first, states, writes, final, time, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    C: tl.constexpr, GIVEN: tl.constexpr, GATED: tl.constexpr, DOCS: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr
):  # fmt: skip
    """Run a block of the state's columns through all chunks: store the state before each chunk, the
    writes U = solved (beta (V - exp(G) K S)) of its tokens, and the state after all."""
    BLOCKS: tl.constexpr = (V + VB - 1) // VB
    PARTS: tl.constexpr = (K + KB - 1) // KB
    DTYPE: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    own = (pid // BLOCKS).to(tl.int64)  # the row and the head
    b, h = own // H, own % H
    column = pid % BLOCKS * VB
    i = tl.arange(0, C)
    state = first_state(first, own, column, K, V, KB, VB, GIVEN)
    for n in range(chunks):
        chunk = own * chunks + n
        row, live = tokens(positions, b, n, h, time, H, C, DOCS)
        keys = ()
        read = tl.zeros((C, VB), tl.float32)
        for part in tl.static_range(PARTS):
            key = tile(k, row, live, part * KB, K, KB)
            if key.dtype != tl.float32:  # those would fill the registers: loaded twice
                keys = keys + (key,)  # noqa: RUF005
            operand = state[part].to(DTYPE)
            store_state(states, operand, chunk, part * KB, column, K, V, KB, VB)
            read = tl.dot(key, operand, read, input_precision=PRECISION)
        read = weighted(read, gates, chunk, ENTER, C, GATED)
        target = tile(v, row, live, column, V, VB).to(tl.float32) - read
        target = amounts(beta, gates, chunk, row, live, C, GATED)[:, None] * target
        inverse = tl.load(solved + chunk * C * C + i[:, None] * C + i[None, :])
        written = tl.dot(inverse, finite(target, DOCS), input_precision=SOLVE)
        written = spoil(written, target, gates, chunk, C, DOCS)
        store_tile(writes, chunk * C + i, column, written, V, VB)
        written = weighted(written, gates, chunk, LEAVE, C, GATED).to(DTYPE)
        factor = kept(gates, chunk, C, GATED)
        after = ()
        for part in tl.static_range(PARTS):
            if k.dtype.element_ty == tl.float32:
                key = tile(k, row, live, part * KB, K, KB)
            else:
                key = keys[part]
            key = where_gate(key, gates, chunk, LEAVE, C, DOCS)
            moved = scaled(state[part], factor, GATED)
            moved = tl.dot(tl.trans(key), written, moved, input_precision=PRECISION)
            after = after + (moved,)  # noqa: RUF005
        state = after
    for part in tl.static_range(PARTS):
        store_state(final, state[part], own, part * KB, column, K, V, KB, VB)


@triton.jit(do_not_specialize=["time", "chunks"])
def outputs(
    q, k, positions, gates, states, writes, out, time, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    C: tl.constexpr, GATED: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """out = exp(G) Q S + P U for each chunk, P[i, j] = exp(G_i - G_j) q_i . k_j for j <= i."""
    BLOCKS: tl.constexpr = (V + VB - 1) // VB
    DTYPE: tl.constexpr = q.dtype.element_ty
    pid = tl.program_id(0)
    column, pid = pid % BLOCKS * VB, pid // BLOCKS
    h, n, b = pid % H, pid // H % chunks, (pid // H // chunks).to(tl.int64)
    chunk = (b * H + h) * chunks + n
    row, live = tokens(positions, b, n, h, time, H, C, DOCS)
    i = tl.arange(0, C)
    scores = tl.zeros((C, C), tl.float32)
    read = tl.zeros((C, VB), tl.float32)
    for first in range(0, K, KB):
        query = tile(q, row, live, first, K, KB)
        key = tile(k, row, live, first, K, KB)
        state = load_state(states, chunk, first, column, K, V, KB, VB)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
        read = tl.dot(query, state, read, input_precision=PRECISION)
    seen, fade = pairs(gates, chunk, C, GATED)
    scores = tl.where(seen, scores * fade, 0.0).to(DTYPE)
    written = tile(writes, chunk * C + i, None, column, V, VB)
    result = weighted(read, gates, chunk, ENTER, C, GATED)
    result = tl.dot(scores, finite(written, DOCS), result, input_precision=PRECISION)
    result = spoil(result, written, gates, chunk, C, DOCS)
    if DOCS:
        result = tl.where(live[:, None], result, 0.0)
    to = column + tl.arange(0, VB)[None, :]
    inside = (n * C + i < time)[:, None] & (to < V)
    tl.store(out + row[:, None] * V + to, result.to(DTYPE), inside)
