"""The backward pass of the delta-rule memory over a segment of chunks (see `delta_chunks`).

With dO and dS' the gradients of what a chunk reads and of the state behind it, and `.` products of
rows by numbers of each token,

    dU = P^T dO + e^(G_C - G) . K dS',      (I + A^T diag(beta)) Z = dU,   Y = diag(beta) Z
    dV = Y,   dbeta_t = e_t . z_t,          dS = e^(G_C) dS' + Q^T (e^G . dO) - K^T (e^G . Y)
    dP = dO U^T on and below the diagonal,  dA = -Y U^T below it
    dQ = e^G . dO S^T + (D dP) K,           D[t, s] = e^(G_t - G_s), element by element
    dK = -e^G . Y S^T + e^(G_C - G) . U dS'^T + (D dP)^T Q + (D dA + (D dA)^T) K

`retreat` runs from the last chunk to the first with a block of columns of dS, which never meet the
others; it finds E again from the state that was kept, and Z. `collect` then takes each chunk by
itself, for sums over all columns.
"""

from __future__ import annotations

import numpy as np

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import FLOAT32, address
from spectral_window.ops.compiled.delta_chunks import (
    CHUNK,
    COUNT,
    DECAY,
    ENTERS,
    FIRST,
    FRESH,
    HEADS,
    KEY_DIM,
    ROW,
    SYSTEM,
    VALUE_DIM,
    K,
    Q,
    V,
    by_decays,
    chunk_at,
    chunks_of,
    fetch_betas,
    fetch_rows,
    grown,
    keep_lower,
    left,
    lower_product,
    minus_a,
    p_of,
    put_rows,
    system_at,
    token_of,
)
from spectral_window.ops.compiled.delta_forward import (
    STATE,
    WIDTH,
    column_blocks,
    columns_of,
    kept_at,
    panel_bytes,
    solve,
    state_at,
    subtract_held,
)
from spectral_window.ops.compiled.delta_products import (
    add_products,
    copy_vectors,
    dot,
    multiply,
    rounded_up,
    row_bytes,
    scale_row,
    scale_rows,
    scale_vectors,
    transpose_rows,
)
from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    transpose,
)
from spectral_window.ops.compiled.threads import float32s, inner, kernel, take
from spectral_window.ops.compiled.window_rows import (
    ONE,
    ZERO,
    aligned,
    blocks_of,
    clear,
    expect_parts,
    padded,
)

# words of a job behind those of `delta_forward`
GRAD, DV, DQ, DK, DBETA, DDECAY = range(24, 30)  # DDECAY: 0 without decay
D_STATE = 30  # of the state behind the segment, becomes that of the state before it, in panels
D_STATES = 31  # of the state behind each chunk of the segment, in panels
ERRORS, D_WRITTEN = 32, 33  # E and Z of each chunk [64, V], rows padded to whole vectors


@inner
def between_at(job, which, b, h, n):
    """The address of ERRORS or D_WRITTEN of the segment's chunk n."""
    head = (b * job[HEADS] + h) * job[COUNT] + n
    return job[which] + head * CHUNK * blocks_of(job[VALUE_DIM]) * BYTES


@inner
def d_state_at(job, b, h, n):
    """The address in D_STATES of the segment's chunk n."""
    head = (b * job[HEADS] + h) * job[COUNT] + n
    return job[D_STATES] + head * blocks_of(job[VALUE_DIM]) * panel_bytes(job)


@inner
def before_at(job, b, h, entry, begin):
    """The address of the state before a chunk that is not FRESH."""
    if entry == ENTERS:
        return state_at(job, b, h, begin)
    return kept_at(job, b, h, entry, begin)


@inner
def solve_transposed(system, betas, rows, right, scaled, step, blocks):
    """dU at `right` becomes Z, and Y = diag(beta) Z at `scaled`."""
    for block in range(rows - LANES, -1, -LANES):
        target, after = right + block * step, block + LANES
        if after < rows:
            below = minus_a(system) + after * ROW + 4 * block
            multiply(
                target, step, BYTES, below, 4, ROW, scaled + after * step, step, BYTES,
                LANES, blocks, rows - after,
            )  # fmt: skip
        for t in range(LANES - 1, -1, -1):
            row, behind = target + t * step, scaled + (block + t + 1) * step
            below = minus_a(system) + (block + t + 1) * ROW + 4 * (block + t)
            add_products(row, below, ROW, behind, step, blocks, LANES - 1 - t)
            scale_row(behind - step, row, betas[block + t], blocks)


def _words(call, first, count, systems, width, state, kept, grad, gradients, scratch):
    slots, chunks = kept.shape[1], call.heads * count
    dv, dq, dk, d_beta, d_decay, d_state = gradients
    d_states, errors, d_written = scratch
    values = chunks * CHUNK * padded(call.v.shape[3])
    if (d_decay is None) != (call.decay is None):
        raise UserError("the gradient of a decay (compiled delta): pass it where there is one")
    return (
        *call.words(first, count),
        address(systems, FLOAT32, chunks * SYSTEM),
        width,
        address(state, FLOAT32, call.heads * call.state),
        address(kept, FLOAT32, call.heads * slots * call.state),
        slots,
        *(call.values(grad), call.values(dv), call.keys(dq), call.keys(dk)),
        *(call.tokens(d_beta), call.tokens(d_decay)),
        address(d_state, FLOAT32, call.heads * call.state),
        address(d_states, FLOAT32, chunks * call.state),
        address(errors, FLOAT32, values),
        address(d_written, FLOAT32, values),
    )


def _retreat_words(parts, call, first, count, systems, width, *rest):
    expect_parts(parts, call.heads * column_blocks(call.v.shape[3], width))
    return _words(call, first, count, systems, width, *rest)


def _collect_words(parts, call, first, count, *rest):
    expect_parts(parts, call.heads * count)
    return _words(call, first, count, *rest)


@kernel(_retreat_words)
def retreat(job):
    """DV, D_STATE, D_STATES, ERRORS and D_WRITTEN of a segment. Parts: (row, head, block of
    columns)."""
    size, key_blocks, panel = job[KEY_DIM], blocks_of(job[KEY_DIM]), panel_bytes(job)
    key_step, step = row_bytes(size), row_bytes(LANES * job[WIDTH])
    room = np.empty(
        (panel * job[WIDTH] + 2 * CHUNK * key_step + 6 * CHUNK * step) // 4 + 8 * LANES,
        np.float32,
    )
    d_state = aligned(room)
    keys = d_state + job[WIDTH] * panel  # then, without a gap, the queries
    held = keys + 2 * CHUNK * key_step  # K S, then K dS'; then, without a gap, what enters dS
    errors = held + 2 * CHUNK * step
    written = errors + CHUNK * step
    given = written + CHUNK * step
    pulled = given + CHUNK * step
    betas_room = pulled + CHUNK * step
    whole = blocks_of(job[VALUE_DIM]) * BYTES
    part = take(job)
    while part >= 0:
        b, h, begin, end = columns_of(job, part)
        blocks = blocks_of(end - begin)
        vectors, count = blocks * panel // BYTES, chunks_of(job, b)
        carried = job[D_STATE] + state_at(job, b, h, begin) - job[STATE]
        if count:
            copy_vectors(carried, d_state, vectors)
        for n in range(count - 1, -1, -1):
            chunk, system = chunk_at(job, b, job[FIRST] + n), system_at(job, b, h, n)
            rows = rounded_up(chunk.tokens)
            queries = keys + rows * key_step
            fetch_rows(job, K, b, h, chunk, size, 0, size, keys, key_step)
            fetch_rows(job, Q, b, h, chunk, size, 0, size, queries, key_step)
            fetch_rows(job, V, b, h, chunk, job[VALUE_DIM], begin, end, errors, step)
            fetch_rows(job, GRAD, b, h, chunk, job[VALUE_DIM], begin, end, given, step)
            betas = fetch_betas(job, b, h, chunk, betas_room)
            # E and U, as in the forward pass
            if chunk.entry != FRESH:
                before = before_at(job, b, h, chunk.entry, begin)
                clear(held, rows * step // BYTES)
                multiply(
                    held, step, BYTES, keys, key_step, 4, before, BYTES, panel, rows, blocks, size
                )
                subtract_held(job, system, errors, held, rows, step, blocks)
            solve(system, betas, rows, errors, written, step, blocks)
            # dU, Z and Y
            d_written = held
            clear(d_written, rows * step // BYTES)
            multiply(
                d_written, step, BYTES, keys, key_step, 4, d_state, BYTES, panel, rows, blocks, size
            )
            if job[DECAY]:
                for t in range(rows):
                    scale_row(d_written + t * step, d_written + t * step, left(system)[t], blocks)
            for at in range(0, rows, LANES):
                multiply(
                    d_written + at * step, step, BYTES, p_of(system) + at * ROW + 4 * at, 4, ROW,
                    given + at * step, step, BYTES, LANES, blocks, rows - at,
                )  # fmt: skip
            solve_transposed(system, betas, rows, d_written, pulled, step, blocks)
            for t in range(rows):
                row = t * whole + 4 * begin
                copy_vectors(errors + t * step, between_at(job, ERRORS, b, h, n) + row, blocks)
                copy_vectors(
                    d_written + t * step, between_at(job, D_WRITTEN, b, h, n) + row, blocks
                )
            put_rows(job, DV, b, h, chunk, job[VALUE_DIM], begin, end, pulled, step)
            # dS
            target = d_state_at(job, b, h, n) + begin // LANES * panel
            copy_vectors(d_state, target, vectors)
            if chunk.entry == FRESH:
                clear(d_state, vectors)
                continue
            for t in range(rows):
                scale = grown(system)[t] if job[DECAY] else ONE
                scale_row(held + t * step, pulled + t * step, -scale, blocks)
                scale_row(held + (rows + t) * step, given + t * step, scale, blocks)
            if job[DECAY]:
                scale_vectors(d_state, grown(system)[chunk.tokens - 1], vectors)
            multiply(
                d_state, BYTES, panel, keys, 4, key_step, held, step, BYTES,
                key_blocks * LANES, blocks, 2 * rows,
            )  # fmt: skip
        if count:
            copy_vectors(d_state, carried, vectors)
        part = take(job)
    room[0] = ZERO  # alive until here


@inner
def times_transposed(job, c, c_row, a, a_row, rows, state, strip):
    """c [rows, K] += a [rows, V] times the transpose of a state in panels."""
    values, panel = blocks_of(job[VALUE_DIM]), panel_bytes(job)
    for i in range(blocks_of(job[KEY_DIM])):
        for j in range(values):
            source = state + j * panel + i * LANES * BYTES
            transpose(source, BYTES, strip + j * LANES * BYTES)
        multiply(c + i * BYTES, c_row, 0, a, a_row, 4, strip, BYTES, 0, rows, 1, values * LANES)


@inner
def through_decays(d_sums, d_matrix, matrix, rows, sign):
    """To the gradient of G: matrix[t, s] has the factor e^(G_t - G_s)."""
    for t in range(rows):
        x, y = float32s(d_matrix + t * ROW, CHUNK), float32s(matrix + t * ROW, CHUNK)
        for s in range(t):
            weight = sign * np.float64(x[s]) * np.float64(y[s])
            d_sums[t] += weight
            d_sums[s] -= weight


@kernel(_collect_words)
def collect(job):
    """DQ, DK, DBETA and DDECAY of a segment, behind `retreat`. Parts: (row, head, chunk)."""
    size, key_blocks, blocks = job[KEY_DIM], blocks_of(job[KEY_DIM]), blocks_of(job[VALUE_DIM])
    key_step, step, whole = row_bytes(size), row_bytes(job[VALUE_DIM]), blocks * BYTES
    room = np.empty(
        (CHUNK * (4 * key_step + 3 * step + whole + 2 * ROW) + LANES * whole) // 4 + 16 * LANES,
        np.float32,
    )
    keys = aligned(room)
    queries = keys + CHUNK * key_step
    dq = queries + CHUNK * key_step  # then, without a gap, dk
    given = dq + 2 * CHUNK * key_step  # then, without a gap, -Y
    written = given + 2 * CHUNK * step
    panels = written + CHUNK * step
    dp = panels + CHUNK * whole
    da = dp + CHUNK * ROW
    strip = da + CHUNK * ROW
    betas_room = strip + LANES * whole
    between = betas_room + 4 * BYTES
    d_sums, held = np.empty(CHUNK), np.empty(CHUNK)
    part = take(job)
    while part >= 0:
        n, h, b = (
            part % job[COUNT],
            part // job[COUNT] % job[HEADS],
            part // job[COUNT] // job[HEADS],
        )
        if n >= chunks_of(job, b):
            part = take(job)
            continue
        chunk, system = chunk_at(job, b, job[FIRST] + n), system_at(job, b, h, n)
        rows, goes_on = rounded_up(chunk.tokens), chunk.entry != FRESH
        dk, minus_pulled = dq + rows * key_step, given + rows * step
        fetch_rows(job, K, b, h, chunk, size, 0, size, keys, key_step)
        fetch_rows(job, Q, b, h, chunk, size, 0, size, queries, key_step)
        fetch_rows(job, GRAD, b, h, chunk, job[VALUE_DIM], 0, job[VALUE_DIM], given, step)
        betas = fetch_betas(job, b, h, chunk, betas_room)
        for t in range(rows):
            e = between_at(job, ERRORS, b, h, n) + t * whole
            z = between_at(job, D_WRITTEN, b, h, n) + t * whole
            scale_row(written + t * step, e, betas[t], blocks)
            scale_row(minus_pulled + t * step, z, -betas[t], blocks)
            if t < chunk.tokens:
                at = token_of(job, b, chunk, t) * job[HEADS] + h
                float32s(job[DBETA] + 4 * at, 1)[0] = dot(e, z, blocks)
        transpose_rows(written, step, rows, job[VALUE_DIM], panels)
        lower_product(dp, given, step, panels, job[VALUE_DIM], rows)
        lower_product(da, minus_pulled, step, panels, job[VALUE_DIM], rows)
        keep_lower(dp, rows, False)
        keep_lower(da, rows, True)
        d_sums[:] = 0.0
        if job[DECAY]:
            through_decays(d_sums, dp, p_of(system), rows, 1.0)
            through_decays(d_sums, da, minus_a(system), rows, -1.0)
            by_decays(job, system, rows, dp, between)
            by_decays(job, system, rows, da, between)
        # through the states before and behind the chunk
        clear(dq, 2 * rows * key_step // BYTES)
        behind = d_state_at(job, b, h, n)
        if goes_on:
            before = before_at(job, b, h, chunk.entry, 0)
            times_transposed(job, dq, key_step, given, step, 2 * rows, before, strip)
            if job[DECAY]:
                scale_rows(dq, key_step, grown(system), rows, key_blocks)
                scale_rows(dk, key_step, grown(system), rows, key_blocks)
                shrunk = 0.0
                for j in range(blocks):
                    place = j * panel_bytes(job)
                    for i in range(key_blocks * LANES):
                        at = place + i * BYTES
                        shrunk += dot(before + at, behind + at, 1)
                d_sums[chunk.tokens - 1] += shrunk * grown(system)[chunk.tokens - 1]
        if job[DECAY]:
            for t in range(rows):
                held[t] = dot(dk + t * key_step, keys + t * key_step, key_blocks)
                d_sums[t] += held[t] + dot(dq + t * key_step, queries + t * key_step, key_blocks)
            scale_rows(written, step, left(system), rows, blocks)
        times_transposed(job, dk, key_step, written, step, rows, behind, strip)
        if job[DECAY]:
            for t in range(rows):
                weight = dot(dk + t * key_step, keys + t * key_step, key_blocks) - held[t]
                d_sums[t] -= weight
                d_sums[chunk.tokens - 1] += weight
            later = 0.0
            for t in range(chunk.tokens - 1, -1, -1):
                later -= d_sums[t]
                at = token_of(job, b, chunk, t) * job[HEADS] + h
                float32s(job[DDECAY] + 4 * at, 1)[0] = later
        # inside the chunk
        for t in range(rows):
            row = float32s(da + t * ROW, CHUNK)
            for s in range(t):
                float32s(da + s * ROW, CHUNK)[t] = row[s]
        for at in range(0, rows, LANES):
            multiply(
                dq + at * key_step, key_step, BYTES, dp + at * ROW, ROW, 4, keys, key_step, BYTES,
                LANES, key_blocks, at + LANES,
            )  # fmt: skip
            multiply(
                dk + at * key_step, key_step, BYTES, dp + at * ROW + 4 * at, 4, ROW,
                queries + at * key_step, key_step, BYTES, LANES, key_blocks, rows - at,
            )  # fmt: skip
        multiply(dk, key_step, BYTES, da, ROW, 4, keys, key_step, BYTES, rows, key_blocks, rows)
        put_rows(job, DQ, b, h, chunk, size, 0, size, dq, key_step)
        put_rows(job, DK, b, h, chunk, size, 0, size, dk, key_step)
        part = take(job)
    room[0] = ZERO
