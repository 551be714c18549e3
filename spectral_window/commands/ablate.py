"""`spectral-window ablate`: see `lab/experiments/ablate.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_window.commands.reproduce import (
    BEYOND_RESULTS,
    QUICK_NOTE,
    folders,
    refuse_failures,
    tell,
)
from spectral_window.commands.show import print_table
from spectral_window.lab.experiments import ablate
from spectral_window.lab.experiments.trainings import Text
from spectral_window.lab.jobs import workers_here

SHOWN = {
    "text": "nats/token",
    "recall 1x": "recall",
    "recall 4x": "4x",
    "recall 16x": "16x",
}


def run(
    *,
    groups: list[str],
    data: list[str],
    valid: list[str],
    out: Path | None,
    work: Path | None,
    jobs: int | None,
    quick: bool,
    command: str,
) -> None:
    """Run what is missing of the ablations and print their table."""
    beyond = ablate.is_beyond(groups)
    beyond_out = out or (None if quick else BEYOND_RESULTS)
    out, work = folders(out, work, quick)
    if beyond:
        out = beyond_out or out
    if quick:
        tell(QUICK_NOTE)
    runs = work / ("ablate-beyond" if beyond else "ablate")
    found = ablate.run(
        out,
        runs,
        groups=groups,
        text=Text(tuple(data), tuple(valid), runs / "tokens"),
        quick=quick,
        workers=workers_here(jobs),
        command=command,
        log=tell,
    )
    chosen = ablate.named(groups)
    for group in chosen:
        lines = [line for line in ablate.table(found, chosen) if line["group"] == group]
        title = f"{group}: mean over seeds, half width of the 95 % interval"
        print_table(
            f"{title} ({QUICK_NOTE})" if quick else title,
            ("", *SHOWN.values()),
            [(line["variant"], *(_cell(line[key]) for key in SHOWN)) for line in lines],
        )
    refuse_failures(found.get("failed", []))


def _cell(estimate: Any) -> str:
    if estimate is None:
        return "missing"
    if estimate.seeds < 2:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"
