"""The program: its own options, and its commands, each found by the name of its file.

`commands/NAME.py` is the command NAME, with `-` for `_`. It has

    EXAMPLE = "NAME ..."          shown below its --help, without the program's name
    def run(...) -> None: ...     parameters with help are its options, the docstring is its help

`run` imports within its body what takes time to import. A file is imported when its command is
asked for; `--help` imports them all.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import sys
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from spectral_window.cli.errors import PROGRAM, NoSuchCommand
from spectral_window.errors import UserError

PACKAGE = "spectral_window.commands"
# Results name modules that have moved since; the commands recorded there can still be run.
MOVED_PLUGINS = {"spectral_window.hf.rivals": "spectral_window.lab.baselines.mixers"}
# The order in --help; commands not named here follow by name.
ORDER = (
    *("bench", "demo", "reproduce", "ablate", "analyze", "doctor", "report"),
    *("train", "recipes", "eval", "generate", "serve", "export", "info"),
    *("publish", "scaling", "warm-up"),
)


def command_names() -> list[str]:
    """List the commands in the order of --help."""
    package = import_module(PACKAGE)
    files = pkgutil.iter_modules(package.__path__)
    names = sorted(file.name.replace("_", "-") for file in files)
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


@functools.cache
def load_command(name: str) -> Any:
    """Import the file of a command and build its click command."""
    module = import_module(f"{PACKAGE}.{name.replace('-', '_')}")
    program = typer.Typer(add_completion=False, rich_markup_mode="rich")
    epilog = f"Example: {PROGRAM} {module.EXAMPLE}"
    program.command(name, cls=Command, epilog=epilog)(module.run)
    return typer.main.get_command(program)


class Command(TyperCommand):
    """A command that sets the number of threads (the option `Threads`) before its body runs."""

    def invoke(self, ctx: Any) -> Any:
        threads = ctx.params.get("threads")
        if threads is not None:
            # Before torch is imported, so that every library of the process uses this number.
            os.environ["OMP_NUM_THREADS"] = str(threads)
            import torch

            torch.set_num_threads(threads)
        # transformers shows bars for files that load in milliseconds; ours show what takes time.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return super().invoke(ctx)


class Commands(TyperGroup):
    """The files of `commands/` as a group of commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return command_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_command(cmd_name) if cmd_name in command_names() else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise NoSuchCommand(args[0], ctx)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name=PROGRAM,
    cls=Commands,
    help="Language models of linear time and constant state, the Spectral-Window Hybrid, on your "
    "own text: train one, measure it, let it write.",
    epilog=f"A first look: {PROGRAM} demo. Your own text: {PROGRAM} train tiny --data texts/",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    plugins: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            metavar="MODULE",
            help="Import this Python module first: a mixer or kernel that it registers is known to "
            "the command. Found as Python finds it, and in the folder you are in.",
        ),
    ] = None,
) -> None:
    if version:
        print(f"{PROGRAM} {metadata.version(PROGRAM)}")
        raise typer.Exit
    for name in plugins or ():
        import_plugin(name)
    if context.invoked_subcommand is None:
        print(context.get_help())


def import_plugin(name: str) -> None:
    """Import the module `name`, also from the current folder.

    Raises:
        UserError: there is no such module, or it fails itself.
    """
    name = MOVED_PLUGINS.get(name, name)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        import_module(name)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines() or [""]
        raise UserError(
            f"cannot import {name!r} (--plugin): {type(error).__name__}: {reason[0]}; give a "
            "module's name as in `import NAME`"
        ) from error
