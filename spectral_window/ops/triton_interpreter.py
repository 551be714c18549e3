"""Triton's interpreter, which runs kernels on a CPU: `TRITON_INTERPRET=1`, set before the first
import of triton. It proves numbers at toy sizes; nothing is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl


def repair() -> None:
    """Mend two faults of the interpreter of triton 3.6; does nothing where kernels are compiled.

    A loop to a bound that is computed asks NumPy for int() of an array of one element, which NumPy
    refuses since 2.4. And every call of a device function replaces all of triton.language again:
    100 times the work of the function. Once a launch is enough.
    """
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor
    if getattr(before, "repaired", False):
        return

    def patch(tensor, scope) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(function, *args, **kwargs):
        languages = [x for x in function.fn.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(language.arange) for language in languages):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    patch.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch
    interpreter.InterpretedFunction.__call__ = call
