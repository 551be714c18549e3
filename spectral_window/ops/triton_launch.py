"""Launches of Triton kernels: on the device of their tensors, from one thread at a time, compiled
by an assembler that is right where one is installed.

Triton (up to 3.7) makes a compiled kernel visible to other threads before its code is loaded on the
device, so a second thread that launches it meanwhile fails (its pull request 11518); and its
interpreter changes the language for all threads. The lock is held while kernels are compiled and
launched, never while they run.

The assembler (ptxas) of CUDA 12.8, which Triton 3.6 brings, compiles some of the memory's kernels
wrongly for Hopper: a matrix product finds an operand at an address that is computed from registers
in which nothing was written. Which kernels depends on sizes and options by no rule that we know.
That of CUDA 13.5 compiles these rightly, and is used where it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

HOPPER = 9  # the first number of its compute capability
SOUND = 13  # the first number of the CUDA from which on Triton's own assembler is used
CHOSEN = "TRITON_PTXAS_PATH"  # the variable by which Triton is told of another
_LAUNCHES = RLock()


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """Return a context for launches: x's device is the current one, other threads wait."""
    with _LAUNCHES, torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        sound(x.device)
        yield


@torch.compiler.assume_constant_result
def sound(device: torch.device) -> bool:
    """Return whether no kernel for a device was found wrong by its assembler, after choosing the
    assembler; recorded graphs hold the answer."""
    return _sound(device)


@cache
def _sound(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return True
    choose_assembler()
    from triton import knobs

    return first_number(knobs.nvidia.ptxas.version) >= SOUND


def choose_assembler() -> None:
    """Set TRITON_PTXAS_PATH to a newer assembler where it is unset and there is one: that of the
    package nvidia-cuda-nvcc (`pip install spectral-window[gpu]`)."""
    from triton import knobs

    found = newer_assembler(os.environ.get(CHOSEN), knobs.nvidia.ptxas.version, installed())
    if found is not None:
        os.environ[CHOSEN] = str(found)


def newer_assembler(chosen: str | None, own: str, others: Iterable[Path]) -> Path | None:
    """Return the assembler to use instead of Triton's own, or None to leave it.

    Args:
        chosen: a path that the user has chosen; it is left.
        own: the CUDA version of Triton's own, as in "12.8".
        others: those of CUDA 13.
    """
    if chosen or first_number(own) >= SOUND:
        return None
    return next(iter(others), None)


def first_number(version: str) -> int:
    """Return 12 for "12.8"."""
    return int(version.split(".")[0])


def installed() -> list[Path]:
    """Return the assemblers of CUDA 13 that are installed as Python packages."""
    package = find_spec("nvidia")
    folders = (package and package.submodule_search_locations) or ()
    places = (Path(folder) / "cu13" / "bin" / "ptxas" for folder in folders)
    return [place for place in places if os.access(place, os.X_OK)]
