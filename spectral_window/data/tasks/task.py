"""What a task is: `Task`, its `Batch`, the registry, and the ceiling by Monte Carlo."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from spectral_window.data.blocks import IGNORED
from spectral_window.errors import UserError, unknown
from spectral_window.registry import Registry

SPLITS = ("train", "test")
TASKS: Registry[type[Task]] = Registry("task")
register = TASKS.register


class Batch(NamedTuple):
    """Sequences and what is asked about them; int64 arrays of one shape [rows, length].

    inputs:   tokens, 0 ... vocab_size - 1.
    labels:   at t, the token to predict after reading inputs up to and with t; -100 elsewhere.
    distance: at t, how many tokens lie between the question at t and the place of its answer; 0
              where nothing is asked or the answer has no single place.
    """

    inputs: np.ndarray
    labels: np.ndarray
    distance: np.ndarray


class Task:
    """One diagnostic task. Its fields are its options: `make(name, **options)`."""

    name = ""
    vocab_size: int
    shortest = 8  # sequences below this length have no room for the question

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """`rows` sequences of `length` tokens. Raises UserError for a length without room."""
        if length < self.shortest:
            raise UserError(
                f"length {length} (task {self.name}): needs at least {self.shortest} tokens"
            )
        return self.draw(rng, rows, length)

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """As `batch`, for a length that has room."""
        raise NotImplementedError

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """The best prediction at every position where the task asks, from the inputs before and at
        it; anything elsewhere. [rows, length]."""
        raise NotImplementedError


def make(name: str, **options: Any) -> Task:
    """The task called `name`. Raises UserError for an unknown name or option."""
    kind = TASKS.find(name)
    fields = getattr(kind, "__dataclass_fields__", {})
    for key in options:
        if key not in fields:
            raise unknown(f"option of task {name}", key, fields)
    return kind(**options)


def generator(seed: int, split: str) -> np.random.Generator:
    """Random numbers for one split: the streams of "train" and "test" never meet, whatever the
    seeds."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return np.random.default_rng([SPLITS.index(split), seed])


def ceiling(task: Task, length: int, *, rows: int = 20_000, seed: int = 0) -> float:
    """Share of the questions that the best solver answers, by Monte Carlo (standard error at most
    0.5 / sqrt(rows), 0.0035 by default)."""
    right = asked = 0
    rng = generator(seed, "test")
    for _ in range(-(-rows // 1000)):
        batch = task.batch(rng, 1000, length)
        scored = batch.labels != IGNORED
        right += int((task.solve(batch.inputs)[scored] == batch.labels[scored]).sum())
        asked += int(scored.sum())
    return right / asked
