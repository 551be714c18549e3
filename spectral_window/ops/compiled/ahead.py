"""Kernels compiled before anything is computed.

A kernel is compiled once, whatever it is called with: sizes and bfloat16 are fields of its record.
So the kernels of a large model are those of a small one with the same parts.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from llvmlite.binding import get_host_cpu_name
from numba.core import config

from spectral_window.errors import ResourceError
from spectral_window.ops import compiled
from spectral_window.ops.compiled.cache import Compiled
from spectral_window.ops.compiled.threads import KERNELS, Kernel


def processor() -> str:
    """Name the processor that code is compiled for, as LLVM calls it; another compiles its own."""
    return config.CPU_NAME or get_host_cpu_name()


def package_kernels() -> dict[str, Kernel]:
    """Import every file of this folder, and return its kernels by name."""
    for module in pkgutil.iter_modules(compiled.__path__):
        import_module(f"{compiled.__name__}.{module.name}")
    here = f"{compiled.__name__}."
    return {k: v for k, v in KERNELS.items() if v.function.__module__.startswith(here)}


def compile_all() -> None:
    """Compile every kernel, or load it where it is stored.

    Raises:
        ResourceError: the first kernel that cannot be stored.
    """
    for kernel in package_kernels().values():
        kernel.compile()
        compiled_kernels()


def compiled_kernels() -> dict[str, Compiled]:
    """Return the kernels that this process has compiled or loaded, by name.

    Raises:
        ResourceError: one is not stored, so the next process would compile it again.
    """
    done = {k: v.compiled for k, v in package_kernels().items() if v.compiled is not None}
    for name, each in done.items():
        if each.file is None:
            raise ResourceError(
                f"compiled code cannot be stored ({name}, warm-up): set NUMBA_CACHE_DIR to a "
                "folder with room that can be written, here and for every later command"
            )
    return done
