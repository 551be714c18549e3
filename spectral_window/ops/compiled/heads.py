"""Vectors of length 1 and gated sums (`ops.pointwise`) in one pass over memory each, forward and
backward.

Rows are vectors of a head. The gradient of what scales all tokens is summed in float32 over a block
of them, then in float64, so no bit depends on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectral_window.ops.compiled.addresses import BFLOAT16, FLOAT32, address, dense
from spectral_window.ops.compiled.pointwise import (
    ROWS,
    bits_of,
    dot,
    place_of,
    put_row,
    row_of,
    scale_by,
    shape_of,
)
from spectral_window.ops.compiled.threads import (
    float32s,
    float_of,
    inner,
    kernel,
    summing,
    take,
)

_SUMMED = 64  # tokens over which a gradient is summed in float32


def _unit_words(parts, half, rows, size, x, shortest, *others):
    """others: float32 where x may be bfloat16; the last of two has x's dtype."""
    dtype, count = BFLOAT16 if half else FLOAT32, rows * size
    grown = [address(y, FLOAT32, count) for y in others[:1]]
    return (
        *(half, rows, size, address(x, dtype, count), shortest, *grown),
        *[address(y, dtype, count) for y in others[1:]],
    )


@kernel(_unit_words)
def _unit(job):
    """job: 2 bfloat16?, 3 rows, 4 size, 5 x, 6 bits of the shortest length, 7 y float32."""
    half, rows, size = job[2], job[3], job[4]
    shortest = float_of(np.int32(job[6]))
    room = np.empty(size, np.float32)
    part = take(job)
    while part >= 0:
        for row in range(part * ROWS, min((part + 1) * ROWS, rows)):
            x = row_of(half, job[5], row * size, room)
            factor = np.float32(1) / max(np.sqrt(dot(x, x)), shortest)
            scaled(x, factor, float32s(job[7] + 4 * row * size, size))
        part = take(job)


@kernel(_unit_words)
def _unit_backward(job):
    """job: 2 bfloat16?, 3 rows, 4 size, 5 x, 6 bits of the shortest length, 7 gradient g of y
    float32, 8 dx = f g - f^3 x (x . g), f = 1 / |x|, without the second part where x is shorter."""
    half, rows, size = job[2], job[3], job[4]
    shortest = float_of(np.int32(job[6]))
    rooms = np.empty((2, size), np.float32)
    part = take(job)
    while part >= 0:
        for row in range(part * ROWS, min((part + 1) * ROWS, rows)):
            x, g = (
                row_of(half, job[5], row * size, rooms[0]),
                float32s(job[7] + 4 * row * size, size),
            )
            dx = place_of(half, job[8], row * size, rooms[1])
            length = np.sqrt(dot(x, x))
            factor = np.float32(1) / max(length, shortest)
            slope = np.float32(0)
            if length >= shortest:
                slope = factor * factor * factor * dot(x, g)
            _weighted_difference(g, factor, x, slope, dx)
            put_row(half, job[8], row * size, dx)
        part = take(job)


@inner
def scaled(x, factor, y):
    for j in range(x.shape[0]):
        y[j] = x[j] * factor


@inner
def _weighted_difference(x, factor, y, slope, z):
    for j in range(x.shape[0]):
        z[j] = x[j] * factor - y[j] * slope


def _add_words(parts, half, rows, heads, size, base, x, gate, scale, y):
    dtype, count = BFLOAT16 if half else FLOAT32, rows * heads * size
    return (
        *(half, rows, heads, size, address(base, dtype, count), address(x, FLOAT32, count)),
        *(address(gate, FLOAT32, rows * heads), address(scale, FLOAT32, heads * size)),
        address(y, dtype, count),
    )


def _add_backward_words(parts, half, rows, heads, size, grad, x, gate, scale, dx, d_gate, d_scale):
    return (
        *_add_words(parts, half, rows, heads, size, grad, x, gate, scale, grad)[:-1],
        address(dx, FLOAT32, rows * heads * size),
        address(d_gate, FLOAT32, rows * heads),
        address(d_scale, FLOAT32, parts * heads * size),
    )


@kernel(_add_words)
def _gated_add(job):
    """job: 2 bfloat16?, 3 rows, 4 heads, 5 size, 6 base, 7 x float32, 8 gate [rows, heads], 9 scale
    [heads, size], 10 y = base + gate scale x."""
    half, rows, heads, size = job[2], job[3], job[4], job[5]
    rooms = np.empty((2, size), np.float32)
    part = take(job)
    while part >= 0:
        for row in range(part * ROWS * heads, min((part + 1) * ROWS, rows) * heads):
            h, at = row % heads, row * size
            base, y = row_of(half, job[6], at, rooms[0]), place_of(half, job[10], at, rooms[1])
            x, scale = float32s(job[7] + 4 * at, size), float32s(job[9] + 4 * h * size, size)
            _add_gated(base, x, float32s(job[8] + 4 * row, 1)[0], scale, y)
            put_row(half, job[10], at, y)
        part = take(job)


@kernel(_add_backward_words)
def _gated_add_backward(job):
    """job: 2 bfloat16?, 3 rows, 4 heads, 5 size, 6 gradient g of y, 7 x, 8 gate, 9 scale, then what
    is found: 10 dx = g gate scale, 11 dgate = (g scale) . x, 12 dscale [parts, heads, size]: the
    sum of g gate x over the rows of a part."""
    half, rows, heads, size = job[2], job[3], job[4], job[5]
    room = np.empty(size, np.float32)
    part = take(job)
    while part >= 0:
        sums = job[12] + 4 * part * heads * size
        float32s(sums, heads * size)[:] = np.float32(0)
        for row in range(part * _SUMMED * heads, min((part + 1) * _SUMMED, rows) * heads):
            h, at = row % heads, row * size
            g, x = row_of(half, job[6], at, room), float32s(job[7] + 4 * at, size)
            scale, dx = float32s(job[9] + 4 * h * size, size), float32s(job[10] + 4 * at, size)
            gate = float32s(job[8] + 4 * row, 1)[0]
            scale_by(g, gate, scale, dx)
            float32s(job[11] + 4 * row, 1)[0] = _dot_of_three(g, scale, x)
            _add_scaled_product(g, gate, x, float32s(sums + 4 * h * size, size))
        part = take(job)


@inner
def _add_gated(base, x, gate, scale, y):
    for j in range(x.shape[0]):
        y[j] = base[j] + gate * scale[j] * x[j]


@summing
def _dot_of_three(x, y, z):
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += x[j] * y[j] * z[j]
    return total


@inner
def _add_scaled_product(x, factor, y, sums):
    for j in range(x.shape[0]):
        sums[j] += x[j] * factor * y[j]


def unit(x: Tensor, shortest: float) -> Tensor:
    """x [..., N] float32 or bfloat16, divided by its length: float32."""
    x = dense(x)
    y, shape = torch.empty_like(x, dtype=torch.float32), shape_of(x)
    _unit(-(-shape[1] // ROWS), *shape, x, bits_of(shortest), y)
    return y


def unit_backward(x: Tensor, shortest: float, grad: Tensor) -> Tensor:
    """The gradient of x, given that of the result."""
    x, grad = dense(x), dense(grad)
    dx, shape = torch.empty_like(x), shape_of(x)
    _unit_backward(-(-shape[1] // ROWS), *shape, x, bits_of(shortest), grad, dx)
    return dx


def gated_add(base: Tensor, x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    """base [..., H N] float32 or bfloat16; x [..., H, N], gate [..., H], scale [H N]: like base."""
    base, x, gate, scale = (dense(each) for each in (base, x, gate, scale.float()))
    y, (half, rows, _) = torch.empty_like(base), shape_of(base)
    _gated_add(-(-rows // ROWS), half, rows, *x.shape[-2:], base, x, gate, scale, y)
    return y


def gated_add_backward(
    grad: Tensor, x: Tensor, gate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and scale, given that of the sum."""
    dtype = scale.dtype
    grad, x, gate, scale = (dense(each) for each in (grad, x, gate, scale.float()))
    dx, d_gate, (half, rows, size) = torch.empty_like(x), torch.empty_like(gate), shape_of(grad)
    parts = -(-rows // _SUMMED)
    sums = torch.empty(parts, size, dtype=torch.float32, device="cpu")
    given = half, rows, *x.shape[-2:], grad, x, gate, scale
    _gated_add_backward(parts, *given, dx, d_gate, sums)
    return dx, d_gate, sums.sum(0, dtype=torch.float64).to(dtype)
