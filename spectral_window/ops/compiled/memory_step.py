"""One token of the memory that reads with the window's queries (`nn.memory`), from its queries and
values to its sum with what the window found, in three kernels.

Between them lie vectors alone, so what a token costs beyond its state is the calls: `prepare` takes
the place of a filter, two normalisations, two gates and four conversions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled import delta_step
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.fir import add_multiplied, multiply
from spectral_window.ops.compiled.heads import gated_add, scaled
from spectral_window.ops.compiled.pointwise import bits_of, dot, exponential, row_of
from spectral_window.ops.compiled.threads import (
    bfloat16s,
    float32s,
    float_of,
    inner,
    int64s,
    kernel,
    narrow,
    take,
    widen,
)

# the words of a job: addresses and sizes
Q, V, GATES, POSITIONS, BEFORE = range(2, 7)  # POSITIONS: 0 for none; BEFORE: queries [B, L - 1, D]
LAG, WRITE_BIAS, READ_BIAS = range(7, 10)  # [D, L], [H], [H]
HEADS, SIZE, TAPS, SHORTEST, CLOSES, HALF = range(10, 16)  # SHORTEST: the bits of a float32
QUERIES, KEYS, VALUES, BETA, READ, AFTER = range(16, 22)  # what is found; AFTER like BEFORE


def _words(parts, q, v, gates, positions, before, own, shortest, closes, found):
    lag, write_bias, read_bias = own
    heads, (channels, taps) = len(write_bias), lag.shape
    dtype, numbers = BFLOAT16 if q.dtype is BFLOAT16 else FLOAT32, parts * channels
    if channels % heads:
        raise UserError(f"{heads} heads of {channels} channels (compiled memory)")
    kept = parts * (taps - 1) * channels
    queries, keys, values, beta, read, after = found
    return (
        *(address(q, dtype, numbers), address(v, dtype, numbers)),
        address(gates, dtype, 2 * parts * heads),
        optional(positions, INT64, parts),
        address(before, dtype, kept),
        address(lag, FLOAT32, channels * taps),
        *(address(bias, FLOAT32, heads) for bias in (write_bias, read_bias)),
        *(heads, channels // heads, taps, bits_of(shortest), closes, dtype is BFLOAT16),
        *(address(x, FLOAT32, numbers) for x in (queries, keys, values)),
        *(address(x, FLOAT32, parts * heads) for x in (beta, read)),
        address(after, dtype, kept),
    )


@inner
def normalised(x, shortest, y):
    scaled(x, np.float32(1) / max(np.sqrt(dot(x, x)), shortest), y)


@inner
def opened(x, bias):
    return np.float32(1) / (np.float32(1) + exponential(-(x + bias)))


@inner
def closing(x, bias):
    """tanh(max(x + bias, 0)): exactly 0 below 0, and without cancellation just above it."""
    x = x + bias
    if x <= 0:  # NaN stays NaN
        return np.float32(0)
    if x < np.float32(0.25):  # Taylor's series, to 1e-8 of it
        z = x * x
        return x * (np.float32(1) - z * (np.float32(1 / 3) - z * (np.float32(2 / 15)
            - z * (np.float32(17 / 315) - z * np.float32(62 / 2835)))))  # fmt: skip
    e = exponential(np.float32(-2) * x)
    return (np.float32(1) - e) / (np.float32(1) + e)


@inner
def copied(half, source, target, begin, count):
    """`count` numbers from `begin` of one array to another's beginning; zeros from no array."""
    if half:
        bits = bfloat16s(target, count)
        for i in range(count):
            bits[i] = bfloat16s(source + 2 * begin, count)[i] if source else np.uint16(0)
    else:
        numbers = float32s(target, count)
        for i in range(count):
            numbers[i] = float32s(source + 4 * begin, count)[i] if source else np.float32(0)


@kernel(_words)
def prepare(job):
    """Parts: rows."""
    half, heads, size, taps = job[HALF], job[HEADS], job[SIZE], job[TAPS]
    channels, kept = heads * size, taps - 1
    shortest = float_of(np.int32(job[SHORTEST]))
    number = 2 if half else 4
    rooms = np.empty((5, channels), np.float32)
    weights = float32s(job[LAG], channels * taps)
    part = take(job)
    while part >= 0:
        p = int64s(job[POSITIONS], part + 1)[part] if job[POSITIONS] else 1
        before = job[BEFORE] + number * part * kept * channels
        after = job[AFTER] + number * part * kept * channels
        q, at = row_of(half, job[Q], part * channels, rooms[0]), 4 * part * channels
        lagged, weight = rooms[1], rooms[2]
        for j in range(taps if p != 0 else 1):
            for c in range(channels):
                weight[c] = weights[c * taps + j]
            if j == 0:
                multiply(q, weight, lagged)
            else:
                earlier = row_of(half, before, (kept - j) * channels, rooms[3])
                add_multiplied(earlier, weight, lagged)
        if half:  # as a filter's result is
            for c in range(channels):
                lagged[c] = widen(narrow(lagged[c]))
        value = row_of(half, job[V], part * channels, rooms[4])
        float32s(job[VALUES] + at, channels)[:] = value
        gates = row_of(half, job[GATES], part * 2 * heads, rooms[3][: 2 * heads])
        for h in range(heads):
            head, place = h * size, at + 4 * h * size
            normalised(q[head : head + size], shortest, float32s(job[QUERIES] + place, size))
            normalised(lagged[head : head + size], shortest, float32s(job[KEYS] + place, size))
            bias = float32s(job[WRITE_BIAS], heads)[h]
            amount = closing(gates[h], bias) if job[CLOSES] else opened(gates[h], bias)
            float32s(job[BETA] + 4 * part * heads, heads)[h] = amount
            bias = float32s(job[READ_BIAS], heads)[h]
            float32s(job[READ] + 4 * part * heads, heads)[h] = opened(gates[heads + h], bias)
        if p < 0:
            copied(half, before, after, 0, kept * channels)
        elif kept > 0:
            last = (kept - 1) * channels
            copied(half, before if p else 0, after, channels, last)
            copied(half, job[Q], after + number * last, part * channels, channels)
        part = take(job)


def step(
    attended: Tensor,
    q: Tensor,
    v: Tensor,
    gates: Tensor,
    own: tuple[Tensor, Tensor, Tensor, Tensor],
    shortest: float,
    closes: bool,
    state: tuple[Tensor, Tensor],
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """attended, q, v [B, 1, D] and gates [B, 1, 2 H] in one dtype, float32 or bfloat16; own: lag
    [D, L], write_bias [H], read_bias [H], scale [D] in float32; closes: the write gate is
    tanh(max(x, 0)); state: the memory [B, H, D / H,
    D / H] float32 and the last queries [B, L - 1, D] in q's dtype; positions [B, 1] int64 or None.

    Returns attended and what was read [B, 1, D], the memory and the queries after the token.
    """
    *maps, scale = own
    batch, channels, heads = len(q), q.shape[2], len(own[1])
    memory, before = (dense(x) for x in state)
    at = None if positions is None else dense(positions)
    room = torch.empty(4, batch, 1, heads, channels // heads, dtype=FLOAT32, device="cpu")
    beta, read = torch.empty(2, batch, 1, heads, dtype=FLOAT32, device="cpu")
    queries, keys, values, out = room
    after, recent = torch.empty_like(memory), torch.empty_like(before)
    found = queries, keys, values, beta, read, recent
    given = dense(q), dense(v), dense(gates), at, before, tuple(dense(x) for x in maps)
    prepare(batch, *given, shortest, closes, found)
    delta_step.step_into(queries, keys, values, beta, None, at, out, memory, after)
    return gated_add(attended, out, read, scale), after, recent
