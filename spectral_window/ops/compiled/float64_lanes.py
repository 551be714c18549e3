"""Many float64 numbers at a time: what a compiled loop needs when the compiler must not guess.

A loop over arrays becomes vector instructions only after the compiler has proved, or tests at every
entry, that no array overlaps another. With a dozen short rows those tests cost more than the loop.
So a kernel may hold `Lanes`, a value of LANES float64 numbers, and say itself what is read and
written when:

    x = load(u, i, LANES)          # u[i] ... u[i + LANES - 1], from float32, float64 or bfloat16
    r = a * r - b * x              # + - * become fused multiply-adds
    store(y, i, LANES, r)          # rounded once to y's dtype

`load` and `store` take the number of lanes that exist, so a width that is no multiple of LANES ends
in a partial vector: nothing outside is read or written, the missing lanes are 0. LLVM turns them
into whatever the CPU has: registers of eight float64 numbers (AVX-512), four (AVX2) or two (NEON).

`prefetch` and `stream` are about memory: the first asks for a cache line early, the second writes
past the cache. A plain store first reads the line that it will overwrite; for an output larger than
the cache that is a third of all traffic.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16 if get_host_cpu_features().get("avx512f") else 8  # what registers hold nine times
_i16, _i32, _i64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_SHORTS, _INTS, _LONGS = (ir.VectorType(t, LANES) for t in (_i16, _i32, _i64))


class Lanes(types.Type):
    """The numba type of LANES float64 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _DOUBLES)


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _declared(builder: Any, name: str, result: Any, arguments: list) -> ir.Function:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _at(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    """The address of `array[index]`."""
    data = cgutils.create_struct_proxy(array)(context, builder, value=value).data
    return builder.gep(data, [index])


def _stored(array: Any) -> ir.VectorType:
    """How LANES numbers of an array lie in memory; uint16 means bfloat16, as in `bfloat16s`."""
    return {types.float32: _FLOATS, types.float64: _DOUBLES, types.uint16: _SHORTS}[array.dtype]


def _mask(builder: Any, count: Any) -> Any:
    spread = builder.insert_element(ir.Constant(_LONGS, ir.Undefined), count, ir.Constant(_i32, 0))
    spread = builder.shuffle_vector(spread, spread, _all(_INTS, 0))
    return builder.icmp_signed("<", ir.Constant(_LONGS, list(range(LANES))), spread)


@intrinsic
def load(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """Lanes of `array[index : index + count]`; count 1 ... LANES, the lanes beyond are 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(array)
        address = builder.bitcast(
            _at(context, builder, array, args[0], args[1]), pointer := kind.as_pointer()
        )
        mask = _mask(builder, args[2])
        name = f"llvm.masked.load.v{LANES}{_suffix(kind)}.p0"
        read = _declared(builder, name, kind, [pointer, _i32, mask.type, kind])
        align = ir.Constant(_i32, array.dtype.bitwidth // 8)
        x = builder.call(read, [address, align, mask, ir.Constant(kind, None)])
        if kind is _DOUBLES:
            return x
        if kind is _SHORTS:
            x = builder.bitcast(builder.shl(builder.zext(x, _INTS), _all(_INTS, 16)), _FLOATS)
        return builder.fpext(x, _DOUBLES)

    return lanes(array, types.int64, types.int64), codegen


def _rounded(builder: Any, x: Any, kind: ir.VectorType) -> Any:
    """Lanes in the dtype of an array, to nearest, ties to even."""
    if kind is _DOUBLES:
        return x
    x = builder.fptrunc(x, _FLOATS)
    if kind is _FLOATS:
        return x
    # By integers, and not by LLVM's fptrunc to bfloat: without AVX-512 BF16 that is a call of a
    # function that no library here has (the process aborts), with it small numbers become 0.
    bits = builder.bitcast(x, _INTS)
    odd = builder.and_(builder.lshr(bits, _all(_INTS, 16)), _all(_INTS, 1))
    rounded = builder.add(builder.add(bits, _all(_INTS, 0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", x, x)
    bits = builder.select(nan, _all(_INTS, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(bits, _all(_INTS, 16)), _SHORTS)


@intrinsic
def store(typingctx: Any, array: Any, index: Any, count: Any, x: Any) -> Any:
    """`array[index : index + count] = x`, rounded once; count 1 ... LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(array)
        address = builder.bitcast(
            _at(context, builder, array, args[0], args[1]), pointer := kind.as_pointer()
        )
        mask = _mask(builder, args[2])
        name = f"llvm.masked.store.v{LANES}{_suffix(kind)}.p0"
        write = _declared(builder, name, ir.VoidType(), [kind, pointer, _i32, mask.type])
        align = ir.Constant(_i32, array.dtype.bitwidth // 8)
        builder.call(write, [_rounded(builder, args[3], kind), address, align, mask])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, lanes), codegen


@intrinsic
def stream(typingctx: Any, array: Any, index: Any, x: Any) -> Any:
    """`array[index : index + LANES] = x` past the cache. The address must be a multiple of 64
    bytes, or of LANES numbers where those are fewer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(array)
        address = _at(context, builder, array, args[0], args[1])
        written = builder.store(
            _rounded(builder, args[2], kind),
            builder.bitcast(address, kind.as_pointer()),
            align=min(64, LANES * array.dtype.bitwidth // 8),
        )
        once = builder.module.add_metadata([ir.Constant(_i32, 1)])
        written.set_metadata("nontemporal", once)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of `array[index]`; any index is allowed, nothing is read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _at(context, builder, array, args[0], args[1])
        byte = ir.IntType(8).as_pointer()
        ask = _declared(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, _i32, _i32, _i32])
        reading, keep, data = (ir.Constant(_i32, n) for n in (0, 3, 1))
        builder.call(ask, [builder.bitcast(address, byte), reading, keep, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def spread(typingctx: Any, number: Any) -> Any:
    """The same float64 in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.insert_element(
            ir.Constant(_DOUBLES, ir.Undefined), args[0], ir.Constant(_i32, 0)
        )
        return builder.shuffle_vector(first, first, _all(_INTS, 0))

    return lanes(types.float64), codegen


@intrinsic
def nearest(typingctx: Any, x: Any) -> Any:
    """The nearest integers, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(
            _declared(builder, f"llvm.rint.v{LANES}f64", _DOUBLES, [_DOUBLES]), args
        )

    return lanes(lanes), codegen


@intrinsic
def power_of_two(typingctx: Any, n: Any) -> Any:
    """2^n for integers -1022 ... 1023, by writing the exponent's bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponent = builder.add(builder.fptosi(args[0], _LONGS), _all(_LONGS, 1023))
        return builder.bitcast(builder.shl(exponent, _all(_LONGS, 52)), _DOUBLES)

    return lanes(lanes), codegen


def _suffix(kind: ir.VectorType) -> str:
    return {ir.DoubleType(): "f64", ir.FloatType(): "f32", _i16: "i16"}[kind.element]


def _arithmetic(operation: Any, instruction: str) -> None:
    @intrinsic
    def apply(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args, flags=("contract",))

        return lanes(lanes, lanes), codegen

    @overload(operation)
    def typed(a, b):
        if isinstance(a, Lanes) and isinstance(b, Lanes):
            return lambda a, b: apply(a, b)
        return None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
