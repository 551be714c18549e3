"""`spectral-window reproduce`: see `lab/experiments`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Data, Debug, Jobs, Out, Quick, Valid, Work
from spectral_window.cli.output import log
from spectral_window.errors import ResourceError, unknown

EXAMPLE = "reproduce synthetic --quick"
PAPER = ("synthetic", "efficiency", "lm")
BEYOND = ("memory", "recall", "capacity")  # beyond the paper, with results of their own: by name
SUITES = (*PAPER, *BEYOND)
BEYOND_RESULTS = Path("results/memory")
QUICK_NOTE = "quick version: it shows the way, and its numbers mean nothing"


def run(
    context: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...",
            help="synthetic, efficiency, lm, or all of these in this order (the default). Beyond "
            "the paper, into results/memory: memory, language models with a memory beside the "
            "branches; recall, what that memory recalls, at up to 1,024 times the length; "
            "capacity, how many pairs a state holds.",
        ),
    ] = None,
    data: Data = None,
    valid: Valid = None,
    size: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the language models: small (hours on CPU cores, any text), short (a million "
            "tokens, for `memory` on any CPU), 125m (the paper's; "
            "a GPU, FineWeb-Edu), or 125m-short (its shape, 20 million tokens of any text).",
        ),
    ] = "small",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of a main language-model run, instead of the size's own."
        ),
    ] = None,
    out: Out = None,
    work: Work = None,
    jobs: Jobs = None,
    quick: Quick = False,
    debug: Debug = False,
) -> None:
    """The paper's experiments, each as published and well-posed. What is done is skipped; Ctrl-C
    stops, the same command goes on."""
    from spectral_window.lab.experiments import (
        capacity,
        efficiency,
        lm,
        memory,
        recall,
        synthetic,
    )
    from spectral_window.lab.experiments.trainings import Text
    from spectral_window.lab.jobs import workers_here

    for suite in suites or ():
        if suite not in SUITES:
            raise unknown("suite", suite, SUITES)
    if size not in lm.SIZES:
        raise unknown("size", size, lm.SIZES)
    beyond = out or (None if quick else BEYOND_RESULTS)
    out, work = folders(out, work, quick)
    beyond = beyond or out
    workers = workers_here(jobs)
    command = context.obj
    failed: list[str] = []
    for suite in suites or PAPER:
        log(f"{suite}: {QUICK_NOTE}" if quick else suite)
        if suite == "synthetic":
            results = synthetic.run(
                out, work / "synthetic", quick=quick, workers=workers, command=command, log=log
            )
        elif suite == "efficiency":
            results = efficiency.run(out, quick=quick, command=command, log=log)
        elif suite == "recall":
            results = recall.run(
                beyond,
                work / "recall",
                earlier=out,
                quick=quick,
                workers=workers,
                command=command,
                log=log,
            )
        elif suite == "capacity":
            results = capacity.run(
                beyond, work / suite, quick=quick, workers=workers, command=command, log=log
            )
        else:
            chosen = "quick" if quick else size
            runs = work / (f"lm-{chosen}" if suite == "lm" else f"memory-{chosen}")
            text = Text(tuple(data or ()), tuple(valid or ()), runs / "text")
            results = (lm if suite == "lm" else memory).run(
                out if suite == "lm" else beyond,
                runs,
                size=chosen,
                text=text,
                workers=workers,
                command=command,
                tokens=tokens,
                log=log,
            )
        failed += results.get("failed", [])
    if not suites or set(suites) - set(BEYOND):
        log(f"spectral-window report {out}    makes a page of it")
    refuse_failures(failed)


def folders(out: Path | None, work: Path | None, quick: bool) -> tuple[Path, Path]:
    """Choose the folders of results and of single runs; a quick version has its own."""
    work = work or Path("runs/quick" if quick else "runs/paper")
    return out or (work / "results" if quick else Path("results/paper")), work


def refuse_failures(failed: list[str]) -> None:
    """Raise an error that names the runs that failed, if any; the results of others are saved."""
    if failed:
        names = ", ".join(failed[:3]) + (", ..." if len(failed) > 3 else "")
        raise ResourceError(
            f"{len(failed)} runs failed ({names}): their errors are above; the same command tries "
            "them again"
        )
