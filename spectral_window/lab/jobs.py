"""Child processes: commands that run side by side, and children that send rows.

Each measurement or training has a process of its own. So its peak memory and its number of threads
are its own, a kill loses one of them at most, and its command can be typed to check a number.

`run_all` runs many `Job`s, each of which ends in a file, and skips those whose file is there. A job
that was started before and can continue (a training, from its checkpoint) gets further arguments.
`rows_of` runs a function in a child that sends its rows as it yields them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import psutil

from spectral_window.errors import ResourceError, UserError
from spectral_window.training.interrupt import Interrupted, catch_signals
from spectral_window.training.machine import choose_device

Log = Callable[[str], None]
Row = dict[str, Any]
PATIENCE = 60.0  # seconds that a child gets to save a checkpoint before it is killed


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
        """The command that starts it now."""
        more = self.resume if self.begun is not None and self.begun.exists() else ()
        return [sys.executable, "-m", self.module, *self.arguments, *more]


def thread_counts() -> list[int]:
    """One, and as many as this process may use."""
    cores = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count()
    return sorted({1, cores or 1})


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a process that computes with `threads` threads."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}


def workers_here(asked: int | None) -> int:
    """How many jobs to run side by side: one per core, or one where there is a GPU, unless asked
    otherwise.

    Small models gain less from a second thread than from a second model beside them.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--jobs {asked}: use 1 or more")
    gpu = choose_device("auto", ("cpu", "cuda")).type == "cuda"
    return asked or (1 if gpu else thread_counts()[-1])


class Child:
    """A running command. Its output is kept for `last_line`, or shown where ours is."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *,
        show: bool = False,
    ) -> None:  # fmt: skip
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._stop_sent = 0.0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if show else self.output,
            stderr=None if show else self.output,
            env=environment,
            start_new_session=True,  # Ctrl-C comes to us alone, and is passed on once
        )

    def ended(self, stop: int) -> bool:
        """Whether it has ended. Where a `stop` signal came, ask it to end, and kill it when it does
        not."""
        if self.process.poll() is not None:
            return True
        if stop and not self._stop_sent:
            self._stop_sent = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
        elif stop and time.monotonic() - self._stop_sent > PATIENCE:
            self.process.kill()
        return False

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()
        self.output.close()

    def last_line(self) -> str:
        """The last line of its output: of a command that failed, the error."""
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("spectral-window: error: ") if lines else "no output"


# ---------------------------------------------------------------------------------- jobs and files


def run_all(jobs: Sequence[Job], *, workers: int, log: Log = print) -> list[str]:
    """Run the jobs that have no result, `workers` at a time. Returns the names of those that
    failed; `log` got each one's last line.

    Raises Interrupted on SIGINT or SIGTERM, after the running jobs have saved and ended.
    """
    waiting = [job for job in jobs if not job.result.exists()]
    done, total, failed = len(jobs) - len(waiting), len(jobs), []
    if done:
        log(f"{done} of {total} are there already")
    threads = max(1, thread_counts()[-1] // workers)
    # threads that wait by spinning would take the core from the job beside
    environment = child_environment(threads) | {"OMP_WAIT_POLICY": "PASSIVE"}
    running: dict[Child, tuple[Job, float]] = {}
    start, first = time.monotonic(), done
    with catch_signals() as stop:
        try:
            while (waiting and not stop.signum) or running:
                while waiting and len(running) < workers and not stop.signum:
                    job = waiting.pop(0)
                    running[Child(job.command(), environment)] = job, time.monotonic()
                time.sleep(0.1)
                for child in [child for child in running if child.ended(stop.signum)]:
                    job, started = running.pop(child)
                    done += 1
                    if child.process.returncode == 0 and job.result.exists():
                        left = (time.monotonic() - start) / (done - first) * (total - done)
                        took = f"{time.monotonic() - started:.0f} s"
                        log(
                            f"{done} of {total}  {job.name}: {took}, about {left / 60:.0f} min left"
                        )
                    elif not stop.signum:
                        failed.append(job.name)
                        log(f"{done} of {total}  {job.name} failed: {child.last_line()}")
                    child.close()
        finally:
            for child in running:
                child.close()
    if stop.signum:
        raise Interrupted(stop.signum)
    return failed


# ------------------------------------------------------------------------------- children and rows


def rows_of(
    measure: Callable[[Row], Iterable[Row]],
    task: Row,
    environment: Mapping[str, str],
    *,
    seconds: float | None = None,
) -> Iterator[Row]:
    """What `measure(task)` yields in a fresh process, as it comes.

    measure: a function of a module. task, rows: plain values. seconds: after which the process is
    killed. Raises ResourceError where it fails, with the last line of its errors.
    """
    words = [measure.__module__, measure.__name__, json.dumps(task)]
    command = [sys.executable, "-m", __name__, *words]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        late = threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        clock = threading.Timer(seconds or 0.0, stop)
        if seconds is not None:
            clock.start()
        try:
            yield from map(json.loads, cast(Any, child.stdout))
        except BaseException:  # we are stopped: the child must not go on alone
            child.kill()
            raise
        finally:
            clock.cancel()
        if child.wait():
            if late.is_set():
                raise ResourceError(f"stopped after {seconds:.0f} s")
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            ended = f"ended with {child.returncode}; -9 means out of memory"
            raise ResourceError(lines[-1][:200] if lines and child.returncode > 0 else ended)


def _send_rows(module: str, measure: str, task: str) -> None:
    """The child's side of `rows_of`: a line of JSON on stdout for each row. Whatever else is
    printed goes to stderr."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for row in getattr(import_module(module), measure)(json.loads(task)):
            print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    _send_rows(*sys.argv[1:])
