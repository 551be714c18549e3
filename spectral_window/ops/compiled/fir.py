"""FIR filters of a few taps in compiled code (numba): one pass over the tokens forward, one back.

    y_t = sum_{j < L} w_j u_{t-j}      du_s = sum_j w_j dy_{s+j}      dw_j = sum_t dy_t u_{t-j}

A tile is a block of tokens. Where the input of each tap lies follows from the shape; documents and
padding need a table of it (`sources`). Rows are float32 in the kernel whatever they are stored in.
The gradient of the taps is summed in float32 over the tokens of a block, then in float64, so no bit
depends on the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
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
from spectral_window.ops.compiled.pages import empty
from spectral_window.ops.compiled.pointwise import read_row, row_for, write_row
from spectral_window.ops.compiled.simd import float32s, inner, int64s
from spectral_window.ops.compiled.threads import claim_tile, kernel

NOTHING = -(1 << 62)  # in a table of sources: there is no such input
_BLOCK = 64  # tokens of a tile


class Filter(NamedTuple):
    u: Address  # [B, T, D]
    before: Address  # [B, L - 1, D], or none
    weights: Address  # float32 [D, L]
    sources: Address  # int64 [tokens, L], or none
    tokens: int
    time: int
    channels: int
    taps: int
    bfloat16: bool
    out: Address  # backward: its gradient
    d_u: Address = NOWHERE
    d_weights: Address = NOWHERE  # float32 [tiles, L, D]: the sum over the tokens of a tile


def _forward(tiles, u, before, weights, sources, out):
    batch, time, channels = u.shape
    dtype = BFLOAT16 if u.dtype is BFLOAT16 else FLOAT32
    taps = weights.shape[1]
    tokens = batch * time if sources is None else sources.shape[0]
    if tiles != -(-tokens // _BLOCK) or taps < 1:
        raise UserError(f"{tiles} tiles for {tokens} tokens (compiled fir): see `_BLOCK`")
    return Filter(
        address(u, dtype, u.numel()),
        optional(before, dtype, batch * (taps - 1) * channels),
        address(weights, FLOAT32, channels * taps),
        optional(sources, INT64, tokens * taps),
        *(tokens, time, channels, taps, dtype is BFLOAT16),
        address(out, dtype, u.numel()),
    )


def _backward(tiles, u, before, weights, sources, grad, du, dw):
    return _forward(tiles, u, before, weights, sources, grad)._replace(
        d_u=address(du, BFLOAT16 if u.dtype is BFLOAT16 else FLOAT32, u.numel()),
        d_weights=address(dw, FLOAT32, tiles * weights.numel()),
    )


@inner
def source(args, i, j):
    """Where the input of token i and tap j lies: an index into the B T inputs, or -1 - k for input
    k of the B (L - 1) of the states, or NOTHING."""
    if args.sources:
        return int64s(args.sources + 8 * i * args.taps, args.taps)[j]
    row, t = i // args.time, i % args.time
    if j <= t:
        return i - j
    if args.before:
        return -1 - (row * (args.taps - 1) + args.taps - 1 + t - j)
    return NOTHING


@inner
def input_of(args, at, buffer):
    """The input at a source."""
    if at >= 0:
        return read_row(args.bfloat16, args.u, at * args.channels, buffer)
    return read_row(args.bfloat16, args.before, (-1 - at) * args.channels, buffer)


@inner
def by_taps(args, buffers):
    """The weights [D, L] as [L, D] in `buffers`."""
    size, taps = args.channels, args.taps
    weights = float32s(args.weights, size * taps)
    for j in range(taps):
        for c in range(size):
            buffers[j, c] = weights[c * taps + j]


@inner
def multiply(x, weight, y):
    for c in range(x.shape[0]):
        y[c] = x[c] * weight[c]


@inner
def add_multiplied(x, weight, y):
    for c in range(x.shape[0]):
        y[c] += x[c] * weight[c]


@kernel(Filter, _forward)
def _convolve(args):
    """Tiles: blocks of tokens."""
    bfloat16, size, taps = args.bfloat16, args.channels, args.taps
    buffers = np.empty((taps + 2, size), np.float32)
    by_taps(args, buffers)
    tile = claim_tile(args)
    while tile >= 0:
        for i in range(tile * _BLOCK, min((tile + 1) * _BLOCK, args.tokens)):
            at = source(args, i, 0)
            y = row_for(bfloat16, args.out, at * size, buffers[taps])
            multiply(input_of(args, at, buffers[taps + 1]), buffers[0], y)
            for j in range(1, taps):
                earlier = source(args, i, j)
                if earlier == NOTHING:
                    break
                add_multiplied(input_of(args, earlier, buffers[taps + 1]), buffers[j], y)
            write_row(bfloat16, args.out, at * size, y)
        tile = claim_tile(args)


@kernel(Filter, _backward)
def _convolve_backward(args):
    """The gradients of u and of the weights. Tiles: blocks of tokens."""
    bfloat16, size, taps = args.bfloat16, args.channels, args.taps
    buffers = np.empty((taps + 3, size), np.float32)
    by_taps(args, buffers)
    tile = claim_tile(args)
    while tile >= 0:
        dw = args.d_weights + 4 * tile * taps * size
        float32s(dw, taps * size)[:] = np.float32(0)
        for i in range(tile * _BLOCK, min((tile + 1) * _BLOCK, args.tokens)):
            at = source(args, i, 0)
            grad = read_row(bfloat16, args.out, at * size, buffers[taps])
            du = row_for(bfloat16, args.d_u, at * size, buffers[taps + 1])
            multiply(grad, buffers[0], du)
            for j in range(1, min(taps, args.tokens - i)):
                if source(args, i + j, j) != at:  # the document has ended
                    break
                later = source(args, i + j, 0) * size
                add_multiplied(
                    read_row(bfloat16, args.out, later, buffers[taps + 2]), buffers[j], du
                )
            write_row(bfloat16, args.d_u, at * size, du)
            for j in range(taps):
                earlier = source(args, i, j)
                if earlier == NOTHING:
                    break
                x = input_of(args, earlier, buffers[taps + 2])
                add_multiplied(x, grad, float32s(dw + 4 * j * size, size))
        tile = claim_tile(args)


def _tiles(u: Tensor, sources: Tensor | None) -> int:
    tokens = u.shape[0] * u.shape[1] if sources is None else sources.shape[0]
    return -(-tokens // _BLOCK)


def _call(u, weights, before, sources):
    before = None if before is None else dense(before)
    return dense(u), before, dense(weights.float()), None if sources is None else dense(sources)


def convolve(u: Tensor, weights: Tensor, before: Tensor | None, sources: Tensor | None) -> Tensor:
    """y [B, T, D] in u's dtype; 0 at padding.

    u: [B, T, D] float32 or bfloat16, not empty. weights: [D, L]. before: the states' inputs
    [B, L - 1, D] in u's dtype, oldest first, or None. sources: [n, L] int64 of the n tokens that
    are no padding, see `source`; None where each row is one document.
    """
    u, *rest = _call(u, weights, before, sources)
    y = empty(u.shape, u.dtype) if sources is None else u.new_zeros(u.shape)
    _convolve(_tiles(u, sources), u, *rest, y)
    return y


def convolve_backward(
    u: Tensor, weights: Tensor, before: Tensor | None, sources: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of u and of the weights, given that of y."""
    u, *rest = _call(u, weights, before, sources)
    du = empty(u.shape, u.dtype) if sources is None else u.new_zeros(u.shape)
    tiles = _tiles(u, sources)
    channels, taps = weights.shape
    dw = torch.empty(tiles, taps, channels, dtype=torch.float32, device="cpu")
    _convolve_backward(tiles, u, *rest, dense(grad), du, dw)
    return du, dw.sum(0, dtype=torch.float64).T.to(weights.dtype)
