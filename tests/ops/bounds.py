"""Every address that a Triton kernel loads from and stores to, checked against its tensors.

Kernels run in Triton's interpreter (TRITON_INTERPRET=1) on tensors of the meta device, which have
shapes and no memory, so sizes beyond 2^31 elements cost nothing. Each tensor gets addresses of its
own, far from all others, and offsets are computed as on a GPU: in int32 where the kernel does, so
one that overflows is outside too. Loads return zeros or what `contents` says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

APART = 44  # log2 of the bytes between the tensors' addresses


class Checked:
    """What was checked.

    Attributes:
        launches: how often each kernel was launched, by its name.
        accesses: loads and stores of tiles.
    """

    def __init__(self) -> None:
        self.launches: dict[str, int] = {}
        self.accesses = 0


def programs(count: int, most: int) -> list[int]:
    """Return the numbers of at most `most` of `count` programs: the last, the first, and others
    between them at equal distances."""
    return sorted({round(i) for i in np.linspace(count - 1, 0, min(count, most))})


@contextmanager
def checked(contents: Mapping[str, int] | None = None, most: int = 6) -> Iterator[Checked]:
    """Return a context in which kernels run on meta tensors, and an access outside is an error.

    Args:
        contents: what loads of an argument of this name return, where it is not zero: an index
            that a kernel reads should be the largest.
        most: programs of a launch that are run.

    Raises:
        AssertionError: an access outside; it names the kernel, the program and the argument.
    """
    done, builder = Checked(), interpreter.InterpreterBuilder
    names: list[str] = []
    sizes: list[int] = []  # bytes
    about: dict[str, Any] = {}

    def check(pointers: Any, mask: Any, verb: str) -> str:
        """The argument that the addresses belong to."""
        done.accesses += 1
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[live.astype(bool)].astype(np.int64)
        if not addresses.size:
            return ""
        number = int((addresses.reshape(-1)[0] + (1 << APART - 1)) >> APART)
        offset = addresses - (number << APART)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        low, high = int(offset.min()), int(offset.max()) + width
        name = names[number - 1]
        assert low >= 0, f"{about}: it {verb} {name} {-low} bytes before its start"
        assert high <= sizes[number - 1], (
            f"{about}: it {verb} {name} up to byte {high} of {sizes[number - 1]}"
        )
        return name

    def load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        value = (contents or {}).get(check(pointers, mask, "loads"), 0)
        found = np.full(pointers.data.shape, value, interpreter._get_np_dtype(kind))
        if other is not None:
            found = np.where(mask.data.astype(bool), found, other.data)
        return interpreter.TensorHandle(found, kind)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        check(pointers, mask, "stores to")

    def dot(self: Any, a: Any, b: Any, start: Any, *_: Any) -> Any:
        return interpreter.TensorHandle(start.data, start.dtype.scalar)

    def convert(argument: Any, name: str) -> Any:
        if not isinstance(argument, Tensor):
            return interpreter._implicit_cvt(argument)
        assert argument.is_meta, f"{name} is on {argument.device}"
        names.append(name)
        steps = zip(argument.shape, argument.stride(), strict=True)
        count = 1 + sum((size - 1) * stride for size, stride in steps) if argument.numel() else 0
        sizes.append(count * argument.element_size())
        kind = tl.str_to_ty(triton.runtime.jit.mangle_type(argument), None)
        base = np.array([len(names) << APART], dtype=np.uint64)
        return tl.tensor(interpreter.TensorHandle(base, kind), kind)

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        options = {name: x for name, x in options.items() if name in known}
        given = inspect.getcallargs(self.fn, *arguments, **options)
        names.clear()
        sizes.clear()
        name = self.fn.__name__
        done.launches[name] = done.launches.get(name, 0) + 1
        scope = interpreter._patch_lang(self.fn)
        try:
            call = {n: x if n in self.constexprs else convert(x, n) for n, x in given.items()}
            interpreter.interpreter_builder.set_grid_dim(self.grid[0], 1, 1)
            for program in programs(self.grid[0], most):
                about.update(kernel=name, program=program, of=self.grid[0])
                interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
                self.fn(**call)
        finally:
            scope.restore()

    replaced = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot}
    before = {name: getattr(builder, name) for name in replaced}
    execute = interpreter.GridExecutor.__call__
    for name, function in replaced.items():
        setattr(builder, name, function)
    interpreter.GridExecutor.__call__ = run
    try:
        yield done
    finally:
        interpreter.GridExecutor.__call__ = execute
        for name, function in before.items():
            setattr(builder, name, function)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
