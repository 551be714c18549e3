"""Products of small matrices in float32, and what else the delta-rule memory does with rows.

Matrices are row-major in scratch memory, rows an odd number of cache lines apart, so that neither
rows nor columns collide in a cache. States are kept in *panels* [V / 16, K, 16], padded with zeros:
the sixteen columns of a tile lie side by side.

A sum is a sum of sums of 64 terms: its error then hardly grows with its length, and what it is
added to is rounded once for 64 terms. It is the same sum whatever the size of the product.
"""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_features

from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    fused,
    load,
    product,
    spread,
    store,
    total,
    transpose,
)
from spectral_window.ops.compiled.threads import inner
from spectral_window.ops.compiled.window_rows import ZERO, blocks_of

# Sums of a tile stay in registers: 12 of 16 with AVX2, where a vector takes two; of 32 elsewhere.
_TALL = 12 if get_host_cpu_features().get("avx512f", False) else 6
_tall, _short = product(_TALL, 1, apart=True), product(4, 1, apart=True)
_line, _dot = product(1, 4, apart=True), product(1, 1, apart=True)
_TERMS = 64  # are added up before they join the whole: many more would cost precision
_DEEP = 256  # terms for which a panel stays in the nearest cache


@inner
def multiply(c, c_row, c_panel, a, a_row, a_step, b, b_step, b_panel, rows, panels, count):
    """c [rows, 16 panels] += a [rows, count] b [count, 16 panels], the sum in the order of `count`.

    Addresses, and bytes from one row, step or panel to the next; rows are a multiple of 4.
    """
    tall = rows // _TALL
    if (rows - tall * _TALL) % 4 and tall > 0:
        tall -= 1
    for begin in range(0, count, _DEEP):
        end = min(begin + _DEEP, count)
        for j in range(panels):
            i = 0
            while i < rows:
                high = i < tall * _TALL
                out = c + j * c_panel + i * c_row
                for k in range(begin, end, _TERMS):
                    left, right = a + i * a_row + k * a_step, b + j * b_panel + k * b_step
                    terms = min(_TERMS, end - k)
                    if high:
                        _tall(out, c_row, left, a_row, a_step, right, b_step, terms)
                    else:
                        _short(out, c_row, left, a_row, a_step, right, b_step, terms)
                i += _TALL if high else 4


@inner
def add_products(c, a, a_step, b, b_step, blocks, count):
    """A single row: c [16 blocks] += a [count] b [count, 16 blocks]."""
    j = 0
    while j + 4 <= blocks:
        _line(c + j * BYTES, 0, a, 0, a_step, b + j * BYTES, b_step, count)
        j += 4
    while j < blocks:
        _dot(c + j * BYTES, 0, a, 0, a_step, b + j * BYTES, b_step, count)
        j += 1


@inner
def scale_row(target, source, scale, blocks):
    """target = scale * source, vectors."""
    for i in range(blocks):
        store(target + i * BYTES, load(source + i * BYTES) * spread(scale))


@inner
def add_row(target, scale, source, blocks):
    """target += scale * source."""
    for i in range(blocks):
        at = target + i * BYTES
        store(at, fused(spread(scale), load(source + i * BYTES), load(at)))


@inner
def row_bytes(size):
    """Bytes from one row of `size` numbers in scratch memory to the next: an odd number of lines,
    so that neighbouring rows never share a place in the cache."""
    return (blocks_of(size) | 1) * BYTES


@inner
def rounded_up(count):
    """The rows that are computed for `count` tokens: whole blocks."""
    return (count + LANES - 1) // LANES * LANES


@inner
def transpose_rows(source, step, rows, size, target):
    """Rows [rows, size] as panels [rows / 16, size, 16]."""
    blocks = blocks_of(size)
    for i in range(rows // LANES):
        for j in range(blocks):
            place = source + i * LANES * step + j * BYTES
            transpose(place, step, target + (i * blocks + j) * LANES * BYTES)


@inner
def copy_vectors(source, target, vectors):
    for i in range(vectors):
        store(target + i * BYTES, load(source + i * BYTES))


@inner
def scale_vectors(target, scale, vectors):
    for i in range(vectors):
        at = target + i * BYTES
        store(at, load(at) * spread(scale))


@inner
def dot(x, y, blocks):
    sums = spread(ZERO)
    for i in range(blocks):
        sums = fused(load(x + i * BYTES), load(y + i * BYTES), sums)
    return total(sums)


@inner
def scale_rows(target, step, scales, rows, blocks):
    for t in range(rows):
        scale_row(target + t * step, target + t * step, scales[t], blocks)
