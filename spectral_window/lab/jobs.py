"""Jobs: many commands, some side by side, each skipped where its result is there already.

Every job is a process of its own, started with a command that can also be typed: so its peak memory
is its own, a kill loses one job at most, and whoever doubts a number runs its command. A job that
was begun and can go on (a training, from its checkpoint) gets further words on its command.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectral_window.errors import UserError
from spectral_window.lab.bench import child_environment, thread_counts
from spectral_window.training.interrupt import Interrupted, catch_signals

Say = Callable[[str], None]
PATIENCE = 60.0  # seconds that a job gets to save a checkpoint before it is killed


@dataclass(frozen=True)
class Job:
    """`module` (python -m) with `arguments` makes the file `result`; where `begun` exists already,
    `resume` is added."""

    name: str
    arguments: tuple[str, ...]
    result: Path
    module: str = "spectral_window"
    begun: Path | None = None
    resume: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The words to start it with now."""
        on = self.resume if self.begun is not None and self.begun.exists() else ()
        return [sys.executable, "-m", self.module, *self.arguments, *on]


def run_all(jobs: Sequence[Job], *, workers: int, say: Say = print) -> list[str]:
    """Run the jobs that have no result, `workers` at a time; returns the names of those that
    failed, each of which `say` has told with its last line.

    Raises Interrupted on SIGINT or SIGTERM, after the running jobs have saved and ended.
    """
    waiting = [job for job in jobs if not job.result.exists()]
    done, total, failed = len(jobs) - len(waiting), len(jobs), []
    if done:
        say(f"{done} of {total} are there already")
    running: list[_Running] = []
    begin, first = time.monotonic(), done
    with catch_signals() as stop:
        try:
            while (waiting and not stop.signum) or running:
                while waiting and len(running) < workers and not stop.signum:
                    running.append(_Running(waiting.pop(0), workers))
                time.sleep(0.1)
                for one in [one for one in running if one.ended(stop.signum)]:
                    running.remove(one)
                    done += 1
                    if one.succeeded:
                        left = (time.monotonic() - begin) / (done - first) * (total - done)
                        took = f"{one.seconds:.0f} s, about {left / 60:.0f} min left"
                        say(f"{done} of {total}  {one.job.name}: {took}")
                    elif not stop.signum:
                        failed.append(one.job.name)
                        say(f"{done} of {total}  {one.job.name} failed: {one.last_line()}")
                    one.said.close()
        finally:
            for one in running:
                one.process.kill()
                one.process.wait()
                one.said.close()
    if stop.signum:
        raise Interrupted(stop.signum)
    return failed


def workers_here(asked: int | None) -> int:
    """How many jobs to run side by side: one a core, or one where there is a GPU, unless asked
    otherwise.

    Small models gain less from a second thread than from a second model beside them.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--jobs {asked}: use 1 or more")
    return asked or (1 if torch.cuda.is_available() else thread_counts()[-1])


class _Running:
    """A job's process, and what it says."""

    def __init__(self, job: Job, workers: int) -> None:
        threads = max(1, thread_counts()[-1] // workers)
        # threads that wait by spinning would take the core from the job beside
        quiet = child_environment(threads) | {"OMP_WAIT_POLICY": "PASSIVE"}
        self.job, self._begin, self._asked = job, time.monotonic(), 0.0
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the job has ended
        self.process = subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=self.said,
            stderr=self.said,
            env=quiet,
            start_new_session=True,  # Ctrl-C comes to us alone, and is passed on once
        )

    @property
    def succeeded(self) -> bool:
        return self.process.returncode == 0 and self.job.result.exists()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def ended(self, stop: int) -> bool:
        """Whether it has; where a `stop` signal came, ask it to, and kill it when it does not."""
        if self.process.poll() is not None:
            return True
        if stop and not self._asked:
            self._asked = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
        elif stop and time.monotonic() - self._asked > PATIENCE:
            self.process.kill()
        return False

    def last_line(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("spectral-window: error: ") if lines else "it said nothing"
