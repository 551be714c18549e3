"""Errors that a user can act on. A message is one line: what (where): what to do.

All are subclasses of `SpectralWindowError`, each with the exit code of the command line, so the
class of an error decides how it is handled. As Python users expect for bad arguments, a `UserError`
is a `ValueError`, and a `UserTypeError` also a `TypeError`. Any other exception is a bug in this
package.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class SpectralWindowError(Exception):
    """Base class of all errors of this package.

    It is raised itself only for an unknown failure of a child process (exit code 1).
    """

    exit_code = 1


class UserError(SpectralWindowError, ValueError):
    """Bad usage or bad input (exit code 2)."""

    exit_code = 2


class UserTypeError(UserError, TypeError):
    """Bad input of a wrong type or dtype (exit code 2)."""


class IntegrityError(SpectralWindowError, ValueError):
    """A file is missing, corrupt or belongs to something else (exit code 3).

    A ValueError, like the errors of other libraries for a damaged file.
    """

    exit_code = 3


class DivergedError(SpectralWindowError, ArithmeticError):
    """Numbers are not finite, so all results computed from them are meaningless (exit code 4)."""

    exit_code = 4


class NotFiniteError(DivergedError, ValueError):
    """An operator got parameters or inputs that are not finite (exit code 4).

    A ValueError, like every error for a bad argument of an operator.
    """


class ResourceError(SpectralWindowError):
    """Disk space, memory or device memory is exhausted (exit code 5)."""

    exit_code = 5


class NetworkError(SpectralWindowError):
    """A remote source, or another process of the run, did not answer (exit code 6)."""

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
    """Return the error for a child process that ended with exit code `code`."""
    kind = next((kind for kind in KINDS if kind.exit_code == code), SpectralWindowError)
    return kind(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is exhausted, on the CPU or a GPU.

    This is the only place that reads the text of an exception: torch's allocator of CPU memory
    raises a plain RuntimeError. It does not import torch.
    """
    if isinstance(error, MemoryError):
        return True
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    return isinstance(error, of_torch) or (
        type(error) is RuntimeError and "DefaultCPUAllocator: " in str(error)
    )


def unknown(what: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not one of `choices`; it suggests the nearest one.

    Example:
        >>> print(unknown("option", "windw", ["window", "kernel"]))
        unknown option 'windw': did you mean 'window'?
    """
    names = sorted(choices)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"unknown {what} '{name}': {hint}")
