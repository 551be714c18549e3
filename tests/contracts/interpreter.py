"""Triton's interpreter, for tests: kernels run on a CPU as they are written, operation by
operation.

Import this before any kernel, in a process of its own: the choice is made when a kernel is defined.
Three faults of the interpreter of Triton 3.6 are mended: it makes loop bounds by int(array), which
numpy >= 2.4 refuses for [1] arrays; it multiplies the bits of bfloat16 as if they were integers;
and it rounds to bfloat16 towards zero where a GPU rounds to nearest. And it goes five times as
fast: it would prepare the whole language anew in every call of a function by a kernel.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_tensor, _patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _with_bounds(tensor, scope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(x: TensorHandle) -> TensorHandle:
    """bfloat16, held as its bits, in float32."""
    bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _cast_rounded(self, x: TensorHandle, to) -> TensorHandle:
    if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    if x.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return _widened(x)
    return _cast(self, x, to)


def _dot_widened(self, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
    a, b = (_widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


def _prepare(fn):
    """Once a launch, for kernels and for Triton's own functions."""
    scope = _patch_language(fn)
    interpreter._patch_builtin(tl.core, interpreter.interpreter_builder, scope)
    interpreter._patch_lang_core(tl.core, scope)
    return scope


interpreter._patch_lang_tensor = _with_bounds
interpreter._patch_lang = _prepare
interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(
    *args, **options
)
InterpreterBuilder.cast_impl = _cast_rounded
InterpreterBuilder.create_dot = _dot_widened
InterpreterBuilder.create_fp_trunc = _cast_rounded
InterpreterBuilder.create_fp_ext = _cast_rounded
