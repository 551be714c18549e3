"""Compiled loops on torch's own threads: what every numba kernel of this package stands on.

A kernel is a function of one job: a row of 64-bit words that holds the addresses and sizes it works
with. Threads take the job's parts one by one, so the last to finish is never far behind. Beside it
stands what its arguments are: a function that turns them into words, in which a tensor becomes an
address only by the checks of `addresses`:

    def words(parts, count, x):
        return count, address(x, FLOAT32, parts * count)

    @kernel(words)
    def double(job):                     # words: 0 next part, 1 parts, then those of `words`
        part = take(job)
        while part >= 0:
            x = float32s(job[3] + 4 * part * job[2], job[2])
            ...
            part = take(job)

    double(parts, count, x)

Why not numba's own threads? torch runs its operators on a team of OpenMP threads that go on
spinning for a while after each of them. A second pool has to fight them for the cores: with two
threads on two cores, short kernels take up to ten times as long. `GOMP_parallel`, the entry to that
team, is an exported function of the OpenMP library that torch has loaded, so a kernel becomes one
more of torch's own parallel regions (3 microseconds to enter and leave). Where the library is
another one (macOS, Windows), Python threads call the same kernel; it runs without the interpreter's
lock either way.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spectral_window.ops.compiled.cache import compile_function

MOST_WORDS = 64
_Job = ctypes.c_int64 * MOST_WORDS


class Kernel:
    """`function(job)`, compiled at its first call, and called on torch's threads (see `kernel`)."""

    def __init__(
        self, function: Callable[[Any], None], words: Callable[..., tuple[int, ...]]
    ) -> None:
        self.function, self.words = function, words
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._lock = threading.Lock()
        self._compiled: Any = None  # numba's function, kept alive here
        self._alone: Any = None  # the same for the calling thread, without the interpreter's lock

    def __call__(self, parts: int, *arguments: Any) -> None:
        """Run parts 0 ... `parts` - 1. Tensors stay alive by the caller's reference.

        Raises TypeError or ValueError for arguments that are not as declared, before any work.
        """
        if parts <= 0:
            return
        job = _Job(0, parts, *self.words(parts, *arguments))
        if self._compiled is None:
            self._compile()
        address = ctypes.addressof(job)
        threads = min(torch.get_num_threads(), parts)
        if threads == 1:
            self._alone(address)
        elif (team := _team()) is not None:
            team(self._compiled.address, address, threads, 0)
        else:
            pool = _pool(torch.get_num_threads())
            others = [pool.submit(self._alone, address) for _ in range(threads - 1)]
            self._alone(address)
            for other in others:
                other.result()
        # every thread that ends well has asked for one part too many; an error inside (out of
        # memory) cannot leave compiled code, it is only printed
        if job[0] <= parts:
            raise RuntimeError(f"{self.function.__name__} failed (compiled code): see above")

    def _compile(self) -> None:
        with self._lock:
            if self._compiled is None:
                compiled = compile_function(self.function, _SIGNATURE)
                self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
                self._compiled = compiled


KERNELS: dict[str, Kernel] = {}  # all that were declared, by name


def kernel(words: Callable[..., tuple[int, ...]]) -> Callable[[Callable[[Any], None]], Kernel]:
    """Decorator: make a kernel of a function of one job. `words(parts, *arguments)` gives the words
    of the job after the first two and says so what the arguments are: it takes addresses of tensors
    from `addresses` alone."""

    def declare(function: Callable[[Any], None]) -> Kernel:
        declared = Kernel(function, words)
        KERNELS[declared.name] = declared
        return declared

    return declare


_SIGNATURE = types.void(types.CPointer(types.int64))


@cache
def _team() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP library that torch runs on, or None."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        enter = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if enter is not None:
            enter.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            enter.restype = None
            return enter
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="spectral-window")


# ---------------------------------------------------------------- inside a kernel

# Fused multiply-adds, but NaN and infinity keep their meaning.
inner = numba.njit(fastmath={"contract"}, error_model="numpy")
# Sums may be reordered too: needed for a loop that adds up to become vector instructions.
summing = numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")


@intrinsic
def take(typingctx: Any, job: Any) -> Any:
    """The next part of the job that no thread has taken, or -1."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        part = builder.atomic_rmw("add", args[0], ir.Constant(word, 1), "monotonic")
        parts = builder.load(builder.gep(args[0], [ir.Constant(word, 1)]))
        left = builder.icmp_signed("<", part, parts)
        return builder.select(left, part, ir.Constant(word, -1))

    return types.int64(job), codegen


def _array_at(dtype: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        kind = types.CPointer(dtype)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return pointer


_float32, _float64 = _array_at(types.float32), _array_at(types.float64)
_int64, _int32, _uint16 = _array_at(types.int64), _array_at(types.int32), _array_at(types.uint16)


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


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 of 32 bits, given as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def widen(typingctx: Any, bits: Any) -> Any:
    """A bfloat16, given as its 16 bits, as the float32 of the same value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(
            builder.shl(builder.zext(args[0], word), ir.Constant(word, 16)), ir.FloatType()
        )

    return types.float32(types.uint16), codegen


@intrinsic
def narrow(typingctx: Any, number: Any) -> Any:
    """The 16 bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        kept = builder.select(nan, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(word, 16)), half)

    return types.uint16(types.float32), codegen


@intrinsic
def lower(typingctx: Any, pair: Any) -> Any:
    """The first of two neighbouring bfloat16 numbers, given as one int32, as a float32. (Widening
    pairs takes half the instructions of widening one by one.)"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(args[0], ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def upper(typingctx: Any, pair: Any) -> Any:
    """The second of two neighbouring bfloat16 numbers, given as one int32, as a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.and_(args[0], ir.Constant(ir.IntType(32), -65536))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), codegen
