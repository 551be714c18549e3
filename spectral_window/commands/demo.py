"""`spectral-window demo`: see `lab/demo.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Debug, Threads

EXAMPLE = "demo --quick"


def run(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the two runs and the report go.")
    ] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead: shows the way, and no result.")
    ] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Minutes on any computer: train SWH with a memory and a Transformer of equal size, and compare
    them."""
    from spectral_window.lab import demo

    demo.run(out, quick=quick)
