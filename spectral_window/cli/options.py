"""Options that several commands take, each written once.

A command names one as the type of a parameter: `threads: Threads = None`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder (its final model, else its newest intact checkpoint), or a folder that "
        "save_pretrained wrote.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe to override, as for train."),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one."),
]
# Set before the command runs, for a parameter of the name `threads`: see `program.Command`.
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="CPU threads to compute with. Default: all."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
# Read from the arguments by `main`, so that it may stand anywhere; every command takes it.
Debug = Annotated[
    bool, typer.Option("--debug", help="On an error, show the Python traceback as well.")
]

# ------------------------------------------------------------ of the paper's experiments

Data = Annotated[
    list[str] | None,
    typer.Option(metavar="SRC...", help="Text to learn from, as for train."),
]
Valid = Annotated[
    list[str] | None,
    typer.Option(metavar="SRC...", help="Text to measure on, as for train."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the results go. Default: results/paper; runs/quick/results with --quick.",
        show_default=False,
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where single runs are kept, so that a stopped one goes on. Default: runs/paper; "
        "runs/quick with --quick.",
        show_default=False,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="Runs side by side. Default: one a core."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Under 3 minutes: shows the way, and no result.")
]
