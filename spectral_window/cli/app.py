"""The program itself, the options that several commands share, and how a command is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata
from typing import Annotated, Any

import typer

from spectral_window.cli.usage import Commands
from spectral_window.commands.failures import PROGRAM
from spectral_window.errors import UserError

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


def call(name: str, threads: int | None, **arguments: Any) -> None:
    """Import the command `name` now (it needs torch) and run it."""
    if threads is not None:
        # Before torch is imported, so that every library of the process sees the same number.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
    # transformers shows bars for files that load in milliseconds; ours show what takes time.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import_module(f"spectral_window.commands.{name}").run(**arguments)


# where results name a module that has moved since: their commands can still be run
MOVED_PLUGINS = {"spectral_window.hf.rivals": "spectral_window.lab.baselines.mixers"}


def import_plugin(name: str) -> None:
    """Import the module `name`; raises UserError where there is none, or where it fails itself."""
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


Threads = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="CPU threads to compute with. Default: all."),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one."),
]
# `main` looks for it: where it stands does not matter.
Debug = Annotated[
    bool, typer.Option("--debug", help="On an error, show the Python traceback as well.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder (its final model, else its newest intact checkpoint), or a folder that "
        "save_pretrained wrote.",
        show_default=False,
    ),
]


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
