"""Filters of a few taps in compiled code (numba): one pass over the tokens forward, one backward.

    y_t = sum_{j < L} w_j u_{t-j}      du_s = sum_j w_j dy_{s+j}      dw_j = sum_t dy_t u_{t-j}

A part is a block of tokens. Where the input of each tap lies follows from the shape; documents and
padding need a table of it (`sources`). Rows are float32 in the kernel whatever they are stored in.
The gradient of the taps is summed in float32 over the tokens of a block, then in float64, so no bit
depends on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    INT64,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.pages import empty
from spectral_window.ops.compiled.pointwise import place_of, put_row, row_of
from spectral_window.ops.compiled.threads import float32s, inner, int64s, kernel, take

NOTHING = -(1 << 62)  # in a table of sources: there is no such input
_BLOCK = 64  # tokens of a part

# the words of a job: addresses and sizes
INPUT, BEFORE, WEIGHTS, SOURCES = range(2, 6)  # BEFORE: 0 without a state; SOURCES: 0 without
TOKENS, TIME, CHANNELS, TAPS, HALF = range(6, 11)  # HALF: 1 for bfloat16
OUT = 11  # backward: the gradient of it, and then what is found
D_INPUT, D_WEIGHTS = 12, 13


def _words(parts, u, before, weights, sources, out):
    batch, time, channels = u.shape
    dtype = BFLOAT16 if u.dtype is BFLOAT16 else FLOAT32
    taps = weights.shape[1]
    tokens = batch * time if sources is None else sources.shape[0]
    if parts != -(-tokens // _BLOCK) or taps < 1:
        raise UserError(f"{parts} parts for {tokens} tokens (compiled fir): see `_BLOCK`")
    return (
        address(u, dtype, u.numel()),
        optional(before, dtype, batch * (taps - 1) * channels),
        address(weights, FLOAT32, channels * taps),
        optional(sources, INT64, tokens * taps),
        *(tokens, time, channels, taps, dtype is BFLOAT16),
        address(out, dtype, u.numel()),
    )


def _backward_words(parts, u, before, weights, sources, grad, du, dw):
    dtype = BFLOAT16 if u.dtype is BFLOAT16 else FLOAT32
    return (
        *_words(parts, u, before, weights, sources, grad),
        address(du, dtype, u.numel()),
        address(dw, FLOAT32, parts * weights.numel()),
    )


@inner
def source(job, i, j):
    """Where the input of token i and tap j lies: an index into the B T inputs, or -1 - k for input
    k of the B (L - 1) of the states, or NOTHING."""
    if job[SOURCES]:
        return int64s(job[SOURCES] + 8 * i * job[TAPS], job[TAPS])[j]
    row, t = i // job[TIME], i % job[TIME]
    if j <= t:
        return i - j
    if job[BEFORE]:
        return -1 - (row * (job[TAPS] - 1) + job[TAPS] - 1 + t - j)
    return NOTHING


@inner
def input_of(job, at, room):
    """The input at a source."""
    if at >= 0:
        return row_of(job[HALF], job[INPUT], at * job[CHANNELS], room)
    return row_of(job[HALF], job[BEFORE], (-1 - at) * job[CHANNELS], room)


@inner
def by_taps(job, rooms):
    """The weights [D, L] as [L, D] in `rooms`."""
    size, taps = job[CHANNELS], job[TAPS]
    weights = float32s(job[WEIGHTS], size * taps)
    for j in range(taps):
        for c in range(size):
            rooms[j, c] = weights[c * taps + j]


@inner
def multiply(x, weight, y):
    for c in range(x.shape[0]):
        y[c] = x[c] * weight[c]


@inner
def add_multiplied(x, weight, y):
    for c in range(x.shape[0]):
        y[c] += x[c] * weight[c]


@kernel(_words)
def _convolve(job):
    """Parts: blocks of tokens."""
    half, size, taps = job[HALF], job[CHANNELS], job[TAPS]
    rooms = np.empty((taps + 2, size), np.float32)
    by_taps(job, rooms)
    part = take(job)
    while part >= 0:
        for i in range(part * _BLOCK, min((part + 1) * _BLOCK, job[TOKENS])):
            at = source(job, i, 0)
            y = place_of(half, job[OUT], at * size, rooms[taps])
            multiply(input_of(job, at, rooms[taps + 1]), rooms[0], y)
            for j in range(1, taps):
                earlier = source(job, i, j)
                if earlier == NOTHING:
                    break
                add_multiplied(input_of(job, earlier, rooms[taps + 1]), rooms[j], y)
            put_row(half, job[OUT], at * size, y)
        part = take(job)


@kernel(_backward_words)
def _convolve_backward(job):
    """D_INPUT, and D_WEIGHTS [parts, L, D]: the sum over the tokens of a part."""
    half, size, taps = job[HALF], job[CHANNELS], job[TAPS]
    rooms = np.empty((taps + 3, size), np.float32)
    by_taps(job, rooms)
    part = take(job)
    while part >= 0:
        dw = job[D_WEIGHTS] + 4 * part * taps * size
        float32s(dw, taps * size)[:] = np.float32(0)
        for i in range(part * _BLOCK, min((part + 1) * _BLOCK, job[TOKENS])):
            at = source(job, i, 0)
            grad = row_of(half, job[OUT], at * size, rooms[taps])
            du = place_of(half, job[D_INPUT], at * size, rooms[taps + 1])
            multiply(grad, rooms[0], du)
            for j in range(1, min(taps, job[TOKENS] - i)):
                if source(job, i + j, j) != at:  # the document has ended
                    break
                later = source(job, i + j, 0) * size
                add_multiplied(row_of(half, job[OUT], later, rooms[taps + 2]), rooms[j], du)
            put_row(half, job[D_INPUT], at * size, du)
            for j in range(taps):
                earlier = source(job, i, j)
                if earlier == NOTHING:
                    break
                x = input_of(job, earlier, rooms[taps + 2])
                add_multiplied(x, grad, float32s(dw + 4 * j * size, size))
        part = take(job)


def _parts(u: Tensor, sources: Tensor | None) -> int:
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
    _convolve(_parts(u, sources), u, *rest, y)
    return y


def convolve_backward(
    u: Tensor, weights: Tensor, before: Tensor | None, sources: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of u and of the weights, given that of y."""
    u, *rest = _call(u, weights, before, sources)
    du = empty(u.shape, u.dtype) if sources is None else u.new_zeros(u.shape)
    parts = _parts(u, sources)
    channels, taps = weights.shape
    dw = torch.empty(parts, taps, channels, dtype=torch.float32, device="cpu")
    _convolve_backward(parts, u, *rest, dense(grad), du, dw)
    return du, dw.sum(0, dtype=torch.float64).T.to(weights.dtype)
