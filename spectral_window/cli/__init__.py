"""The command line: a table of commands, each imported when it is called.

So `--help` and a misspelt option answer at once, without waiting for torch. What a command does is
in `commands/`, how it fails in `failures.py`; here is what it is called and what it takes: commands
about one model in `models.py`, measurements and comparisons in `lab.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

from spectral_window.cli import lab, models  # noqa: F401 - they fill the table
from spectral_window.cli.app import app
from spectral_window.commands.failures import PROGRAM, explain, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, never a UnicodeEncodeError.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # A plain SIGTERM ends a process on the spot; an exception lets temporary files be removed.
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, _terminate)
    try:
        command = typer.main.get_command(app)
        words = _spread(arguments)
        with command.make_context(PROGRAM, words, obj=shlex.join([PROGRAM, *arguments])) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain again when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        line, code = explain(error)
        say(line)
        return code
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""

    exit_code = 143


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated("terminated")


def _spread(arguments: list[str]) -> list[str]:
    """`--data a b c` as `--data a --data b --data c`, so that `--data texts/*.txt` works.

    The list ends at the next option or key=value (an existing file of that name is a file).
    """
    lists = ("--data", "--valid")
    spread: list[str] = []
    current = None
    for index, argument in enumerate(arguments):
        if argument == "--":
            return spread + arguments[index:]
        option = argument.startswith("-") and argument != "-"
        knob = re.match(r"[A-Za-z_]\w*=", argument) and not os.path.exists(argument)
        if option or knob:
            current = argument if argument in lists else None
        elif current is not None and spread[-1] != current:
            spread.append(current)
        spread.append(argument)
    return spread


if __name__ == "__main__":
    sys.exit(main())
