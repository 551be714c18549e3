"""How a command fails: one line and an exit code.

    spectral-window: error: what (where): what to do

2 usage or input, 3 a file that is damaged or belongs to something else, 4 numbers that are not
finite, 5 disk, memory or device, 6 network, 7 a fault that the doctor found, 130 Ctrl-C, 143
SIGTERM, 141 a closed pipe, 1 a bug of ours. With `--debug` the traceback comes first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from difflib import get_close_matches
from typing import Any

import typer

from spectral_window.errors import SpectralWindowError, UserError, is_out_of_memory

PROGRAM = "spectral-window"

# Typer is built on click: on its own copy or on the package, depending on its version.
_click: Any = sys.modules[typer.BadParameter.__module__]
ClickError: type[Exception] = _click.ClickException


def explain(error: BaseException) -> tuple[str, int]:
    """Turn an exception into (one line, exit code), decided by its class alone."""
    message = " ".join(str(error).split())
    if isinstance(error, SpectralWindowError):
        return message, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return message or "interrupted", getattr(error, "exit_code", 130)
    if is_out_of_memory(error):
        return f"out of memory ({message[:120]}): use a smaller batch, length or model", 5
    if isinstance(error, OSError):
        where = "file system" if error.filename is None else error.filename
        if error.errno == errno.ENAMETOOLONG:
            return f"{error.strerror} ({str(where)[:80]}...): choose a shorter one", 2
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room" if full else "check the path and its permissions"
        return f"{error.strerror or message} ({where}): {todo}", 5
    kind = type(error).__name__
    return f"{kind}: {message} (a bug): run again with --debug and report what it prints", 1


class NoSuchCommand(_click.UsageError):  # type: ignore[misc]
    """A command that does not exist: click has no class for it."""

    def __init__(self, name: str, context: Any) -> None:
        super().__init__(f"No such command '{name}'", ctx=context)
        self.name = name


def usage_error(error: Any, program: str) -> UserError:
    """Turn a ClickError into what (where): what to do, with the nearest option or command."""
    context: Any = getattr(error, "ctx", None)
    where = program if context is None else context.command_path
    what, wrong, choices = error.format_message(), "", []
    if isinstance(error, _click.NoSuchOption):
        what, wrong = error.message, error.option_name
        if context is not None:
            choices = [name for parameter in context.command.params for name in parameter.opts]
    elif isinstance(error, NoSuchCommand):
        wrong, choices = error.name, context.command.list_commands(context)
    near = get_close_matches(wrong, choices, n=1, cutoff=0.5)
    todo = f"did you mean '{near[0]}'?" if near else f"see '{where} --help'"
    what = " ".join(what.split()).rstrip(".?")
    return UserError(f"{what[:1].lower()}{what[1:]} ({where}): {todo}")


def print_message(line: str, kind: str = "error: ") -> None:
    """Print one line on stderr, control characters escaped; do nothing if stderr is closed."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"{PROGRAM}: {kind}{safe}", file=sys.stderr, flush=True)


class LogHandler(logging.Handler):
    """Prints each record of the library's logger as a line: `spectral-window: compiling ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "" if record.levelno < logging.WARNING else "warning: "
        print_message(record.getMessage(), kind)


def log_to_stderr() -> None:
    """Print the library's log messages on stderr from now on."""
    logger = logging.getLogger("spectral_window")
    if not any(isinstance(handler, LogHandler) for handler in logger.handlers):
        logger.addHandler(LogHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
