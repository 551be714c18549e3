"""The kernels of the recurrence (see `scan` for the maths).

A tile is a group of the batch's rows and a slice of the channels. It goes through its rows one by
one. A state is loaded from the tile's buffer into registers, advanced over a few rows of time, many
channels at once, and stored back. One mode without a gain writes y at once; several add theirs into
rows of float64 first.

A buffer is a few float64 planes of [M, width], the width rounded up to whole vectors, so that only
tensors, never a buffer, end in a partial vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    NOWHERE,
    Address,
    address,
    optional,
)
from spectral_window.ops.compiled.simd import (
    LANES64,
    always,
    bfloat16s,
    float32s,
    float64s,
    inner,
    int64s,
    load_at,
    power_of_two,
    prefetch_at,
    rounded,
    spread,
    store_at,
    stream_at,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel

BLOCK = 64  # positions between checkpoints
ROWS = 4  # of time that a state stays in registers
LINE = 16  # slices begin at multiples of it, so that no two threads write one cache line
_AHEAD = 8  # rows of time that are prefetched

# The planes of a buffer, each [M, width] float64: z, gain, h; backwards also s, sum g s,
# sum g Re h, l and sum conj(l) s. Then ROWS rows in which modes are summed.
ZR, ZI, GAIN, HR, HI, SR, SI, QR, QI, GG, LR, LI, ER, EI = range(14)


class Scan(NamedTuple):
    decay: Address  # [D, M], like frequency and gain: float64 if `double`, else float32
    frequency: Address
    gain: Address  # or none, for 1
    double: bool
    positions: Address  # int64 [B, T], or none
    batch: int
    time: int
    channels: int
    modes: int
    slices: int
    groups: int
    stream: bool  # whether the output is written past the cache
    checkpoints: Address  # float64 [B, blocks, 2, M, D]: the state at the start of every block
    refused: Address  # int64 [1], or none: becomes 1 where modes are not finite, or grow
    u: Address  # [B, T, D], like y and the gradients of both
    # forward
    y: Address = NOWHERE
    state: Address = NOWHERE  # float64 [B, D, M, 2], or none
    final: Address = NOWHERE
    # backward: gradients, given ...
    d_y: Address = NOWHERE
    d_final: Address = NOWHERE
    # ... and found
    d_u: Address = NOWHERE
    d_state: Address = NOWHERE
    sums: Address = NOWHERE  # float64 [groups, 3, D, M]: of decay, frequency and gain


def _record(dtype, tiles, inputs, stream, checkpoints, refused, u, **others):
    """The fields decay ... u, for u in `dtype` (see `scan._inputs`), and others."""
    decay, frequency, gain, positions, batch, time, channels, modes, slices, groups = inputs
    kind, count = (FLOAT64 if decay.dtype is FLOAT64 else FLOAT32), channels * modes
    if tiles != slices * groups or min(slices, groups) < 1:
        raise UserError(f"{tiles} tiles (compiled code): expected {groups} groups, {slices} slices")
    return Scan(
        *(address(decay, kind, count), address(frequency, kind, count)),
        *(optional(gain, kind, count), kind is FLOAT64),
        optional(positions, INT64, batch * time),
        *(batch, time, channels, modes, slices, groups, stream),
        optional(checkpoints, FLOAT64, batch * -(-time // BLOCK) * 2 * modes * channels),
        optional(refused, INT64, 1),
        address(u, dtype, batch * time * channels),
        **others,
    )


def _forward_arguments(dtype: Any) -> Callable[..., Scan]:
    """Of a forward pass over u and y in `dtype`; see `scan.run`."""

    def arguments(tiles, inputs, stream, checkpoints, refused, u, y, state, final):
        *_, batch, time, channels, modes, _, _ = inputs
        count, numbers = batch * time * channels, batch * channels * modes * 2
        return _record(
            *(dtype, tiles, inputs, stream, checkpoints, refused, u),
            y=address(y, dtype, count),
            state=optional(state, FLOAT64, numbers),
            final=address(final, FLOAT64, numbers),
        )

    return arguments


def _backward_arguments(dtype: Any) -> Callable[..., Scan]:
    """Of a backward pass over u, its gradient and that of y in `dtype`."""

    def arguments(tiles, inputs, stream, checkpoints, u, d_y, d_u, d_final, d_state, sums):
        *_, batch, time, channels, modes, _, groups = inputs
        count, numbers = batch * time * channels, batch * channels * modes * 2
        if checkpoints is None:
            raise UserError("no checkpoints (compiled scan): the forward pass saves them")
        return _record(
            *(dtype, tiles, inputs, stream, checkpoints, None, u),
            d_y=address(d_y, dtype, count),
            d_final=address(d_final, FLOAT64, numbers),
            d_u=address(d_u, dtype, count),
            d_state=address(d_state, FLOAT64, numbers),
            sums=address(sums, FLOAT64, groups * 3 * channels * modes),
        )

    return arguments


# ---------------------------------------------------------------- z = exp(-decay + i frequency)

# Compilers call the C library for exp, cos and sin, one number at a time: 20 microseconds for 768
# channels, more than everything else in a step of decoding. Here they are polynomials over vectors:
#
#     exp(x) = 2^n exp(x - n ln 2),   |x - n ln 2| <= ln(2) / 2
#     cos(x), sin(x): turn by n quarters the cos and sin of x - n pi/2, |x - n pi/2| <= pi/4
#
# n ln 2 and n pi/2 are subtracted in parts, the first so short that its product with n is exact
# (Cody and Waite): the remainder keeps all its digits. Beyond 100,000 radians per token, where that
# would end, the C library serves.

_FAR = 1e5  # radians up to which pi/2 in three tiles of 33 bits leaves an exact remainder
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
_LN2 = (0.6931471803691238, 1.9082149292705877e-10)
# Taylor series, last term first, as far as float64 sees: |x| <= ln(2)/2, and |x| <= pi/4 in x^2.
_EXP = tuple(1 / math.factorial(k) for k in range(13, -1, -1))
_SIN = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8, -1, -1))
_COS = tuple((-1) ** k / math.factorial(2 * k) for k in range(8, -1, -1))


@always
def _polynomial(coefficients, x):
    y = spread(coefficients[0])
    for k in range(1, len(coefficients)):
        y = y * x + spread(coefficients[k])
    return y


@inner
def exponentiate(buffer, size):
    """In place: `size` decays, then `size` frequencies, become Re z and Im z. `size` is a multiple
    of LANES64; what is not finite gives what the C library gives."""
    near = True
    for i in range(size):
        if buffer[i] > 750.0:
            buffer[i] = 750.0  # exp is 0 from here on
        near &= (buffer[i] >= 0.0) & (abs(buffer[size + i]) <= _FAR)
    if not near:
        for i in range(size):
            scale, angle = math.exp(-buffer[i]), buffer[size + i]
            buffer[i], buffer[size + i] = scale * math.cos(angle), scale * math.sin(angle)
        return
    for i in range(0, size, LANES64):
        x = spread(0.0) - load_at(buffer, i, LANES64)
        n = rounded(x * spread(1 / math.log(2.0)))
        x = x - n * spread(_LN2[0]) - n * spread(_LN2[1])
        half = rounded(n * spread(0.5))  # 2^n in two factors, the result may be denormal
        scale = _polynomial(_EXP, x) * power_of_two(half) * power_of_two(n - half)

        x = load_at(buffer, size + i, LANES64)
        n = rounded(x * spread(2 / math.pi))
        x = x - n * spread(_HALF_PI[0]) - n * spread(_HALF_PI[1]) - n * spread(_HALF_PI[2])
        xx = x * x
        c, s = _polynomial(_COS, xx), _polynomial(_SIN, xx) * x
        # turn by n quarters: cos and sin of n pi/2, as polynomials in n = -2 ... 2
        n = n - rounded(n * spread(0.25)) * spread(4.0)
        nn = n * n
        turn_s = n * (spread(4.0) - nn) * spread(1 / 3)
        turn_c = spread(1.0) - nn * (spread(7.0) - nn) * spread(1 / 6)
        store_at(buffer, i, LANES64, scale * (c * turn_c - s * turn_s))
        store_at(buffer, size + i, LANES64, scale * (s * turn_c + c * turn_s))


# ---------------------------------------------------------------- a tile and its buffer


@inner
def _gather(source, args, begin, width, buffer, plane):
    """Slice `begin`, `width` of [D, M] into a plane; whether all are finite."""
    modes = args.modes
    padded = padded_to(width)
    finite = True
    for m in range(modes):
        first = (plane * modes + m) * padded
        for j in range(width):
            buffer[first + j] = source[(begin + j) * modes + m]
            finite &= abs(buffer[first + j]) < np.inf
    return finite


@inner
def dynamics(args, begin, width, buffer):
    """Fill the planes of z and gain; False where the call asked to refuse modes that are not
    finite or grow, and some are."""
    size = args.modes * padded_to(width)
    count = args.channels * args.modes
    right = True
    buffer[GAIN * size : (GAIN + 1) * size] = 1.0
    for plane, source in ((ZR, args.decay), (ZI, args.frequency), (GAIN, args.gain)):
        if source != 0:
            if args.double:
                right &= _gather(float64s(source, count), args, begin, width, buffer, plane)
            else:
                right &= _gather(float32s(source, count), args, begin, width, buffer, plane)
    for i in range(size):
        right &= buffer[i] >= 0.0
    if args.refused != 0 and not right:
        int64s(args.refused, 1)[0] = 1
        return False
    exponentiate(buffer, size)
    return True


# ---------------------------------------------------------------- tiles and their memory


@always
def padded_to(width):
    return (width + LANES64 - 1) // LANES64 * LANES64


@inner
def numbers(args):
    return args.batch * args.time * args.channels


@inner
def slice_of(args, tile):
    """(first batch row, last + 1, first channel, channels) of a tile."""
    batch, channels, slices, groups = args.batch, args.channels, args.slices, args.groups
    group, slice_ = tile // slices, tile % slices
    begin = channels * slice_ // slices // LINE * LINE
    end = channels if slice_ == slices - 1 else channels * (slice_ + 1) // slices // LINE * LINE
    return batch * group // groups, batch * (group + 1) // groups, begin, end - begin


@inner
def new_buffer(planes, args, width):
    """Zeros for `planes` planes and ROWS rows, at a cache line's beginning."""
    count = (planes * args.modes + ROWS) * padded_to(width)
    memory = np.zeros(count + 8)
    shift = -(memory.ctypes.data // 8) % 8
    return memory[shift : shift + count]


@inner
def read_state(args, address, b, begin, width, buffer, plane):
    """Row b of a state [B, D, M, 2] (address 0: zeros) into two planes."""
    modes, padded = args.modes, padded_to(width)
    size = modes * padded
    buffer[plane * size : (plane + 2) * size] = 0.0
    if address != 0:
        h = float64s(address, args.batch * args.channels * modes * 2)
        for m in range(modes):
            at, to = ((b * args.channels + begin) * modes + m) * 2, plane * size + m * padded
            for j in range(width):
                buffer[to + j] = h[at + j * modes * 2]
                buffer[to + size + j] = h[at + j * modes * 2 + 1]


@inner
def write_state(args, address, b, begin, width, buffer, plane):
    modes, padded = args.modes, padded_to(width)
    size = modes * padded
    h = float64s(address, args.batch * args.channels * modes * 2)
    for m in range(modes):
        to, at = ((b * args.channels + begin) * modes + m) * 2, plane * size + m * padded
        for j in range(width):
            h[to + j * modes * 2] = buffer[at + j]
            h[to + j * modes * 2 + 1] = buffer[at + size + j]


@inner
def checkpoints_of(args):
    blocks = (args.time + BLOCK - 1) // BLOCK
    return float64s(args.checkpoints, args.batch * blocks * 2 * args.modes * args.channels)


@inner
def checkpoint_at(args, b, t, begin):
    """The index, in the checkpoints [B, blocks, 2, M, D], of the block that holds position t."""
    blocks = (args.time + BLOCK - 1) // BLOCK
    return (b * blocks + t // BLOCK) * 2 * args.modes * args.channels + begin


# ---------------------------------------------------------------- runs of tokens


@inner
def _run(at, first, step, most):
    """How many of the next `most` tokens pass without an event. Forwards (`step` 1) a position 0
    may only be the first of them, backwards (-1) the last; padding ends a run."""
    count = 1
    while count < most:
        here, there = at[first + (count - 1) * step], at[first + count * step]
        if there < 0 or (there == 0 if step > 0 else here == 0):
            break
        count += 1
    return count


@inner
def _flush(y, i, channels, rows, width, buffer, acc):
    """Write and clear the rows in which modes were summed."""
    padded = padded_to(width)
    for k in range(rows):
        for j in range(0, width, LANES64):
            at = acc + k * padded + j
            store_at(y, i + k * channels + j, min(LANES64, width - j), load_at(buffer, at, LANES64))
            store_at(buffer, at, LANES64, spread(0.0))


# ---------------------------------------------------------------- forwards


@always
def _advance_lanes(u, y, i, channels, rows, j, count, buffer, o, size, acc, width, alone, past):
    """`rows` rows of one mode, channels j ... j + count. o: the mode's place in a plane; acc: the
    place of the summed rows, used unless the mode is `alone`; `past`: write past the cache."""
    zr, zi = load_at(buffer, o + j, LANES64), load_at(buffer, size + o + j, LANES64)
    w = load_at(buffer, GAIN * size + o + j, LANES64)
    hr, hi = (
        load_at(buffer, HR * size + o + j, LANES64),
        load_at(buffer, HI * size + o + j, LANES64),
    )
    at, to = i + j, acc + j
    for _ in range(rows):
        prefetch_at(u, at + _AHEAD * channels)
        x = load_at(u, at, count) - zi * hi
        hi = zr * hi + zi * hr
        hr = zr * hr + x
        if not alone:
            store_at(buffer, to, LANES64, load_at(buffer, to, LANES64) + w * hr)
        elif past:
            stream_at(y, at, hr)
        else:
            store_at(y, at, count, hr)
        at += channels
        to += padded_to(width)
    store_at(buffer, HR * size + o + j, LANES64, hr)
    store_at(buffer, HI * size + o + j, LANES64, hi)


@inner
def _advance(u, y, i, channels, rows, width, buffer, o, size, acc, alone, past):
    for k in range(rows):  # one line: it is the page's address that takes long to find
        prefetch_at(y, i + (k + _AHEAD) * channels)
    whole = width // LANES64 * LANES64
    for j in range(0, whole, LANES64):
        _advance_lanes(
            u, y, i, channels, rows, j, LANES64, buffer, o, size, acc, width, alone, past
        )
    if whole < width:
        left = width - whole
        _advance_lanes(
            u, y, i, channels, rows, whole, left, buffer, o, size, acc, width, alone, past
        )


@inner
def _forward_row(args, u, y, b, begin, width, buffer):
    time, channels, modes, documents = args.time, args.channels, args.modes, args.positions != 0
    at = int64s(args.positions, args.batch * time)
    padded = padded_to(width)
    size = modes * padded
    acc = buffer.shape[0] - ROWS * padded
    alone = modes == 1 and args.gain == 0
    read_state(args, args.state, b, begin, width, buffer, HR)
    t = 0
    while t < time:
        if args.checkpoints != 0 and t % BLOCK == 0:
            states, place = checkpoints_of(args), checkpoint_at(args, b, t, begin)
            for plane in range(2 * modes):  # real tiles, then imaginary ones
                h = HR * size + plane * padded
                states[place : place + width] = buffer[h : h + width]
                place += channels
        i = (b * time + t) * channels + begin
        rows = min(ROWS, BLOCK - t % BLOCK, time - t)
        if documents:
            position = at[b * time + t]
            if position < 0:
                y[i : i + width] = 0
                t += 1
                continue
            if position == 0:
                buffer[HR * size : (HI + 1) * size] = 0.0
            rows = _run(at, b * time + t, 1, rows)
        for m in range(modes):
            o = m * padded
            _advance(u, y, i, channels, rows, width, buffer, o, size, acc, alone, args.stream)
        if not alone:
            _flush(y, i, channels, rows, width, buffer, acc)
        t += rows
    write_state(args, args.final, b, begin, width, buffer, HR)


@inner
def _forward(args, u, y):
    tile = claim_tile(args)
    while tile >= 0:
        first, last, begin, width = slice_of(args, tile)
        buffer = new_buffer(HI + 1, args, width)
        if dynamics(args, begin, width, buffer):
            for b in range(first, last):
                _forward_row(args, u, y, b, begin, width, buffer)
        tile = claim_tile(args)


# ---------------------------------------------------------------- backwards


@always
def _follow_lanes(u, g, i, channels, rows, j, count, ahead, buffer, o, size):
    """h and s over `rows` rows of one mode, and what they give to the sums of g s and g Re h."""
    at, p = i + j, o + j
    zr, zi = load_at(buffer, p, LANES64), load_at(buffer, size + p, LANES64)
    hr, hi = load_at(buffer, HR * size + p, LANES64), load_at(buffer, HI * size + p, LANES64)
    sr, si = load_at(buffer, SR * size + p, LANES64), load_at(buffer, SI * size + p, LANES64)
    qr, qi = load_at(buffer, QR * size + p, LANES64), load_at(buffer, QI * size + p, LANES64)
    gg = load_at(buffer, GG * size + p, LANES64)
    for _ in range(rows):
        prefetch_at(u, at + ahead)
        prefetch_at(g, at + ahead)
        x, d = load_at(u, at, count), load_at(g, at, count)
        before = sr
        sr = zr * sr + (hr - zi * si)
        si = zr * si + (hi + zi * before)
        before = hr
        hr = zr * hr + (x - zi * hi)
        hi = zr * hi + zi * before
        qr, qi, gg = qr + d * sr, qi + d * si, gg + d * hr
        at += channels
    store_at(buffer, HR * size + p, LANES64, hr)
    store_at(buffer, HI * size + p, LANES64, hi)
    store_at(buffer, SR * size + p, LANES64, sr)
    store_at(buffer, SI * size + p, LANES64, si)
    store_at(buffer, QR * size + p, LANES64, qr)
    store_at(buffer, QI * size + p, LANES64, qi)
    store_at(buffer, GG * size + p, LANES64, gg)


@inner
def _follow(u, g, i, channels, rows, width, ahead, buffer, o, size):
    whole = width // LANES64 * LANES64
    for j in range(0, whole, LANES64):
        _follow_lanes(u, g, i, channels, rows, j, LANES64, ahead, buffer, o, size)
    if whole < width:
        _follow_lanes(u, g, i, channels, rows, whole, width - whole, ahead, buffer, o, size)


@always
def _retreat_lanes(g, du, i, channels, rows, j, count, buffer, o, size, acc, width, alone, past):
    """l over `rows` rows of one mode, from row i back. The planes hold conj(z) l_{t+1}: the
    gradient that reaches h_t from later positions."""
    at, to, p = i + j, acc + j, o + j
    zr, zi, w = (
        load_at(buffer, p, LANES64),
        load_at(buffer, size + p, LANES64),
        load_at(buffer, GAIN * size + p, LANES64),
    )
    lr, li = load_at(buffer, LR * size + p, LANES64), load_at(buffer, LI * size + p, LANES64)
    for _ in range(rows):
        prefetch_at(g, at - _AHEAD * channels)
        re = lr + w * load_at(g, at, count)
        if not alone:
            store_at(buffer, to, LANES64, load_at(buffer, to, LANES64) + re)
        elif past:
            stream_at(du, at, re)
        else:
            store_at(du, at, count, re)
        lr = zr * re + zi * li
        li = zr * li - zi * re
        at -= channels
        to += padded_to(width)
    store_at(buffer, LR * size + p, LANES64, lr)
    store_at(buffer, LI * size + p, LANES64, li)


@inner
def _retreat(g, du, i, channels, rows, width, buffer, o, size, acc, alone, past):
    for k in range(rows):
        prefetch_at(du, i - (k + _AHEAD) * channels)
    whole = width // LANES64 * LANES64
    for j in range(0, whole, LANES64):
        _retreat_lanes(
            g, du, i, channels, rows, j, LANES64, buffer, o, size, acc, width, alone, past
        )
    if whole < width:
        left = width - whole
        _retreat_lanes(
            g, du, i, channels, rows, whole, left, buffer, o, size, acc, width, alone, past
        )


@inner
def _meet(buffer, size):
    """At a block's end: what s gives to dL/dz through all that comes later, conj(l) s."""
    for p in range(0, size, LANES64):
        lr, li = load_at(buffer, LR * size + p, LANES64), load_at(buffer, LI * size + p, LANES64)
        sr, si = load_at(buffer, SR * size + p, LANES64), load_at(buffer, SI * size + p, LANES64)
        er, ei = load_at(buffer, ER * size + p, LANES64), load_at(buffer, EI * size + p, LANES64)
        store_at(buffer, ER * size + p, LANES64, er + lr * sr + li * si)
        store_at(buffer, EI * size + p, LANES64, ei + lr * si - li * sr)


@inner
def _backward_row(args, u, g, du, b, begin, width, buffer):
    time, channels, modes, documents = args.time, args.channels, args.modes, args.positions != 0
    at = int64s(args.positions, args.batch * time)
    padded = padded_to(width)
    size = modes * padded
    acc = buffer.shape[0] - ROWS * padded
    alone = modes == 1
    read_state(args, args.d_final, b, begin, width, buffer, LR)
    start = (time - 1) // BLOCK * BLOCK
    while start >= 0:
        end = min(start + BLOCK, time)
        states, place = checkpoints_of(args), checkpoint_at(args, b, start, begin)
        for plane in range(2 * modes):
            h = HR * size + plane * padded
            buffer[h : h + width] = states[place : place + width]
            place += channels
        buffer[SR * size : (SI + 1) * size] = 0.0
        t = start
        while t < end:
            rows = min(ROWS, end - t)
            if documents:
                position = at[b * time + t]
                if position < 0:
                    t += 1
                    continue
                if position == 0:
                    buffer[HR * size : (SI + 1) * size] = 0.0
                rows = _run(at, b * time + t, 1, rows)
            # after this block comes the one before it
            ahead = _AHEAD if t + _AHEAD < end else _AHEAD - (end - start) - BLOCK
            i = (b * time + t) * channels + begin
            for m in range(modes):
                o = m * padded
                _follow(u, g, i, channels, rows, width, ahead * channels, buffer, o, size)
            t += rows
        _meet(buffer, size)
        t = end - 1
        while t >= start:
            i = (b * time + t) * channels + begin
            rows = min(ROWS, t - start + 1)
            if documents:
                if at[b * time + t] < 0:
                    du[i : i + width] = 0
                    t -= 1
                    continue
                rows = _run(at, b * time + t, -1, rows)
            for m in range(modes):
                o = m * padded
                _retreat(g, du, i, channels, rows, width, buffer, o, size, acc, alone, args.stream)
            if not alone:
                _flush(du, i, -channels, rows, width, buffer, acc)
            t -= rows
            if documents and at[b * time + t + 1] == 0:
                buffer[LR * size : (LI + 1) * size] = 0.0
        start -= BLOCK
    write_state(args, args.d_state, b, begin, width, buffer, LR)


@inner
def _backward(args, u, g, du):
    modes, channels = args.modes, args.channels
    sums = float64s(args.sums, args.groups * 3 * channels * modes)
    tile = claim_tile(args)
    while tile >= 0:
        first, last, begin, width = slice_of(args, tile)
        buffer = new_buffer(EI + 1, args, width)
        dynamics(args, begin, width, buffer)
        for b in range(first, last):
            _backward_row(args, u, g, du, b, begin, width, buffer)
        size = modes * padded_to(width)
        for m in range(modes):
            for j in range(width):
                p = m * padded_to(width) + j
                w, zr, zi = buffer[GAIN * size + p], buffer[p], buffer[size + p]
                qr = w * buffer[QR * size + p] + buffer[ER * size + p]
                qi = w * buffer[QI * size + p] + buffer[EI * size + p]
                to = ((tile // args.slices * 3) * channels + begin + j) * modes + m
                # dz/d(decay) = -z, dz/d(frequency) = i z
                sums[to] = qi * zi - qr * zr
                sums[to + channels * modes] = -qr * zi - qi * zr
                sums[to + 2 * channels * modes] = buffer[GG * size + p]
        tile = claim_tile(args)


@kernel(Scan, _forward_arguments(FLOAT32))
def forward_float32(args):
    _forward(args, float32s(args.u, numbers(args)), float32s(args.y, numbers(args)))


@kernel(Scan, _forward_arguments(FLOAT64))
def forward_float64(args):
    _forward(args, float64s(args.u, numbers(args)), float64s(args.y, numbers(args)))


@kernel(Scan, _forward_arguments(BFLOAT16))
def forward_bfloat16(args):
    _forward(args, bfloat16s(args.u, numbers(args)), bfloat16s(args.y, numbers(args)))


@kernel(Scan, _backward_arguments(FLOAT32))
def backward_float32(args):
    _backward(
        args,
        float32s(args.u, numbers(args)),
        float32s(args.d_y, numbers(args)),
        float32s(args.d_u, numbers(args)),
    )


@kernel(Scan, _backward_arguments(FLOAT64))
def backward_float64(args):
    _backward(
        args,
        float64s(args.u, numbers(args)),
        float64s(args.d_y, numbers(args)),
        float64s(args.d_u, numbers(args)),
    )


@kernel(Scan, _backward_arguments(BFLOAT16))
def backward_bfloat16(args):
    _backward(
        args,
        bfloat16s(args.u, numbers(args)),
        bfloat16s(args.d_y, numbers(args)),
        bfloat16s(args.d_u, numbers(args)),
    )
