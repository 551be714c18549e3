"""The Triton kernels of the convolution forwards (see `triton_spectral` for the maths).

    dynamics   z = exp(-decay + i frequency), once per call
    ends       the final state of each chunk of time, from a zero state
    carry      the state at the start of each chunk, by a recurrence over chunks
    outputs    the recurrence again, from the right start: writes y

A program computes one row of the batch, one chunk of time and one block of channels. Its warp
covers the channels, a few adjacent ones per lane, so that a row of time is one wide load or store
per lane. The loop over time keeps the state in registers and loads ROWS rows before it uses the
first of them; STAGES such groups are in flight at a time, copied to shared memory.

Modes are the first dimension of every tile ([modes, channels], padded to a power of two). States at
chunk borders are planes [batch, chunks, (re, im), modes, channels] of float64. A kernel with
REVERSE runs backwards in time, with conj(z), for the gradient l of the state.

Inside the kernels h = (re, im); z = (re, im, what rounding took from re, from im); at = (first
token, channels, their mask, channels in all).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_window.ops import triton_interpreter

triton_interpreter.repair()


@triton.jit
def times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def advance(h, z, x, PAIR: tl.constexpr):
    """z h + x for a real x; with PAIR, by z as it was before rounding."""
    re, im = h[0], h[1]
    if PAIR:
        new_re = z[0] * re + ((z[2] * re + (x - z[3] * im)) - z[1] * im)
        new_im = z[0] * im + (z[1] * re + (z[2] * im + z[3] * re))
    else:
        new_re = z[0] * re + (x - z[1] * im)
        new_im = z[0] * im + z[1] * re
    return new_re, new_im


@triton.jit
def select(condition, h, other):
    """`h` where `condition`; a choice and not a product, so that a NaN stays in its document."""
    return tl.where(condition, h[0], other[0]), tl.where(condition, h[1], other[1])


@triton.jit
def load_z(z, place, mask, DTYPE: tl.constexpr, REVERSE: tl.constexpr):
    """z (conj(z) for REVERSE) in DTYPE, and its rounding error."""
    re = tl.load(z + 2 * place, mask, 0.0)
    im = tl.load(z + 2 * place + 1, mask, 0.0)
    if REVERSE:
        im = -im
    hr, hi = re.to(DTYPE), im.to(DTYPE)
    return hr, hi, (re - hr.to(tl.float64)).to(DTYPE), (im - hi.to(tl.float64)).to(DTYPE)


@triton.jit
def load_gain(gain, place, mask, MODES: tl.constexpr, GAIN: tl.constexpr, DTYPE: tl.constexpr):
    """The gain of every mode; 0 for modes that only pad the tile."""
    if GAIN:
        return tl.load(gain + place, mask, 0.0).to(DTYPE)
    elif MODES == 1:  # noqa: RET505 (the compiler follows what comes after a return)
        return tl.full((1, 1), 1.0, DTYPE)
    else:
        return tl.where(mask, 1.0, 0.0).to(DTYPE)


@triton.jit
def power(z, n, BITS: tl.constexpr):
    """z^n in float64 by squaring, 0 <= n < 2^BITS."""
    zr, zi = z[0], z[1]
    pr, pi = tl.full(zr.shape, 1.0, tl.float64), tl.full(zr.shape, 0.0, tl.float64)
    for bit in tl.static_range(BITS):
        wanted = ((n >> bit) & 1) == 1
        qr, qi = times(pr, pi, zr, zi)
        pr, pi = tl.where(wanted, qr, pr), tl.where(wanted, qi, pi)
        zr, zi = times(zr, zi, zr, zi)
    return pr, pi


@triton.jit
def tile(pid, chunks, channels, MODES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of program `pid`: row b, chunk n, channels [1, BLOCK] and their mask, modes
    [PADDED, 1] and the mask of the whole tile."""
    blocks = tl.cdiv(channels, BLOCK)
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = tl.arange(0, PADDED)[:, None]
    b = (pid // blocks // chunks).to(tl.int64)
    inside = d < channels
    return b, pid // blocks % chunks, d, inside, m, inside & (m < MODES)


@triton.jit
def load_rows(x, at, i, ROWS: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Load rows i, i + STEP, ... of time together: a tuple of ROWS tiles [1, BLOCK]."""
    offset = (at[0] + i) * at[3] + at[1]
    rows = ()
    for k in tl.static_range(ROWS):
        if MASKED:
            rows = rows + (tl.load(x + offset + k * STEP * at[3], at[2], 0.0),)  # noqa: RUF005
        else:
            rows = rows + (tl.load(x + offset + k * STEP * at[3]),)  # noqa: RUF005
    return rows


@triton.jit
def store_row(y, at, i, value, MASKED: tl.constexpr):
    value = value.to(y.dtype.element_ty)
    if MASKED:
        tl.store(y + (at[0] + i) * at[3] + at[1], value, at[2])
    else:
        tl.store(y + (at[0] + i) * at[3] + at[1], value)


@triton.jit
def load_position(positions, token, DOCUMENTS: tl.constexpr):
    """The token's position in its document; without documents 1, which has no effect."""
    if DOCUMENTS:
        return tl.load(positions + token).to(tl.int32)
    else:  # noqa: RET505
        return 1


@triton.jit
def sum_modes(value, PADDED: tl.constexpr):
    if PADDED == 1:
        return value
    else:  # noqa: RET505
        return tl.sum(value, 0, keep_dims=True)


@triton.jit
def step_state(h, z, x, position, PAIR: tl.constexpr, DOCUMENTS: tl.constexpr):
    """h <- z h + x; the first token of a document resets the state, padding keeps it."""
    new = h
    if DOCUMENTS:
        new = select(position == 0, (0.0, 0.0), new)
    new = advance(new, z, x.to(z[0].dtype), PAIR)
    if DOCUMENTS:
        new = select(position < 0, h, new)
    return new


@triton.jit
def step_back(l, z, w, g, position, PAIR: tl.constexpr, DOCUMENTS: tl.constexpr):
    """l <- conj(z) (l + w g), with z conjugate already; the first token of a document stops it."""
    new = advance((l[0] + w * g.to(z[0].dtype), l[1]), z, 0.0, PAIR)
    if DOCUMENTS:
        new = select(position == 0, (0.0, 0.0), new)
        new = select(position < 0, l, new)
    return new


@triton.jit
def dynamics(decay, frequency, z, count, BLOCK: tl.constexpr):
    """z [count, (re, im)] float64 of `count` decays and frequencies."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    size = tl.exp(-tl.load(decay + i, mask, 0.0).to(tl.float64))
    angle = tl.load(frequency + i, mask, 0.0).to(tl.float64)
    tl.store(z + 2 * i, size * tl.cos(angle), mask)
    tl.store(z + 2 * i + 1, size * tl.sin(angle), mask)


@triton.jit
def _leave(
    h, count, z, w, x, positions, at, begin, stop,
    ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, REVERSE: tl.constexpr,
    PAIR: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Tokens begin ... stop of a chunk of `ends`, ROWS at a time; `count` is the number of tokens,
    and of document starts."""
    STEP: tl.constexpr = -1 if REVERSE else 1
    for i in tl.range(begin, stop, ROWS, num_stages=STAGES):
        rows = load_rows(x, at, i * STEP, ROWS, STEP, MASKED)
        for k in tl.static_range(ROWS):
            position = load_position(positions, at[0] + (i + k) * STEP, DOCUMENTS)
            if REVERSE:
                h = step_back(h, z, w, rows[k], position, PAIR, DOCUMENTS)
            else:
                h = step_state(h, z, rows[k], position, PAIR, DOCUMENTS)
            if DOCUMENTS:
                count = (
                    count[0] + tl.where(position >= 0, 1, 0),
                    count[1] + tl.where(position == 0, 1, 0),
                )
    return h, count


@triton.jit(do_not_specialize=["time", "chunks"])
def ends(
    x, z, gain, positions, states, steps, time, channels, chunks,
    MODES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
    REVERSE: tl.constexpr, GAIN: tl.constexpr, PAIR: tl.constexpr, DOCUMENTS: tl.constexpr,
    DTYPE: tl.constexpr
):  # fmt: skip
    """Write the final state of each chunk of x [batch, time, channels], from zero, to `states`.

    REVERSE: x is the gradient of y. With DOCUMENTS, `steps` (planes too) gets the power of z by
    which the state before the chunk is multiplied at its end: 0 if a document starts inside.
    """
    b, n, d, inside, m, mask = tile(tl.program_id(0), chunks, channels, MODES, PADDED, BLOCK)
    place = d * MODES + m
    zs = load_z(z, place, mask, DTYPE, REVERSE)
    w = load_gain(gain, place, mask, MODES, GAIN, DTYPE)
    h = (tl.zeros((PADDED, BLOCK), DTYPE), tl.zeros((PADDED, BLOCK), DTYPE))
    length = tl.minimum(time - n * CHUNK, CHUNK)
    token = b * time + n * CHUNK
    if REVERSE:
        token += length - 1
    at = (token, d, inside, channels)
    whole = length // ROWS * ROWS
    count = (0, 0)
    h, count = _leave(
        h, count, zs, w, x, positions, at, 0, whole, ROWS, STAGES, MASKED, REVERSE, PAIR, DOCUMENTS
    )
    h, count = _leave(
        h, count, zs, w, x, positions, at, whole, length, 1, 1, MASKED, REVERSE, PAIR, DOCUMENTS
    )
    to = ((b * chunks + n) * 2 * MODES + m) * channels + d
    tl.store(states + to, h[0].to(tl.float64), mask)
    tl.store(states + to + MODES * channels, h[1].to(tl.float64), mask)
    if DOCUMENTS:
        p = power(load_z(z, place, mask, tl.float64, REVERSE), count[0], BITS)
        p = select(count[1] > 0, (0.0, 0.0), p)
        tl.store(steps + to, p[0], mask)
        tl.store(steps + to + MODES * channels, p[1], mask)


@triton.jit(do_not_specialize=["time", "chunks"])
def carry(
    states, z, steps, first, last, time, channels, chunks,
    MODES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """Replace the final state of each chunk by the state before it (REVERSE: after it), starting
    from `first` (GIVEN; zero otherwise). `last` gets the state after all chunks.

    first, last: [batch, channels, modes, (re, im)] float64.
    """
    size = MODES * channels
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = k < size
    place = k % channels * MODES + k // channels
    zs = load_z(z, place, mask, tl.float64, REVERSE)
    across = power(zs, CHUNK, BITS)
    across_last = power(zs, time - (chunks - 1) * CHUNK, BITS)
    own = 2 * (b * size + place)
    if GIVEN:
        h = (tl.load(first + own, mask, 0.0), tl.load(first + own + 1, mask, 0.0))
    else:
        h = (tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64))
    for begin in range(0, chunks, ROWS):
        left, step = (), ()
        for j in tl.static_range(ROWS):
            n = begin + j
            there = mask & (n < chunks)
            if REVERSE:
                n = chunks - 1 - n
            i = (b * chunks + n) * 2 * size + k
            pair = (tl.load(states + i, there, 0.0), tl.load(states + i + size, there, 0.0))
            left = left + (pair,)  # noqa: RUF005
            if DOCUMENTS:
                pair = (tl.load(steps + i, there, 0.0), tl.load(steps + i + size, there, 0.0))
                step = step + (pair,)  # noqa: RUF005
        for j in tl.static_range(ROWS):
            n = begin + j
            there = n < chunks
            if REVERSE:
                n = chunks - 1 - n
            i = (b * chunks + n) * 2 * size + k
            tl.store(states + i, h[0], mask & there)
            tl.store(states + i + size, h[1], mask & there)
            if DOCUMENTS:
                p = step[j]
                moved = times(p[0], p[1], h[0], h[1])
                moved = select((p[0] == 0.0) & (p[1] == 0.0), (0.0, 0.0), moved)
            else:
                p = select(n == chunks - 1, across_last, across)
                moved = times(p[0], p[1], h[0], h[1])
            h = select(there, (moved[0] + left[j][0], moved[1] + left[j][1]), h)
    tl.store(last + own, h[0], mask)
    tl.store(last + own + 1, h[1], mask)


@triton.jit
def _write_outputs(
    h, z, w, u, y, positions, at, begin, stop,
    PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
    PAIR: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Tokens begin ... stop of a chunk of `outputs`, ROWS at a time."""
    for i in tl.range(begin, stop, ROWS, num_stages=STAGES):
        rows = load_rows(u, at, i, ROWS, 1, MASKED)
        for k in tl.static_range(ROWS):
            position = load_position(positions, at[0] + i + k, DOCUMENTS)
            h = step_state(h, z, rows[k], position, PAIR, DOCUMENTS)
            value = sum_modes(w * h[0], PADDED)
            if DOCUMENTS:
                value = tl.where(position < 0, 0.0, value)
            store_row(y, at, i + k, value, MASKED)
    return h


@triton.jit(do_not_specialize=["time", "chunks"])
def outputs(
    u, z, gain, positions, starts, y, time, channels, chunks,
    MODES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, GAIN: tl.constexpr,
    PAIR: tl.constexpr, DOCUMENTS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """y of each chunk, from the state at its start."""
    # the last chunks first: `ends` read them last, so they may still be in the cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, n, d, inside, m, mask = tile(pid, chunks, channels, MODES, PADDED, BLOCK)
    place = d * MODES + m
    zs = load_z(z, place, mask, DTYPE, False)
    w = load_gain(gain, place, mask, MODES, GAIN, DTYPE)
    start = ((b * chunks + n) * 2 * MODES + m) * channels + d
    re = tl.load(starts + start, mask, 0.0).to(DTYPE)
    im = tl.load(starts + start + MODES * channels, mask, 0.0).to(DTYPE)
    length = tl.minimum(time - n * CHUNK, CHUNK)
    at = (b * time + n * CHUNK, d, inside, channels)
    whole = length // ROWS * ROWS
    h = _write_outputs(
        (re, im),
        zs,
        w,
        u,
        y,
        positions,
        at,
        0,
        whole,
        PADDED,
        ROWS,
        STAGES,
        MASKED,
        PAIR,
        DOCUMENTS,
    )
    _write_outputs(
        h, zs, w, u, y, positions, at, whole, length, PADDED, 1, 1, MASKED, PAIR, DOCUMENTS
    )
