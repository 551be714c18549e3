"""Errors that a user can act on: one line, what (where): what to do.

All are `SpectralWindowError`s and stand beside one another, each with the exit code that the
command line returns for it. What Python users expect for bad arguments is kept: a `UserError` is a
`ValueError`, and a `UserTypeError` also a `TypeError`. Any other exception is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpectralWindowError(Exception):
    """What all errors of this package have in common; raised are its kinds."""

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
    """Training met a number that is not finite (exit code 4)."""

    exit_code = 4


class ResourceError(SpectralWindowError):
    """Disk, memory or device ran out (exit code 5)."""

    exit_code = 5


class NetworkError(SpectralWindowError):
    """A remote source did not answer (exit code 6)."""

    exit_code = 6


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`, with the nearest one: `unknown window 'windw':
    did you mean 'window'?`"""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"unknown {what} '{name}': {hint}")
