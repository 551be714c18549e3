"""`spectral-window ablate`: see `lab/experiments/ablate.py`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectral_window.cli.options import Data, Debug, Jobs, Out, Quick, Valid, Work
from spectral_window.cli.output import log, print_table
from spectral_window.commands.reproduce import (
    BEYOND_RESULTS,
    QUICK_NOTE,
    folders,
    refuse_failures,
)

EXAMPLE = "ablate window --quick"
COLUMNS = {
    "text": "nats/token",
    "recall 1x": "recall",
    "recall 4x": "4x",
    "recall 16x": "16x",
}


def run(
    context: typer.Context,
    groups: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GROUP]...",
            help="window, branches, fusion, kernel, or all of these (the default). Beyond the "
            "paper, by its name alone and into results/memory: memory, what decides the memory's "
            "form.",
        ),
    ] = None,
    data: Data = None,
    valid: Valid = None,
    out: Out = None,
    work: Work = None,
    jobs: Jobs = None,
    quick: Quick = False,
    debug: Debug = False,
) -> None:
    """One part of the layer changed at a time: recall, length generalisation and language
    modelling. What is done is skipped; Ctrl-C stops, the same command goes on."""
    from spectral_window.lab.experiments import ablate
    from spectral_window.lab.experiments.trainings import Text
    from spectral_window.lab.jobs import workers_here

    groups = groups or []
    beyond = ablate.is_beyond(groups)
    beyond_out = out or (None if quick else BEYOND_RESULTS)
    out, work = folders(out, work, quick)
    papers = out
    if beyond:
        out = beyond_out or out
    if quick:
        log(QUICK_NOTE)
    runs = work / ("ablate-beyond" if beyond else "ablate")
    results = ablate.run(
        out,
        runs,
        groups=groups,
        text=Text(tuple(data or ()), tuple(valid or ()), runs / "tokens"),
        quick=quick,
        workers=workers_here(jobs),
        command=context.obj,
        earlier=papers if beyond else None,
        log=log,
    )
    chosen = ablate.named(groups)
    for group in chosen:
        lines = [line for line in ablate.table(results, chosen) if line["group"] == group]
        title = f"{group}: mean over seeds, half width of the 95 % interval"
        print_table(
            f"{title} ({QUICK_NOTE})" if quick else title,
            ("", *COLUMNS.values()),
            [(line["variant"], *(_cell(line[key]) for key in COLUMNS)) for line in lines],
        )
    refuse_failures(results.get("failed", []))


def _cell(estimate: Any) -> str:
    if estimate is None:
        return "missing"
    if estimate.seeds < 2:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"
