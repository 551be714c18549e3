"""The compiled loops of the recurrence (see `scan` for the maths): one row of the batch
and one slice of its channels at a time, forwards and backwards.

A state is loaded from the part's room (`scan_rooms`) into registers, advanced over a few rows of
time, many channels at once (`float64_lanes`), and stored back. One mode without a gain
writes y at once; several add theirs into rows of float64 first.
"""

from __future__ import annotations

from spectral_window.ops.compiled.addresses import BFLOAT16, FLOAT32, FLOAT64
from spectral_window.ops.compiled.float64_lanes import LANES, load, prefetch, spread, store, stream
from spectral_window.ops.compiled.scan_rooms import (
    AT,
    BATCH,
    BEGIN,
    BLOCK,
    CHANNELS,
    CUTS,
    DU,
    EI,
    END,
    ER,
    FINAL,
    GAIN,
    GG,
    GROUPS,
    HI,
    HR,
    KEPT,
    LI,
    LR,
    MODES,
    QI,
    QR,
    ROWS,
    SI,
    SR,
    STATE,
    STREAM,
    SUMS,
    TIME,
    G,
    U,
    W,
    Y,
    always,
    backward_words,
    dynamics,
    forward_words,
    kept_place,
    kept_states,
    new_room,
    numbers,
    padded_to,
    read_state,
    slice_of,
    write_state,
)
from spectral_window.ops.compiled.threads import (
    bfloat16s,
    float32s,
    float64s,
    inner,
    int64s,
    kernel,
    take,
)

_AHEAD = 8  # rows of time that are asked for before they are needed


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
def _flush(y, i, channels, rows, width, room, acc):
    """Write and clear the rows in which modes were summed."""
    padded = padded_to(width)
    for k in range(rows):
        for j in range(0, width, LANES):
            at = acc + k * padded + j
            store(y, i + k * channels + j, min(LANES, width - j), load(room, at, LANES))
            store(room, at, LANES, spread(0.0))


# ---------------------------------------------------------------- forwards


@always
def _advance_lanes(u, y, i, channels, rows, j, count, room, o, size, acc, width, alone, past):
    """`rows` rows of one mode, channels j ... j + count. o: the mode's place in a plane; acc: the
    place of the summed rows, used unless the mode is `alone`; `past`: write past the cache."""
    zr, zi = load(room, o + j, LANES), load(room, size + o + j, LANES)
    w = load(room, W * size + o + j, LANES)
    hr, hi = load(room, HR * size + o + j, LANES), load(room, HI * size + o + j, LANES)
    at, to = i + j, acc + j
    for _ in range(rows):
        prefetch(u, at + _AHEAD * channels)
        x = load(u, at, count) - zi * hi
        hi = zr * hi + zi * hr
        hr = zr * hr + x
        if not alone:
            store(room, to, LANES, load(room, to, LANES) + w * hr)
        elif past:
            stream(y, at, hr)
        else:
            store(y, at, count, hr)
        at += channels
        to += padded_to(width)
    store(room, HR * size + o + j, LANES, hr)
    store(room, HI * size + o + j, LANES, hi)


@inner
def _advance(u, y, i, channels, rows, width, room, o, size, acc, alone, past):
    for k in range(rows):  # one line: it is the page's address that takes long to find
        prefetch(y, i + (k + _AHEAD) * channels)
    whole = width // LANES * LANES
    for j in range(0, whole, LANES):
        _advance_lanes(u, y, i, channels, rows, j, LANES, room, o, size, acc, width, alone, past)
    if whole < width:
        left = width - whole
        _advance_lanes(u, y, i, channels, rows, whole, left, room, o, size, acc, width, alone, past)


@inner
def _forward_row(job, u, y, b, begin, width, room):
    time, channels, modes, documents = job[TIME], job[CHANNELS], job[MODES], job[AT] != 0
    at = int64s(job[AT], job[BATCH] * time)
    padded = padded_to(width)
    size = modes * padded
    acc = room.shape[0] - ROWS * padded
    alone = modes == 1 and job[GAIN] == 0
    read_state(job, job[STATE], b, begin, width, room, HR)
    t = 0
    while t < time:
        if job[KEPT] != 0 and t % BLOCK == 0:
            kept, place = kept_states(job), kept_place(job, b, t, begin)
            for plane in range(2 * modes):  # real parts, then imaginary ones
                h = HR * size + plane * padded
                kept[place : place + width] = room[h : h + width]
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
                room[HR * size : (HI + 1) * size] = 0.0
            rows = _run(at, b * time + t, 1, rows)
        for m in range(modes):
            o = m * padded
            _advance(u, y, i, channels, rows, width, room, o, size, acc, alone, job[STREAM])
        if not alone:
            _flush(y, i, channels, rows, width, room, acc)
        t += rows
    write_state(job, job[FINAL], b, begin, width, room, HR)


@inner
def _forward(job, u, y):
    part = take(job)
    while part >= 0:
        first, last, begin, width = slice_of(job, part)
        room = new_room(HI + 1, job, width)
        if dynamics(job, begin, width, room):
            for b in range(first, last):
                _forward_row(job, u, y, b, begin, width, room)
        part = take(job)


# ---------------------------------------------------------------- backwards


@always
def _follow_lanes(u, g, i, channels, rows, j, count, ahead, room, o, size):
    """h and s over `rows` rows of one mode, and what they give to the sums of g s and g Re h."""
    at, p = i + j, o + j
    zr, zi = load(room, p, LANES), load(room, size + p, LANES)
    hr, hi = load(room, HR * size + p, LANES), load(room, HI * size + p, LANES)
    sr, si = load(room, SR * size + p, LANES), load(room, SI * size + p, LANES)
    qr, qi = load(room, QR * size + p, LANES), load(room, QI * size + p, LANES)
    gg = load(room, GG * size + p, LANES)
    for _ in range(rows):
        prefetch(u, at + ahead)
        prefetch(g, at + ahead)
        x, d = load(u, at, count), load(g, at, count)
        before = sr
        sr = zr * sr + (hr - zi * si)
        si = zr * si + (hi + zi * before)
        before = hr
        hr = zr * hr + (x - zi * hi)
        hi = zr * hi + zi * before
        qr, qi, gg = qr + d * sr, qi + d * si, gg + d * hr
        at += channels
    store(room, HR * size + p, LANES, hr)
    store(room, HI * size + p, LANES, hi)
    store(room, SR * size + p, LANES, sr)
    store(room, SI * size + p, LANES, si)
    store(room, QR * size + p, LANES, qr)
    store(room, QI * size + p, LANES, qi)
    store(room, GG * size + p, LANES, gg)


@inner
def _follow(u, g, i, channels, rows, width, ahead, room, o, size):
    whole = width // LANES * LANES
    for j in range(0, whole, LANES):
        _follow_lanes(u, g, i, channels, rows, j, LANES, ahead, room, o, size)
    if whole < width:
        _follow_lanes(u, g, i, channels, rows, whole, width - whole, ahead, room, o, size)


@always
def _retreat_lanes(g, du, i, channels, rows, j, count, room, o, size, acc, width, alone, past):
    """l over `rows` rows of one mode, from row i back. The planes hold conj(z) l_{t+1}: the
    gradient that reaches h_t from later positions."""
    at, to, p = i + j, acc + j, o + j
    zr, zi, w = load(room, p, LANES), load(room, size + p, LANES), load(room, W * size + p, LANES)
    lr, li = load(room, LR * size + p, LANES), load(room, LI * size + p, LANES)
    for _ in range(rows):
        prefetch(g, at - _AHEAD * channels)
        re = lr + w * load(g, at, count)
        if not alone:
            store(room, to, LANES, load(room, to, LANES) + re)
        elif past:
            stream(du, at, re)
        else:
            store(du, at, count, re)
        lr = zr * re + zi * li
        li = zr * li - zi * re
        at -= channels
        to += padded_to(width)
    store(room, LR * size + p, LANES, lr)
    store(room, LI * size + p, LANES, li)


@inner
def _retreat(g, du, i, channels, rows, width, room, o, size, acc, alone, past):
    for k in range(rows):
        prefetch(du, i - (k + _AHEAD) * channels)
    whole = width // LANES * LANES
    for j in range(0, whole, LANES):
        _retreat_lanes(g, du, i, channels, rows, j, LANES, room, o, size, acc, width, alone, past)
    if whole < width:
        left = width - whole
        _retreat_lanes(
            g, du, i, channels, rows, whole, left, room, o, size, acc, width, alone, past
        )


@inner
def _meet(room, size):
    """At a block's end: what s gives to dL/dz through all that comes later, conj(l) s."""
    for p in range(0, size, LANES):
        lr, li = load(room, LR * size + p, LANES), load(room, LI * size + p, LANES)
        sr, si = load(room, SR * size + p, LANES), load(room, SI * size + p, LANES)
        er, ei = load(room, ER * size + p, LANES), load(room, EI * size + p, LANES)
        store(room, ER * size + p, LANES, er + lr * sr + li * si)
        store(room, EI * size + p, LANES, ei + lr * si - li * sr)


@inner
def _backward_row(job, u, g, du, b, begin, width, room):
    time, channels, modes, documents = job[TIME], job[CHANNELS], job[MODES], job[AT] != 0
    at = int64s(job[AT], job[BATCH] * time)
    padded = padded_to(width)
    size = modes * padded
    acc = room.shape[0] - ROWS * padded
    alone = modes == 1
    read_state(job, job[END], b, begin, width, room, LR)
    start = (time - 1) // BLOCK * BLOCK
    while start >= 0:
        end = min(start + BLOCK, time)
        kept, place = kept_states(job), kept_place(job, b, start, begin)
        for plane in range(2 * modes):
            h = HR * size + plane * padded
            room[h : h + width] = kept[place : place + width]
            place += channels
        room[SR * size : (SI + 1) * size] = 0.0
        t = start
        while t < end:
            rows = min(ROWS, end - t)
            if documents:
                position = at[b * time + t]
                if position < 0:
                    t += 1
                    continue
                if position == 0:
                    room[HR * size : (SI + 1) * size] = 0.0
                rows = _run(at, b * time + t, 1, rows)
            # after this block comes the one before it
            ahead = _AHEAD if t + _AHEAD < end else _AHEAD - (end - start) - BLOCK
            i = (b * time + t) * channels + begin
            for m in range(modes):
                o = m * padded
                _follow(u, g, i, channels, rows, width, ahead * channels, room, o, size)
            t += rows
        _meet(room, size)
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
                _retreat(g, du, i, channels, rows, width, room, o, size, acc, alone, job[STREAM])
            if not alone:
                _flush(du, i, -channels, rows, width, room, acc)
            t -= rows
            if documents and at[b * time + t + 1] == 0:
                room[LR * size : (LI + 1) * size] = 0.0
        start -= BLOCK
    write_state(job, job[BEGIN], b, begin, width, room, LR)


@inner
def _backward(job, u, g, du):
    modes, channels = job[MODES], job[CHANNELS]
    sums = float64s(job[SUMS], job[GROUPS] * 3 * channels * modes)
    part = take(job)
    while part >= 0:
        first, last, begin, width = slice_of(job, part)
        room = new_room(EI + 1, job, width)
        dynamics(job, begin, width, room)
        for b in range(first, last):
            _backward_row(job, u, g, du, b, begin, width, room)
        size = modes * padded_to(width)
        for m in range(modes):
            for j in range(width):
                p = m * padded_to(width) + j
                w, zr, zi = room[W * size + p], room[p], room[size + p]
                qr = w * room[QR * size + p] + room[ER * size + p]
                qi = w * room[QI * size + p] + room[EI * size + p]
                to = ((part // job[CUTS] * 3) * channels + begin + j) * modes + m
                # dz/d(decay) = -z, dz/d(frequency) = i z
                sums[to] = qi * zi - qr * zr
                sums[to + channels * modes] = -qr * zi - qi * zr
                sums[to + 2 * channels * modes] = room[GG * size + p]
        part = take(job)


@kernel(forward_words(FLOAT32))
def forward_float32(job):
    _forward(job, float32s(job[U], numbers(job)), float32s(job[Y], numbers(job)))


@kernel(forward_words(FLOAT64))
def forward_float64(job):
    _forward(job, float64s(job[U], numbers(job)), float64s(job[Y], numbers(job)))


@kernel(forward_words(BFLOAT16))
def forward_bfloat16(job):
    _forward(job, bfloat16s(job[U], numbers(job)), bfloat16s(job[Y], numbers(job)))


@kernel(backward_words(FLOAT32))
def backward_float32(job):
    _backward(
        job,
        float32s(job[U], numbers(job)),
        float32s(job[G], numbers(job)),
        float32s(job[DU], numbers(job)),
    )


@kernel(backward_words(FLOAT64))
def backward_float64(job):
    _backward(
        job,
        float64s(job[U], numbers(job)),
        float64s(job[G], numbers(job)),
        float64s(job[DU], numbers(job)),
    )


@kernel(backward_words(BFLOAT16))
def backward_bfloat16(job):
    _backward(
        job,
        bfloat16s(job[U], numbers(job)),
        bfloat16s(job[G], numbers(job)),
        bfloat16s(job[DU], numbers(job)),
    )
