"""`spectral-window report`: a page of the paper's reproduction, or of runs (see `lab`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Debug
from spectral_window.cli.output import print_table
from spectral_window.errors import UserError

EXAMPLE = "report runs/tiny"
RUN_FILES = ("config.json", "metrics.jsonl")


def run(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Results of reproduce and ablate (default: results/paper), or run folders.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page. Default: FOLDER/report.html.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """One page of the paper's claims, verdicts, figures and tables; or of runs."""
    from spectral_window.lab import report
    from spectral_window.lab.paper import page

    folders = folders or [Path("results/paper")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} (report): no such folder: `spectral-window reproduce` makes the paper's "
                "results, `spectral-window train` a run"
            )
    if all(_is_run(folder) for folder in folders):
        default = folders[0] if len(folders) == 1 else folders[0].parent
        print(report.write(folders, out or default / "report.html"))
        return
    if len(folders) > 1:
        other = next(folder for folder in folders if not _is_run(folder))
        raise UserError(
            f"{other} (report): not a run folder; name runs only, or one results folder"
        )
    folder = folders[0]
    reading = page.read(folder)
    if not any(reading.suites.values()):
        raise UserError(
            f"{folder} (report): holds neither a run ({', '.join(RUN_FILES)}) nor results of "
            "`spectral-window reproduce`: name a folder that does"
        )
    written = page.write(folder, out or folder / "report.html")
    judged = reading.claims()
    print_table(
        page.headline(judged),
        ("claim", "verdict", "as published, here", "well-posed, here"),
        [(claim.name, verdict, claim.published, claim.well_posed) for claim, verdict in judged],
        numbers=False,
    )
    if any(map(reading.quick, reading.suites)):
        print(page.QUICK_NOTE)
    print(written)


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN_FILES)
