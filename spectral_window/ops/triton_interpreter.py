"""Fixes for Triton's interpreter, which runs kernels on a CPU, operation by operation.

It is switched on by `TRITON_INTERPRET=1` before the first import of triton, and serves to test the
numbers of kernels at small sizes; nothing is compiled.

`repair` fixes three faults of the interpreter of Triton 3.6: it converts loop bounds by int(array),
which NumPy >= 2.4 refuses for arrays of one element; it multiplies the bits of bfloat16 as
integers; and it rounds to bfloat16 towards zero, where a GPU rounds to nearest. It also makes the
interpreter many times faster, by preparing the language once per launch instead of once per call
of a function inside a kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl


def repair() -> None:
    """Fix the interpreter, once; do nothing where kernels are compiled."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    if getattr(patch_tensor, "repaired", False):
        return
    patch_language, cast, dot = interpreter._patch_lang, builder.cast_impl, builder.create_dot

    def with_bounds(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def prepare(function: Any) -> Any:
        """Prepare kernels and Triton's own functions, once per launch."""
        scope = patch_language(function)
        interpreter._patch_builtin(tl.core, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(tl.core, scope)
        return scope

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        return self.rewrite()(*arguments, **options)

    def cast_rounded(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16)
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        if x.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return widened(x)
        return cast(self, x, to)

    def widened(x: Any) -> Any:
        """Return bfloat16, stored as its bits, in float32."""
        bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    with_bounds.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = with_bounds
    interpreter._patch_lang = prepare
    interpreter.InterpretedFunction.__call__ = call
    builder.cast_impl = builder.create_fp_trunc = builder.create_fp_ext = cast_rounded
    builder.create_dot = dot_widened
