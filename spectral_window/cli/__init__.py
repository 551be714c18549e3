"""The program around the commands: arguments in, one exit code out.

The commands themselves are the files of `commands/`. Here stand what they share:

program.py   the program, its own options, how a command is found by its file's name
options.py   options that several commands take
output.py    tables and JSON on stdout, warnings and progress on stderr
errors.py    from an exception to one line and an exit code

Nothing here imports torch, numpy or transformers, so `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence

import typer

from spectral_window.cli import errors
from spectral_window.cli.errors import PROGRAM
from spectral_window.cli.program import app
from spectral_window.errors import SpectralWindowError
from spectral_window.training.interrupt import Interrupted, asked, raise_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the arguments of the process).

    Returns:
        The exit code, see `errors.py`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    _drop_bad_terminal_sizes()
    errors.log_to_stderr()
    with raise_on_signals():
        try:
            code = _run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed it (`| head`)
            code = 141
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in arguments:
                import traceback

                traceback.print_exc()
            signum = asked()
            paused = isinstance(error, Interrupted) and error.checkpoint is not None
            if signum and not isinstance(error, (SpectralWindowError, KeyboardInterrupt)):
                # An import turned what the signal raised into an error of its own.
                line, code = "interrupted", 128 + signum
            else:
                line, code = errors.explain(error)
            errors.print_message(line, "" if paused else "error: ")
    _discard_unwritable_stdout()
    return code


def _run(arguments: list[str]) -> int:
    program = typer.main.get_command(app)
    command_line = shlex.join([PROGRAM, *arguments])
    try:
        with program.make_context(PROGRAM, spread_lists(arguments), obj=command_line) as context:
            program.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except errors.ClickError as error:
        raise errors.usage_error(error, PROGRAM) from error
    return 0


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """Write `--data a b c` as `--data a --data b --data c`, so that `--data texts/*.txt` works.

    The list ends at the next option or key=value. An argument with "=" that names an existing file
    is that file.
    """
    lists = ["--data", "--valid"]
    if "train" in arguments:  # elsewhere --chat is one question
        lists.append("--chat")
    spread: list[str] = []
    current = None
    for index, argument in enumerate(arguments):
        if argument == "--":
            return spread + list(arguments[index:])
        is_option = argument.startswith("-") and argument != "-"
        is_override = re.match(r"[A-Za-z_]\w*=", argument) and not os.path.exists(argument)
        if is_option or is_override:
            current = argument if argument in lists else None
        elif current is not None and spread[-1] != current:
            spread.append(current)
        spread.append(argument)
    return spread


def _prepare_streams() -> None:
    """Open what the shell closed (`<&-`): it reads as empty and discards what is written.

    Otherwise the next file opened would take the number of the closed stream.
    """
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
        # Where the terminal's encoding lacks a character, print its escape: no UnicodeEncodeError.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _drop_bad_terminal_sizes() -> None:
    """Remove sizes of the terminal from the environment in which no table fits."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        if name in os.environ and not re.fullmatch("[2-9][0-9]|[1-9][0-9]{2,3}", os.environ[name]):
            del os.environ[name]


def _discard_unwritable_stdout() -> None:
    """Redirect a stdout that cannot be written, or Python complains when it flushes at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
