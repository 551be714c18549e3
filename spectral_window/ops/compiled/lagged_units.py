"""Rows of length 1, and those of their FIR filter, in one pass over memory (numba), and one back.

    p_t = u_t / |u_t|      k_t = y_t / |y_t|,  y_t = sum_{j < L} w_j u_{t-j}      in every head

Apart, the three operators write and read y, and add up two gradients of u. Here y lies in cache
alone: it is computed again on the way back. There the gradient of u_t needs those of the later
tokens' filters, y_t ... y_{t+L-1}. They stand in a ring of L rows, and a tile computes the L - 1
tokens behind it too. Tiles, sources and the sum over tokens are those of `fir`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled import fir
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    NOWHERE,
    Address,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.fir import (
    BLOCK,
    add_products,
    by_taps,
    inputs_of,
    place_of,
    source,
    sum_rows,
)
from spectral_window.ops.compiled.pages import empty
from spectral_window.ops.compiled.pointwise import (
    dot,
    read_row,
    scaled,
    write_row,
)
from spectral_window.ops.compiled.simd import (
    BYTES,
    LANES,
    ONE,
    ZERO,
    float32s,
    fused,
    inner,
    load,
    spread,
    store,
    total,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel


class Lagged(NamedTuple):
    u: Address  # [B, T, D]
    before: Address  # [B, L - 1, D], or none
    weights: Address  # float32 [D, L]
    sources: Address  # int64 [tokens, L], or none
    tokens: int
    time: int
    channels: int
    taps: int
    bfloat16: bool
    heads: int
    shortest: float  # a vector is divided by no less
    units: Address  # float32 [B, T, D], of u; backward: its gradient
    lagged: Address  # the same of the filter's rows
    d_u: Address = NOWHERE
    d_weights: Address = NOWHERE  # float32 [tiles, L, D]: the sum over the tokens of a tile


def _forward(tiles, u, before, weights, sources, heads, shortest, units, lagged):
    batch, time, channels = u.shape
    dtype = BFLOAT16 if u.dtype is BFLOAT16 else FLOAT32
    taps = weights.shape[1]
    tokens = batch * time if sources is None else sources.shape[0]
    if tiles != -(-tokens // BLOCK) or taps < 1:
        raise UserError(f"{tiles} tiles for {tokens} tokens (compiled units): see `fir.BLOCK`")
    if heads < 1 or channels % heads:
        raise UserError(f"{heads} heads of {channels} channels (compiled units)")
    return Lagged(
        address(u, dtype, u.numel()),
        optional(before, dtype, batch * (taps - 1) * channels),
        address(weights, FLOAT32, channels * taps),
        optional(sources, INT64, tokens * taps),
        *(tokens, time, channels, taps, dtype is BFLOAT16, heads, shortest),
        *(address(units, FLOAT32, u.numel()), address(lagged, FLOAT32, u.numel())),
    )


def _backward(tiles, u, before, weights, sources, heads, shortest, units, lagged, du, dw):
    args = _forward(tiles, u, before, weights, sources, heads, shortest, units, lagged)
    return args._replace(
        d_u=address(du, BFLOAT16 if u.dtype is BFLOAT16 else FLOAT32, u.numel()),
        d_weights=address(dw, FLOAT32, tiles * weights.numel()),
    )


@inner
def _index(args, row):
    """The token, among all B T, whose input lies at the address `row`."""
    return (row - args.u) // (args.channels * (2 if args.bfloat16 else 4))


@inner
def _normalise(x, heads, shortest, y):
    size = x.shape[0] // heads
    for h in range(heads):
        head = x[h * size : (h + 1) * size]
        factor = np.float32(1) / max(np.sqrt(dot(head, head)), shortest)
        scaled(head, factor, y[h * size : (h + 1) * size])


@inner
def _unit_gradient(x, g, size, shortest, more, dx):
    """dx = f g - f^3 x (x . g), f = 1 / |x|, without the second term where x is shorter, and the
    row `more`, where there is one: addresses of `size` numbers."""
    whole = size // LANES
    squares, products = spread(ZERO), spread(ZERO)
    for i in range(whole):
        vector = load(x + i * BYTES)
        squares = fused(vector, vector, squares)
        products = fused(vector, load(g + i * BYTES), products)
    square, product = total(squares), total(products)
    xs, gs, dxs = float32s(x, size), float32s(g, size), float32s(dx, size)
    for c in range(whole * LANES, size):
        square += xs[c] * xs[c]
        product += xs[c] * gs[c]
    length = np.sqrt(square)
    factor = ONE / max(length, shortest)
    slope = factor * factor * factor * product if length >= shortest else ZERO
    scale, back = spread(factor), spread(-slope)
    for i in range(whole):
        at = i * BYTES
        vector = load(g + at) * scale
        if more:
            vector = fused(load(g + at), scale, load(more + at))
        store(dx + at, fused(load(x + at), back, vector))
    for c in range(whole * LANES, size):
        dxs[c] = gs[c] * factor - xs[c] * slope + (float32s(more, size)[c] if more else ZERO)


@inner
def _unit_gradients(x, g, heads, size, shortest, more, dx):
    """The same in every head."""
    for h in range(heads):
        at = 4 * h * size
        _unit_gradient(x + at, g + at, size, shortest, more + at if more else 0, dx + at)


@kernel(Lagged, _forward)
def _lagged_units(args):
    """Tiles: blocks of tokens."""
    size, taps, bfloat16 = args.channels, args.taps, args.bfloat16
    buffer, rows = np.empty((taps + 2, size), np.float32), np.empty(taps, np.int64)
    weights = buffer.ctypes.data
    filtered, wide = weights + 4 * taps * size, buffer[taps + 1]
    by_taps(args, weights)
    tile = claim_tile(args)
    while tile >= 0:
        for i in range(tile * BLOCK, min((tile + 1) * BLOCK, args.tokens)):
            count = inputs_of(args, i, rows)
            sum_rows(rows, count, weights, size, size, bfloat16, filtered)
            at = 4 * size * _index(args, rows[0])
            u = read_row(bfloat16, rows[0], 0, wide)
            _normalise(u, args.heads, args.shortest, float32s(args.units + at, size))
            y = read_row(bfloat16, filtered, 0, wide)
            _normalise(y, args.heads, args.shortest, float32s(args.lagged + at, size))
        tile = claim_tile(args)
    buffer[0, 0] = 0  # alive until here


@inner
def _float32_row(bfloat16, row, size, buffer):
    """The address of `size` numbers as float32: `row`, or bfloat16 widened in `buffer`."""
    if not bfloat16:
        return row
    read_row(bfloat16, row, 0, float32s(buffer, size))
    return buffer


@kernel(Lagged, _backward)
def _lagged_units_backward(args):
    """The gradients of u and of the weights. Tiles: blocks of tokens."""
    size, taps, bfloat16 = args.channels, args.taps, args.bfloat16
    heads, line = args.heads, 4 * args.channels
    buffer, rows = np.empty((2 * taps + 4, size), np.float32), np.empty(taps, np.int64)
    later = np.empty(taps, np.int64)
    weights = buffer.ctypes.data
    ring = weights + taps * line  # gradients of the filter's rows: of token i in row i % taps
    filtered = ring + taps * line
    wide, summed, narrowed = filtered + line, filtered + 2 * line, filtered + 3 * line
    each = heads, size // heads, args.shortest
    by_taps(args, weights)
    tile = claim_tile(args)
    while tile >= 0:
        begin, end = tile * BLOCK, min((tile + 1) * BLOCK, args.tokens)
        dw = args.d_weights + tile * taps * line
        float32s(dw, taps * size)[:] = ZERO
        for i in range(begin, end + taps - 1):
            if i < args.tokens:
                count, dy = inputs_of(args, i, rows), ring + i % taps * line
                sum_rows(rows, count, weights, size, size, bfloat16, filtered)
                y = _float32_row(bfloat16, filtered, size, wide)
                g = args.lagged + _index(args, rows[0]) * line
                _unit_gradients(y, g, *each, NOWHERE, dy)
                if i < end:
                    add_products(rows, count, bfloat16, dy, False, dw, size)
            t = i - taps + 1
            if t < begin:
                continue
            at, count = source(args, t, 0), 1
            later[0] = ring + t % taps * line
            for j in range(1, min(taps, args.tokens - t)):
                if source(args, t + j, j) != at:  # the document has ended
                    break
                later[j] = ring + (t + j) % taps * line
                count = j + 1
            sum_rows(later, count, weights, size, size, False, summed)
            u = _float32_row(bfloat16, place_of(args, at), size, wide)
            du = narrowed if bfloat16 else args.d_u + at * line
            _unit_gradients(u, args.units + at * line, *each, summed, du)
            write_row(bfloat16, args.d_u, at * size, float32s(du, size))
        tile = claim_tile(args)
    buffer[0, 0] = 0  # alive until here


def units(
    u: Tensor,
    weights: Tensor,
    before: Tensor | None,
    sources: Tensor | None,
    heads: int,
    shortest: float,
) -> tuple[Tensor, Tensor]:
    """The rows of u and those of its filter, [B, T, D] float32 with length 1 in each head; 0 at
    padding. Arguments as in `fir.convolve`."""
    u, *rest = fir.settle(u, weights, before, sources)
    found = empty(u.shape, FLOAT32), empty(u.shape, FLOAT32)
    if sources is not None:
        for each in found:
            each.zero_()
    _lagged_units(fir.tiles_of(u, sources), u, *rest, heads, shortest, *found)
    return found


def units_backward(
    u: Tensor,
    weights: Tensor,
    before: Tensor | None,
    sources: Tensor | None,
    heads: int,
    shortest: float,
    d_units: Tensor,
    d_lagged: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of u and of the weights, given those of both results."""
    u, *rest = fir.settle(u, weights, before, sources)
    du = empty(u.shape, u.dtype) if sources is None else u.new_zeros(u.shape)
    tiles = fir.tiles_of(u, sources)
    channels, taps = weights.shape
    dw = torch.empty(tiles, taps, channels, dtype=FLOAT32, device="cpu")
    given = heads, shortest, dense(d_units), dense(d_lagged)
    _lagged_units_backward(tiles, u, *rest, *given, du, dw)
    return du, dw.sum(0, dtype=torch.float64).T.to(weights.dtype)
