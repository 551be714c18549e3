"""Times on a GPU (and, for dry runs, on a CPU): the device's own clock, contestants interleaved.

A call shorter than a millisecond is repeated until it is one, and the mean of the repeats counts.
Every round runs each contestant once, in an order drawn anew; ratios are to the first contestant
within a round. A contestant that fails has a row that says why.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from spectral_window.lab.bench.timing import reason

Row = dict[str, Any]
Call = Callable[[], object]
SHORTEST, MOST_REPEATS = 1e-3, 50  # seconds of a measurement; calls in it


def clock(call: Call, device: str, repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` that follow each other."""
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


def race(
    lineup: Mapping[str, Call],
    device: str,
    *,
    seconds: float = 0.5,
    fewest: int = 5,
    most: int = 30,
    **tags: Any,
) -> list[Row]:
    """A row for each contestant of `lineup`: `tags`, contestant, status, and where that is "ok"
    milliseconds and ratio to the first (median, 10th and 90th percentile) and the rounds.

    Rounds go on for `seconds`, at least `fewest` and at most `most`.
    """
    failed: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, call in lineup.items():
        try:
            clock(call, device)  # compiles, loads, takes memory
            first = max(clock(call, device), 1e-6)
            repeats[name] = max(1, min(MOST_REPEATS, round(SHORTEST / first)))
        except Exception as error:  # whatever it is, the row tells it
            failed[name] = reason(error)
    rounds: list[dict[str, float]] = []
    order, draw, begin = list(repeats), random.Random(0), time.perf_counter()
    while order and len(rounds) < most:
        if len(rounds) >= fewest and time.perf_counter() - begin > seconds:
            break
        draw.shuffle(order)
        rounds.append({name: clock(lineup[name], device, repeats[name]) for name in order})
    base = next(iter(lineup))
    rows = []
    for name in lineup:
        row: Row = {**tags, "contestant": name, "status": failed.get(name, "ok")}
        if name in repeats:
            row |= spread("milliseconds", [1000 * one[name] for one in rounds])
            if base in repeats:
                row |= spread("ratio", [one[name] / one[base] for one in rounds])
            row["rounds"] = len(rounds)
        rows.append(row)
    return rows


def spread(key: str, values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile as `key`, `key`_p10 and `key`_p90, in four digits."""
    low, high = np.quantile(values, (0.1, 0.9))
    numbers = {key: median(values), f"{key}_p10": float(low), f"{key}_p90": float(high)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}
