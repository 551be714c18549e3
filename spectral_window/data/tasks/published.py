"""The paper's diagnostic tasks as its code draws them (PAPER.md section 2), flaws included.

Keys, values and noise share the tokens 1 ... 49, so the queried key also occurs by chance, followed
by something else: no solver can know which occurrence is meant. "Sorting" asks for the largest of
the tokens, one of which has been overwritten. The solvers here are the best possible (Bayes), and
their scores are the tasks' ceilings.

    associative, T = 8       37  5 21 | 9 44 30 12  5 -> 21      5 = key, 21 = value, key again
    sorting, T = 8           37  5 21   9 44 30 12  0 -> 44      44 = the largest
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectral_window.data.tasks.task import IGNORED, Batch, Task, register

VOCABULARY = 50  # tokens 1 ... 49 are drawn; 0 stands for what is missing


def _last(inputs: np.ndarray, answer: np.ndarray, distance: np.ndarray) -> Batch:
    """A batch that asks at the last position alone."""
    labels = np.full_like(inputs, IGNORED)
    labels[:, -1] = answer
    far = np.zeros_like(inputs)
    far[:, -1] = distance
    return Batch(inputs, labels, far)


@dataclass(frozen=True)
class _Lookup(Task):
    """Random tokens; the last one repeats the token at a random place; asked is its successor."""

    vocab_size: int = VOCABULARY

    def places(self, length: int) -> int:
        """The key stands at a position below this."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        inputs = rng.integers(1, self.vocab_size, (rows, length))
        place = rng.integers(0, self.places(length), rows)
        row = np.arange(rows)
        inputs[:, -1] = inputs[row, place]
        return _last(inputs, inputs[row, place + 1], length - 1 - place)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """All places where the key stands are equally likely the meant one, so the best guess is
        the token that most often follows it there."""
        places = self.places(inputs.shape[1])
        meant = inputs[:, :places] == inputs[:, -1:]
        votes = np.zeros((len(inputs), self.vocab_size), dtype=np.int64)
        rows, at = np.nonzero(meant)
        np.add.at(votes, (rows, inputs[rows, at + 1]), 1)
        guesses = np.zeros_like(inputs)
        guesses[:, -1] = votes.argmax(1)
        return guesses


@register("published-associative")
@dataclass(frozen=True)
class Associative(_Lookup):
    """The key stands in the first half. At T = 128 it is the paper's length generalisation."""

    def places(self, length: int) -> int:
        return length // 2


@register("published-induction")
@dataclass(frozen=True)
class Induction(_Lookup):
    """The key stands anywhere up to 10 tokens before the end."""

    shortest = 12

    def places(self, length: int) -> int:
        return length - 10


@register("published-needle")
@dataclass(frozen=True)
class Needle(_Lookup):
    """The key stands in the first 80 %; the paper asks it of the associative model at T = 256."""

    def places(self, length: int) -> int:
        return int(0.8 * length)


@register("published-sorting")
@dataclass(frozen=True)
class Sorting(Task):
    """Asked is the largest token, after the last one has been overwritten by 0."""

    vocab_size: int = VOCABULARY

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        inputs = rng.integers(1, self.vocab_size, (rows, length))
        largest = inputs.max(1)
        inputs[:, -1] = 0
        return _last(inputs, largest, np.zeros(rows, dtype=np.int64))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """The largest token in sight: likelier than each larger one that may be hidden."""
        guesses = np.zeros_like(inputs)
        guesses[:, -1] = inputs.max(1)
        return guesses
