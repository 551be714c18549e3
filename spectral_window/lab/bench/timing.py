"""The measurement of time: calls in one process, taking turns.

    warm-up       a call or two each: compiles, loads, maps memory
    round 1...n   every call once, in an order drawn anew for each round

Whatever else the machine does affects all of them, so what counts is the ratio to the first call
*within* a round. Its median and its 10th to 90th percentile over the rounds are reported. A call
shorter than a millisecond is repeated until it is one, and the mean of the repeats counts. Rounds
continue until the row's seconds are used up, and there are at least three. On a GPU the time is
taken by its own clock.

What cannot be timed has a row too, with the reason: wrong numbers, an error, or left out because a
smaller size already took too long.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from spectral_window.lab.jobs import Row

Call = Callable[[], object]
SHORTEST = 1e-3  # seconds: what is shorter is repeated
MOST_ON_GPU = 50  # repeats there
LONG = 5.0  # seconds of all calls: no second warm-up


@dataclass
class Timing:
    """Times of the same calls at growing sizes.

    seconds:  of rounds for each size; fewest and most bound the number of rounds.
    longest:  a call of more seconds than this is left out at later sizes, unless it is in `always`.
    out:      name -> why it is not timed.
    warm:     names that ran before, at another size.
    device:   "cpu" or "cuda".
    """

    seconds: float = 2.0
    fewest: int = 3
    most: int = 30
    longest: float = 3.0
    always: tuple[str, ...] = ()
    out: dict[str, str] = field(default_factory=dict)
    warm: set[str] = field(default_factory=set)
    device: str = "cpu"

    def run(self, calls: Mapping[str, Call], **tags: Any) -> list[Row]:
        """A row for each of `calls` (by name), whose ratios are to the first: `tags`, contestant
        (the name), status, and where that is "ok" milliseconds, ratio, their 10th and 90th
        percentiles, and the number of rounds."""
        failed = {name: why for name, why in self.out.items() if name in calls}
        first: dict[str, float] = {}
        for name, call in calls.items():
            if name not in failed:
                try:
                    first[name] = clock(call, self.device)
                    if first[name] < 0.1 or self.device != "cpu":
                        # without compiling and first-time loading
                        first[name] = clock(call, self.device)
                except Exception as error:  # whatever it is, it stands in the row
                    failed[name] = reason(error)
        rounds = self._rounds({name: calls[name] for name in first}, first)
        for name in first:
            spent = min(one[name] for one in rounds)  # without what only a first call takes
            if spent > self.longest and name not in self.always:
                self.out[name] = f"left out: over {self.longest:g} s at a smaller size"
        self.warm |= set(first)
        base = next(iter(calls))
        return [
            {**tags, "contestant": name}
            | ({"status": failed[name]} if name in failed else _row(name, base, rounds))
            for name in calls
        ]

    def _rounds(self, calls: Mapping[str, Call], first: Mapping[str, float]) -> list[dict]:
        # Long calls that ran before need no warm-up: theirs was the first round.
        counts = set(first) <= self.warm and sum(first.values()) > LONG
        rounds = [dict(first)] if counts else []
        most = math.inf if self.device == "cpu" else MOST_ON_GPU
        repeats = {
            name: int(max(1, min(most, round(SHORTEST / max(spent, 1e-7)))))
            for name, spent in first.items()
        }
        begin, order, draw = time.perf_counter(), list(calls), random.Random(0)
        begin -= sum(first.values()) if counts else 0.0
        while calls and len(rounds) < self.most:
            if len(rounds) >= self.fewest and time.perf_counter() - begin > self.seconds:
                break
            draw.shuffle(order)
            rounds.append({name: clock(calls[name], self.device, repeats[name]) for name in order})
        return rounds


def time_on(
    device: str, calls: Mapping[str, Call], *, seconds: float = 0.5, fewest: int = 5, **tags: Any
) -> list[Row]:
    """The rows of `Timing.run` on a GPU, or for a dry run on a CPU, with no call left out."""
    timing = Timing(seconds=seconds, fewest=fewest, longest=math.inf, device=device)
    return timing.run(calls, **tags)


def graphed(call: Call, device: str, pool: Any = None) -> Call:
    """`call` as a CUDA graph, which has no time of the host; on a CPU the call itself.

    pool: memory that it shares with other graphs (`torch.cuda.graph_pool_handle`).
    """
    if device == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def clock(call: Call, device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` that follow one another."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000 / repeats


def _row(name: str, base: str, rounds: list[dict[str, float]]) -> Row:
    times = [1000 * one[name] for one in rounds]
    row: Row = {"status": "ok", **spread("milliseconds", times), "rounds": len(rounds)}
    if base in rounds[0]:
        row |= spread("ratio", [one[name] / one[base] for one in rounds])
    return row


def spread(key: str, values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile as `key`, `key`_p10 and `key`_p90, in four digits."""
    low, high = np.quantile(values, (0.1, 0.9))
    numbers = {key: median(values), f"{key}_p10": float(low), f"{key}_p90": float(high)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def relative_error(y: Any, truth: Any) -> float:
    """|y - truth| / |truth| over all elements (tensors)."""
    return float((y.detach().double() - truth).norm() / truth.norm())


def disqualified(error: Callable[[], float], bar: float) -> str | None:
    """Why a call is not timed: its `error` is above the bar, or cannot even be computed. None if it
    may be."""
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
