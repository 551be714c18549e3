"""The paper's diagnostic tasks as its code draws them (PAPER.md section 2), including their flaws.

Keys, values and noise share the tokens 1 ... 49. So the queried key also occurs by chance, followed
by another token, and no solver can know which occurrence is the right one. "Sorting" asks for the
largest of the tokens, of which one has been overwritten. The solvers here are the best possible
(Bayes); their scores are the ceilings of the tasks.

    associative, T = 8       37  5 21 | 9 44 30 12  5 -> 21      5 = key, 21 = value, key again
    sorting, T = 8           37  5 21   9 44 30 12  0 -> 44      44 = the largest
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectral_window.data.tasks.task import IGNORED, Batch, Task, register

VOCABULARY = 50  # tokens 1 ... 49 are drawn; 0 stands for an overwritten token


def _last(inputs: np.ndarray, answer: np.ndarray, distance: np.ndarray) -> Batch:
    """Return a batch with a question at the last position only."""
    labels = np.full_like(inputs, IGNORED)
    labels[:, -1] = answer
    far = np.zeros_like(inputs)
    far[:, -1] = distance
    return Batch(inputs, labels, far)


@dataclass(frozen=True)
class _Lookup(Task):
    """The last token repeats one at a random place; the question is the token after that place."""

    vocab_size: int = VOCABULARY

    def places(self, length: int) -> int:
        """Return a bound: the key is at a position below it."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        inputs = rng.integers(1, self.vocab_size, (rows, length))
        place = rng.integers(0, self.places(length), rows)
        row = np.arange(rows)
        inputs[:, -1] = inputs[row, place]
        return _last(inputs, inputs[row, place + 1], length - 1 - place)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """Return the token that most often follows the key: all its places are equally likely."""
        places = self.places(inputs.shape[1])
        is_key = inputs[:, :places] == inputs[:, -1:]
        votes = np.zeros((len(inputs), self.vocab_size), dtype=np.int64)
        rows, at = np.nonzero(is_key)
        np.add.at(votes, (rows, inputs[rows, at + 1]), 1)
        guesses = np.zeros_like(inputs)
        guesses[:, -1] = votes.argmax(1)
        return guesses


@register("published-associative")
@dataclass(frozen=True)
class Associative(_Lookup):
    """The key is in the first half. At T = 128 it is the paper's test of length generalisation."""

    def places(self, length: int) -> int:
        return length // 2


@register("published-induction")
@dataclass(frozen=True)
class Induction(_Lookup):
    """The key is anywhere up to 10 tokens before the end."""

    shortest = 12

    def places(self, length: int) -> int:
        return length - 10


@register("published-needle")
@dataclass(frozen=True)
class Needle(_Lookup):
    """The key is in the first 80 %; the paper tests the associative model with it at T = 256."""

    def places(self, length: int) -> int:
        return int(0.8 * length)


@register("published-sorting")
@dataclass(frozen=True)
class Sorting(Task):
    """The question is the largest token, after the last one has been overwritten by 0."""

    vocab_size: int = VOCABULARY

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        inputs = rng.integers(1, self.vocab_size, (rows, length))
        largest = inputs.max(1)
        inputs[:, -1] = 0
        return _last(inputs, largest, np.zeros(rows, dtype=np.int64))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        """Return the largest visible token: more likely than any larger one that may be hidden."""
        guesses = np.zeros_like(inputs)
        guesses[:, -1] = inputs.max(1)
        return guesses
