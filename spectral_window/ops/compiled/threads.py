"""Kernels: how a loop is compiled, given its arguments, and shared among torch's threads.

A kernel is a function of one record. The record has named fields, and is declared as a NamedTuple:

    class Doubled(NamedTuple):
        size: int            # numbers of a tile
        x: Address           # float32 [tiles, size]

Beside it stands a function that makes the record of what a caller passes. There a tensor becomes an
address, only by the checks of `addresses`:

    def doubled(tiles, size, x):
        return Doubled(size, address(x, FLOAT32, tiles * size))

    @kernel(Doubled, doubled)
    def double(args):
        tile = claim_tile(args)
        while tile >= 0:
            x = float32s(args.x + 4 * tile * args.size, args.size)
            ...
            tile = claim_tile(args)

    double(tiles, size, x)

The work is cut into tiles. Threads claim them one by one, so the last to finish is never far
behind.

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
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spectral_window.errors import UserError
from spectral_window.ops.compiled.cache import Compiled, compile_function

_CODES = {int: "q", bool: "?", float: "f"}  # as `struct` and numpy name them


class Record:
    """How a kernel's arguments lie in memory: the next tile, the number of tiles, then the fields
    of a NamedTuple, aligned as in C.

    A field is int or Address (int64), float (float32) or bool; or Annotated[bytes, NamedTuple,
    count], a table whose missing entries are zeros.
    """

    def __init__(self, fields: type) -> None:
        columns: list[Any] = [("next_tile", "q"), ("tiles", "q")]
        layout = "@qq"
        for name, hint in get_type_hints(fields, include_extras=True).items():
            if get_origin(hint) is Annotated:
                _, entry, count = get_args(hint)
                dtype = np.dtype([(part, "q") for part in entry._fields])
                columns.append((name, dtype, (count,)))
                layout += f"0q{dtype.itemsize * count}s"
            else:
                columns.append((name, _CODES[hint]))
                layout += _CODES[hint]
        self.dtype = np.dtype(columns, align=True)
        packed = struct.Struct(layout + "0q")
        assert packed.size == self.dtype.itemsize
        self.memory: Any = ctypes.c_int64 * (packed.size // 8)  # the first is the next tile
        self.pack_into = packed.pack_into


class Kernel:
    """`function(args)`, compiled at its first call, and called on torch's threads."""

    def __init__(
        self, function: Callable[[Any], None], fields: type, check: Callable[..., Any]
    ) -> None:
        self.function, self.check, self.record = function, check, Record(fields)
        self._memory, self._pack_into = self.record.memory, self.record.pack_into
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._lock = threading.Lock()
        self.compiled: Compiled | None = None  # keeps numba's function alive
        self._alone: Any = None  # the same for the calling thread, without the interpreter's lock

    def __call__(self, tiles: int, *arguments: Any) -> None:
        """Run tiles 0 ... `tiles` - 1. Tensors stay alive by the caller's reference.

        Raises TypeError or ValueError for arguments that are not as declared, before any work.
        """
        if tiles <= 0:
            return
        args = self._memory()
        self._pack_into(args, 0, 0, tiles, *self.check(tiles, *arguments))
        compiled = self.compiled or self.compile()
        address = ctypes.addressof(args)
        threads = min(torch.get_num_threads(), tiles)
        if threads == 1:
            self._alone(address)
        elif (team := _team()) is not None:
            team(compiled.code.address, address, threads, 0)
        else:
            pool = _pool(torch.get_num_threads())
            others = [pool.submit(self._alone, address) for _ in range(threads - 1)]
            self._alone(address)
            for other in others:
                other.result()
        # every thread that ends well has asked for one tile too many; an error inside (out of
        # memory) cannot leave compiled code, it is only printed
        if args[0] <= tiles:
            raise RuntimeError(f"{self.function.__name__} failed (compiled code): see above")

    def compile(self) -> Compiled:
        """Compile the function, or load it from the cache; once, whatever it is called with."""
        with self._lock:
            if self.compiled is None:
                signature = types.void(numba.from_dtype(self.record.dtype))
                compiled = compile_function(self.function, signature)
                self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.code.address)
                self.compiled = compiled
            return self.compiled


KERNELS: dict[str, Kernel] = {}  # all that were declared, by name


def kernel(fields: type, check: Callable[..., Any]) -> Callable[[Callable[[Any], None]], Kernel]:
    """Decorator: make a kernel of a function of one record.

    fields: a NamedTuple, the record's fields. check: check(tiles, *arguments) makes one of what a
    caller passes; it takes addresses of tensors from `addresses` alone.
    """

    def declare(function: Callable[[Any], None]) -> Kernel:
        declared = Kernel(function, fields, check)
        KERNELS[declared.name] = declared
        return declared

    return declare


def expect_tiles(tiles: int, expected: int) -> None:
    """Raise UserError for another number of tiles than a kernel's loop expects."""
    if tiles != expected:
        raise UserError(f"{tiles} tiles (compiled code): expected {expected}")


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


@intrinsic
def claim_tile(typingctx: Any, args: Any) -> Any:
    """Inside a kernel: the next tile that no thread has claimed, or -1."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        head = builder.bitcast(values[0], word.as_pointer())
        tile = builder.atomic_rmw("add", head, ir.Constant(word, 1), "monotonic")
        tiles = builder.load(builder.gep(head, [ir.Constant(word, 1)]))
        left = builder.icmp_signed("<", tile, tiles)
        return builder.select(left, tile, ir.Constant(word, -1))

    return types.int64(args), codegen
