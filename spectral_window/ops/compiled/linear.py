"""y = A x for a few x, at the speed at which A can be read.

Generating text multiplies every weight with one vector a token: two operations for each number
read, so memory is the limit and nothing else should be. What that takes: every thread reads whole
rows of A in order, several matrices that share one x are one call, and a row's sum takes few
instructions. In bfloat16 that is the processor's own product of pairs (AVX-512 BF16), where it has
one; elsewhere numbers are widened two at a time, as the halves of a 32-bit word, for which x is
laid out as its evens, then its odds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    Address,
    address,
    dense,
    optional,
)
from spectral_window.ops.compiled.simd import (
    bfloat16s,
    float32s,
    inner,
    int32s,
    narrow,
    summing,
    widen,
    widen_lower,
    widen_upper,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel

MOST = 18  # matrices in one call
_TILES = 2  # per thread, so that one that is held up does not hold up the others
_PAIRS = 32  # bfloat16 numbers that one instruction multiplies
_BLOCK = 8  # rows of A that stay in cache for the next vector of a batch
_CHAINS = 2  # of sums, so that one product need not wait for the one before
_FLOAT32, _PAIRWISE, _NATIVE = 0, 1, 2  # kinds of numbers, and of ways to multiply them
NATIVE = not numba.config.CPU_NAME and llvm.get_host_cpu_features().get("avx512bf16", False)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic
def _native_dot(typingctx: Any, w: Any, x: Any, blocks: Any) -> Any:
    """The dot product of `blocks` times 64 bfloat16 numbers at two addresses."""
    word, lanes = ir.IntType(64), _PAIRS // 2
    sums = ir.VectorType(ir.FloatType(), lanes)
    stored = ir.VectorType(ir.IntType(32), lanes)
    numbers = ir.VectorType(_BFloat(), _PAIRS)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not NATIVE:  # never called
            return ir.Constant(ir.FloatType(), 0.0)

        def read(address: Any) -> Any:
            words = builder.load(builder.inttoptr(address, stored.as_pointer()), align=4)
            return builder.bitcast(words, numbers)

        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        kind = ir.FunctionType(sums, [sums, numbers, numbers])
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, name)
        chains = [cgutils.alloca_once(builder, sums) for _ in range(_CHAINS)]
        for chain in chains:
            builder.store(ir.Constant(sums, [0.0] * lanes), chain)
        w, x, blocks = args
        with cgutils.for_range(builder, blocks) as loop:
            begin = builder.mul(loop.index, ir.Constant(word, 2 * _PAIRS * _CHAINS))
            for i, chain in enumerate(chains):
                at = builder.add(begin, ir.Constant(word, 2 * _PAIRS * i))
                pair = read(builder.add(w, at)), read(builder.add(x, at))
                builder.store(builder.call(multiply_add, [builder.load(chain), *pair]), chain)
        total = builder.load(chains[0])
        for chain in chains[1:]:
            total = builder.fadd(total, builder.load(chain))
        half = lanes // 2
        while half:
            turned = ir.Constant(stored, [(i + half) % lanes for i in range(lanes)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, turned))
            half //= 2
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64, types.int64, types.int64), codegen


@summing
def _dot_float32(w, x, size):
    """The dot product of float32 numbers at two addresses."""
    a, b = float32s(w, size), float32s(x, size)
    total = np.float32(0)
    for j in range(size):
        total += a[j] * b[j]
    return total


@inner
def _dot_native(w, x, size):
    """The same of bfloat16 numbers."""
    step = _PAIRS * _CHAINS
    total = _native_dot(w, x, size // step)
    a, b = bfloat16s(w, size), bfloat16s(x, size)
    for j in range(size // step * step, size):
        total += widen(a[j]) * widen(b[j])
    return total


@summing
def _dot_pairs(w, x, size):
    """The same, x given as float32: its evens, then its odds."""
    half = size // 2
    pairs, even, odd = int32s(w, half), float32s(x, half), float32s(x + 4 * half, half)
    evens = odds = np.float32(0)
    for j in range(half):
        evens += widen_lower(pairs[j]) * even[j]
        odds += widen_upper(pairs[j]) * odd[j]
    return evens + odds


@inner
def _float32_rows(w, x, size, sums):
    for r in range(sums.shape[0]):
        sums[r] = _dot_float32(w + 4 * r * size, x, size)


@inner
def _native_rows(w, x, size, sums):
    for r in range(sums.shape[0]):
        sums[r] = _dot_native(w + 2 * r * size, x, size)


@inner
def _pairwise_rows(w, x, size, sums):
    for r in range(sums.shape[0]):
        sums[r] = _dot_pairs(w + 2 * r * size, x, size)


class Matrix(NamedTuple):
    """Of a table that a call passes."""

    weight: Address  # [rows, D]
    rows: int
    bias: Address  # [rows], or none


class Maps(NamedTuple):
    kind: int
    batch: int
    size: int  # D
    x: Address  # [batch, D]
    y: Address  # [batch, columns]
    columns: int
    matrix_count: int
    matrices: Annotated[bytes, Matrix, MOST]


def _maps(tiles, kind, batch, size, x, y, columns, weights, biases):
    dtype = FLOAT32 if kind == _FLOAT32 else BFLOAT16
    x_dtype = BFLOAT16 if kind == _NATIVE else FLOAT32
    inputs = address(x, x_dtype, batch * size), address(y, dtype, batch * columns)
    matrices: list[int] = []
    seen = 0
    for weight, bias in zip(weights, biases, strict=True):
        rows = weight.shape[0]
        seen += rows
        matrices += address(weight, dtype, rows * size), rows, optional(bias, dtype, rows)
    if seen != columns or (size % 2 and kind == _PAIRWISE) or len(weights) > MOST:
        raise UserError(f"{seen} rows of {size} (compiled code): expected {columns}, in pairs")
    table = struct.pack(f"{len(matrices)}q", *matrices)
    return Maps(kind, batch, size, *inputs, columns, len(weights), table)


@kernel(Maps, _maps)
def _multiply(args):
    """Every tile takes a run of rows of each matrix."""
    kind, batch, size = args.kind, args.batch, args.size
    width = 4 if kind == _FLOAT32 else 2  # bytes of a number
    x_width = 2 if kind == _NATIVE else 4
    buffer = np.empty(_BLOCK, np.float32)
    tile = claim_tile(args)
    while tile >= 0:
        before = 0  # columns of the matrices before
        for which in range(args.matrix_count):
            matrix = args.matrices[which]
            rows, bias = matrix.rows, matrix.bias
            end = rows * (tile + 1) // args.tiles
            for r in range(rows * tile // args.tiles, end, _BLOCK):
                sums = buffer[: min(_BLOCK, end - r)]
                for b in range(batch):
                    w, x = matrix.weight + width * r * size, args.x + x_width * b * size
                    place = b * args.columns + before + r
                    if kind == _FLOAT32:
                        _float32_rows(w, x, size, sums)
                        _add_float32(sums, bias + 4 * r if bias else 0, args.y + 4 * place)
                        continue
                    if kind == _NATIVE:
                        _native_rows(w, x, size, sums)
                    else:
                        _pairwise_rows(w, x, size, sums)
                    _add_bfloat16(sums, bias + 2 * r if bias else 0, args.y + 2 * place)
            before += rows
        tile = claim_tile(args)


@inner
def _add_float32(sums, bias, y):
    out = float32s(y, sums.shape[0])
    for r in range(sums.shape[0]):
        out[r] = sums[r]
    if bias:
        for r in range(sums.shape[0]):
            out[r] += float32s(bias, sums.shape[0])[r]


@inner
def _add_bfloat16(sums, bias, y):
    out = bfloat16s(y, sums.shape[0])
    if bias:
        for r in range(sums.shape[0]):
            sums[r] += widen(bfloat16s(bias, sums.shape[0])[r])
    for r in range(sums.shape[0]):
        out[r] = narrow(sums[r])


def multiply(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """x [batch, D] times each of `weights` [rows, D], plus its bias [rows] or None: all side by
    side, [batch, sum of rows]. At most MOST matrices; all float32 or bfloat16 (then D is even),
    weights and biases contiguous, sums in float32."""
    x = dense(x)
    columns = sum(weight.shape[0] for weight in weights)
    y = x.new_empty(x.shape[0], columns)
    kind = _FLOAT32 if x.dtype == torch.float32 else _NATIVE if NATIVE else _PAIRWISE
    if kind == _PAIRWISE:
        x = x.float().unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    tiles, size = _TILES * torch.get_num_threads(), weights[0].shape[1]
    _multiply(tiles, kind, y.shape[0], size, x, y, columns, weights, biases)
    return y
