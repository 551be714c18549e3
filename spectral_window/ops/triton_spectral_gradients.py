"""The Triton kernels of the convolution's backward pass (see `triton_spectral` for the maths).

    gradients  h and s = dh/dz forwards, then l backwards, inside each chunk: writes du and sums
    finish     adds the sums, and computes the gradients of decay and frequency from dL/dz

The notation is that of `triton_spectral_kernels`, whose `ends` and `carry` run before these: with
REVERSE they give conj(z) l after each chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_window.ops.triton_spectral_kernels import (
    advance,
    load_gain,
    load_position,
    load_rows,
    load_z,
    select,
    step_back,
    store_row,
    sum_modes,
    tile,
)


@triton.jit
def _follow(h, s, q, gg, z, x, g, position, PAIR: tl.constexpr, DOCUMENTS: tl.constexpr):
    """One token of h and s, and of the sums q = sum g s and gg = sum g Re h."""
    x, g = x.to(z[0].dtype), g.to(z[0].dtype)
    before, slope = h, s
    if DOCUMENTS:
        before = select(position == 0, (0.0, 0.0), before)
        slope = select(position == 0, (0.0, 0.0), slope)
    slope = advance(slope, z, before[0], PAIR)
    slope = (slope[0], slope[1] + before[1])
    new = advance(before, z, x, PAIR)
    new_q, new_gg = (q[0] + g * slope[0], q[1] + g * slope[1]), gg + g * new[0]
    if DOCUMENTS:
        pad = position < 0
        new, slope = select(pad, h, new), select(pad, s, slope)
        new_q, new_gg = select(pad, q, new_q), tl.where(pad, gg, new_gg)
    return new, slope, new_q, new_gg


@triton.jit
def _sum(
    h, s, q, gg, z, u, g, positions, at, begin, stop,
    ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, PAIR: tl.constexpr,
    DOCUMENTS: tl.constexpr
):  # fmt: skip
    """`_follow` over tokens begin ... stop of a chunk, ROWS at a time."""
    for i in tl.range(begin, stop, ROWS, num_stages=STAGES):
        xs = load_rows(u, at, i, ROWS, 1, MASKED)
        gs = load_rows(g, at, i, ROWS, 1, MASKED)
        for k in tl.static_range(ROWS):
            position = load_position(positions, at[0] + i + k, DOCUMENTS)
            h, s, q, gg = _follow(h, s, q, gg, z, xs[k], gs[k], position, PAIR, DOCUMENTS)
    return h, s, q, gg


@triton.jit
def _write_gradients(
    l, z, w, g, du, positions, at, begin, stop,
    PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
    PAIR: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """l over tokens begin ... stop of a chunk, counted from its last one; du = Re sum (l + w g)."""
    for i in tl.range(begin, stop, ROWS, num_stages=STAGES):
        gs = load_rows(g, at, -i, ROWS, -1, MASKED)
        for k in tl.static_range(ROWS):
            position = load_position(positions, at[0] - i - k, DOCUMENTS)
            value = l[0] + w * gs[k].to(z[0].dtype)
            if PADDED > 1:  # modes that pad the tile have w = 0 and l = 0
                value = sum_modes(value, PADDED)
            if DOCUMENTS:
                value = tl.where(position < 0, 0.0, value)
            store_row(du, at, -i - k, value, MASKED)
            l = step_back(l, z, w, gs[k], position, PAIR, DOCUMENTS)
    return l


@triton.jit(do_not_specialize=["time", "chunks"])
def gradients(
    u, g, z, gain, positions, starts, tails, du, sums, time, channels, chunks,
    MODES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, GAIN: tl.constexpr,
    PAIR: tl.constexpr, DOCUMENTS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """du of each chunk, and its part of dL/dz (re, im) and dL/dgain: `sums` [batch, chunks, 3,
    modes, channels] float64. starts: h before each chunk; tails: conj(z) l behind it."""
    b, n, d, inside, m, mask = tile(tl.program_id(0), chunks, channels, MODES, PADDED, BLOCK)
    place = d * MODES + m
    zs = load_z(z, place, mask, DTYPE, False)
    w = load_gain(gain, place, mask, MODES, GAIN, DTYPE)
    border = ((b * chunks + n) * 2 * MODES + m) * channels + d
    plane = MODES * channels
    re = tl.load(starts + border, mask, 0.0).to(DTYPE)
    im = tl.load(starts + border + plane, mask, 0.0).to(DTYPE)
    length = tl.minimum(time - n * CHUNK, CHUNK)
    at = (b * time + n * CHUNK, d, inside, channels)
    whole = length // ROWS * ROWS
    zero = tl.zeros((PADDED, BLOCK), DTYPE)
    h, s, q, gg = (re, im), (zero, zero), (zero, zero), zero
    h, s, q, gg = _sum(
        h, s, q, gg, zs, u, g, positions, at, 0, whole, ROWS, STAGES, MASKED, PAIR, DOCUMENTS
    )
    h, s, q, gg = _sum(
        h, s, q, gg, zs, u, g, positions, at, whole, length, 1, 1, MASKED, PAIR, DOCUMENTS
    )
    # what comes later sees this chunk through its end: conj(l) s
    lr = tl.load(tails + border, mask, 0.0)
    li = tl.load(tails + border + plane, mask, 0.0)
    sr, si, wide = s[0].to(tl.float64), s[1].to(tl.float64), w.to(tl.float64)
    to = ((b * chunks + n) * 3 * MODES + m) * channels + d
    tl.store(sums + to, wide * q[0].to(tl.float64) + (lr * sr + li * si), mask)
    tl.store(sums + to + plane, wide * q[1].to(tl.float64) + (lr * si - li * sr), mask)
    tl.store(sums + to + 2 * plane, gg.to(tl.float64), mask)
    back = (zs[0], -zs[1], zs[2], -zs[3])
    at = (b * time + n * CHUNK + length - 1, d, inside, channels)
    l = (lr.to(DTYPE), li.to(DTYPE))
    l = _write_gradients(
        l, back, w, g, du, positions, at, 0, whole, PADDED, ROWS, STAGES, MASKED, PAIR, DOCUMENTS
    )
    _write_gradients(
        l, back, w, g, du, positions, at, whole, length, PADDED, 1, 1, MASKED, PAIR, DOCUMENTS
    )


@triton.jit(do_not_specialize=["parts"])
def finish(
    sums, z, d_decay, d_frequency, d_gain, parts, channels,
    MODES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Add `sums` [parts, 3, modes, channels], always in the same order. The gradients
    [channels, modes] follow from dz/d(decay) = -z and dz/d(frequency) = i z."""
    size = MODES * channels
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    qr = tl.zeros((ROWS, BLOCK), tl.float64)
    qi, gg = qr, qr
    for begin in range(0, parts, ROWS):
        i = (begin + row) * 3 * size + k[None, :]
        there = (begin + row < parts) & (k < size)[None, :]
        qr += tl.load(sums + i, there, 0.0)
        qi += tl.load(sums + i + size, there, 0.0)
        gg += tl.load(sums + i + 2 * size, there, 0.0)
    mask = k < size
    place = k % channels * MODES + k // channels
    zr = tl.load(z + 2 * place, mask, 0.0)
    zi = tl.load(z + 2 * place + 1, mask, 0.0)
    ar, ai = tl.sum(qr, 0), tl.sum(qi, 0)
    in_decay, in_frequency = ai * zi - ar * zr, -ar * zi - ai * zr
    tl.store(d_decay + place, in_decay.to(d_decay.dtype.element_ty), mask)
    tl.store(d_frequency + place, in_frequency.to(d_frequency.dtype.element_ty), mask)
    tl.store(d_gain + place, tl.sum(gg, 0).to(d_gain.dtype.element_ty), mask)
