"""What a layer does between two matrix products, in one pass over memory each, forward and
backward: RMSNorm, the gate of SwiGLU, vectors of length 1, and gated sums.

Between two matrix products a layer only has to read and write its activations once; made of
PyTorch's elementary operations these few lines take as long as a tenth of all the products. Rows
are worked on in float32 whatever they are stored in, and bfloat16 is rounded once, at the end. The
gradient of what scales all tokens is summed in float32 over a tile of them, then in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    NOWHERE,
    Address,
    address,
    dense,
)
from spectral_window.ops.compiled.simd import (
    bfloat16s,
    float32s,
    inner,
    narrow,
    summing,
    widen,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel

ROWS = 16  # of a tile
_SUMMED = 64  # tokens over which a gradient is summed in float32


@intrinsic
def _scaled(typingctx: Any, number: Any, exponent: Any) -> Any:
    """number * 2^n, where n was added to 1.5 x 2^23 and so stands in the lowest bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.add(builder.bitcast(args[1], word), ir.Constant(word, 127))
        power = builder.bitcast(builder.shl(bits, ir.Constant(word, 23)), ir.FloatType())
        return builder.fmul(args[0], power)

    return types.float32(types.float32, types.float32), codegen


@inner
def exp_number(x):
    """e^x within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, and e^r by its Taylor
    polynomial. Held between e^-87 and e^88."""
    x = np.float32(88.0) if x > np.float32(88.0) else x
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.428606765330187e-06)
    p = np.float32(1 / 5040) * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    return _scaled(p * r + np.float32(1.0), shifted)


@inner
def read_row(bfloat16, address, begin, buffer):
    """The numbers from `begin` of the array at `address`: in place, or bfloat16 in `buffer`."""
    size = buffer.shape[0]
    if not bfloat16:
        return float32s(address + 4 * begin, size)
    bits = bfloat16s(address + 2 * begin, size)
    for j in range(size):
        buffer[j] = widen(bits[j])
    return buffer


@inner
def row_for(bfloat16, address, begin, buffer):
    """Where to write such numbers before `write_row` is called with the same arguments."""
    return buffer if bfloat16 else float32s(address + 4 * begin, buffer.shape[0])


@inner
def write_row(bfloat16, address, begin, buffer):
    if bfloat16:
        bits = bfloat16s(address + 2 * begin, buffer.shape[0])
        for j in range(buffer.shape[0]):
            bits[j] = narrow(buffer[j])


@summing
def dot(x, y):
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@inner
def scale_by(x, factor, weight, y):
    # input and output are never one array: the compiler would have to go number by number
    for j in range(x.shape[0]):
        y[j] = x[j] * factor * weight[j]


@inner
def _norm_gradient(x, g, weighted, factor, slope, dx, dw):
    """dx = w g f - x f^3 mean(w g x), and dw += g x f."""
    for j in range(x.shape[0]):
        dx[j] = weighted[j] * factor - x[j] * slope
        dw[j] += g[j] * x[j] * factor


# ---------------------------------------------------------------- RMSNorm


class Norm(NamedTuple):
    bfloat16: bool
    rows: int
    size: int
    x: Address
    weight: Address  # float32 [D]
    eps: float
    y: Address  # backward: its gradient
    dx: Address = NOWHERE
    dw: Address = NOWHERE  # float32 [tiles, D]: the sum over the rows of a tile


def _norm(tiles, bfloat16, rows, size, x, weight, eps, y):
    dtype, count = BFLOAT16 if bfloat16 else FLOAT32, rows * size
    inputs = address(x, dtype, count), address(weight, FLOAT32, size)
    return Norm(bfloat16, rows, size, *inputs, eps, address(y, dtype, count))


def _norm_backward(tiles, bfloat16, rows, size, x, weight, eps, grad, dx, dw):
    norm = _norm(tiles, bfloat16, rows, size, x, weight, eps, grad)
    dx = address(dx, BFLOAT16 if bfloat16 else FLOAT32, rows * size)
    return norm._replace(dx=dx, dw=address(dw, FLOAT32, tiles * size))


@kernel(Norm, _norm)
def _rms_norm(args):
    bfloat16, size = args.bfloat16, args.size
    weight = float32s(args.weight, size)
    buffers = np.empty((2, size), np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        for row in range(tile * ROWS, min((tile + 1) * ROWS, args.rows)):
            at = row * size
            x = read_row(bfloat16, args.x, at, buffers[0])
            y = row_for(bfloat16, args.y, at, buffers[1])
            factor = np.float32(1) / np.sqrt(dot(x, x) / np.float32(size) + args.eps)
            scale_by(x, factor, weight, y)
            write_row(bfloat16, args.y, at, y)
        tile = claim_tile(args)


@kernel(Norm, _norm_backward)
def _rms_norm_backward(args):
    bfloat16, rows, size = args.bfloat16, args.rows, args.size
    weight = float32s(args.weight, size)
    buffers = np.empty((4, size), np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        dw = float32s(args.dw + 4 * tile * size, size)
        for j in range(size):
            dw[j] = np.float32(0)
        for row in range(rows * tile // args.tiles, rows * (tile + 1) // args.tiles):
            at = row * size
            x = read_row(bfloat16, args.x, at, buffers[0])
            g = read_row(bfloat16, args.y, at, buffers[1])
            dx, weighted = row_for(bfloat16, args.dx, at, buffers[2]), buffers[3]
            for j in range(size):
                weighted[j] = g[j] * weight[j]
            factor = np.float32(1) / np.sqrt(dot(x, x) / np.float32(size) + args.eps)
            mean = dot(weighted, x) / np.float32(size)
            _norm_gradient(x, g, weighted, factor, factor * factor * factor * mean, dx, dw)
            write_row(bfloat16, args.dx, at, dx)
        tile = claim_tile(args)


# ---------------------------------------------------------------- SwiGLU's gate


class Gate(NamedTuple):
    bfloat16: bool
    rows: int
    size: int
    gate: Address
    up: Address
    y: Address  # backward: its gradient
    d_gate: Address = NOWHERE
    d_up: Address = NOWHERE


def _gate(tiles, bfloat16, rows, size, *tensors):
    dtype, count = BFLOAT16 if bfloat16 else FLOAT32, rows * size
    return Gate(bfloat16, rows, size, *[address(x, dtype, count) for x in tensors])


@inner
def _gated(gate, up, y):
    """y = up gate / (1 + e^-gate)"""
    one = np.float32(1)
    for j in range(gate.shape[0]):
        y[j] = up[j] * gate[j] / (one + exp_number(-gate[j]))


@inner
def _gate_gradient(gate, up, g, d_gate, d_up):
    """With s = 1 / (1 + e^-gate): g up s (1 + gate (1 - s)) and g gate s."""
    one = np.float32(1)
    for j in range(gate.shape[0]):
        s = one / (one + exp_number(-gate[j]))
        d_gate[j] = g[j] * up[j] * s * (one + gate[j] * (one - s))
        d_up[j] = g[j] * gate[j] * s


@kernel(Gate, _gate)
def _swiglu(args):
    bfloat16, size = args.bfloat16, args.size
    buffers = np.empty((3, size), np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        for row in range(tile * ROWS, min((tile + 1) * ROWS, args.rows)):
            at = row * size
            gate = read_row(bfloat16, args.gate, at, buffers[0])
            up = read_row(bfloat16, args.up, at, buffers[1])
            y = row_for(bfloat16, args.y, at, buffers[2])
            _gated(gate, up, y)
            write_row(bfloat16, args.y, at, y)
        tile = claim_tile(args)


@kernel(Gate, _gate)
def _swiglu_backward(args):
    bfloat16, size = args.bfloat16, args.size
    buffers = np.empty((5, size), np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        for row in range(tile * ROWS, min((tile + 1) * ROWS, args.rows)):
            at = row * size
            gate = read_row(bfloat16, args.gate, at, buffers[0])
            up = read_row(bfloat16, args.up, at, buffers[1])
            g = read_row(bfloat16, args.y, at, buffers[2])
            d_gate = row_for(bfloat16, args.d_gate, at, buffers[3])
            d_up = row_for(bfloat16, args.d_up, at, buffers[4])
            _gate_gradient(gate, up, g, d_gate, d_up)
            write_row(bfloat16, args.d_gate, at, d_gate)
            write_row(bfloat16, args.d_up, at, d_up)
        tile = claim_tile(args)


# ---------------------------------------------------------------- vectors of length 1


class Unit(NamedTuple):
    bfloat16: bool
    rows: int
    size: int
    x: Address
    shortest: float  # a vector is divided by no less
    y: Address  # float32; backward: its gradient
    dx: Address = NOWHERE


def _unit_arguments(tiles, bfloat16, rows, size, x, shortest, y):
    dtype, count = BFLOAT16 if bfloat16 else FLOAT32, rows * size
    inputs = address(x, dtype, count), shortest, address(y, FLOAT32, count)
    return Unit(bfloat16, rows, size, *inputs)


def _unit_backward_arguments(tiles, bfloat16, rows, size, x, shortest, grad, dx):
    unit = _unit_arguments(tiles, bfloat16, rows, size, x, shortest, grad)
    return unit._replace(dx=address(dx, BFLOAT16 if bfloat16 else FLOAT32, rows * size))


@kernel(Unit, _unit_arguments)
def _unit(args):
    bfloat16, size = args.bfloat16, args.size
    buffer = np.empty(size, np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        for row in range(tile * ROWS, min((tile + 1) * ROWS, args.rows)):
            x = read_row(bfloat16, args.x, row * size, buffer)
            factor = np.float32(1) / max(np.sqrt(dot(x, x)), args.shortest)
            scaled(x, factor, float32s(args.y + 4 * row * size, size))
        tile = claim_tile(args)


@kernel(Unit, _unit_backward_arguments)
def _unit_backward(args):
    """dx = f g - f^3 x (x . g), f = 1 / |x|; without the second term where x is shorter."""
    bfloat16, size = args.bfloat16, args.size
    buffers = np.empty((2, size), np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        for row in range(tile * ROWS, min((tile + 1) * ROWS, args.rows)):
            x = read_row(bfloat16, args.x, row * size, buffers[0])
            g = float32s(args.y + 4 * row * size, size)
            dx = row_for(bfloat16, args.dx, row * size, buffers[1])
            length = np.sqrt(dot(x, x))
            factor = np.float32(1) / max(length, args.shortest)
            slope = np.float32(0)
            if length >= args.shortest:
                slope = factor * factor * factor * dot(x, g)
            _weighted_difference(g, factor, x, slope, dx)
            write_row(bfloat16, args.dx, row * size, dx)
        tile = claim_tile(args)


@inner
def scaled(x, factor, y):
    for j in range(x.shape[0]):
        y[j] = x[j] * factor


@inner
def _weighted_difference(x, factor, y, slope, z):
    for j in range(x.shape[0]):
        z[j] = x[j] * factor - y[j] * slope


# ---------------------------------------------------------------- gated sums


class GatedSum(NamedTuple):
    bfloat16: bool
    rows: int
    heads: int
    size: int
    base: Address  # backward: the gradient of y
    x: Address  # float32 [rows, heads, size]
    gate: Address  # float32 [rows, heads]
    scale: Address  # float32 [heads, size]
    y: Address
    dx: Address = NOWHERE
    d_gate: Address = NOWHERE
    d_scale: Address = NOWHERE  # float32 [tiles, heads, size]: the sum over the rows of a tile


def _sum(tiles, bfloat16, rows, heads, size, base, x, gate, scale, y):
    dtype, count = BFLOAT16 if bfloat16 else FLOAT32, rows * heads * size
    return GatedSum(
        *(bfloat16, rows, heads, size, address(base, dtype, count), address(x, FLOAT32, count)),
        *(address(gate, FLOAT32, rows * heads), address(scale, FLOAT32, heads * size)),
        address(y, dtype, count),
    )


def _sum_backward(tiles, bfloat16, rows, heads, size, grad, x, gate, scale, dx, d_gate, d_scale):
    return _sum(tiles, bfloat16, rows, heads, size, grad, x, gate, scale, grad)._replace(
        dx=address(dx, FLOAT32, rows * heads * size),
        d_gate=address(d_gate, FLOAT32, rows * heads),
        d_scale=address(d_scale, FLOAT32, tiles * heads * size),
    )


@kernel(GatedSum, _sum)
def _gated_add(args):
    """y = base + gate scale x."""
    bfloat16, heads, size = args.bfloat16, args.heads, args.size
    buffers = np.empty((2, size), np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        for row in range(tile * ROWS * heads, min((tile + 1) * ROWS, args.rows) * heads):
            h, at = row % heads, row * size
            base = read_row(bfloat16, args.base, at, buffers[0])
            y = row_for(bfloat16, args.y, at, buffers[1])
            x, scale = float32s(args.x + 4 * at, size), float32s(args.scale + 4 * h * size, size)
            _add_gated(base, x, float32s(args.gate + 4 * row, 1)[0], scale, y)
            write_row(bfloat16, args.y, at, y)
        tile = claim_tile(args)


@kernel(GatedSum, _sum_backward)
def _gated_add_backward(args):
    """With the gradient g of y: dx = g gate scale, d_gate = (g scale) . x, d_scale = sum of g gate
    x."""
    bfloat16, heads, size = args.bfloat16, args.heads, args.size
    buffer = np.empty(size, np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        sums = args.d_scale + 4 * tile * heads * size
        float32s(sums, heads * size)[:] = np.float32(0)
        for row in range(tile * _SUMMED * heads, min((tile + 1) * _SUMMED, args.rows) * heads):
            h, at = row % heads, row * size
            g, x = read_row(bfloat16, args.base, at, buffer), float32s(args.x + 4 * at, size)
            scale, dx = float32s(args.scale + 4 * h * size, size), float32s(args.dx + 4 * at, size)
            gate = float32s(args.gate + 4 * row, 1)[0]
            scale_by(g, gate, scale, dx)
            float32s(args.d_gate + 4 * row, 1)[0] = _dot_of_three(g, scale, x)
            _add_scaled_product(g, gate, x, float32s(sums + 4 * h * size, size))
        tile = claim_tile(args)


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


# ---------------------------------------------------------------- from Python


def shape_of(x: Tensor) -> tuple[bool, int, int]:
    """(bfloat16?, rows, size) of [..., size]."""
    return x.dtype == torch.bfloat16, x.numel() // x.shape[-1], x.shape[-1]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] float32 or bfloat16; weight [D]: y like x."""
    x = dense(x)
    y, shape = torch.empty_like(x), shape_of(x)
    w = dense(weight.float())
    _rms_norm(-(-shape[1] // ROWS), *shape, x, w, eps, y)
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, given that of y."""
    x, grad = dense(x), dense(grad)
    dx, shape = torch.empty_like(x), shape_of(x)
    tiles = min(4 * torch.get_num_threads(), shape[1])
    dw = torch.empty(tiles, shape[2], dtype=torch.float32, device=x.device)
    w = dense(weight.float())
    _rms_norm_backward(tiles, *shape, x, w, eps, grad, dx, dw)
    return dx, dw.sum(0, dtype=torch.float64).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, all [..., size] of one dtype, float32 or bfloat16."""
    gate, up = dense(gate), dense(up)
    y, shape = torch.empty_like(gate), shape_of(gate)
    _swiglu(-(-shape[1] // ROWS), *shape, gate, up, y)
    return y


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, given that of the product."""
    gate, up, grad = dense(gate), dense(up), dense(grad)
    d_gate, d_up, shape = torch.empty_like(gate), torch.empty_like(up), shape_of(gate)
    _swiglu_backward(-(-shape[1] // ROWS), *shape, gate, up, grad, d_gate, d_up)
    return d_gate, d_up


def unit(x: Tensor, shortest: float) -> Tensor:
    """x [..., N] float32 or bfloat16, divided by its length: float32."""
    x = dense(x)
    y, shape = torch.empty_like(x, dtype=torch.float32), shape_of(x)
    _unit(-(-shape[1] // ROWS), *shape, x, shortest, y)
    return y


def unit_backward(x: Tensor, shortest: float, grad: Tensor) -> Tensor:
    """The gradient of x, given that of the result."""
    x, grad = dense(x), dense(grad)
    dx, shape = torch.empty_like(x), shape_of(x)
    _unit_backward(-(-shape[1] // ROWS), *shape, x, shortest, grad, dx)
    return dx


def gated_add(base: Tensor, x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    """base [..., H N] float32 or bfloat16; x [..., H, N], gate [..., H], scale [H N]: like base."""
    base, x, gate, scale = (dense(each) for each in (base, x, gate, scale.float()))
    y, (bfloat16, rows, _) = torch.empty_like(base), shape_of(base)
    _gated_add(-(-rows // ROWS), bfloat16, rows, *x.shape[-2:], base, x, gate, scale, y)
    return y


def gated_add_backward(
    grad: Tensor, x: Tensor, gate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and scale, given that of the sum."""
    dtype = scale.dtype
    grad, x, gate, scale = (dense(each) for each in (grad, x, gate, scale.float()))
    dx, d_gate, (bfloat16, rows, size) = torch.empty_like(x), torch.empty_like(gate), shape_of(grad)
    tiles = -(-rows // _SUMMED)
    sums = torch.empty(tiles, size, dtype=torch.float32, device="cpu")
    given = bfloat16, rows, *x.shape[-2:], grad, x, gate, scale
    _gated_add_backward(tiles, *given, dx, d_gate, sums)
    return dx, d_gate, sums.sum(0, dtype=torch.float64).to(dtype)
