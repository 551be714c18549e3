"""One token of the memory that reads with the window's queries (`nn.memory`), from its queries and
values to its sum with what the window found, in three kernels, and its short convolution in one.

Between them lie vectors alone, so what a token costs beyond its state is the calls: `prepare` takes
the place of a filter, two normalisations, two gates and four conversions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled import delta_step
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    Address,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.fir import add_multiplied, by_taps, multiply, sum_rows
from spectral_window.ops.compiled.pointwise import (
    dot,
    exp_number,
    gated_add,
    read_row,
    scaled,
)
from spectral_window.ops.compiled.simd import (
    bfloat16s,
    float32s,
    inner,
    int64s,
    narrow,
    widen,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel


class Inputs(NamedTuple):
    q: Address  # [B, D]
    k: Address
    v: Address
    positions: Address  # int64 [B], or none
    before: Address  # their last values [B, L - 1, 3 D]
    weights: Address  # float32 [3 D, L]
    channels: int  # 3 D
    taps: int
    bfloat16: bool
    out: Address  # [3, B, D]
    after: Address  # like `before`


def _inputs(tiles, q, k, v, positions, before, weights, out, after):
    dtype, (channels, taps) = BFLOAT16 if q.dtype is BFLOAT16 else FLOAT32, weights.shape
    if channels % 3:
        raise UserError(f"{channels} channels (compiled memory): expected those of q, k and v")
    each, earlier = tiles * channels // 3, tiles * (taps - 1) * channels
    return Inputs(
        *(address(q, dtype, each), address(k, dtype, each), address(v, dtype, each)),
        optional(positions, INT64, tiles),
        address(before, dtype, earlier),
        address(weights, FLOAT32, channels * taps),
        *(channels, taps, dtype is BFLOAT16),
        *(address(out, dtype, 3 * each), address(after, dtype, earlier)),
    )


class Token(NamedTuple):
    q: Address  # [B, D]
    v: Address  # [B, D]
    gates: Address  # [B, 2 H]
    positions: Address  # int64 [B], or none
    before: Address  # the last queries [B, L - 1, D]
    lag: Address  # float32 [D, L]
    write_bias: Address  # float32 [H]
    read_bias: Address  # float32 [H]
    heads: int
    size: int
    taps: int
    shortest: float
    write_gate: int  # 0 sigmoid, 1 closing, 2 reflecting
    bfloat16: bool
    # what is computed, float32 but for the last
    queries: Address  # [B, D]
    keys: Address  # [B, D]
    values: Address  # [B, D]
    beta: Address  # [B, H]
    read: Address  # [B, H]
    after: Address  # like `before`


def _token(tiles, q, v, gates, positions, before, own, shortest, write_gate, outputs):
    lag, write_bias, read_bias = own
    heads, (channels, taps) = len(write_bias), lag.shape
    dtype, numbers = BFLOAT16 if q.dtype is BFLOAT16 else FLOAT32, tiles * channels
    if channels % heads:
        raise UserError(f"{heads} heads of {channels} channels (compiled memory)")
    earlier = tiles * (taps - 1) * channels
    queries, keys, values, beta, read, after = outputs
    return Token(
        *(address(q, dtype, numbers), address(v, dtype, numbers)),
        address(gates, dtype, 2 * tiles * heads),
        optional(positions, INT64, tiles),
        address(before, dtype, earlier),
        address(lag, FLOAT32, channels * taps),
        *(address(write_bias, FLOAT32, heads), address(read_bias, FLOAT32, heads)),
        heads,
        channels // heads,
        taps,
        shortest,
        write_gate,
        dtype is BFLOAT16,
        *(address(queries, FLOAT32, numbers), address(keys, FLOAT32, numbers)),
        address(values, FLOAT32, numbers),
        *(address(beta, FLOAT32, tiles * heads), address(read, FLOAT32, tiles * heads)),
        address(after, dtype, earlier),
    )


@inner
def normalised(x, shortest, y):
    scaled(x, np.float32(1) / max(np.sqrt(dot(x, x)), shortest), y)


@inner
def opened(x, bias):
    return np.float32(1) / (np.float32(1) + exp_number(-(x + bias)))


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
    e = exp_number(np.float32(-2) * x)
    return (np.float32(1) - e) / (np.float32(1) + e)


@inner
def copied(bfloat16, source, target, begin, count):
    """`count` numbers from `begin` of one array to another's beginning; zeros from no array."""
    if bfloat16:
        bits = bfloat16s(target, count)
        for i in range(count):
            bits[i] = bfloat16s(source + 2 * begin, count)[i] if source else np.uint16(0)
    else:
        numbers = float32s(target, count)
        for i in range(count):
            numbers[i] = float32s(source + 4 * begin, count)[i] if source else np.float32(0)


@kernel(Inputs, _inputs)
def convolve_once(args):
    """Tiles: rows."""
    bfloat16, channels, taps = args.bfloat16, args.channels, args.taps
    size, earlier, number = channels // 3, taps - 1, 2 if args.bfloat16 else 4
    buffer, rows = np.empty(taps * channels, np.float32), np.empty(taps, np.int64)
    weights = buffer.ctypes.data
    by_taps(args, weights)
    tile = claim_tile(args)
    while tile >= 0:
        p = int64s(args.positions, tile + 1)[tile] if args.positions else 1
        before = args.before + number * tile * earlier * channels
        after = args.after + number * tile * earlier * channels
        if p < 0:
            copied(bfloat16, before, after, 0, earlier * channels)
        elif earlier > 0:
            copied(bfloat16, before if p else 0, after, channels, (earlier - 1) * channels)
        for part in range(3):
            u = args.q if part == 0 else args.k if part == 1 else args.v
            begin = part * size
            out = args.out + number * (part * args.tiles + tile) * size
            if p < 0:
                copied(bfloat16, 0, out, 0, size)
                continue
            rows[0] = u + number * tile * size
            for j in range(1, taps):
                rows[j] = before + number * ((earlier - j) * channels + begin)
            at = weights + 4 * begin
            sum_rows(rows, taps if p else 1, at, channels, size, bfloat16, out)
            if earlier > 0:
                last = after + number * ((earlier - 1) * channels + begin)
                copied(bfloat16, rows[0], last, 0, size)
        tile = claim_tile(args)
    buffer[0] = 0  # alive until here


@kernel(Token, _token)
def prepare(args):
    """Tiles: rows."""
    bfloat16, heads, size, taps = args.bfloat16, args.heads, args.size, args.taps
    channels, earlier = heads * size, taps - 1
    number = 2 if bfloat16 else 4
    buffers = np.empty((5, channels), np.float32)
    weights = float32s(args.lag, channels * taps)
    tile = claim_tile(args)
    while tile >= 0:
        p = int64s(args.positions, tile + 1)[tile] if args.positions else 1
        before = args.before + number * tile * earlier * channels
        after = args.after + number * tile * earlier * channels
        q, at = read_row(bfloat16, args.q, tile * channels, buffers[0]), 4 * tile * channels
        lagged, weight = buffers[1], buffers[2]
        for j in range(taps if p != 0 else 1):
            for c in range(channels):
                weight[c] = weights[c * taps + j]
            if j == 0:
                multiply(q, weight, lagged)
            else:
                query = read_row(bfloat16, before, (earlier - j) * channels, buffers[3])
                add_multiplied(query, weight, lagged)
        if bfloat16:  # as a filter's result is
            for c in range(channels):
                lagged[c] = widen(narrow(lagged[c]))
        value = read_row(bfloat16, args.v, tile * channels, buffers[4])
        float32s(args.values + at, channels)[:] = value
        gates = read_row(bfloat16, args.gates, tile * 2 * heads, buffers[3][: 2 * heads])
        for h in range(heads):
            head, place = h * size, at + 4 * h * size
            normalised(q[head : head + size], args.shortest, float32s(args.queries + place, size))
            normalised(lagged[head : head + size], args.shortest, float32s(args.keys + place, size))
            bias = float32s(args.write_bias, heads)[h]
            if args.write_gate == 1:
                amount = closing(gates[h], bias)
            else:
                amount = opened(gates[h], bias)
                if args.write_gate == 2:
                    amount *= np.float32(2)
            float32s(args.beta + 4 * tile * heads, heads)[h] = amount
            bias = float32s(args.read_bias, heads)[h]
            float32s(args.read + 4 * tile * heads, heads)[h] = opened(gates[heads + h], bias)
        if p < 0:
            copied(bfloat16, before, after, 0, earlier * channels)
        elif earlier > 0:
            last = (earlier - 1) * channels
            copied(bfloat16, before if p else 0, after, channels, last)
            copied(bfloat16, args.q, after + number * last, tile * channels, channels)
        tile = claim_tile(args)


def convolve(
    inputs: Sequence[Tensor], weights: Tensor, before: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inputs: q, k, v [B, 1, D] in one dtype, float32 or bfloat16; weights [3 D, L] float32; before
    [B, L - 1, 3 D] in the inputs' dtype; positions [B, 1] int64 or None.

    Returns q, k, v [B, 1, D] convolved, and the last inputs after the token.
    """
    before, at = dense(before), None if positions is None else dense(positions)
    q, k, v = (dense(x) for x in inputs)
    out, after = q.new_empty((3, *q.shape)), torch.empty_like(before)
    convolve_once(len(q), q, k, v, at, before, dense(weights), out, after)
    return out[0], out[1], out[2], after


def step(
    attended: Tensor,
    q: Tensor,
    v: Tensor,
    gates: Tensor,
    own: tuple[Tensor, Tensor, Tensor, Tensor],
    shortest: float,
    write_gate: int,
    state: tuple[Tensor, Tensor],
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """attended, q, v [B, 1, D] and gates [B, 1, 2 H] in one dtype, float32 or bfloat16; own: lag
    [D, L], write_bias [H], read_bias [H], scale [D] in float32; write_gate: 0 for sigmoid(x), 1 for
    tanh(max(x, 0)), 2 for 2 sigmoid(x); state: the memory [B, H, D / H, D / H] float32 and the last
    queries [B, L - 1, D] in q's dtype; positions [B, 1] int64 or None.

    Returns attended and what was read [B, 1, D], the memory and the queries after the token.
    """
    *maps, scale = own
    batch, channels, heads = len(q), q.shape[2], len(own[1])
    memory, before = (dense(x) for x in state)
    at = None if positions is None else dense(positions)
    vectors = torch.empty(4, batch, 1, heads, channels // heads, dtype=FLOAT32, device="cpu")
    beta, read = torch.empty(2, batch, 1, heads, dtype=FLOAT32, device="cpu")
    queries, keys, values, out = vectors
    after, recent = torch.empty_like(memory), torch.empty_like(before)
    outputs = queries, keys, values, beta, read, recent
    given = dense(q), dense(v), dense(gates), at, before, tuple(dense(x) for x in maps)
    prepare(batch, *given, shortest, write_gate, outputs)
    delta_step.step_into(queries, keys, values, beta, None, at, out, memory, after)
    return gated_add(attended, out, read, scale), after, recent
