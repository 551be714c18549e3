"""Values with their 95 % intervals.

A share of right answers has two sources of error: the finite test (a binomial, Wilson's interval)
and the seed that a model was trained from (Student's t over the seeds' shares). The wider of the
two is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # of a normal distribution, two-sided 95 %
# Student's t, two-sided 95 %, by degrees of freedom
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `seeds` models; NaN-free."""

    value: float
    low: float
    high: float
    seeds: int

    def share(self) -> str:
        """'0.86 (0.85 to 0.87)'."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def share(counts: Sequence[tuple[int, int]]) -> Estimate:
    """Right of asked, one pair for each seed: the mean share and the wider of both intervals."""
    right, asked = sum(r for r, _ in counts), sum(a for _, a in counts)
    pooled = right / asked
    middle = (pooled + Z * Z / (2 * asked)) / (1 + Z * Z / asked)
    reach = pooled * (1 - pooled) / asked + Z * Z / (4 * asked * asked)
    half = Z * math.sqrt(reach) / (1 + Z * Z / asked)
    low, high = middle - half, middle + half
    if len(counts) > 1:
        between = mean([r / a for r, a in counts])
        low, high = min(low, between.low), max(high, between.high)
    return Estimate(pooled, max(low, 0.0), min(high, 1.0), len(counts))


def mean(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's interval; of one value the interval is unknown (infinite)."""
    count, middle = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(middle, -math.inf, math.inf, count)
    half = _t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(middle, middle - half, middle + half, count)


def _t(degrees: int) -> float:
    if degrees < len(T95):
        return T95[degrees]
    return Z + (Z**3 + Z) / (4 * degrees)  # its expansion begun: 1.2 % short at 11, less beyond


def fisher(right: int, asked: int, other_right: int, other_asked: int) -> float:
    """Fisher's exact one-sided p: the chance of `right` or more of the successes falling here."""
    total, successes = asked + other_asked, right + other_right
    ways = math.comb(total, asked)
    return sum(
        math.comb(successes, k) * math.comb(total - successes, asked - k) / ways
        for k in range(right, min(asked, successes) + 1)
        if asked - k <= total - successes
    )
