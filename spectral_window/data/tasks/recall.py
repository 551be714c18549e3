"""Recall where the value does not simply follow its key, and state tracking.

A memory whose keys come from the previous token (`nn/memory.py`) fits the order "K V"; these tasks
have another one. As in `well_posed.py` the vocabularies are disjoint, every ceiling is 1, and at
the end, after a separator, all keys are repeated in another order, each asking for its value.

    gap, pairs = 2, gap = 2        . K3 . . V7 . K1 . V2 . ? K1 K3 -> V2 at K1, V7 at K3
    value-first, pairs = 2         . V7 K3 . . V2 K1 . ? K1 K3     -> V2 at K1, V7 at K3
    two-token-keys, side = 2       K1 K5 V2 . K1 K8 V4 K6 K5 V9 . K6 K8 V1 . ? K1 K8 ... -> V4 at K8
    overwriting, pairs = 2         K3 V7 . K1 V2 K3 V5 . ? K1 K3   -> V2 at K1, V5 at K3
    two-hops, pairs = 2            K4 V2 . K3 K4 . K1 K6 K6 V7 ? K1 K3 -> V7 at K1, V2 at K3
    parity                         1 0 1 1 0 -> 1 1 0 1 1          the sum of all bits so far, mod 2
    permutations                   2 1 1 5 -> 2 4 2 3              the product so far, 2 = (1 0 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from spectral_window.data.tasks.task import IGNORED, Batch, Task, register
from spectral_window.data.tasks.well_posed import distinct, follower, spaced


@dataclass(frozen=True)
class _Pairs(Task):
    """Keys and values in noise, then a separator and every key again.

    The token ranges are, in order: the separator, keys, values, noise.
    """

    pairs: int = 4
    keys: int = 16
    values: int = 16
    noise: int = 16

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + self.keys + self.values + self.noise

    def _noise(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        return 1 + self.keys + self.values + rng.integers(0, self.noise, (rows, length))

    def _keys(self, rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
        return 1 + distinct(rng, rows, count, self.keys)

    def _values(self, rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
        return 1 + self.keys + rng.integers(0, self.values, (rows, count))

    def _is_value(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens > self.keys) & (tokens <= self.keys + self.values)


def _ask(
    rng: np.random.Generator,
    inputs: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    place: np.ndarray,
) -> Batch:
    """Write the separator and the questions to the end of `inputs`, in place.

    Args:
        rng: the random generator.
        inputs: [rows, length].
        key: [rows, count, tokens]; repeated in another order, with a question at the last token.
        value: [rows, count], the answers.
        place: [rows, count], the place of the last token of each key in the context.
    """
    rows, count, width = key.shape
    row, begin = np.arange(rows)[:, None], inputs.shape[1] - count * width
    order = distinct(rng, rows, count, count)
    inputs[:, begin - 1] = 0
    inputs[:, begin:] = key[row, order].reshape(rows, -1)
    asked = begin + width * np.arange(1, count + 1) - 1
    labels, distance = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
    labels[:, asked], distance[:, asked] = value[row, order], asked - place[row, order]
    return Batch(inputs, labels, distance)


@register("gap")
@dataclass(frozen=True)
class Gap(_Pairs):
    """Between a key and its value are 1 to `gap` tokens of noise, a random number.

    No other pair starts before the value.
    """

    gap: int = 4

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return self.pairs * (3 + self.gap) + 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row, context = np.arange(rows)[:, None], length - self.pairs - 1
        inputs = self._noise(rng, rows, length)
        behind = 1 + rng.integers(1, self.gap + 1, (rows, self.pairs))
        taken = np.cumsum(behind + 1, 1)
        free = context - taken[:, -1:]
        before = np.sort((rng.random((rows, self.pairs)) * (free + 1)).astype(np.int64), 1)
        place = before + taken - (behind + 1)
        key, value = self._keys(rng, rows, self.pairs), self._values(rng, rows, self.pairs)
        inputs[row, place], inputs[row, place + behind] = key, value
        return _ask(rng, inputs, key[..., None], value, place)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        guesses, row = np.zeros_like(inputs), np.arange(len(inputs))
        places, values = np.arange(inputs.shape[1]), self._is_value(inputs)
        for at in range(inputs.shape[1] - self.pairs, inputs.shape[1]):
            place = (inputs == inputs[:, at, None]).argmax(1)
            first = (values & (places > place[:, None])).argmax(1)
            guesses[:, at] = inputs[row, first]
        return guesses


@register("value-first")
@dataclass(frozen=True)
class ValueFirst(_Pairs):
    """The value is right before its key."""

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return 3 * self.pairs + 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row, context = np.arange(rows)[:, None], length - self.pairs - 1
        inputs = self._noise(rng, rows, length)
        place = spaced(rng, rows, self.pairs, context)
        key, value = self._keys(rng, rows, self.pairs), self._values(rng, rows, self.pairs)
        inputs[row, place], inputs[row, place + 1] = value, key
        return _ask(rng, inputs, key[..., None], value, place + 1)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        guesses, row = np.zeros_like(inputs), np.arange(len(inputs))
        for at in range(inputs.shape[1] - self.pairs, inputs.shape[1]):
            guesses[:, at] = inputs[row, (inputs == inputs[:, at, None]).argmax(1) - 1]
        return guesses


@register("two-token-keys")
@dataclass(frozen=True)
class TwoTokenKeys(_Pairs):
    """A key is two tokens, and neither determines it alone.

    Each of `side` first tokens is combined with each of `side` second tokens: side^2 keys (`pairs`
    is not used).
    """

    side: int = 2

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return 5 * self.side**2 + 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        count = self.side**2
        row, context = np.arange(rows)[:, None], length - 2 * count - 1
        inputs = self._noise(rng, rows, length)
        # places of three tokens each: distinct places, spread by two tokens each
        place = np.sort(distinct(rng, rows, count, context - 2 * count), 1) + 2 * np.arange(count)
        tokens = self._keys(rng, rows, 2 * self.side)
        which = distinct(rng, rows, count, count)
        key = np.stack(
            (tokens[row, which // self.side], tokens[row, self.side + which % self.side]), -1
        )
        value = self._values(rng, rows, count)
        inputs[row, place], inputs[row, place + 1] = key[..., 0], key[..., 1]
        inputs[row, place + 2] = value
        return _ask(rng, inputs, key, value, place + 1)

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        guesses, row = np.zeros_like(inputs), np.arange(len(inputs))
        for at in range(inputs.shape[1] - 2 * self.side**2 + 1, inputs.shape[1], 2):
            both = (inputs[:, :-1] == inputs[:, at - 1, None]) & (
                inputs[:, 1:] == inputs[:, at, None]
            )
            guesses[:, at] = inputs[row, both.argmax(1) + 2]
        return guesses


@register("overwriting")
@dataclass(frozen=True)
class Overwriting(_Pairs):
    """Keys are overwritten: `pairs` keys, each at least once, in twice as many pairs.

    The answer is the last value of a key.
    """

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return 5 * self.pairs + 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        writes = 2 * self.pairs
        row, context = np.arange(rows)[:, None], length - self.pairs - 1
        inputs = self._noise(rng, rows, length)
        place = spaced(rng, rows, writes, context)
        key = self._keys(rng, rows, self.pairs)
        once = np.broadcast_to(np.arange(self.pairs), (rows, self.pairs))
        again = rng.integers(0, self.pairs, (rows, self.pairs))
        which = np.concatenate((once, again), 1)[row, distinct(rng, rows, writes, writes)]
        value = self._values(rng, rows, writes)
        inputs[row, place], inputs[row, place + 1] = key[row, which], value
        own = which[:, None] == np.arange(self.pairs)[:, None]  # [rows, keys, writes]
        last = writes - 1 - own[..., ::-1].argmax(-1)
        return _ask(rng, inputs, key[..., None], value[row, last], place[row, last])

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        guesses, context = np.zeros_like(inputs), inputs.shape[1] - self.pairs - 1
        backwards = inputs[:, :context][:, ::-1]
        for at in range(context + 1, inputs.shape[1]):
            behind = (backwards == inputs[:, at, None]).argmax(1)
            guesses[:, at] = inputs[np.arange(len(inputs)), context - behind]
        return guesses


@register("two-hops")
@dataclass(frozen=True)
class TwoHops(_Pairs):
    """A key is followed by another key, and that one, elsewhere, by the answer.

    The two pairs can be anywhere, in either order.
    """

    pairs: int = 2

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return 5 * self.pairs + 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        row, context = np.arange(rows)[:, None], length - self.pairs - 1
        inputs = self._noise(rng, rows, length)
        steps = 2 * self.pairs
        place = spaced(rng, rows, steps, context)
        place = place[row, distinct(rng, rows, steps, steps)]
        key, value = self._keys(rng, rows, steps), self._values(rng, rows, self.pairs)
        inputs[row, place] = key
        inputs[row, place + 1] = np.concatenate((key[:, self.pairs :], value), 1)
        first = slice(None, self.pairs)
        return _ask(rng, inputs, key[:, first, None], value, place[:, first])

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        guesses, row = np.zeros_like(inputs), np.arange(len(inputs))
        values = np.roll(self._is_value(inputs), -1, 1)  # before a value is its own key
        for at in range(inputs.shape[1] - self.pairs, inputs.shape[1]):
            middle = follower(inputs, inputs[:, at])
            place = ((inputs == middle[:, None]) & values).argmax(1)
            guesses[:, at] = inputs[row, place + 1]
        return guesses


@register("parity")
@dataclass(frozen=True)
class Parity(Task):
    """State tracking: random bits; the question at each is the parity of all bits up to it."""

    vocab_size: int = 2

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        inputs = rng.integers(0, 2, (rows, length))
        return Batch(inputs, self.solve(inputs), np.zeros_like(inputs))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        return np.cumsum(inputs, 1) % 2


@register("permutations")
@dataclass(frozen=True)
class Permutations(Task):
    """State tracking: random permutations of three; the question at each is their product so far.

    The word problem of the smallest group in which order counts. A token is the number of a
    permutation in lexicographic order.
    """

    vocab_size: int = 6

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        inputs = rng.integers(0, 6, (rows, length))
        return Batch(inputs, self.solve(inputs), np.zeros_like(inputs))

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        every = list(permutations(range(3)))
        # the number of "first b, then a" is after[a, b]
        after = np.array(
            [[every.index(tuple(a[i] for i in b)) for b in every] for a in every], dtype=np.int64
        )
        product, state = np.empty_like(inputs), np.zeros(len(inputs), dtype=np.int64)
        for at in range(inputs.shape[1]):
            state = after[inputs[:, at], state]
            product[:, at] = state
        return product
