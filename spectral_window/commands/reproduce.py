"""`spectral-window reproduce`: see `lab/experiments`."""

from __future__ import annotations

import sys
from pathlib import Path

from spectral_window.errors import ResourceError, unknown
from spectral_window.lab.experiments import efficiency, lm, memory, recall, synthetic
from spectral_window.lab.experiments.trainings import Text
from spectral_window.lab.jobs import workers_here

PAPER = ("synthetic", "efficiency", "lm")
BEYOND = ("memory", "recall")  # beyond the paper: only by their names, with results of their own
SUITES = (*PAPER, *BEYOND)
BEYOND_RESULTS = Path("results/memory")
QUICK_NOTE = "quick version: it shows the way, and its numbers mean nothing"


def run(
    *,
    suites: list[str],
    data: list[str],
    valid: list[str],
    size: str,
    tokens: int | None,
    out: Path | None,
    work: Path | None,
    jobs: int | None,
    quick: bool,
    command: str,
) -> None:
    """Run the `suites` one after the other; what each made is in `out`."""
    for suite in suites:
        if suite not in SUITES:
            raise unknown("suite", suite, SUITES)
    if size not in lm.SIZES:
        raise unknown("size", size, lm.SIZES)
    beyond = out or (None if quick else BEYOND_RESULTS)
    out, work = folders(out, work, quick)
    beyond = beyond or out
    workers = workers_here(jobs)
    failed: list[str] = []
    for suite in suites or PAPER:
        tell(f"{suite}: {QUICK_NOTE}" if quick else suite)
        if suite == "synthetic":
            found = synthetic.run(
                out, work / "synthetic", quick=quick, workers=workers, command=command, log=tell
            )
        elif suite == "efficiency":
            found = efficiency.run(out, quick=quick, command=command, log=tell)
        elif suite == "recall":
            found = recall.run(
                beyond,
                work / "recall",
                earlier=out,
                quick=quick,
                workers=workers,
                command=command,
                log=tell,
            )
        else:
            chosen = "quick" if quick else size
            runs = work / (f"lm-{chosen}" if suite == "lm" else f"memory-{chosen}")
            text = Text(tuple(data), tuple(valid), runs / "text")
            found = (lm if suite == "lm" else memory).run(
                out if suite == "lm" else beyond,
                runs,
                size=chosen,
                text=text,
                workers=workers,
                command=command,
                tokens=tokens,
                log=tell,
            )
        failed += found.get("failed", [])
    if not suites or set(suites) - set(BEYOND):
        tell(f"spectral-window report {out}    makes a page of it")
    refuse_failures(failed)


def folders(out: Path | None, work: Path | None, quick: bool) -> tuple[Path, Path]:
    """Where results and single runs go: a quick version never stands among real ones."""
    work = work or Path("runs/quick" if quick else "runs/paper")
    return out or (work / "results" if quick else Path("results/paper")), work


def tell(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def refuse_failures(failed: list[str]) -> None:
    """End with an error that names the runs that failed, if any; the others' results are kept."""
    if failed:
        names = ", ".join(failed[:3]) + (", ..." if len(failed) > 3 else "")
        raise ResourceError(
            f"{len(failed)} runs failed ({names}): their errors are above; the same command tries "
            "them again"
        )
