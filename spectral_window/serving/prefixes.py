"""States after the beginnings of prompts, so that what many requests begin with is read once.

A state of constant size is a value: keeping one costs its bytes, whatever it has read, and a row
that starts from it changes nothing of it. Prompts are compared by digests of their first n ids, at
the few n where a state is kept, so a look-up reads the prompt once and compares no text.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from spectral_window.generation.session_file import leaves

States = Sequence[Any]


class Prefixes:
    """The states of prefixes used last, within a number of bytes.

    Args:
        capacity: bytes of all states together; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._kept: OrderedDict[bytes, tuple[int, States, int]] = OrderedDict()
        self._lengths: dict[int, int] = {}  # length -> how many prefixes of it are kept

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Sequence[int]) -> tuple[int, States] | None:
        """Return the longest kept prefix of `ids`, as (its length, the states after it).

        At least one token is left: the one whose logits are wanted.
        """
        lengths = sorted(n for n in self._lengths if n < len(ids))
        for length, key in reversed(list(zip(lengths, digests(ids, lengths), strict=True))):
            if key in self._kept:
                self._kept.move_to_end(key)
                return length, self._kept[key][1]
        return None

    def keep(self, ids: Sequence[int], length: int, states: States) -> None:
        """Keep the states after the first `length` of `ids`; the ones used longest ago go."""
        (key,) = digests(ids, [length])
        size = sum(t.nbytes for state in states for _, t in leaves("", state))
        if key in self._kept or size > self.capacity:
            return
        self._kept[key] = length, states, size
        self._lengths[length] = self._lengths.get(length, 0) + 1
        self.bytes += size
        while self.bytes > self.capacity:
            _, (gone, _, freed) = self._kept.popitem(last=False)
            self.bytes -= freed
            self._lengths[gone] -= 1
            if not self._lengths[gone]:
                del self._lengths[gone]


def digests(ids: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Return a digest of the first n of `ids` for each n of `lengths`, which ascend."""
    content = np.asarray(ids[: lengths[-1]] if lengths else (), dtype=np.int32).tobytes()
    running, found, at = hashlib.blake2b(digest_size=16), [], 0
    for length in lengths:
        running.update(content[4 * at : 4 * length])
        at = length
        found.append(running.copy().digest())
    return found
