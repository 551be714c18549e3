"""The shape of an experiment: trials, their jobs, and the rows that they leave.

    run     a `Probe` or a `Training`; its key names all the settings that decide its outcome
    trial   a run, and the labels that its row gets in this experiment
    row     plain values: the key, the labels, what was measured
    work    the folder where each run leaves its row, so that a stopped experiment can continue

A trial whose row is in `work` or in earlier results is not run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

from spectral_window.lab import results
from spectral_window.lab.experiments import probes
from spectral_window.lab.experiments.probes import Probe
from spectral_window.lab.experiments.trainings import Training
from spectral_window.lab.jobs import Job, Log, Row, run_all

EACH = 3  # probes in one process
R = TypeVar("R", bound=Probe | Training)


@dataclass(frozen=True)
class Trial(Generic[R]):
    """A run, its name in the progress, and the labels of its row."""

    name: str
    run: R
    labels: dict[str, Any]


class Experiment:
    """The rows of folder `out`/NAME.json: those of earlier results, and those that trials add.

    earlier: rows of other results that stand for trials of this experiment too. quick: marks the
    results of a version that shows the way and measures nothing.
    """

    def __init__(
        self, name: str, out: Path, work: Path, *, quick: bool, workers: int, command: str,
        log: Log = print, earlier: Iterable[Row] = (),
    ) -> None:  # fmt: skip
        self.name, self.out, self.work = name, out, work
        self.quick, self.workers, self.command, self.log = quick, workers, command, log
        own = (results.load(out, name) or {"rows": []})["rows"]
        self.earlier: dict[str, Row] = {row["key"]: row for row in (*earlier, *own)}
        self.failed: list[str] = []

    def run(self, trials: Sequence[Trial[Any]], each: int = EACH) -> None:
        """Run those of the trials that have no row; names of those that fail go to `failed`.

        each: probes in one process. Raises Interrupted on a signal, IntegrityError where `work`
        holds another run in a trial's place.
        """
        missing = [trial for trial in trials if trial.run.key not in self.earlier]
        jobs = jobs_of(missing, self.work, each)
        known = len(trials) - len(missing)
        self.log(f"{len(trials)} runs, {known} in earlier results, {len(jobs)} jobs to run")
        self.failed += run_all(jobs, workers=self.workers, log=self.log)

    def rows(self, trials: Iterable[Trial[Any]]) -> list[Row]:
        """The rows of the trials that have one, in their order."""
        rows = []
        for trial in trials:
            if earlier := self.earlier.get(trial.run.key):
                rows.append(earlier | trial.labels)
            elif row := trial.run.read(self.work):
                rows.append(trial.labels | row)
        return rows

    def save(self, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
        """Write the results with these rows; returns them as written."""
        about = {"suite": self.name, "quick": self.quick, "command": self.command}
        content = {**about, "failed": self.failed, **more, "rows": list(rows)}
        path = results.save(self.out, self.name, content)
        self.log(f"{len(rows)} rows: {path}")
        return results.load(self.out, self.name) or {}


def jobs_of(trials: Iterable[Trial[Any]], work: Path, each: int = EACH) -> list[Job]:
    """The trials that have no row in `work` as jobs: a training each, probes that follow one
    another by `each`, because a process needs seconds to start."""
    waiting = [trial for trial in trials if trial.run.read(work) is None]
    jobs: list[Job] = []
    for kind, group in groupby(waiting, key=lambda trial: type(trial.run)):
        runs: list[Any] = list(group)
        if kind is Training:
            jobs += [trial.run.job(work) for trial in runs]
            continue
        for first in range(0, len(runs), each):
            batch = runs[first : first + each]
            jobs.append(probes.job([(trial.name, trial.run) for trial in batch], work))
    return jobs
