"""The Triton kernels of the delta-rule memory backwards (see `triton_delta` for the maths).

    inflow      the gradients of a chunk's writes, and of the state before it, from its own outputs
    retreat     the gradient of the state after each chunk, from the end; of the targets; dv
    gradients   dq, dk, and the gradients of beta and decay

Constants and buffers are as in `triton_delta_kernels`. `entering` are the gradients of the states
before the chunks from the chunks' own outputs; `d_states` are those of the states *after* the
chunks, complete. `d_writes` holds the gradients of the writes by `inflow`, until `retreat` replaces
them by those of the targets beta (V - exp(G) K S).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_window.ops.triton_delta_kernels import (
    ENTER,
    LEAVE,
    amounts,
    finite,
    first_state,
    gate,
    kept,
    load_state,
    pairs,
    scaled,
    store_state,
    store_tile,
    tile,
    tokens,
    weighted,
    where_gate,
)


@triton.jit(do_not_specialize=["time", "chunks"])
def inflow(
    q, k, positions, gates, d_out, entering, d_writes, time, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    C: tl.constexpr, GATED: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """For each chunk P^T d_out, P[i, j] = exp(G_i - G_j) q_i . k_j for j <= i, and what reaches the
    state before it by its outputs, (exp(G) Q)^T d_out."""
    BLOCKS: tl.constexpr = (V + VB - 1) // VB
    DTYPE: tl.constexpr = q.dtype.element_ty
    pid = tl.program_id(0)
    column, pid = pid % BLOCKS * VB, pid // BLOCKS
    h, n, b = pid % H, pid // H % chunks, (pid // H // chunks).to(tl.int64)
    chunk = (b * H + h) * chunks + n
    row, live = tokens(positions, b, n, h, time, H, C, DOCS)
    i = tl.arange(0, C)
    grad = tile(d_out, row, live, column, V, VB)
    seeing = grad
    if GATED:
        seeing = weighted(grad.to(tl.float32), gates, chunk, ENTER, C, GATED).to(DTYPE)
    for first in range(0, K, KB):
        query = tile(q, row, live, first, K, KB)
        query = where_gate(query, gates, chunk, ENTER, C, DOCS)
        before = tl.dot(tl.trans(query), seeing, input_precision=PRECISION)
        store_state(entering, before.to(DTYPE), chunk, first, column, K, V, KB, VB)
    scores = tl.zeros((C, C), tl.float32)
    for first in range(0, K, KB):  # a loop of its own needs fewer registers
        query = tile(q, row, live, first, K, KB)
        key = tile(k, row, live, first, K, KB)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    seen, fade = pairs(gates, chunk, C, GATED)
    scores = tl.where(seen, scores * fade, 0.0).to(DTYPE)
    result = tl.dot(tl.trans(scores), finite(grad, DOCS), input_precision=PRECISION)
    store_tile(d_writes, chunk * C + i, column, result, V, VB)


@triton.jit(do_not_specialize=["time", "chunks"])
def retreat(
    k, beta, positions, solved, gates, d_final, entering, d_states, d_writes, dv, d_first,
    time, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    C: tl.constexpr, GIVEN: tl.constexpr, GATED: tl.constexpr, DOCS: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr
):  # fmt: skip
    """`scan` from the end, for the gradients dS of the state and dU of the writes:

        dU     = P^T d_out + exp(G_last - G) K dS
        target = solved^T dU,   dv = beta target
        dS    <- exp(G_last) dS + (exp(G) Q)^T d_out - (beta exp(G) K)^T target

    The parts of d_out are those of `inflow`.
    """
    BLOCKS: tl.constexpr = (V + VB - 1) // VB
    PARTS: tl.constexpr = (K + KB - 1) // KB
    DTYPE: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    own = (pid // BLOCKS).to(tl.int64)
    b, h = own // H, own % H
    column = pid % BLOCKS * VB
    i = tl.arange(0, C)
    to = column + tl.arange(0, VB)[None, :]
    d_state = first_state(d_final, own, column, K, V, KB, VB, GIVEN)
    for step in range(chunks):
        n = chunks - 1 - step
        chunk = own * chunks + n
        row, live = tokens(positions, b, n, h, time, H, C, DOCS)
        keys = ()
        back = tl.zeros((C, VB), tl.float32)
        for part in tl.static_range(PARTS):
            key = tile(k, row, live, part * KB, K, KB)
            if key.dtype != tl.float32:  # those would fill the registers: loaded twice
                keys = keys + (key,)  # noqa: RUF005
            operand = d_state[part].to(DTYPE)
            back = tl.dot(key, operand, back, input_precision=PRECISION)
        d_written = tile(d_writes, chunk * C + i, None, column, V, VB).to(tl.float32)
        d_written += weighted(back, gates, chunk, LEAVE, C, GATED)
        inverse = tl.load(solved + chunk * C * C + i[:, None] * C + i[None, :])
        target = tl.dot(tl.trans(inverse), finite(d_written, DOCS), input_precision=SOLVE)
        store_tile(d_writes, chunk * C + i, column, target, V, VB)
        target = amounts(beta, gates, chunk, row, live, C, GATED)[:, None] * target
        if DOCS:
            target = tl.where(live[:, None], target, 0.0)
        inside = (n * C + i < time)[:, None] & (to < V)
        tl.store(dv + row[:, None] * V + to, target.to(DTYPE), inside)
        target = weighted(-target, gates, chunk, ENTER, C, GATED).to(DTYPE)
        factor = kept(gates, chunk, C, GATED)
        before = ()
        for part in tl.static_range(PARTS):
            if k.dtype.element_ty == tl.float32:
                key = tile(k, row, live, part * KB, K, KB)
            else:
                key = keys[part]
            key = where_gate(key, gates, chunk, ENTER, C, DOCS)
            more = load_state(entering, chunk, part * KB, column, K, V, KB, VB)
            operand = d_state[part].to(DTYPE)
            store_state(d_states, operand, chunk, part * KB, column, K, V, KB, VB)
            moved = scaled(d_state[part], factor, GATED) + more.to(tl.float32)
            moved = tl.dot(tl.trans(key), target, moved, input_precision=PRECISION)
            before = before + (moved,)  # noqa: RUF005
        d_state = before
    for part in tl.static_range(PARTS):
        store_state(d_first, d_state[part], own, part * KB, column, K, V, KB, VB)


@triton.jit(do_not_specialize=["time", "chunks"])
def gradients(
    q, k, v, beta, positions, gates, states, writes, d_states, d_writes, d_out,
    dq, dk, d_beta, d_decay, time, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, GATED: tl.constexpr, DOCS: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """The gradients of q, k, beta and decay, for each chunk.

    That of k has two parts: `passive` as a key that others meet, and beta times `active`, as the
    key at which the token itself writes. With them dG = q . dq - k . passive + beta k . active and
    d_beta = target . v + k . active.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    pid = tl.program_id(0)
    h, n, b = pid % H, pid // H % chunks, (pid // H // chunks).to(tl.int64)
    chunk = (b * H + h) * chunks + n
    row, live = tokens(positions, b, n, h, time, H, C, DOCS)
    i = tl.arange(0, C)
    place = chunk * C + i
    inside = n * C + i < time
    d_scores = tl.zeros((C, C), tl.float32)
    d_overlap = tl.zeros((C, C), tl.float32)
    d_amount = tl.zeros((C,), tl.float32)
    for column in range(0, V, VB):
        grad = tile(d_out, row, live, column, V, VB)
        written = tile(writes, place, None, column, V, VB)
        target = tile(d_writes, place, None, column, V, VB)
        value = tile(v, row, live, column, V, VB)
        d_scores = tl.dot(grad, tl.trans(written), d_scores, input_precision=PRECISION)
        d_overlap = tl.dot(target, tl.trans(written), d_overlap, input_precision=PRECISION)
        d_amount += tl.sum(target.to(tl.float32) * value.to(tl.float32), 1)
    seen, fade = pairs(gates, chunk, C, GATED)
    amount = amounts(beta, gates, chunk, row, live, C, GATED)[:, None]
    d_scores = tl.where(seen, d_scores * fade, 0.0).to(DTYPE)
    others = seen & (i[:, None] != i[None, :])
    d_overlap = tl.where(others, -d_overlap * fade, 0.0)
    weighed = tl.where(others, amount * d_overlap, 0.0).to(DTYPE)
    d_overlap = d_overlap.to(DTYPE)
    factor = kept(gates, chunk, C, GATED)
    d_fade = tl.zeros((C,), tl.float32)
    d_end = 0.0
    # what the loop does not change must not fill the registers
    for first in tl.range(0, K, KB, num_stages=1, disable_licm=True):
        query = tile(q, row, live, first, K, KB)
        key = tile(k, row, live, first, K, KB)
        d_query = tl.zeros((C, KB), tl.float32)
        passive = tl.zeros((C, KB), tl.float32)
        active = tl.zeros((C, KB), tl.float32)
        for column in range(0, V, VB):
            before = load_state(states, chunk, first, column, K, V, KB, VB)
            d_after = load_state(d_states, chunk, first, column, K, V, KB, VB)
            grad = tile(d_out, row, live, column, V, VB)
            written = tile(writes, place, None, column, V, VB)
            target = tile(d_writes, place, None, column, V, VB)
            d_query = tl.dot(grad, tl.trans(before), d_query, input_precision=PRECISION)
            active = tl.dot(target, tl.trans(before), active, input_precision=PRECISION)
            passive = tl.dot(written, tl.trans(d_after), passive, input_precision=PRECISION)
            if DECAY:
                product = scaled(before.to(tl.float32) * d_after.to(tl.float32), factor, GATED)
                d_end += tl.sum(tl.sum(product, 1), 0)
        d_query = weighted(d_query, gates, chunk, ENTER, C, GATED)
        active = -weighted(active, gates, chunk, ENTER, C, GATED)
        passive = weighted(passive, gates, chunk, LEAVE, C, GATED)
        exact = key.to(tl.float32)
        if DECAY:
            last = gate(gates, chunk, LEAVE, C)[:, None] != 0.0
            d_end += tl.sum(tl.sum(tl.where(last, exact * passive, 0.0), 1), 0)
        met = finite(key, DOCS)
        d_query = tl.dot(d_scores, met, d_query, input_precision=PRECISION)
        active = tl.dot(d_overlap, met, active, input_precision=PRECISION)
        passive = tl.dot(tl.trans(weighed), met, passive, input_precision=PRECISION)
        met = finite(query, DOCS)
        passive = tl.dot(tl.trans(d_scores), met, passive, input_precision=PRECISION)
        d_amount += tl.sum(exact * active, 1)
        if DECAY:
            d_fade += tl.sum(query.to(tl.float32) * d_query, 1)
            d_fade += tl.sum(exact * (amount * active - passive), 1)
        d_key = passive + amount * active
        if DOCS:
            d_query = tl.where(live[:, None], d_query, 0.0)
            d_key = tl.where(live[:, None], d_key, 0.0)
        to = first + tl.arange(0, KB)[None, :]
        mask = inside[:, None] & (to < K)
        tl.store(dq + row[:, None] * K + to, d_query.to(DTYPE), mask)
        tl.store(dk + row[:, None] * K + to, d_key.to(DTYPE), mask)
    tl.store(d_beta + row, tl.where(live, d_amount, 0.0), inside)
    if DECAY:
        d_fade += tl.where(i == C - 1, d_end, 0.0)
        later = tl.sum(tl.where(seen, d_fade[:, None], 0.0), 0)
        tl.store(d_decay + row, tl.where(live, -later, 0.0), inside)
