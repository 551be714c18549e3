"""The base class of tasks, their batches, their registry, and ceilings by Monte Carlo."""

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
    """Sequences with their labels; int64 arrays of one shape [rows, length].

    Attributes:
        inputs: tokens, 0 ... vocab_size - 1.
        labels: at t, the token to predict from the inputs up to and including t; -100 if there is
            no question.
        distance: at t, the number of tokens from the place of the answer to the question at t; 0 if
            there is no question, or no single place.
    """

    inputs: np.ndarray
    labels: np.ndarray
    distance: np.ndarray


class Task:
    """Base class of tasks. The fields of a task are its options: `make(name, **options)`."""

    name = ""
    vocab_size: int
    shortest = 8  # the least length of a sequence

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences.

        Args:
            rng: the random generator.
            rows: number of sequences.
            length: tokens per sequence.

        Raises:
            UserError: `length` is too short for the task.
        """
        if length < self.shortest:
            raise UserError(
                f"length {length} (task {self.name}): needs at least {self.shortest} tokens"
            )
        return self.draw(rng, rows, length)

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of a valid length; see `batch`."""
        raise NotImplementedError

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """Return the best predictions [rows, length] from the inputs up to each position.

        They are arbitrary where there is no question.
        """
        raise NotImplementedError


def make(name: str, **options: Any) -> Task:
    """Return the task called `name`.

    Raises:
        UserError: an unknown name or option.
    """
    kind = TASKS.find(name)
    fields = getattr(kind, "__dataclass_fields__", {})
    for key in options:
        if key not in fields:
            raise unknown(f"option of task {name}", key, fields)
    return kind(**options)


def generator(seed: int, split: str) -> np.random.Generator:
    """Return a random generator for "train" or "test"; their streams differ for all seeds."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return np.random.default_rng([SPLITS.index(split), seed])


def ceiling(task: Task, length: int, *, rows: int = 20_000, seed: int = 0) -> float:
    """Return the fraction of questions that the best solver answers correctly, by Monte Carlo.

    The standard error is at most 0.5 / sqrt(rows), 0.0035 by default.
    """
    right = asked = 0
    rng = generator(seed, "test")
    for _ in range(-(-rows // 1000)):
        batch = task.batch(rng, 1000, length)
        scored = batch.labels != IGNORED
        right += int((task.solve(batch.inputs)[scored] == batch.labels[scored]).sum())
        asked += int(scored.sum())
    return right / asked
