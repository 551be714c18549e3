"""What a kernel computes with: arrays at addresses, bfloat16, and vectors as values.

A plain loop becomes vector instructions by itself, if the compiler can prove that no array overlaps
another, and it reads and writes its sums in memory at every pass. Where the speed hangs on what
stays in registers, a kernel holds vectors and says itself what is read and written when. There are
two types of them, with one vocabulary: LANES float32 numbers, and LANES64 float64 numbers.

    x = load(address)                            # 16 float32 numbers; addresses are in bytes
    store(address, fused(x, spread(two), x))     # 2 x + x, rounded once

    x = load_at(u, i, LANES64)                   # u[i] ... u[i + LANES64 - 1] as float64
    r = a * r - b * x                            # + - * become fused multiply-adds
    store_at(y, i, LANES64, r)                   # rounded once to y's dtype

The operations +, -, *, `spread`, `rounded` and `power_of_two` take both types. Memory is named in
two ways. `load`, `store` and `prefetch` take an address, without alignment. `load_at`, `store_at`,
`stream_at` and `prefetch_at` take an array of float32, float64 or bfloat16 and an index; the first
two also take the number of lanes that exist, so that a width that is no multiple of LANES64 ends in
a partial vector: nothing outside is touched, missing lanes are 0.

LLVM rotations vectors into whatever the CPU has: AVX-512, AVX2 or NEON. They live in kernels only,
never in Python.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

# Fused multiply-adds, but NaN and infinity keep their meaning.
inner = numba.njit(fastmath={"contract"}, error_model="numpy")
# Sums may be reordered too: needed for a loop that adds up to become vector instructions.
summing = numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")
# Into the caller, before LLVM sees it: for the body of an innermost loop.
always = numba.njit(forceinline=True, error_model="numpy")

LANES = 16
BYTES = 4 * LANES  # of a float32 vector in memory
# 32 registers that each hold a whole vector, and not 16 of half. Told of another processor, numba
# compiles for that one.
AVX512 = bool(get_host_cpu_features().get("avx512f")) and not numba.config.CPU_NAME
LANES64 = 16 if AVX512 else 8  # what registers hold nine times
ZERO, ONE = np.float32(0), np.float32(1)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_SUFFIX = {_I16: "i16", _F32: "f32", _F64: "f64"}  # in the names of LLVM's functions


# ---------------------------------------------------------------- arrays and numbers


def _pointer_to(dtype: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        kind = types.CPointer(dtype)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return pointer


_float32, _float64 = _pointer_to(types.float32), _pointer_to(types.float64)
_int64, _int32, _uint16 = (_pointer_to(t) for t in (types.int64, types.int32, types.uint16))


@inner
def float32s(address, count):
    """The `count` float32 numbers at `address`, as an array."""
    return numba.carray(_float32(address), (count,))


@inner
def float64s(address, count):
    return numba.carray(_float64(address), (count,))


@inner
def int64s(address, count):
    return numba.carray(_int64(address), (count,))


@inner
def int32s(address, count):
    return numba.carray(_int32(address), (count,))


@inner
def bfloat16s(address, count):
    """bfloat16 numbers as their 16 bits: read with `widen`, written with `narrow`."""
    return numba.carray(_uint16(address), (count,))


def _gives(emit: Callable[..., Any]) -> Callable[..., Any]:
    """numba's code generator from emit(builder, *arguments) -> result or None."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = emit(builder, *arguments)
        return context.get_dummy_value() if result is None else result

    return codegen


@intrinsic
def widen(typingctx: Any, bits: Any) -> Any:
    """A bfloat16, given as its 16 bits, as the float32 of the same value."""

    def emit(b: Any, bits: Any) -> Any:
        return b.bitcast(b.shl(b.zext(bits, _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint16), _gives(emit)


@intrinsic
def narrow(typingctx: Any, number: Any) -> Any:
    """The 16 bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""
    return types.uint16(types.float32), _gives(lambda b, x: _bfloat16_bits(b, x, _I32, _I16))


@intrinsic
def widen_lower(typingctx: Any, pair: Any) -> Any:
    """The first of two neighbouring bfloat16 numbers, given as one int32, as a float32. (Widening
    pairs takes half the instructions of widening one by one.)"""

    def emit(b: Any, pair: Any) -> Any:
        return b.bitcast(b.shl(pair, ir.Constant(_I32, 16)), _F32)

    return types.float32(types.int32), _gives(emit)


@intrinsic
def widen_upper(typingctx: Any, pair: Any) -> Any:
    """The second of two neighbouring bfloat16 numbers, given as one int32, as a float32."""

    def emit(b: Any, pair: Any) -> Any:
        return b.bitcast(b.and_(pair, ir.Constant(_I32, -65536)), _F32)

    return types.float32(types.int32), _gives(emit)


def _constant(kind: Any, value: float) -> Any:
    """`value` as a number of LLVM type `kind`, or in every lane of such a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


def _bfloat16_bits(b: Any, x: Any, words: Any, halves: Any) -> Any:
    """Round float32 to bfloat16, to nearest, ties to even; NaN stays NaN.

    By integers, and not by LLVM's fptrunc to bfloat: without AVX-512 BF16 that is a call of a
    function that no library here has (the process aborts), with it small numbers become 0.
    """
    bits = b.bitcast(x, words)
    odd = b.and_(b.lshr(bits, _constant(words, 16)), _constant(words, 1))
    nearest = b.add(b.add(bits, _constant(words, 0x7FFF)), odd)
    number_or_nan = b.select(b.fcmp_unordered("uno", x, x), _constant(words, 0x7FC00000), nearest)
    return b.trunc(b.lshr(number_or_nan, _constant(words, 16)), halves)


# ---------------------------------------------------------------- vectors


class Vector(types.Type):
    """numba's type of a vector."""

    def __init__(self, element: Any, llvm: Any, lanes: int) -> None:
        super().__init__(name=f"{element}x{lanes}")
        self.element, self.llvm = element, ir.VectorType(llvm, lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.llvm)


_V32, _V64 = Vector(types.float32, _F32, LANES), Vector(types.float64, _F64, LANES64)
_VECTOR_OF = {types.float32: _V32, types.float64: _V64}
_A, _F = types.int64, types.float32  # address, number
_FLOATS, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, _I16))


def _vectors(*kinds: Any) -> bool:
    return all(isinstance(kind, Vector) for kind in kinds) and len(set(kinds)) == 1


def _call(b: Any, name: str, *arguments: Any) -> Any:
    """LLVM's function `name` from vectors of one type to such a vector."""
    vector = arguments[0].type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    name = f"{name}.v{vector.count}{_SUFFIX[vector.element]}"
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _spread(b: Any, number: Any, vector: Any = _FLOATS) -> Any:
    first = b.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, first, _constant(ir.VectorType(_I32, vector.count), 0))


def _lanes(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    """The lanes of x (0 ... 15) and y (16 ... 31) in `order`."""
    return b.shuffle_vector(x, y, ir.Constant(_WORDS, order))


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(b, "llvm.fmuladd", x, y, z)


@intrinsic
def spread(typingctx: Any, number: Any) -> Any:
    """`number`, a float32 or a float64, in all lanes of a vector of its type."""
    vector = _VECTOR_OF[number]
    return vector(number), _gives(lambda b, x: _spread(b, x, vector.llvm))


@intrinsic
def rounded(typingctx: Any, x: Any) -> Any:
    """The nearest whole numbers, ties to even."""
    return x(x), _gives(lambda b, x: _call(b, "llvm.rint", x))


@intrinsic
def power_of_two(typingctx: Any, x: Any) -> Any:
    """2^x, by writing the exponent's bits.

    x holds whole numbers, -126 ... 127 in float32 and -1022 ... 1023 in float64; others give
    anything at all.
    """

    def float32(b: Any, x: Any) -> Any:
        # adding 1.5 * 2^23 leaves the whole number in the lowest bits
        bits = b.bitcast(b.fadd(x, _constant(_FLOATS, 12582912.0)), _WORDS)
        return b.bitcast(b.shl(b.add(bits, _constant(_WORDS, 127)), _constant(_WORDS, 23)), _FLOATS)

    def float64(b: Any, x: Any) -> Any:
        longs = ir.VectorType(_I64, LANES64)
        exponent = b.add(b.fptosi(x, longs), _constant(longs, 1023))
        return b.bitcast(b.shl(exponent, _constant(longs, 52)), x.type)

    return x(x), _gives(float32 if x == _V32 else float64)


def _arithmetic(operation: Any, instruction: str) -> None:
    @intrinsic
    def apply(typingctx: Any, x: Any, y: Any) -> Any:
        # float64 sums are fused by the compiler, float32 ones where a kernel says `fused`
        flags = ("contract",) if x == _V64 else ()
        return x(x, x), _gives(lambda b, x, y: getattr(b, instruction)(x, y, flags=flags))

    @overload(operation)
    def typed(x, y):
        return (lambda x, y: apply(x, y)) if _vectors(x, y) else None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")


# ---------------------------------------------------------------- memory, by address


def _read(b: Any, address: Any, kind: Any = _FLOATS) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=2 if kind is _HALVES else 4)


def _write(b: Any, x: Any, address: Any) -> None:
    kind = x.type
    b.store(x, b.inttoptr(address, kind.as_pointer()), align=2 if kind == _HALVES else 4)


def _place(b: Any, address: Any, offset: int) -> Any:
    return b.add(address, ir.Constant(address.type, offset))


def _ask(b: Any, pointer: Any) -> None:
    """A prefetch of the cache line at a pointer to bytes."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    ask = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    read, all_caches, data = (ir.Constant(_I32, n) for n in (0, 3, 1))
    b.call(ask, [pointer, read, all_caches, data])


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """The sixteen float32 numbers at `address`."""
    return _V32(_A), _gives(_read)


@intrinsic
def store(typingctx: Any, address: Any, x: Any) -> Any:
    return types.void(_A, _V32), _gives(lambda b, address, x: _write(b, x, address))


@intrinsic
def load_bfloat16(typingctx: Any, address: Any) -> Any:
    """The sixteen bfloat16 numbers at `address`."""

    def emit(b: Any, address: Any) -> Any:
        bits = b.zext(_read(b, address, _HALVES), _WORDS)
        return b.bitcast(b.shl(bits, _constant(_WORDS, 16)), _FLOATS)

    return _V32(_A), _gives(emit)


@intrinsic
def store_bfloat16(typingctx: Any, address: Any, x: Any) -> Any:
    """Write the nearest bfloat16 numbers, ties to even; NaN stays NaN."""

    def emit(b: Any, address: Any, x: Any) -> None:
        _write(b, _bfloat16_bits(b, x, _WORDS, _HALVES), address)

    return types.void(_A, _V32), _gives(emit)


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, which may be anywhere: nothing is read."""

    def emit(b: Any, address: Any) -> None:
        _ask(b, b.inttoptr(address, _I8.as_pointer()))

    return types.void(_A), _gives(emit)


@intrinsic
def transpose(typingctx: Any, source: Any, step: Any, target: Any) -> Any:
    """Sixteen rows of sixteen numbers, `step` bytes apart at `source`, as columns at `target`."""

    def emit(b: Any, source: Any, step: Any, target: Any) -> None:
        heads = [b.add(source, b.mul(step, ir.Constant(step.type, i))) for i in range(LANES)]
        rows = [_read(b, head) for head in heads]
        size = LANES // 2
        while size:  # exchange the off-diagonal blocks of ever smaller squares
            upper = [LANES + (j ^ size) if j & size else j for j in range(LANES)]
            lower = [LANES + j if j & size else j | size for j in range(LANES)]
            for i in (i for i in range(LANES) if not i & size):
                top, bottom = rows[i], rows[i | size]
                rows[i] = _lanes(b, top, bottom, upper)
                rows[i | size] = _lanes(b, top, bottom, lower)
            size //= 2
        for i, row in enumerate(rows):
            _write(b, row, _place(b, target, i * BYTES))

    return types.void(_A, _A, _A), _gives(emit)


# ---------------------------------------------------------------- memory, by array and index


def _element(context: Any, b: Any, array: Any, value: Any, index: Any, kind: Any) -> Any:
    """The pointer to `array[index]`, to LLVM type `kind`."""
    data = cgutils.create_struct_proxy(array)(context, b, value=value).data
    return b.bitcast(b.gep(data, [index]), kind.as_pointer())


def _stored(array: Any) -> Any:
    """How LANES64 numbers of an array lie in memory; uint16 means bfloat16, as in `bfloat16s`."""
    elements = {types.float32: _F32, types.float64: _F64, types.uint16: _I16}
    return ir.VectorType(elements[array.dtype], LANES64)


def _mask(b: Any, count: Any) -> Any:
    """True in the first `count` lanes."""
    longs = ir.VectorType(_I64, LANES64)
    lanes = ir.Constant(longs, list(range(LANES64)))
    return b.icmp_signed("<", lanes, _spread(b, count, longs))


def _masked(b: Any, name: str, kind: Any, result: Any, arguments: list[Any]) -> Any:
    function = ir.FunctionType(result, [x.type for x in arguments])
    name = f"llvm.masked.{name}.v{LANES64}{_SUFFIX[kind.element]}.p0"
    return b.call(cgutils.get_or_insert_function(b.module, function, name), arguments)


def _widened(b: Any, x: Any) -> Any:
    """The lanes of an array as float64."""
    if x.type.element == _F64:
        return x
    if x.type.element == _I16:
        words, floats = ir.VectorType(_I32, LANES64), ir.VectorType(_F32, LANES64)
        x = b.bitcast(b.shl(b.zext(x, words), _constant(words, 16)), floats)
    return b.fpext(x, _V64.llvm)


def _narrowed(b: Any, x: Any, kind: Any) -> Any:
    """float64 lanes as an array of LLVM type `kind` stores them, to nearest, ties to even."""
    if kind.element == _F64:
        return x
    x = b.fptrunc(x, ir.VectorType(_F32, LANES64))
    if kind.element == _F32:
        return x
    return _bfloat16_bits(b, x, ir.VectorType(_I32, LANES64), kind)


@intrinsic
def load_at(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """`array[index : index + count]` as float64; count 1 ... LANES64, the lanes beyond are 0."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = _stored(array)
        pointer = _element(context, b, array, args[0], args[1], kind)
        align = ir.Constant(_I32, array.dtype.bitwidth // 8)
        arguments = [pointer, align, _mask(b, args[2]), ir.Constant(kind, None)]
        return _widened(b, _masked(b, "load", kind, kind, arguments))

    return _V64(array, types.int64, types.int64), codegen


@intrinsic
def store_at(typingctx: Any, array: Any, index: Any, count: Any, x: Any) -> Any:
    """`array[index : index + count] = x`, rounded once; count 1 ... LANES64."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = _stored(array)
        pointer = _element(context, b, array, args[0], args[1], kind)
        align = ir.Constant(_I32, array.dtype.bitwidth // 8)
        arguments = [_narrowed(b, args[3], kind), pointer, align, _mask(b, args[2])]
        _masked(b, "store", kind, ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, _V64), codegen


@intrinsic
def stream_at(typingctx: Any, array: Any, index: Any, x: Any) -> Any:
    """`array[index : index + LANES64] = x` past the cache.

    A plain store first reads the line that it will overwrite; for an output larger than the cache
    that is a third of all traffic. The address must be a multiple of 64 bytes, or of LANES64
    numbers where those are fewer.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = _stored(array)
        written = b.store(
            _narrowed(b, args[2], kind),
            _element(context, b, array, args[0], args[1], kind),
            align=min(64, LANES64 * array.dtype.bitwidth // 8),
        )
        written.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(array, types.int64, _V64), codegen


@intrinsic
def prefetch_at(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of `array[index]`; any index is allowed, nothing is read."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _ask(b, _element(context, b, array, args[0], args[1], _I8))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


# ---------------------------------------------------------------- float32 arithmetic


@intrinsic
def fused(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once where the CPU can."""
    return _V32(_V32, _V32, _V32), _gives(_fused)


@intrinsic
def larger(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger of x and y, lane by lane; y where one of them is NaN."""
    return _V32(_V32, _V32), _gives(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@intrinsic
def where_between(typingctx: Any, low: Any, x: Any, high: Any, inside: Any, outside: Any) -> Any:
    """`inside` in the lanes where low <= x <= high, else `outside`."""

    def emit(b: Any, low: Any, x: Any, high: Any, inside: Any, outside: Any) -> Any:
        between = b.and_(b.fcmp_ordered("<=", low, x), b.fcmp_ordered("<=", x, high))
        return b.select(between, inside, outside)

    return _V32(*[_V32] * 5), _gives(emit)


@intrinsic
def inverse(typingctx: Any, x: Any) -> Any:
    """1 / x."""
    return _V32(_V32), _gives(lambda b, x: b.fdiv(_constant(_FLOATS, 1.0), x))


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of the lanes, half onto half."""

    def emit(b: Any, x: Any) -> Any:
        half = LANES // 2
        while half:
            x = b.fadd(x, _lanes(b, x, x, [(i + half) % LANES for i in range(LANES)]))
            half //= 2
        return b.extract_element(x, ir.Constant(_I32, 0))

    return _F(_V32), _gives(emit)


@intrinsic
def rotated(typingctx: Any, x: Any, z: Any, backwards: Any) -> Any:
    """Eight complex numbers x times eight z, or times their conjugates; real parts in even lanes.

    (x0 + i x1)(c + i s) = (x0 c - x1 s) + i (x1 c + x0 s)
    """

    def emit(b: Any, x: Any, z: Any, backwards: Any) -> Any:
        cos = _lanes(b, z, z, [i & ~1 for i in range(LANES)])
        sin = _lanes(b, z, z, [i | 1 for i in range(LANES)])
        sin = b.fmul(sin, ir.Constant(_FLOATS, [-1.0, 1.0] * (LANES // 2)))
        sin = b.select(backwards, b.fneg(sin), sin)
        swapped = _lanes(b, x, x, [i ^ 1 for i in range(LANES)])
        return _fused(b, swapped, sin, b.fmul(x, cos))

    return _V32(_V32, _V32, types.boolean), _gives(emit)


_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)  # few bits: n times it is exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
_SMALLEST, _INFINITY = np.float32(-87), np.float32(np.inf)


@inner
def exponential(x):
    """e^x for x <= 0, within 2 units of the last place; 0 below e^-87.

    e^x = 2^n e^r with |r| <= log(2) / 2, where Taylor's series to r^7 is exact to float32.
    """
    n = rounded(x * spread(_LOG2_E))
    r = fused(n, spread(-_LN2_LOW), fused(n, spread(-_LN2_HIGH), x))
    y = spread(_TAYLOR[7])
    y = fused(y, r, spread(_TAYLOR[6]))
    y = fused(y, r, spread(_TAYLOR[5]))
    y = fused(y, r, spread(_TAYLOR[4]))
    y = fused(y, r, spread(_TAYLOR[3]))
    y = fused(y, r, spread(_TAYLOR[2]))
    y = fused(y, r, spread(ONE))
    y = fused(y, r, spread(ONE))
    y = y * power_of_two(n)
    # a NaN is between no two numbers, and stays
    return where_between(spread(-_INFINITY), x, spread(_SMALLEST), spread(ZERO), y)


# ---------------------------------------------------------------- rows of float32 vectors


def padded(size: int) -> int:
    """The next multiple of a vector's lanes."""
    return -(-size // LANES) * LANES


@inner
def vectors_of(size):
    """The vectors that hold `size` numbers."""
    return (size + LANES - 1) // LANES


@inner
def aligned(buffer):
    """The first address in an array at which a vector is aligned."""
    return (buffer.ctypes.data + BYTES - 1) // BYTES * BYTES


@inner
def clear(address, vectors):
    for i in range(vectors):
        store(address + i * BYTES, spread(ZERO))


@inner
def copy_vectors(source, target, vectors):
    for i in range(vectors):
        store(target + i * BYTES, load(source + i * BYTES))


@inner
def dot_vectors(x, y, vectors):
    sums = spread(ZERO)
    for i in range(vectors):
        sums = fused(load(x + i * BYTES), load(y + i * BYTES), sums)
    return total(sums)


@inner
def scale_row(target, source, scale, vectors):
    """target = scale * source."""
    for i in range(vectors):
        store(target + i * BYTES, load(source + i * BYTES) * spread(scale))


@inner
def add_row(target, scale, source, vectors):
    """target += scale * source."""
    for i in range(vectors):
        at = target + i * BYTES
        store(at, fused(spread(scale), load(source + i * BYTES), load(at)))


@inner
def prefetch_row(row, bfloat16, size):
    """Ask for a row of `size` numbers that is read soon."""
    for line in range(0, size * (2 if bfloat16 else 4), 64):
        prefetch(row + line)


@inner
def load_row(source, bfloat16, size, rotations, scale, target):
    """Bring a row of `size` numbers to `target` in float32, padded with zeros, rotated and scaled.

    rotations: the address of (cos, sin) for every pair of numbers, or 0. Returns a vector of zeros,
    or with a NaN where the row is not finite.
    """
    vectors = vectors_of(size)
    if size % LANES:
        clear(target, vectors)
        numbers = float32s(target, size)
        if bfloat16:
            bits = bfloat16s(source, size)
            for i in range(size):
                numbers[i] = widen(bits[i])
        else:
            numbers[:] = float32s(source, size)
        source, bfloat16 = target, False
    zero_or_nan = spread(ZERO)
    for i in range(vectors):
        x = load_bfloat16(source + i * BYTES // 2) if bfloat16 else load(source + i * BYTES)
        if rotations:
            x = rotated(x, load(rotations + i * BYTES), False)
        x = x * spread(scale)
        store(target + i * BYTES, x)
        zero_or_nan = fused(x, spread(ZERO), zero_or_nan)
    return zero_or_nan


@inner
def store_row(source, bfloat16, size, rotations, scale, target):
    """Write a row that `load_row` laid out to `target`, scaled, rotated back and rounded once."""
    final, narrowed = (source, False) if size % LANES else (target, bfloat16)
    for i in range(vectors_of(size)):
        x = load(source + i * BYTES) * spread(scale)
        if rotations:
            x = rotated(x, load(rotations + i * BYTES), True)
        if narrowed:
            store_bfloat16(final + i * BYTES // 2, x)
        else:
            store(final + i * BYTES, x)
    if size % LANES:
        numbers = float32s(source, size)
        if bfloat16:
            bits = bfloat16s(target, size)
            for i in range(size):
                bits[i] = narrow(numbers[i])
        else:
            float32s(target, size)[:] = numbers


# ---------------------------------------------------------------- the product


def product(
    rows: int, columns: int, *, fresh: bool = False, apart: bool = False, panels: bool = False
) -> Any:
    """A tile of a matrix product, as a function for kernels: for i < rows, j < 16 columns

        c[i, j] += sum over k < count of a[i, k] b[k, j]

    or = in place of += if `fresh`. Called with (c, c_row, a, a_row, a_step, b, b_step, count):
    addresses, and the bytes from one row, or one k, to the next. The sum runs in the order of k;
    from c on, or, if `apart`, from 0, and joins c at its end: a large c is then rounded only once.
    If `panels`, each sixteen columns are apart from the next; c_panel and b_panel, the bytes
    between them, then come last.

    The tile of sums stays in registers while its two operands stream by: a step loads rows +
    columns values for rows x columns multiply-adds.
    """

    def emit(
        b: Any,
        out: Any,
        out_row: Any,
        left: Any,
        left_row: Any,
        left_step: Any,
        right: Any,
        right_step: Any,
        count: Any,
        *apart_by: Any,
    ) -> None:
        def column(head: Any, j: int, which: int) -> Any:
            if not panels:
                return _place(b, head, j * BYTES)
            return row(head, apart_by[which], j)

        def row(head: Any, step: Any, i: int) -> Any:
            return b.add(head, b.mul(step, ir.Constant(step.type, i)))

        sums = {
            (i, j): cgutils.alloca_once(b, _FLOATS) for i in range(rows) for j in range(columns)
        }
        for (i, j), place in sums.items():
            target = column(row(out, out_row, i), j, 0)
            b.store(_constant(_FLOATS, 0.0) if fresh or apart else _read(b, target), place)
        with cgutils.for_range(b, count) as loop:
            along, down = b.mul(loop.index, left_step), b.mul(loop.index, right_step)
            line = [_read(b, column(b.add(right, down), j, 1)) for j in range(columns)]
            for i in range(rows):
                head = b.add(row(left, left_row, i), along)
                number = _spread(b, _read(b, head, _F32))
                for j in range(columns):
                    place = sums[i, j]
                    b.store(_fused(b, number, line[j], b.load(place)), place)
        for (i, j), place in sums.items():
            target, sum_ = column(row(out, out_row, i), j, 0), b.load(place)
            _write(b, b.fadd(_read(b, target), sum_) if apart else sum_, target)

    if panels:

        @intrinsic
        def tile_of_panels(
            typingctx: Any,
            c: Any,
            c_row: Any,
            a: Any,
            a_row: Any,
            a_step: Any,
            b: Any,
            b_step: Any,
            count: Any,
            c_panel: Any,
            b_panel: Any,
        ) -> Any:
            return types.void(*[_A] * 10), _gives(emit)

        return tile_of_panels

    @intrinsic
    def tile(
        typingctx: Any,
        c: Any,
        c_row: Any,
        a: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        count: Any,
    ) -> Any:
        return types.void(*[_A] * 8), _gives(emit)

    return tile
