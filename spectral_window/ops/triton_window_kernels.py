"""The GPU kernels of window attention (Triton): tiles of queries against tiles of keys.

A row is a *stream* of S = P + T keys: P keys of the state, then the T tokens, documents one after
another, padding last. The query at place i then sees one interval of the stream, `low[i]` to i, so
documents, padding and states are described by the table `low`. The table `order` has the places of
the tokens in memory, so nothing is moved. Without documents (DOCS false) no tables are needed:
low[i] = max(i // W - 1, 0) W, and the order is that in memory.

RoPE depends on distances only, so a place in the stream serves as position. Its angle is the sum of
two: of the tile's first place and of the place within the tile. Both come from a small table that
`find_turns` computes in float64, so angles are as exact at place 10^6 as at 0.

    attend           S = Q K^T, weights by a running softmax, O = P V; saves lse = log2 of the sum
    attend_queries   dQ, and delta = sum of O dO, which the next kernel needs
    attend_keys      dK and dV: a tile of keys against all queries that see it
    remember         the state after rows that are one document

No kernel adds to memory that another program writes (no atomics), so results have the same bits in
every call. Without GUARD, 0 * NaN lets a NaN cross to those queries of its tile that do not see it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_window.ops import triton_interpreter

triton_interpreter.repair()

# mypy: ignore-errors

# do_not_specialize: no kernel is compiled again for lengths that are divisible by 16, or are 1.


@triton.jit(do_not_specialize=["rows", "near", "step", "start"])
def find_turns(
    turns, rows, near, step, start, LOG_THETA: tl.constexpr, K: tl.constexpr, KH: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """cos and sin [2, rows, KH]: of the places 0 ... near - 1, then of start, start + step, ..."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    pair = tl.arange(0, KH)
    place = tl.where(row < near, row, start + (row - near) * step).to(tl.float64)
    log_theta = tl.full([KH], LOG_THETA, tl.float64)
    angle = place[:, None] * tl.exp(log_theta * pair.to(tl.float64) * (-2.0 / K))[None, :]
    at = turns + row[:, None] * KH + pair[None, :]
    here = (row < rows)[:, None]
    tl.store(at, tl.cos(angle).to(tl.float32), mask=here)
    tl.store(at + rows * KH, tl.sin(angle).to(tl.float32), mask=here)


@triton.jit
def find_part(stream, prefix, heads, tiles, SIZE: tl.constexpr):
    """(row, head, first place) of this program; heads, adjacent in memory, run together."""
    part = tl.program_id(0)
    head = part % heads
    rest = part // heads
    return (rest // tiles).to(tl.int64), head.to(tl.int64), (rest % tiles + prefix // SIZE) * SIZE


@triton.jit
def load_rows(base, rows, here, stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[R, PADDED] of the rows `here`, zeros elsewhere."""
    column = tl.arange(0, PADDED)
    mask = here[:, None]
    if SIZE < PADDED:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(base + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, here, stride, x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    mask = here[:, None]
    if SIZE < PADDED:
        mask = mask & (column < SIZE)[None, :]
    at = base + rows[:, None] * stride + column[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def near_turns(turns, rows, R: tl.constexpr, KH: tl.constexpr, ROPE: tl.constexpr):
    """cos and sin [R, KH] of the places within a tile."""
    cos = tl.zeros([R, KH], tl.float32)
    sin = cos
    if ROPE:
        at = tl.arange(0, R)[:, None] * KH + tl.arange(0, KH)[None, :]
        cos = tl.load(turns + at)
        sin = tl.load(turns + rows * KH + at)
    return cos, sin


@triton.jit
def turn(
    x, cos, sin, turns, rows, near, step, first, back: tl.constexpr, R: tl.constexpr,
    KP: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """x [R, KP] rotated to the places first ... first + R - 1; rotated back with `back`."""
    if ROPE:
        pair = tl.arange(0, KP // 2)
        far = turns + (near + first // step) * (KP // 2) + pair
        far_cos = tl.load(far)[None, :]
        far_sin = tl.load(far + rows * (KP // 2))[None, :]
        c = far_cos * cos - far_sin * sin
        s = far_sin * cos + far_cos * sin
        if back:
            s = -s
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [R, KP // 2, 2]))
        both = tl.join(even * c - odd * s, even * s + odd * c)
        x = tl.reshape(both, [R, KP]).to(x.dtype)
    return x


@triton.jit
def find_queries(
    low, order, place, prefix, time, stream, window, unseen, DOCS: tl.constexpr
):  # fmt: skip
    """(is it a query?, its row in memory, the first place that it sees) of the places [R]."""
    here = (place >= prefix) & (place < stream)
    if DOCS:
        first = tl.load(low + place - prefix, mask=here, other=unseen)
        row = tl.load(order + place - prefix, mask=here, other=0)
    else:
        first = tl.where(here, tl.maximum(place // window - 1, 0) * window, unseen)
        row = place
    return here, row.to(tl.int64), first


@triton.jit
def find_keys(order, place, prefix, stream, DOCS: tl.constexpr):
    """(is it a key?, its row in memory) of the places [R]."""
    here = place < stream
    row = place
    if DOCS:
        token = tl.load(order + place - prefix, mask=here & (place >= prefix), other=0)
        row = tl.where(place < prefix, place, token + prefix)
    return here, row.to(tl.int64)


@triton.jit
def clean(x, GUARD: tl.constexpr):
    """(finite values of x [R, C], zeros elsewhere; [R]: NaN for rows with other values, else 0)."""
    poison = tl.zeros([x.shape[0]], tl.float32)
    if GUARD:
        doubt = x.to(tl.float32) - x.to(tl.float32)
        poison = tl.sum(doubt, 1)
        x = tl.where(doubt == 0.0, x, tl.zeros_like(x))
    return x, poison


@triton.jit(do_not_specialize=["time", "stream", "tiles", "window", "rows", "near", "step"])
def attend(
    q, k, v, out, lse, low, order, turns,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    heads, time, stream, tiles, window, rows, near, step, scale,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, DOCS: tl.constexpr,
    GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, V] and lse [B, H, T]; q [B, T, H, K], k [B, S, H, K], v [B, S, H, V] with
    strides; low, order [B, T]; scale includes log2(e). One program a row, head and M queries."""
    prefix = stream - time
    b, h, first = find_part(stream, prefix, heads, tiles, M)
    place = first + tl.arange(0, M)
    unseen = stream
    here, row, seen = find_queries(
        low + b * time, order + b * time, place, prefix, time, stream, window, unseen, DOCS
    )
    queries = load_rows(q + b * q_b + h * q_h, row, here, q_t, K, KP)
    cos, sin = near_turns(turns, rows, M, KP // 2, ROPE)
    queries = turn(queries, cos, sin, turns, rows, near, step, first, False, M, KP, ROPE)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, VP], tl.float32)
    cos, sin = near_turns(turns, rows, N, KP // 2, ROPE)
    begin = tl.min(seen, 0) // N * N
    end = tl.minimum(first + M, stream)
    for start in tl.range(begin, end, N):
        at = start + tl.arange(0, N)
        exists, source = find_keys(order + b * time, at, prefix, stream, DOCS)
        keys = load_rows(k + b * k_b + h * k_h, source, exists, k_t, K, KP)
        values = load_rows(v + b * v_b + h * v_h, source, exists, v_t, V, VP)
        values, poison = clean(values, GUARD)
        keys = turn(keys, cos, sin, turns, rows, near, step, start, False, N, KP, ROPE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if GUARD:
            scores += poison[None, :]
        visible = (at[None, :] >= seen[:, None]) & (at[None, :] <= place[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        peak = tl.maximum(top, tl.max(scores, 1) * scale)
        level = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp2(scores * scale - level[:, None])
        if GUARD:
            weights = tl.where(visible, weights, 0.0)
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
        top = peak
    none = total == 0.0
    result = tl.where(none[:, None], 0.0, result / tl.where(none, 1.0, total)[:, None])
    store_rows(out + (b * time * heads + h) * V, row, here, heads * V, result, V, VP)
    level = tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total)))
    tl.store(lse + (b * heads + h) * time + row, level, mask=here)


@triton.jit(do_not_specialize=["time", "stream", "tiles", "window", "rows", "near", "step"])
def attend_queries(
    q, k, v, out, grad, lse, delta, low, order, turns, dq,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    heads, time, stream, tiles, window, rows, near, step, scale, unit,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, DOCS: tl.constexpr,
    GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, K] and delta [B, H, T]; unit: scale without log2(e). Parts as in `attend`."""
    prefix = stream - time
    b, h, first = find_part(stream, prefix, heads, tiles, M)
    place = first + tl.arange(0, M)
    here, row, seen = find_queries(
        low + b * time, order + b * time, place, prefix, time, stream, window, stream, DOCS
    )
    queries = load_rows(q + b * q_b + h * q_h, row, here, q_t, K, KP)
    given = load_rows(grad + b * g_b + h * g_h, row, here, g_t, V, VP)
    result = load_rows(out + (b * time * heads + h) * V, row, here, heads * V, V, VP)
    mean = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + (b * heads + h) * time + row, mean, mask=here)
    level = tl.load(lse + (b * heads + h) * time + row, mask=here, other=float("inf"))
    cos, sin = near_turns(turns, rows, M, KP // 2, ROPE)
    queries = turn(queries, cos, sin, turns, rows, near, step, first, False, M, KP, ROPE)
    d_queries = tl.zeros([M, KP], tl.float32)
    cos, sin = near_turns(turns, rows, N, KP // 2, ROPE)
    begin = tl.min(seen, 0) // N * N
    end = tl.minimum(first + M, stream)
    for start in tl.range(begin, end, N):
        at = start + tl.arange(0, N)
        exists, source = find_keys(order + b * time, at, prefix, stream, DOCS)
        keys = load_rows(k + b * k_b + h * k_h, source, exists, k_t, K, KP)
        values = load_rows(v + b * v_b + h * v_h, source, exists, v_t, V, VP)
        keys, poison = clean(keys, GUARD)
        keys = turn(keys, cos, sin, turns, rows, near, step, start, False, N, KP, ROPE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        visible = (at[None, :] >= seen[:, None]) & (at[None, :] <= place[:, None])
        weights = tl.exp2(scores * scale - level[:, None])
        d_weights = tl.dot(given, tl.trans(values), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None])
        if GUARD:
            d_scores += poison[None, :]
        d_scores = tl.where(visible, d_scores, 0.0)
        d_queries = tl.dot(d_scores.to(keys.dtype), keys, d_queries, input_precision=PRECISION)
    cos, sin = near_turns(turns, rows, M, KP // 2, ROPE)  # anew: kept, they would fill registers
    d_queries = turn(d_queries * unit, cos, sin, turns, rows, near, step, first, True, M, KP, ROPE)
    store_rows(dq + (b * time * heads + h) * K, row, here, heads * K, d_queries, K, KP)


@triton.jit(do_not_specialize=["time", "stream", "tiles", "window", "rows", "near", "step"])
def attend_keys(
    q, k, v, grad, lse, delta, low, order, turns, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    heads, time, stream, tiles, window, rows, near, step, scale, unit,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, DOCS: tl.constexpr,
    GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B, S, H, K] and dv [B, S, H, V]. One program a row, head and M keys."""
    prefix = stream - time
    b, h, first = find_part(stream, 0, heads, tiles, M)
    at = first + tl.arange(0, M)
    exists, target = find_keys(order + b * time, at, prefix, stream, DOCS)
    keys = load_rows(k + b * k_b + h * k_h, target, exists, k_t, K, KP)
    values = load_rows(v + b * v_b + h * v_h, target, exists, v_t, V, VP)
    cos, sin = near_turns(turns, rows, M, KP // 2, ROPE)
    keys = turn(keys, cos, sin, turns, rows, near, step, first, False, M, KP, ROPE)
    d_keys = tl.zeros([M, KP], tl.float32)
    d_values = tl.zeros([M, VP], tl.float32)
    cos, sin = near_turns(turns, rows, N, KP // 2, ROPE)
    if DOCS:
        end = first + M - 1 + 2 * window  # no document's chunks end later
    else:
        end = ((first + M - 1) // window + 2) * window
    end = tl.minimum(end, stream)
    begin = tl.maximum(first, prefix) // N * N
    for start in tl.range(begin, end, N):
        place = start + tl.arange(0, N)
        here, row, seen = find_queries(
            low + b * time, order + b * time, place, prefix, time, stream, window, stream, DOCS
        )
        queries = load_rows(q + b * q_b + h * q_h, row, here, q_t, K, KP)
        given = load_rows(grad + b * g_b + h * g_h, row, here, g_t, V, VP)
        level = tl.load(lse + (b * heads + h) * time + row, mask=here, other=float("inf"))
        mean = tl.load(delta + (b * heads + h) * time + row, mask=here, other=0.0)
        queries, poison = clean(queries, GUARD)
        given, doubt = clean(given, GUARD)
        queries = turn(queries, cos, sin, turns, rows, near, step, start, False, N, KP, ROPE)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        visible = (at[:, None] >= seen[None, :]) & (at[:, None] <= place[None, :])
        weights = tl.exp2(scores * scale - level[None, :])
        if GUARD:
            weights += (poison + doubt)[None, :]
        weights = tl.where(visible, weights, 0.0)
        d_values = tl.dot(weights.to(given.dtype), given, d_values, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(given), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[None, :])
        d_scores = tl.where(visible, d_scores, 0.0)
        d_keys = tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision=PRECISION)
    store_rows(dv + (b * stream * heads + h) * V, target, exists, heads * V, d_values, V, VP)
    cos, sin = near_turns(turns, rows, M, KP // 2, ROPE)  # anew: kept, they would fill registers
    d_keys = turn(d_keys * unit, cos, sin, turns, rows, near, step, first, True, M, KP, ROPE)
    store_rows(dk + (b * stream * heads + h) * K, target, exists, heads * K, d_keys, K, KP)


@triton.jit(do_not_specialize=["time", "tiles", "rows", "slots", "oldest"])
def remember(
    k, v, key, value, turns, k_b, k_t, k_h, v_b, v_t, v_h,
    heads, time, slots, oldest, rows, tiles,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    R: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """key [B, 2W, H, K], rotated, and value [B, 2W, H, V]: the places oldest ... time - 1, each in
    slot place mod 2W, zeros elsewhere. turns: angles of those places."""
    b, h, first = find_part(slots, 0, heads, tiles, R)
    slot = first + tl.arange(0, R)
    exists = slot < slots
    ahead = (slot + slots - oldest % slots) % slots
    live = exists & (oldest + ahead < time)
    place = (oldest + ahead).to(tl.int64)
    keys = load_rows(k + b * k_b + h * k_h, place, live, k_t, K, KP)
    if ROPE:
        at = turns + ahead[:, None] * (KP // 2) + tl.arange(0, KP // 2)[None, :]
        cos = tl.load(at, mask=live[:, None], other=0.0)
        sin = tl.load(at + rows * (KP // 2), mask=live[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(keys.to(tl.float32), [R, KP // 2, 2]))
        keys = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [R, KP])
    row = slot.to(tl.int64)
    store_rows(key + (b * slots * heads + h) * K, row, exists, heads * K, keys, K, KP)
    values = load_rows(v + b * v_b + h * v_h, place, live, v_t, V, VP)
    store_rows(value + (b * slots * heads + h) * V, row, exists, heads * V, values, V, VP)
