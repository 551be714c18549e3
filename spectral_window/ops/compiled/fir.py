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
from spectral_window.ops.compiled.simd import (
    BYTES,
    LANES,
    bfloat16s,
    float32s,
    fused,
    inner,
    int64s,
    load,
    load_bfloat16,
    narrow,
    store,
    store_bfloat16,
    widen,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel

NOTHING = -(1 << 62)  # in a table of sources: there is no such input
BLOCK = 64  # tokens of a tile


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
    if tiles != -(-tokens // BLOCK) or taps < 1:
        raise UserError(f"{tiles} tiles for {tokens} tokens (compiled fir): see `BLOCK`")
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
def place_of(args, at):
    """The address of the input at a source."""
    size = args.channels * (2 if args.bfloat16 else 4)
    return args.u + at * size if at >= 0 else args.before + (-1 - at) * size


@inner
def inputs_of(args, i, rows):
    """Writes the addresses of the inputs of token i to `rows`, and says how many there are."""
    for j in range(args.taps):
        at = source(args, i, j)
        if at == NOTHING:
            return j
        rows[j] = place_of(args, at)
    return args.taps


@inner
def by_taps(args, target):
    """The weights [D, L] as [L, D] at `target`."""
    size, taps = args.channels, args.taps
    weights = float32s(args.weights, size * taps)
    for j in range(taps):
        row = float32s(target + 4 * j * size, size)
        for c in range(size):
            row[c] = weights[c * taps + j]


@inner
def vector_at(row, i, bfloat16):
    """Vector i of a row of inputs."""
    return load_bfloat16(row + i * BYTES // 2) if bfloat16 else load(row + i * BYTES)


@inner
def number_at(row, c, bfloat16):
    return widen(bfloat16s(row, c + 1)[c]) if bfloat16 else float32s(row, c + 1)[c]


@inner
def sum_rows(rows, count, weights, channels, size, bfloat16, target):
    """target = the sum of `count` rows, each times its row of weights: one pass, sums in registers.

    rows: the rows' addresses. weights: those of `size` channels in float32 [L, channels].
    """
    whole, step = size // LANES, 4 * channels
    i = 0
    while i + 4 <= whole:
        at = weights + i * BYTES
        a = vector_at(rows[0], i, bfloat16) * load(at)
        b = vector_at(rows[0], i + 1, bfloat16) * load(at + BYTES)
        c = vector_at(rows[0], i + 2, bfloat16) * load(at + 2 * BYTES)
        d = vector_at(rows[0], i + 3, bfloat16) * load(at + 3 * BYTES)
        for j in range(1, count):
            row, at = rows[j], at + step
            a = fused(vector_at(row, i, bfloat16), load(at), a)
            b = fused(vector_at(row, i + 1, bfloat16), load(at + BYTES), b)
            c = fused(vector_at(row, i + 2, bfloat16), load(at + 2 * BYTES), c)
            d = fused(vector_at(row, i + 3, bfloat16), load(at + 3 * BYTES), d)
        put_vector(a, target, i, bfloat16)
        put_vector(b, target, i + 1, bfloat16)
        put_vector(c, target, i + 2, bfloat16)
        put_vector(d, target, i + 3, bfloat16)
        i += 4
    while i < whole:
        a = vector_at(rows[0], i, bfloat16) * load(weights + i * BYTES)
        for j in range(1, count):
            a = fused(vector_at(rows[j], i, bfloat16), load(weights + j * step + i * BYTES), a)
        put_vector(a, target, i, bfloat16)
        i += 1
    for c in range(whole * LANES, size):
        y = number_at(rows[0], c, bfloat16) * float32s(weights, size)[c]
        for j in range(1, count):
            y += number_at(rows[j], c, bfloat16) * float32s(weights + j * step, size)[c]
        if bfloat16:
            bfloat16s(target, size)[c] = narrow(y)
        else:
            float32s(target, size)[c] = y


@inner
def put_vector(x, row, i, bfloat16):
    if bfloat16:
        store_bfloat16(row + i * BYTES // 2, x)
    else:
        store(row + i * BYTES, x)


@inner
def add_products(rows, count, bfloat16, grad, half, sums, size):
    """sums [L, size] += each of `count` rows times the row `grad`; bfloat16 and half: whether the
    rows are, and `grad`."""
    whole = size // LANES
    for j in range(count):
        row, to = rows[j], sums + 4 * j * size
        for i in range(whole):
            at = to + i * BYTES
            g = vector_at(grad, i, half)
            store(at, fused(vector_at(row, i, bfloat16), g, load(at)))
        for c in range(whole * LANES, size):
            g = number_at(grad, c, half)
            float32s(to, size)[c] += number_at(row, c, bfloat16) * g


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
    size, taps = args.channels, args.taps
    buffer, rows = np.empty(taps * size, np.float32), np.empty(taps, np.int64)
    weights = buffer.ctypes.data
    by_taps(args, weights)
    tile = claim_tile(args)
    while tile >= 0:
        for i in range(tile * BLOCK, min((tile + 1) * BLOCK, args.tokens)):
            count = inputs_of(args, i, rows)
            target = args.out + rows[0] - args.u
            sum_rows(rows, count, weights, size, size, args.bfloat16, target)
        tile = claim_tile(args)
    buffer[0] = 0  # alive until here


@kernel(Filter, _backward)
def _convolve_backward(args):
    """The gradients of u and of the weights. Tiles: blocks of tokens."""
    size, taps = args.channels, args.taps
    buffer, rows = np.empty(taps * size, np.float32), np.empty(taps, np.int64)
    later = np.empty(taps, np.int64)
    weights = buffer.ctypes.data
    by_taps(args, weights)
    tile = claim_tile(args)
    while tile >= 0:
        dw = args.d_weights + 4 * tile * taps * size
        float32s(dw, taps * size)[:] = np.float32(0)
        for i in range(tile * BLOCK, min((tile + 1) * BLOCK, args.tokens)):
            at, count = source(args, i, 0), 1
            here = place_of(args, at) - args.u
            later[0] = args.out + here
            for j in range(1, min(taps, args.tokens - i)):
                if source(args, i + j, j) != at:  # the document has ended
                    break
                later[j] = args.out + place_of(args, source(args, i + j, 0)) - args.u
                count = j + 1
            sum_rows(later, count, weights, size, size, args.bfloat16, args.d_u + here)
            count = inputs_of(args, i, rows)
            add_products(rows, count, args.bfloat16, later[0], args.bfloat16, dw, size)
        tile = claim_tile(args)
    buffer[0] = 0  # alive until here


def tiles_of(u: Tensor, sources: Tensor | None) -> int:
    """Blocks of the tokens of u that are no padding."""
    tokens = u.shape[0] * u.shape[1] if sources is None else sources.shape[0]
    return -(-tokens // BLOCK)


def settle(
    u: Tensor, weights: Tensor, before: Tensor | None, sources: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(u, before, weights, sources) as kernels take them."""
    before = None if before is None else dense(before)
    return dense(u), before, dense(weights.float()), None if sources is None else dense(sources)


def convolve(u: Tensor, weights: Tensor, before: Tensor | None, sources: Tensor | None) -> Tensor:
    """y [B, T, D] in u's dtype; 0 at padding.

    u: [B, T, D] float32 or bfloat16, not empty. weights: [D, L]. before: the states' inputs
    [B, L - 1, D] in u's dtype, oldest first, or None. sources: [n, L] int64 of the n tokens that
    are no padding, see `source`; None where each row is one document.
    """
    u, *rest = settle(u, weights, before, sources)
    y = empty(u.shape, u.dtype) if sources is None else u.new_zeros(u.shape)
    _convolve(tiles_of(u, sources), u, *rest, y)
    return y


def convolve_backward(
    u: Tensor, weights: Tensor, before: Tensor | None, sources: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of u and of the weights, given that of y."""
    u, *rest = settle(u, weights, before, sources)
    du = empty(u.shape, u.dtype) if sources is None else u.new_zeros(u.shape)
    tiles = tiles_of(u, sources)
    channels, taps = weights.shape
    dw = torch.empty(tiles, taps, channels, dtype=torch.float32, device="cpu")
    _convolve_backward(tiles, u, *rest, dense(grad), du, dw)
    return du, dw.sum(0, dtype=torch.float64).T.to(weights.dtype)
