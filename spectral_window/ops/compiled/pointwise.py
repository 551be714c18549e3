"""RMSNorm and the gate of SwiGLU in one pass over memory each, forward and backward.

Between two matrix products a layer only has to read and write its activations once; made of
PyTorch's elementary operations these few lines take as long as a tenth of all the products. Rows
are worked on in float32 whatever they are stored in, and bfloat16 is rounded once, at the end.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from spectral_window.ops.compiled.addresses import BFLOAT16, FLOAT32, address, dense
from spectral_window.ops.compiled.threads import (
    bfloat16s,
    float32s,
    float_of,
    inner,
    kernel,
    narrow,
    summing,
    take,
    widen,
)

ROWS = 16  # that a thread takes at once
_HALF = 1  # the word that says bfloat16


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
def exponential(x):
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
def row_of(half, address, begin, room):
    """The numbers from `begin` of the array at `address`: float32 in place, bfloat16 in `room`."""
    size = room.shape[0]
    if not half:
        return float32s(address + 4 * begin, size)
    bits = bfloat16s(address + 2 * begin, size)
    for j in range(size):
        room[j] = widen(bits[j])
    return room


@inner
def place_of(half, address, begin, room):
    """Where to write such numbers before `put_row` is called with the same arguments."""
    return room if half else float32s(address + 4 * begin, room.shape[0])


@inner
def put_row(half, address, begin, room):
    if half:
        bits = bfloat16s(address + 2 * begin, room.shape[0])
        for j in range(room.shape[0]):
            bits[j] = narrow(room[j])


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


def _words(parts, half, rows, size, *tensors):
    """Of a kernel that reads and writes rows alone."""
    dtype, count = BFLOAT16 if half else FLOAT32, rows * size
    return half, rows, size, *[address(x, dtype, count) for x in tensors]


def _norm_words(parts, half, rows, size, x, weight, eps, y):
    dtype, count = BFLOAT16 if half else FLOAT32, rows * size
    inputs = address(x, dtype, count), address(weight, FLOAT32, size)
    return half, rows, size, *inputs, eps, address(y, dtype, count)


def _norm_backward_words(parts, half, rows, size, x, weight, eps, grad, dx, dw):
    head = _norm_words(parts, half, rows, size, x, weight, eps, grad)
    dtype = BFLOAT16 if half else FLOAT32
    return *head, address(dx, dtype, rows * size), address(dw, FLOAT32, parts * size)


@kernel(_norm_words)
def _rms_norm(job):
    """job: 2 bfloat16?, 3 rows, 4 D, 5 x, 6 weight float32 [D], 7 bits of eps, 8 y."""
    half, rows, size = job[2], job[3], job[4]
    weight, eps = float32s(job[6], size), float_of(np.int32(job[7]))
    rooms = np.empty((2, size), np.float32)
    part = take(job)
    while part >= 0:
        for row in range(part * ROWS, min((part + 1) * ROWS, rows)):
            at = row * size
            x, y = row_of(half, job[5], at, rooms[0]), place_of(half, job[8], at, rooms[1])
            factor = np.float32(1) / np.sqrt(dot(x, x) / np.float32(size) + eps)
            scale_by(x, factor, weight, y)
            put_row(half, job[8], at, y)
        part = take(job)


@kernel(_norm_backward_words)
def _rms_norm_backward(job):
    """job: 2 bfloat16?, 3 rows, 4 D, 5 x, 6 weight, 7 bits of eps, 8 gradient of y, 9 dx, 10 dw
    float32 [parts, D]: the sum over the rows of a part."""
    half, rows, size = job[2], job[3], job[4]
    weight, eps = float32s(job[6], size), float_of(np.int32(job[7]))
    rooms = np.empty((4, size), np.float32)
    part = take(job)
    while part >= 0:
        dw = float32s(job[10] + 4 * part * size, size)
        for j in range(size):
            dw[j] = np.float32(0)
        for row in range(rows * part // job[1], rows * (part + 1) // job[1]):
            at = row * size
            x, g = row_of(half, job[5], at, rooms[0]), row_of(half, job[8], at, rooms[1])
            dx, weighted = place_of(half, job[9], at, rooms[2]), rooms[3]
            for j in range(size):
                weighted[j] = g[j] * weight[j]
            factor = np.float32(1) / np.sqrt(dot(x, x) / np.float32(size) + eps)
            mean = dot(weighted, x) / np.float32(size)
            _norm_gradient(x, g, weighted, factor, factor * factor * factor * mean, dx, dw)
            put_row(half, job[9], at, dx)
        part = take(job)


@inner
def _gated(gate, up, y):
    """y = up gate / (1 + e^-gate)"""
    one = np.float32(1)
    for j in range(gate.shape[0]):
        y[j] = up[j] * gate[j] / (one + exponential(-gate[j]))


@inner
def _gate_gradient(gate, up, g, d_gate, d_up):
    """With s = 1 / (1 + e^-gate): g up s (1 + gate (1 - s)) and g gate s."""
    one = np.float32(1)
    for j in range(gate.shape[0]):
        s = one / (one + exponential(-gate[j]))
        d_gate[j] = g[j] * up[j] * s * (one + gate[j] * (one - s))
        d_up[j] = g[j] * gate[j] * s


@kernel(_words)
def _swiglu(job):
    """job: 2 bfloat16?, 3 rows, 4 size, 5 gate, 6 up, 7 y."""
    half, rows, size = job[2], job[3], job[4]
    rooms = np.empty((3, size), np.float32)
    part = take(job)
    while part >= 0:
        for row in range(part * ROWS, min((part + 1) * ROWS, rows)):
            at = row * size
            gate, up = row_of(half, job[5], at, rooms[0]), row_of(half, job[6], at, rooms[1])
            y = place_of(half, job[7], at, rooms[2])
            _gated(gate, up, y)
            put_row(half, job[7], at, y)
        part = take(job)


@kernel(_words)
def _swiglu_backward(job):
    """job: 2 bfloat16?, 3 rows, 4 size, 5 gate, 6 up, 7 gradient of y, 8 dgate, 9 dup."""
    half, rows, size = job[2], job[3], job[4]
    rooms = np.empty((5, size), np.float32)
    part = take(job)
    while part >= 0:
        for row in range(part * ROWS, min((part + 1) * ROWS, rows)):
            at = row * size
            gate, up = row_of(half, job[5], at, rooms[0]), row_of(half, job[6], at, rooms[1])
            g = row_of(half, job[7], at, rooms[2])
            d_gate, d_up = (
                place_of(half, job[8], at, rooms[3]),
                place_of(half, job[9], at, rooms[4]),
            )
            _gate_gradient(gate, up, g, d_gate, d_up)
            put_row(half, job[8], at, d_gate)
            put_row(half, job[9], at, d_up)
        part = take(job)


@cache
def bits_of(number: float) -> int:
    """The 32 bits of a float32, to be passed in a job."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def shape_of(x: Tensor) -> tuple[int, int, int]:
    """(bfloat16?, rows, size) of [..., size]."""
    return int(x.dtype == torch.bfloat16), x.numel() // x.shape[-1], x.shape[-1]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] float32 or bfloat16; weight [D]: y like x."""
    x = dense(x)
    y, shape = torch.empty_like(x), shape_of(x)
    w = dense(weight.float())
    _rms_norm(-(-shape[1] // ROWS), *shape, x, w, bits_of(eps), y)
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, given that of y."""
    x, grad = dense(x), dense(grad)
    dx, shape = torch.empty_like(x), shape_of(x)
    parts = min(4 * torch.get_num_threads(), shape[1])
    dw = torch.empty(parts, shape[2], dtype=torch.float32, device=x.device)
    w = dense(weight.float())
    _rms_norm_backward(parts, *shape, x, w, bits_of(eps), grad, dx, dw)
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
