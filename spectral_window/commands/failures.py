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

from spectral_window.errors import SpectralWindowError, is_out_of_memory

PROGRAM = "spectral-window"


def explain(error: BaseException) -> tuple[str, int]:
    """An exception as (one line, exit code), decided by its class alone."""
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
