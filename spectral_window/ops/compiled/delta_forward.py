"""The forward pass of the delta-rule memory over a segment of chunks (see `delta_chunks`).

The columns of a state never meet, so a part is a block of columns of one row and head: its state
stays in the scratch from the first chunk of the segment to the last. Every number is the same sum
in the same order whatever the width of the blocks.
"""

from __future__ import annotations

import numpy as np

from spectral_window.ops.compiled.addresses import FLOAT32, address
from spectral_window.ops.compiled.delta_chunks import (
    CHUNK,
    DECAY,
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
    chunk_at,
    chunks_of,
    fetch_betas,
    fetch_rows,
    grown,
    left,
    minus_a,
    p_of,
    put_rows,
    system_at,
)
from spectral_window.ops.compiled.delta_products import (
    add_products,
    add_row,
    copy_vectors,
    multiply,
    rounded_up,
    row_bytes,
    scale_row,
    scale_vectors,
)
from spectral_window.ops.compiled.float32_lanes import BYTES, LANES
from spectral_window.ops.compiled.threads import inner, kernel, take
from spectral_window.ops.compiled.window_rows import (
    ZERO,
    aligned,
    blocks_of,
    clear,
    expect_parts,
    padded,
)

# words of a job behind those of `delta_chunks`
WIDTH, STATE, KEPT, SLOTS = 20, 21, 22, 23  # vectors of a block of columns; states in panels
OUT = 24


def column_blocks(value_dim: int, width: int) -> int:
    return -(-padded(value_dim) // (LANES * width))


@inner
def columns_of(job, part):
    """(row, head, first column, end column) of a part."""
    wide = LANES * job[WIDTH]
    cuts = (job[VALUE_DIM] + wide - 1) // wide
    begin = part % cuts * wide
    return (
        part // cuts // job[HEADS],
        part // cuts % job[HEADS],
        begin,
        min(begin + wide, job[VALUE_DIM]),
    )


@inner
def panel_bytes(job):
    return blocks_of(job[KEY_DIM]) * LANES * BYTES


@inner
def state_at(job, b, h, begin):
    """The address of a head's state [V / 16, K, 16] in STATE, from column `begin` on."""
    return job[STATE] + (
        (b * job[HEADS] + h) * blocks_of(job[VALUE_DIM]) + begin // LANES
    ) * panel_bytes(job)


@inner
def kept_at(job, b, h, slot, begin):
    """The same of the state that is kept in slot `slot`."""
    head = (b * job[SLOTS] + slot) * job[HEADS] + h
    return job[KEPT] + (head * blocks_of(job[VALUE_DIM]) + begin // LANES) * panel_bytes(job)


@inner
def solve(system, betas, rows, right, written, step, blocks):
    """The right-hand sides R at `right` become E, and U = diag(beta) E at `written`."""
    for block in range(0, rows, LANES):
        target, above = right + block * step, minus_a(system) + block * ROW
        if block:
            multiply(target, step, BYTES, above, ROW, 4, written, step, BYTES, LANES, blocks, block)
        for t in range(LANES):
            row, before = target + t * step, written + block * step
            add_products(row, above + t * ROW + 4 * block, 4, before, step, blocks, t)
            scale_row(before + t * step, row, betas[block + t], blocks)


@inner
def subtract_held(job, system, right, held, rows, step, blocks):
    """R = V - diag(e^G) K S, of V at `right` and K S at `held`."""
    for t in range(rows):
        scale = -grown(system)[t] if job[DECAY] else np.float32(-1)
        add_row(right + t * step, scale, held + t * step, blocks)


def _words(parts, call, first, count, systems, width, state, kept, out):
    slots = 0 if kept is None else kept.shape[1]
    expect_parts(parts, call.heads * column_blocks(call.v.shape[3], width))
    return (
        *call.words(first, count),
        address(systems, FLOAT32, call.heads * count * SYSTEM),
        width,
        address(state, FLOAT32, call.heads * call.state),
        0 if kept is None else address(kept, FLOAT32, call.heads * slots * call.state),
        slots,
        call.values(out),
    )


@kernel(_words)
def advance(job):
    """The chunks of a segment: STATE becomes the state behind it, the states at the beginning of
    chunks go to KEPT, and what is read to OUT. Parts: (row, head, block of columns)."""
    key_blocks, panel = blocks_of(job[KEY_DIM]), panel_bytes(job)
    key_step, step = row_bytes(job[KEY_DIM]), row_bytes(LANES * job[WIDTH])
    room = np.empty(
        (panel * job[WIDTH] + 2 * CHUNK * key_step + 4 * CHUNK * step) // 4 + 8 * LANES,
        np.float32,
    )
    state = aligned(room)
    keys = state + job[WIDTH] * panel  # then, without a gap, the queries
    held = keys + 2 * CHUNK * key_step  # K S, then Q S
    right = held + 2 * CHUNK * step
    written = right + CHUNK * step
    betas_room = written + CHUNK * step
    part = take(job)
    while part >= 0:
        b, h, begin, end = columns_of(job, part)
        blocks = blocks_of(end - begin)
        count = chunks_of(job, b)
        if count:
            copy_vectors(state_at(job, b, h, begin), state, blocks * panel // BYTES)
        for n in range(count):
            chunk, system = chunk_at(job, b, job[FIRST] + n), system_at(job, b, h, n)
            rows = rounded_up(chunk.tokens)
            if chunk.entry == FRESH:
                clear(state, blocks * panel // BYTES)
            elif chunk.entry >= 0 and job[KEPT]:
                copy_vectors(state, kept_at(job, b, h, chunk.entry, begin), blocks * panel // BYTES)
            queries = keys + rows * key_step
            fetch_rows(job, K, b, h, chunk, job[KEY_DIM], 0, job[KEY_DIM], keys, key_step)
            fetch_rows(job, Q, b, h, chunk, job[KEY_DIM], 0, job[KEY_DIM], queries, key_step)
            fetch_rows(job, V, b, h, chunk, job[VALUE_DIM], begin, end, right, step)
            betas = fetch_betas(job, b, h, chunk, betas_room)
            read = held + rows * step
            clear(held, 2 * rows * step // BYTES)
            if chunk.entry != FRESH:
                multiply(
                    held, step, BYTES, keys, key_step, 4, state, BYTES, panel,
                    2 * rows, blocks, job[KEY_DIM],
                )  # fmt: skip
                subtract_held(job, system, right, held, rows, step, blocks)
                if job[DECAY]:
                    for t in range(rows):
                        scale_row(read + t * step, read + t * step, grown(system)[t], blocks)
            solve(system, betas, rows, right, written, step, blocks)
            for at in range(0, rows, LANES):
                multiply(
                    read + at * step, step, BYTES, p_of(system) + at * ROW, ROW, 4,
                    written, step, BYTES, LANES, blocks, at + LANES,
                )  # fmt: skip
            put_rows(job, OUT, b, h, chunk, job[VALUE_DIM], begin, end, read, step)
            if job[DECAY]:
                scale_vectors(state, grown(system)[chunk.tokens - 1], blocks * panel // BYTES)
                for t in range(rows):
                    scale_row(written + t * step, written + t * step, left(system)[t], blocks)
            multiply(
                state, BYTES, panel, keys, 4, key_step, written, step, BYTES,
                key_blocks * LANES, blocks, chunk.tokens,
            )  # fmt: skip
        if count:
            copy_vectors(state, state_at(job, b, h, begin), blocks * panel // BYTES)
        part = take(job)
    room[0] = ZERO  # alive until here
