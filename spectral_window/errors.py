"""Errors that a user can act on: one line, what (where): what to do.

Every error of this kind is a `ValueError`, so a library caller catches what Python users expect,
and carries the exit code that the command line returns for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad usage or bad input (exit code 2)."""

    exit_code = 2


class IntegrityError(UserError):
    """A file is missing, corrupt or belongs to something else (exit code 3)."""

    exit_code = 3


class DivergedError(UserError):
    """Training met a number that is not finite (exit code 4)."""

    exit_code = 4


class ResourceError(UserError):
    """Disk, memory or device ran out (exit code 5)."""

    exit_code = 5


class NetworkError(UserError):
    """A remote source did not answer (exit code 6)."""

    exit_code = 6


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`, with the nearest one: `unknown window 'windw':
    did you mean 'window'?`"""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"unknown {what} '{name}': {hint}")
