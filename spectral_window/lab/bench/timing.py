"""The measurement itself: contestants in one process, taking turns.

    warm-up       a call or two each: compiles, loads, maps memory
    round 1...n   every contestant once, in an order drawn anew each round

Whatever else the machine does falls on all of them, so what counts is the ratio to the first
contestant *within* a round; its median and its 10th to 90th percentile over the rounds are kept.
A call shorter than a millisecond is repeated until it is one, and the mean of the repeats counts.
Rounds go on until the row's seconds are used up, at least three, whatever they cost.

Who may not run has a row too, and the row says why: found wrong by the gate, failed (with the
error), or left out because a shorter size already took too long.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

Call = Callable[[], object]
SHORTEST = 1e-3  # seconds: what is shorter is repeated
LONG = 5.0  # seconds of all contestants: no second warm-up


@dataclass
class Race:
    """Races of the same contestants at growing sizes.

    seconds:  of rounds for each lineup; fewest and most bound the number of rounds.
    longest:  a contestant whose call takes more seconds than this is left out at later sizes,
              unless it is `always` wanted.
    out:      contestant -> why it may not run.
    warm:     contestants that ran before, at another size.
    """

    seconds: float = 2.0
    fewest: int = 3
    most: int = 30
    longest: float = 3.0
    always: tuple[str, ...] = ()
    out: dict[str, str] = field(default_factory=dict)
    warm: set[str] = field(default_factory=set)

    def run(self, lineup: Mapping[str, Call], **tags: Any) -> list[dict[str, Any]]:
        """A row for each contestant of `lineup` (name -> one call), the first being the measure of
        all: `tags`, contestant, status, and where that is "ok" milliseconds, ratio, their 10th and
        90th percentiles, and the number of rounds."""
        failed = {name: why for name, why in self.out.items() if name in lineup}
        first: dict[str, float] = {}
        for name, call in lineup.items():
            if name not in failed:
                try:
                    first[name] = _clock(call)
                    if first[name] < 0.1:
                        first[name] = _clock(call)  # without compiling and first-time loading
                except Exception as error:  # whatever it is, the row tells it
                    failed[name] = reason(error)
        rounds = self._rounds({name: lineup[name] for name in first}, first)
        for name in first:
            spent = min(one[name] for one in rounds)  # without what only a first call takes
            if spent > self.longest and name not in self.always:
                self.out[name] = f"left out: over {self.longest:g} s at a smaller size"
        self.warm |= set(first)
        return [
            {**tags, "contestant": name}
            | (
                {"status": failed[name]}
                if name in failed
                else _row(name, next(iter(lineup)), rounds)
            )
            for name in lineup
        ]

    def _rounds(self, lineup: Mapping[str, Call], first: Mapping[str, float]) -> list[dict]:
        # Long calls of contestants that ran before need no warm-up: theirs was the first round.
        counts = set(first) <= self.warm and sum(first.values()) > LONG
        rounds = [dict(first)] if counts else []
        repeats = {
            name: max(1, round(SHORTEST / max(spent, 1e-7))) for name, spent in first.items()
        }
        begin, order, draw = time.perf_counter(), list(lineup), random.Random(0)
        begin -= sum(first.values()) if counts else 0.0
        while lineup and len(rounds) < self.most:
            if len(rounds) >= self.fewest and time.perf_counter() - begin > self.seconds:
                break
            draw.shuffle(order)
            rounds.append({name: _clock(lineup[name], repeats[name]) for name in order})
        return rounds


def _clock(call: Call, repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats`."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _row(name: str, base: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    spent = [1000 * one[name] for one in rounds]
    row = {"status": "ok", **_spread("milliseconds", spent), "rounds": len(rounds)}
    if base in rounds[0]:
        row |= _spread("ratio", [one[name] / one[base] for one in rounds])
    return row


def _spread(key: str, values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.1, 0.9))
    numbers = {key: median(values), f"{key}_p10": float(low), f"{key}_p90": float(high)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def relative_error(y: Any, truth: Any) -> float:
    """|y - truth| / |truth| over all elements (tensors)."""
    return float((y.detach().double() - truth).norm() / truth.norm())


def disqualified(error: Callable[[], float], bar: float) -> str | None:
    """Why a contestant gets no time: its `error` is above the bar, or cannot even be computed.
    None if it may run."""
    try:
        off = error()
    except Exception as failure:
        return reason(failure)
    return None if off <= bar else f"wrong: relative error {off:.1e}, allowed {bar:.0e}"


def reason(error: Exception) -> str:
    """An exception as a status."""
    if isinstance(error, ImportError):
        return f"not here: {error}"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
