"""Sixteen float32 numbers as one value, and the small matrix product made of them: for kernels
whose speed hangs on what stays in registers.

A plain loop becomes vector instructions by itself, but it reads and writes its sums in memory at
every pass. A product runs at the speed of the arithmetic units only if a tile of sums stays in
registers while its two operands stream by: a step then loads rows + columns values for rows x
columns multiply-adds. `product` builds such a tile.

    x = load(address)                           # addresses are in bytes and need no alignment
    store(address, fused(x, spread(two), x))    # 2 x + x, rounded once

Vectors add, subtract and multiply by +, - and *. They live in kernels only, never in Python. For a
CPU with narrower vectors the compiler splits them. (`float64_lanes` has eight float64 numbers, for
loops along rows of an array.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
BYTES = 4 * LANES  # of a vector in memory

_WORD, _HALF, _FLOAT = ir.IntType(32), ir.IntType(16), ir.FloatType()
_WORDS, _HALVES, _FLOATS = (ir.VectorType(kind, LANES) for kind in (_WORD, _HALF, _FLOAT))


class Vector(types.Type):
    """numba's type of sixteen float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


_V, _A, _F = Vector(), types.int64, types.float32  # vector, address, number


# ---------------------------------------------------------------- LLVM's instructions


def _read(b: Any, address: Any, kind: Any = _FLOATS) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=2 if kind is _HALVES else 4)


def _write(b: Any, x: Any, address: Any) -> None:
    kind = x.type
    b.store(x, b.inttoptr(address, kind.as_pointer()), align=2 if kind == _HALVES else 4)


def _place(b: Any, address: Any, offset: int) -> Any:
    return b.add(address, ir.Constant(address.type, offset))


def _all(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)


def _spread(b: Any, number: Any) -> Any:
    one = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(_WORD, 0))
    return b.shuffle_vector(one, one, _all(0))


def _lanes(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    """The lanes of x (0 ... 15) and y (16 ... 31) in `order`."""
    return b.shuffle_vector(x, y, ir.Constant(_WORDS, order))


def _call(b: Any, name: str, *arguments: Any) -> Any:
    """LLVM's function `name` from vectors to a vector."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(arguments))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"{name}.v{LANES}f32"), arguments)


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(b, "llvm.fmuladd", x, y, z)


def _gives(emit: Callable[..., Any]) -> Callable[..., Any]:
    """numba's code generator from emit(builder, *arguments) -> result or None."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = emit(builder, *arguments)
        return context.get_dummy_value() if result is None else result

    return codegen


# ---------------------------------------------------------------- memory


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """The sixteen float32 numbers at `address`."""
    return _V(_A), _gives(_read)


@intrinsic
def store(typingctx: Any, address: Any, x: Any) -> Any:
    return types.void(_A, _V), _gives(lambda b, address, x: _write(b, x, address))


@intrinsic
def load_bfloat16(typingctx: Any, address: Any) -> Any:
    """The sixteen bfloat16 numbers at `address`."""

    def emit(b: Any, address: Any) -> Any:
        bits = b.zext(_read(b, address, _HALVES), _WORDS)
        return b.bitcast(b.shl(bits, _all(16)), _FLOATS)

    return _V(_A), _gives(emit)


@intrinsic
def store_bfloat16(typingctx: Any, address: Any, x: Any) -> Any:
    """Write the nearest bfloat16 numbers, ties to even; NaN stays NaN."""

    def emit(b: Any, address: Any, x: Any) -> None:
        bits = b.bitcast(x, _WORDS)
        odd = b.and_(b.lshr(bits, _all(16)), _all(1))
        rounded = b.add(b.add(bits, _all(0x7FFF)), odd)
        kept = b.select(b.fcmp_unordered("uno", x, x), _all(0x7FC00000), rounded)
        _write(b, b.trunc(b.lshr(kept, _all(16)), _HALVES), address)

    return types.void(_A, _V), _gives(emit)


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, which may be anywhere: nothing is read."""

    def emit(b: Any, address: Any) -> None:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        ask = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        reading, keep, data = (ir.Constant(_WORD, n) for n in (0, 3, 1))
        b.call(ask, [b.inttoptr(address, byte), reading, keep, data])

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


# ---------------------------------------------------------------- arithmetic


@intrinsic
def spread(typingctx: Any, number: Any) -> Any:
    """A vector of sixteen times `number`."""
    return _V(_F), _gives(_spread)


@intrinsic
def fused(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once where the CPU can."""
    return _V(_V, _V, _V), _gives(_fused)


@intrinsic
def larger(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger of x and y, lane by lane; y where one of them is NaN."""
    return _V(_V, _V), _gives(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@intrinsic
def where_between(typingctx: Any, low: Any, x: Any, high: Any, inside: Any, outside: Any) -> Any:
    """`inside` in the lanes where low <= x <= high, else `outside`."""

    def emit(b: Any, low: Any, x: Any, high: Any, inside: Any, outside: Any) -> Any:
        between = b.and_(b.fcmp_ordered("<=", low, x), b.fcmp_ordered("<=", x, high))
        return b.select(between, inside, outside)

    return _V(_V, _V, _V, _V, _V), _gives(emit)


@intrinsic
def rounded(typingctx: Any, x: Any) -> Any:
    """The nearest whole numbers."""
    return _V(_V), _gives(lambda b, x: _call(b, "llvm.rint", x))


@intrinsic
def power_of_two(typingctx: Any, x: Any) -> Any:
    """2^x of whole numbers -126 <= x <= 127; anything at all outside."""

    def emit(b: Any, x: Any) -> Any:
        # adding 1.5 * 2^23 leaves the whole number in the lowest bits
        bits = b.bitcast(b.fadd(x, ir.Constant(_FLOATS, [12582912.0] * LANES)), _WORDS)
        return b.bitcast(b.shl(b.add(bits, _all(127)), _all(23)), _FLOATS)

    return _V(_V), _gives(emit)


@intrinsic
def inverse(typingctx: Any, x: Any) -> Any:
    """1 / x."""
    return _V(_V), _gives(lambda b, x: b.fdiv(ir.Constant(_FLOATS, [1.0] * LANES), x))


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of the lanes, half onto half."""

    def emit(b: Any, x: Any) -> Any:
        half = LANES // 2
        while half:
            x = b.fadd(x, _lanes(b, x, x, [(i + half) % LANES for i in range(LANES)]))
            half //= 2
        return b.extract_element(x, ir.Constant(_WORD, 0))

    return _F(_V), _gives(emit)


@intrinsic
def turned(typingctx: Any, x: Any, z: Any, backwards: Any) -> Any:
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

    return _V(_V, _V, types.boolean), _gives(emit)


@intrinsic
def _plus(typingctx: Any, x: Any, y: Any) -> Any:
    return _V(_V, _V), _gives(lambda b, x, y: b.fadd(x, y))


@intrinsic
def _minus(typingctx: Any, x: Any, y: Any) -> Any:
    return _V(_V, _V), _gives(lambda b, x, y: b.fsub(x, y))


@intrinsic
def _times(typingctx: Any, x: Any, y: Any) -> Any:
    return _V(_V, _V), _gives(lambda b, x, y: b.fmul(x, y))


def _vectors(*kinds: Any) -> bool:
    return all(isinstance(kind, Vector) for kind in kinds)


@overload(operator.add)
def _add(x, y):
    return (lambda x, y: _plus(x, y)) if _vectors(x, y) else None


@overload(operator.sub)
def _subtract(x, y):
    return (lambda x, y: _minus(x, y)) if _vectors(x, y) else None


@overload(operator.mul)
def _multiply(x, y):
    return (lambda x, y: _times(x, y)) if _vectors(x, y) else None


# ---------------------------------------------------------------- the product


def product(rows: int, columns: int, *, fresh: bool = False, apart: bool = False) -> Any:
    """A tile of a matrix product, as a function for kernels: for i < rows, j < 16 columns

        c[i, j] += sum over k < count of a[i, k] b[k, j]

    or = in place of += if `fresh`. Called with (c, c_row, a, a_row, a_step, b, b_step, count):
    addresses, and the bytes from one row, or one k, to the next. The sum runs in the order of k;
    from c on, or, if `apart`, from 0, and joins c at its end: a large c is then rounded only once.
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
    ) -> None:
        def row(head: Any, step: Any, i: int) -> Any:
            return b.add(head, b.mul(step, ir.Constant(step.type, i)))

        sums = {
            (i, j): cgutils.alloca_once(b, _FLOATS) for i in range(rows) for j in range(columns)
        }
        for (i, j), place in sums.items():
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            target = _place(b, row(out, out_row, i), j * BYTES)
            b.store(zero if fresh or apart else _read(b, target), place)
        with cgutils.for_range(b, count) as loop:
            along, down = b.mul(loop.index, left_step), b.mul(loop.index, right_step)
            line = [_read(b, _place(b, b.add(right, down), j * BYTES)) for j in range(columns)]
            for i in range(rows):
                head = b.add(row(left, left_row, i), along)
                number = _spread(b, _read(b, head, _FLOAT))
                for j in range(columns):
                    place = sums[i, j]
                    b.store(_fused(b, number, line[j], b.load(place)), place)
        for (i, j), place in sums.items():
            target, found = _place(b, row(out, out_row, i), j * BYTES), b.load(place)
            _write(b, b.fadd(_read(b, target), found) if apart else found, target)

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
