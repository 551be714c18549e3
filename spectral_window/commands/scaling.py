"""`spectral-window scaling`: see `lab/scaling.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Debug, Json
from spectral_window.cli.output import print_json, print_table

EXAMPLE = "scaling --size 1.3b --gpus 64 --context 1048576"


def run(
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Size of a preset, as 1.3b. Repeatable. Default: all."),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1 << 20, metavar="N", help="Repeatable. Default: 1, 8, 64, 512."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=1 << 40, metavar="N",
            help="Tokens of a training row. Repeatable. Default: 8,192 to 16,777,216.",
        ),
    ] = None,
    hybrid: Annotated[
        bool,
        typer.Option(
            "--hybrid",
            help="Share parameters within each machine of 8 GPUs (shard=hybrid), not among all.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also draw DIR/context.png: speed against context."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Does it fit? Memory, traffic and time of a training on H100s, on paper: nothing of it is
    measured."""
    from spectral_window.lab import scaling

    sizes = size or scaling.SIZES
    rows = scaling.table(sizes, gpus or scaling.GPUS, context or scaling.CONTEXTS, hybrid=hybrid)
    if out is not None:
        scaling.draw(out / "context.png")
    if json:
        return print_json({"rows": rows})
    print_table("models", *scaling.model_cells(sizes))
    print_table(
        f"one step, counted; {scaling.REACHED:.0%} of an H100's peak in products",
        *scaling.cells(rows),
    )
    for row in rows:
        if not row["fits"]:
            print(row["why"])
    return None
