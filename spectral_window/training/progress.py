"""The events of a training run, and how a terminal or a log file shows them.

`train` prints nothing itself: it calls the methods of a `Progress`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

FIRST_STEPS = 5  # from which the time of a training is estimated


class Progress(Protocol):
    """The events of a run. Steps are optimiser steps, losses nats per token."""

    def prepare(self, stage: str, done: int, total: int | None) -> None:
        """Data preparation: `done` of `total` bytes (None if unknown) of a named stage."""

    def start(self, title: str, first_step: int, steps: int) -> None:
        """Training starts after `first_step` (0 unless resumed) of `steps`."""

    def step(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """A step is done; the numbers are those of the last log line."""

    def note(self, text: str) -> None:
        """A line to show: an evaluation, a checkpoint, a refused checkpoint."""

    def stop(self) -> None:
        """No more events; called once, also after an error."""


class Silent:
    """A Progress that shows nothing."""

    def prepare(self, stage: str, done: int, total: int | None) -> None: ...
    def start(self, title: str, first_step: int, steps: int) -> None: ...
    def step(self, step: int, loss: float | None, tokens_per_second: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class RichProgress:
    """Bars on a terminal; elsewhere (a log file) a plain line every `every` seconds. After the
    first steps a line estimates the time that is left.

    clock: the time in seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.every = every
        self._clock = clock
        self._first: tuple[int, float] | None = None  # the first step, and when it was done
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._last = 0.0
        self._steps = 0
        self._title = ""

    def prepare(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self._stage = stage
            self._open(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[size]}")
            )
            if not self.console.is_terminal:
                self.console.print(f"{stage} ...")
        if self._bar is not None and self._task is not None and self._due(0.1):
            size = f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else "")
            self._bar.update(self._task, completed=done, total=total, description=stage, size=size)

    def start(self, title: str, first_step: int, steps: int) -> None:
        self._title, self._steps = title, steps
        self._open()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=title, completed=first_step, total=steps)

    def step(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        self._estimate(step)
        text = "" if loss is None else f"loss {loss:.3f}"
        text += "" if tokens_per_second is None else f"  {tokens_per_second:,.0f} tokens/s"
        if self.console.is_terminal:
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=step, size=text)
        elif self._due(self.every) or step == self._steps:
            self.console.print(
                f"{self._title}: step {step} of {self._steps}  {text}", highlight=False
            )

    def _estimate(self, step: int) -> None:
        """Say once how long the steps that are left will take, as long as the first ones. The very
        first is not counted: it compiles."""
        now = self._clock()
        if self._first is None:
            self._first = step, now
        elif step == self._first[0] + FIRST_STEPS and step < self._steps:
            left = (now - self._first[1]) / FIRST_STEPS * (self._steps - step)
            self.note(f"about {_duration(left)} to go, without evaluations")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _open(self, *columns: ProgressColumn) -> None:
        """Start a bar of these columns; none: those of a training, as many as fit."""
        self.stop()
        if self.console.is_terminal:
            kind = Bar if columns else _TrainingBar
            self._bar = kind(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=None, size="")

    def _due(self, seconds: float) -> bool:
        now = self._clock()
        if now - self._last < seconds:
            return False
        self._last = now
        return True


def _duration(seconds: float) -> str:
    """A time in the largest unit of which there are two: 90 s, 12 min, 31 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class _TrainingBar(Bar):
    """A line of the columns that fit the terminal's width now: no number is ever cut."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        tasks = list(tasks)
        self.columns = tuple(_columns(self.console.width, tasks[0])) if tasks else ()
        return super().make_tasks_table(tasks)


def _columns(width: int, task: Task) -> list[ProgressColumn]:
    """The columns in reading order. What does not fit is dropped, the least useful first: the bar,
    the time spent, the title, the time left, the losses."""
    steps = 2 * len(str(task.total or 0)) + 1
    place = TextColumn("{task.completed:.0f}/{task.total:.0f}") if task.total else TextColumn("")
    # (reading order, column, characters), the most useful first
    choices: list[tuple[int, ProgressColumn, int]] = [
        (2, place, steps),
        (3, TextColumn("{task.fields[size]}"), max(30, len(task.fields["size"]))),
        (5, TimeRemainingColumn(compact=True), 8),
        (0, TextColumn("{task.description}"), len(task.description)),
        (4, TimeElapsedColumn(), 8),
        (1, BarColumn(bar_width=None), 12),
    ]
    shown, used = [], 0
    for order, column, characters in choices:
        if used + characters + 1 <= width:
            shown.append((order, column))
            used += characters + 1
    return [column for _, column in sorted(shown, key=lambda pair: pair[0])]
