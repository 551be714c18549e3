"""Errors that a user can act on: one line, what (where): what to do.

All are `SpectralWindowError`s and stand beside one another, each with the exit code that the
command line returns for it: what to do about an error follows from its class alone. What Python
users expect for bad arguments is kept: a `UserError` is a `ValueError`, and a `UserTypeError` a
`TypeError` too. Any other exception is a bug of ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class SpectralWindowError(Exception):
    """What all errors of this package have in common; raised are its kinds. Itself it stands for a
    failure of unknown kind in another process (exit code 1)."""

    exit_code = 1


class UserError(SpectralWindowError, ValueError):
    """Bad usage or bad input (exit code 2)."""

    exit_code = 2


class UserTypeError(UserError, TypeError):
    """Bad input, of a type or dtype that cannot be taken (exit code 2)."""


class IntegrityError(SpectralWindowError, ValueError):
    """A file is missing, corrupt or belongs to something else (exit code 3). A ValueError, as
    other libraries' errors for a damaged file are."""

    exit_code = 3


class DivergedError(SpectralWindowError, ArithmeticError):
    """Numbers that are not finite, so nothing computed from them means anything (exit code 4)."""

    exit_code = 4


class NotFiniteError(DivergedError, ValueError):
    """An operator was given parameters or inputs that are not finite (exit code 4). A ValueError,
    as it is for any other argument an operator cannot take."""


class ResourceError(SpectralWindowError):
    """Disk, memory or device ran out (exit code 5)."""

    exit_code = 5


class NetworkError(SpectralWindowError):
    """A remote source did not answer (exit code 6)."""

    exit_code = 6


class FaultFound(SpectralWindowError):
    """The doctor found a fault in a model (exit code 7)."""

    exit_code = 7


KINDS = (
    UserError,
    IntegrityError,
    DivergedError,
    ResourceError,
    NetworkError,
    FaultFound,
)


def from_exit_code(code: int, message: str) -> SpectralWindowError:
    """The error of a child process that ended with exit code `code`."""
    kind = next((kind for kind in KINDS if kind.exit_code == code), SpectralWindowError)
    return kind(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, Python's, NumPy's or torch's, on the CPU or a GPU.

    The one place that reads an exception's text: torch's allocator of CPU memory raises a plain
    RuntimeError. Asking does not import torch.
    """
    if isinstance(error, MemoryError):
        return True
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    return isinstance(error, of_torch) or (
        type(error) is RuntimeError and "DefaultCPUAllocator: " in str(error)
    )


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`, with the nearest one: `unknown window 'windw':
    did you mean 'window'?`"""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"unknown {what} '{name}': {hint}")
