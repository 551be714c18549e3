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
import sys
from collections.abc import Sequence

import typer

from spectral_window.cli import lab, models, usage  # noqa: F401 - they fill the table
from spectral_window.cli.app import app
from spectral_window.commands.failures import PROGRAM, explain, say, show_messages
from spectral_window.errors import SpectralWindowError
from spectral_window.training.interrupt import asked, raise_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    _forget_senseless_sizes()
    show_messages()
    with raise_on_signals():
        try:
            code = _run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has gone (`| head`)
            code = 141
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in arguments:
                import traceback

                traceback.print_exc()
            signum = asked()
            if signum and not isinstance(error, (SpectralWindowError, KeyboardInterrupt)):
                # an import turned what the signal raised into an error of its own
                line, code = "interrupted", 128 + signum
            else:
                line, code = explain(error)
            say(line)
    _give_up_unwritable_stdout()
    return code


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    words = _spread(arguments)
    try:
        with command.make_context(PROGRAM, words, obj=shlex.join([PROGRAM, *arguments])) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except usage.ClickError as error:
        raise usage.explain(error, PROGRAM) from error
    return 0


def _prepare_streams() -> None:
    """Streams that can be used, whatever the shell gave: a closed one (`<&-`) reads as empty and
    takes what is written, so that no file opened later comes to stand in its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, never a UnicodeEncodeError.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _forget_senseless_sizes() -> None:
    """What the environment says of the terminal's size, where no table fits, is not passed on to
    libraries."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        if name in os.environ and not re.fullmatch("[2-9][0-9]|[1-9][0-9]{2,3}", os.environ[name]):
            del os.environ[name]


def _give_up_unwritable_stdout() -> None:
    """Python would complain once more when it flushes at its end what cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
