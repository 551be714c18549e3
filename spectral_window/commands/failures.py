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
import re
import sys
from difflib import get_close_matches
from typing import Any

from spectral_window.errors import UserError

PROGRAM = "spectral-window"


def explain(error: BaseException) -> tuple[str, int]:
    """An exception as (one line, exit code)."""
    kind, message = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, UserError):
        return message, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return message or "interrupted", getattr(error, "exit_code", 130)
    if hasattr(error, "format_message"):  # found by typer (or its click) in the command line
        return _explain_usage(error), 2
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "allocate mem" in message:
        return f"out of memory ({message[:120]}): use a smaller batch, length or model", 5
    if isinstance(error, OSError):
        where = "file system" if error.filename is None else error.filename
        if error.errno == errno.ENAMETOOLONG:
            return f"{error.strerror} ({str(where)[:80]}...): choose a shorter one", 2
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room" if full else "check the path and its permissions"
        return f"{error.strerror or message} ({where}): {todo}", 5
    if isinstance(error, (ValueError, TypeError)) and _raised_by_us(error):
        return message, 2  # by the house rule such a message is one line for the user
    return f"{kind}: {message} (a bug): run again with --debug and report what it prints", 1


def _explain_usage(error: Any) -> str:
    """A usage error as what (where): what to do, with the nearest option or command."""
    context = getattr(error, "ctx", None)
    where = PROGRAM if context is None else context.command_path
    what = re.split(r" \(Possible options| Did you mean", error.format_message())[0]
    known: list[str] = []
    if context is not None and "o such option" in what:
        known = [name for parameter in context.command.params for name in parameter.opts]
    elif context is not None and "o such command" in what:
        known = list(context.command.list_commands(context))
    wrong = re.search(r"'(.*)'|(-\S+)", what)
    name = (wrong[1] or wrong[2]) if wrong else ""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    todo = f"did you mean '{near[0]}'?" if near else f"see '{where} --help'"
    what = " ".join(what.split()).rstrip(".?")
    return f"{what[:1].lower()}{what[1:]} ({where}): {todo}"


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return module.startswith("spectral_window")


def say(line: str, kind: str = "error: ") -> None:
    """One line on stderr, control characters escaped; nothing where stderr is closed too."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"{PROGRAM}: {kind}{safe}", file=sys.stderr, flush=True)


class Messages(logging.Handler):
    """What the library tells its logger, a line each: `spectral-window: compiling ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), "" if record.levelno < logging.WARNING else "warning: ")


def show_messages() -> None:
    """Show the library's messages on stderr, from now on."""
    logger = logging.getLogger("spectral_window")
    if not any(isinstance(handler, Messages) for handler in logger.handlers):
        logger.addHandler(Messages())
        logger.setLevel(logging.INFO)
        logger.propagate = False
