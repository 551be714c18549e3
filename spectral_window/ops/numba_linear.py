"""y = W x for a few x, at the speed at which W can be read.

Generating text multiplies every weight with one vector a token: two operations for each number
read, so memory is the limit and nothing else should be. What that takes: every thread reads whole
rows of W in order, bfloat16 is widened two numbers at a time (the halves of a 32-bit word, hence x
is laid out as evens, then odds), and several matrices that share one x are one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spectral_window.ops.numba_parallel import (
    bfloat16s,
    float32s,
    int32s,
    kernel,
    lower,
    narrow,
    summing,
    take,
    upper,
    widen,
)

_SHARE = 2  # parts a thread, so that one that is held up does not hold up the others


@summing
def _dot(w, x):
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += w[j] * x[j]
    return total


@summing
def _dot_of_pairs(w, even, odd):
    evens = odds = np.float32(0)
    for j in range(even.shape[0]):
        evens += lower(w[j]) * even[j]
        odds += upper(w[j]) * odd[j]
    return evens + odds


@kernel
def _multiply_float32(job):
    """job: 2 batch, 3 K, 4 x [batch, K], 5 y [batch, columns], 6 columns, 7 matrices, then for each
    its address, rows and bias (address or 0). Every part takes a run of rows of each matrix."""
    batch, size, columns = job[2], job[3], job[6]
    x, y = float32s(job[4], batch * size), float32s(job[5], batch * columns)
    part = take(job)
    while part >= 0:
        before = 0  # columns of the matrices before
        for which in range(job[7]):
            at = 8 + 3 * which
            rows = job[at + 1]
            w = float32s(job[at], rows * size)
            bias = float32s(job[at + 2], rows if job[at + 2] else 0)
            for r in range(rows * part // job[1], rows * (part + 1) // job[1]):
                for b in range(batch):
                    value = _dot(w[r * size : (r + 1) * size], x[b * size : (b + 1) * size])
                    if bias.shape[0]:
                        value += bias[r]
                    y[b * columns + before + r] = value
            before += rows
        part = take(job)


@kernel
def _multiply_bfloat16(job):
    """The same in bfloat16; x is float32 [batch, 2, K / 2], the evens and the odds of each row."""
    batch, half, columns = job[2], job[3] // 2, job[6]
    x, y = float32s(job[4], batch * half * 2), bfloat16s(job[5], batch * columns)
    part = take(job)
    while part >= 0:
        before = 0
        for which in range(job[7]):
            at = 8 + 3 * which
            rows = job[at + 1]
            w = int32s(job[at], rows * half)
            bias = bfloat16s(job[at + 2], rows if job[at + 2] else 0)
            for r in range(rows * part // job[1], rows * (part + 1) // job[1]):
                for b in range(batch):
                    even = x[2 * b * half : (2 * b + 1) * half]
                    odd = x[(2 * b + 1) * half : (2 * b + 2) * half]
                    value = _dot_of_pairs(w[r * half : (r + 1) * half], even, odd)
                    if bias.shape[0]:
                        value += widen(bias[r])
                    y[b * columns + before + r] = narrow(value)
            before += rows
        part = take(job)


def multiply(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """x [batch, K] times each of `weights` [rows, K], plus its bias [rows] or None: all side by
    side, [batch, sum of rows]. Everything contiguous, float32 or bfloat16 (then K is even), sums in
    float32."""
    columns = sum(weight.shape[0] for weight in weights)
    y = x.new_empty(x.shape[0], columns)
    words: list[Tensor | int | None] = []
    for weight, bias in zip(weights, biases, strict=True):
        words += (weight, weight.shape[0], bias)
    parts = _SHARE * torch.get_num_threads()
    if x.dtype == torch.float32:
        run = _multiply_float32
    else:
        run = _multiply_bfloat16
        x = x.float().unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    size = weights[0].shape[1]
    run(parts, y.shape[0], size, x, y, columns, len(weights), *words)
    return y
