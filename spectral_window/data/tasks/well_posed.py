"""The paper's tasks, posed so that each question has one answer: every ceiling is 1.

Keys, values and noise are drawn from disjoint vocabularies and a key occurs once, so only the pair
itself determines the answer. Any length is possible: the rest is noise, which a model must ignore.
The token ranges are, in order: a few special tokens, keys, values, noise.

    recall, pairs = 2, T = 12      . K3 V7 . . K1 V2 . . ? K1 K3 -> V2 at K1, V7 at K3
    needle, T = 8                  . . ! V4 . . . ! -> V4
    induction, T = 8               5 2 ! 7 1 5 3 ! -> 7           the answer is a noise token
    sorting, n = 3                 7 2 5 | 2 5 -> (| -> 2, 2 -> 5, 5 -> 7)
    mqar, pairs = 2, T = 12        K3 V7 K1 V2 K1 . . K3 . . . .  -> V2 at K1, V7 at K3
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectral_window.data.tasks.task import IGNORED, Batch, Task, register


def distinct(rng: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """Draw [rows, count] integers below `below`, different in each row, in random order."""
    return rng.random((rows, below)).argsort(1)[:, :count]


def spaced(rng: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """Draw [rows, count] ascending places below `below`, no two adjacent: each has two tokens."""
    free = np.sort(distinct(rng, rows, count, below - count), 1)
    return free + np.arange(count)


def follower(inputs: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the token after the first occurrence of `key` [rows]: [rows]."""
    place = (inputs == key[:, None]).argmax(1)
    return inputs[np.arange(len(inputs)), place + 1]


@register("recall")
@dataclass(frozen=True)
class Recall(Task):
    """Associative recall: `pairs` keys with their values anywhere in noise.

    At the end all keys are repeated in another order, each asking for its value.
    """

    pairs: int = 4
    keys: int = 16
    values: int = 16
    noise: int = 16

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + self.keys + self.values + self.noise

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return 3 * self.pairs + 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row, context = np.arange(rows)[:, None], length - self.pairs - 1
        inputs = 1 + self.keys + self.values + rng.integers(0, self.noise, (rows, length))
        place = spaced(rng, rows, self.pairs, context)
        key = 1 + distinct(rng, rows, self.pairs, self.keys)
        value = 1 + self.keys + rng.integers(0, self.values, (rows, self.pairs))
        inputs[row, place], inputs[row, place + 1] = key, value
        order = distinct(rng, rows, self.pairs, self.pairs)
        inputs[:, context] = 0
        inputs[:, context + 1 :] = key[row, order]
        labels, distance = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        labels[:, context + 1 :] = value[row, order]
        distance[:, context + 1 :] = np.arange(context + 1, length) - place[row, order]
        return Batch(inputs, labels, distance)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        guesses = np.zeros_like(inputs)
        for at in range(inputs.shape[1] - self.pairs, inputs.shape[1]):
            guesses[:, at] = follower(inputs, inputs[:, at])
        return guesses


@register("needle")
@dataclass(frozen=True)
class Needle(Task):
    """Needle in a haystack: one marked value anywhere in noise; at the end the mark is repeated."""

    values: int = 16
    noise: int = 16

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + self.values + self.noise

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row = np.arange(rows)
        inputs = 1 + self.values + rng.integers(0, self.noise, (rows, length))
        place = rng.integers(0, length - 2, rows)
        value = 1 + rng.integers(0, self.values, rows)
        inputs[row, place], inputs[row, place + 1], inputs[:, -1] = 0, value, 0
        return _at_end(inputs, value, length - 1 - place)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        return _guess_at_end(inputs, follower(inputs, inputs[:, -1]))


@register("induction")
@dataclass(frozen=True)
class Induction(Task):
    """Induction: a trigger that occurs once, and is repeated at the end.

    The token after it is drawn like all others, so only its place distinguishes it from noise.
    """

    tokens: int = 32

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + self.tokens

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row = np.arange(rows)
        inputs = 1 + rng.integers(0, self.tokens, (rows, length))
        place = rng.integers(0, length - 2, rows)
        inputs[row, place], inputs[:, -1] = 0, 0
        return _at_end(inputs, inputs[row, place + 1], length - 1 - place)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        return _guess_at_end(inputs, follower(inputs, inputs[:, -1]))


@register("sorting")
@dataclass(frozen=True)
class Sorting(Task):
    """Sorting: n = length // 2 tokens, a separator, and the same tokens in ascending order.

    Each sorted token is predicted from all tokens before it. A token can occur several times.
    """

    tokens: int = 32

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + self.tokens

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        count = length // 2
        given = 1 + rng.integers(0, self.tokens, (rows, count))
        order = np.sort(given, 1)
        separator = np.zeros((rows, 1), dtype=np.int64)
        inputs = np.concatenate((given, separator, order[:, :-1]), 1)
        labels = np.full_like(inputs, IGNORED)
        labels[:, count:] = order
        return Batch(inputs, labels, np.zeros_like(inputs))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        count = inputs.shape[1] // 2
        guesses = np.zeros_like(inputs)
        guesses[:, count:] = np.sort(inputs[:, :count], 1)
        return guesses


@register("mqar")
@dataclass(frozen=True)
class MultiQuery(Task):
    """Multi-query associative recall (Zoology, arXiv 2312.04927).

    The pairs come first, then every key is asked once, after gaps that follow a power law (small
    gaps are more likely). Between the questions is noise.
    """

    pairs: int = 8
    keys: int = 64
    values: int = 64
    noise: int = 64
    power: float = 0.01

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.keys + self.values + self.noise

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return 4 * self.pairs

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row, context = np.arange(rows)[:, None], 2 * self.pairs
        inputs = self.keys + self.values + rng.integers(0, self.noise, (rows, length))
        key = distinct(rng, rows, self.pairs, self.keys)
        value = self.keys + rng.integers(0, self.values, (rows, self.pairs))
        inputs[:, 0:context:2], inputs[:, 1:context:2] = key, value
        # places without replacement, each with weight gap ** (power - 1): the largest of
        # log(weight) + Gumbel noise
        places = (length - context) // 2
        weight = (self.power - 1) * np.log(np.arange(1, places + 1))
        gap = (-(weight + rng.gumbel(size=(rows, places)))).argsort(1)[:, : self.pairs]
        asked = context + 2 * gap
        inputs[row, asked] = key
        labels, distance = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        labels[row, asked] = value
        distance[row, asked] = asked - 2 * np.arange(self.pairs)
        return Batch(inputs, labels, distance)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        context = 2 * self.pairs
        value_of = np.zeros((len(inputs), self.vocab_size), dtype=np.int64)
        row = np.arange(len(inputs))[:, None]
        value_of[row, inputs[:, 0:context:2]] = inputs[:, 1:context:2]
        return value_of[row, inputs]


def _at_end(inputs: np.ndarray, answer: np.ndarray, distance: np.ndarray) -> Batch:
    labels, far = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
    labels[:, -1], far[:, -1] = answer, distance
    return Batch(inputs, labels, far)


def _guess_at_end(inputs: np.ndarray, answer: np.ndarray) -> np.ndarray:
    guesses = np.zeros_like(inputs)
    guesses[:, -1] = answer
    return guesses
