"""How fast are an operator's methods here, side by side?

Every contestant is first held to the float64 truth, on a length where that is affordable: a fast
wrong answer has no time. Then all run in one process, taking turns, round after round, so that
whatever else the machine does falls on all of them. What counts is the ratio within a round; its
median and its spread (10th to 90th percentile) over the rounds are shown. A contestant that fails
says why and has no number.

    spectral   scan, chunked, the paper's FFT, and a copy of the input: nothing that reads u and
               writes y can be faster than that
    window     chunked, and full causal attention by PyTorch's fused kernel
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import unknown
from spectral_window.ops import Modes, spectral_conv, window_attention
from spectral_window.training.machine import environment

CHANNELS, HEADS, WINDOW = 768, 12, 32
LENGTHS = (512, 1024, 4096, 16384, 65536)
QUICK = (512, 1024)
TRUTH_LENGTH, BAR = 300, 1e-5  # the FFT's own accuracy; the tests hold the others to 2e-6
LONGEST = 1.0  # seconds: a contestant slower than that leaves the longer lengths out


@dataclass(frozen=True)
class Contestant:
    """`run(inputs)` computes y; `exact` says that y is the operator's own function."""

    name: str
    run: Callable[[Sequence[Tensor]], Tensor]
    exact: bool = True


def run(operator: str, *, quick: bool = False, rounds: int = 9) -> dict[str, Any]:
    """Measure `operator` ("spectral" or "window"): settings, environment and a row for each
    (length, pass, contestant) with milliseconds, ratio to the first contestant, and spread.

    Raises ValueError for an unknown operator.
    """
    if operator not in _OPERATORS:
        raise unknown("operator", operator, _OPERATORS)
    draw, contestants = _OPERATORS[operator]
    rows: list[dict[str, Any]] = []
    failed = _check(draw, contestants, operator)
    tired: set[tuple[str, str]] = set()
    for length in QUICK if quick else LENGTHS:
        for name, backward in (("forward", False), ("forward + backward", True)):
            rows += _race(
                draw(length, backward),
                contestants,
                length,
                name,
                3 if quick else rounds,
                failed,
                tired,
            )
    return {
        "bench": operator,
        "command": f"spectral-window bench {operator}" + (" --quick" if quick else ""),
        "quick": quick,
        "channels": CHANNELS,
        "heads": HEADS,
        "window": WINDOW,
        "environment": environment("cpu"),
        "rows": rows,
    }


def _check(draw: Callable, contestants: Sequence[Contestant], operator: str) -> dict[str, str]:
    """Contestant -> why it may not run: it is wrong."""
    inputs = [x.double() for x in draw(TRUTH_LENGTH, False)]
    truth = (
        _spectral("reference")(inputs) if operator == "spectral" else _window("reference")(inputs)
    )
    failed = {}
    for contestant in contestants:
        if contestant.exact:
            try:
                y = contestant.run([x.float() for x in inputs]).double()
            except ImportError as error:
                failed[contestant.name] = f"not here: {error}"
                continue
            off = float((y - truth).norm() / truth.norm())
            if not off <= BAR:
                failed[contestant.name] = f"wrong: relative error {off:.1e}, allowed {BAR:.0e}"
    return failed


def _race(
    inputs: Sequence[Tensor],
    contestants: Sequence[Contestant],
    length: int,
    direction: str,
    rounds: int,
    failed: dict[str, str],
    tired: set[tuple[str, str]],
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {}
    reasons = dict(failed)
    running = []
    for contestant in contestants:
        if contestant.name in reasons:
            continue
        if (contestant.name, direction) in tired:
            reasons[contestant.name] = f"left out: over {LONGEST:.0f} s at a shorter length"
            continue
        try:
            first = _time(contestant, inputs)  # also compiles and warms up
        except (RuntimeError, MemoryError) as error:
            reasons[contestant.name] = f"failed: {' '.join(str(error).split())[:200]}"
            continue
        if first > LONGEST:
            tired.add((contestant.name, direction))
            rounds = min(rounds, 3)  # slow things are steady, and patience is finite
        running.append(contestant)
    for _ in range(rounds):
        for contestant in running:
            times.setdefault(contestant.name, []).append(_time(contestant, inputs))
    base = times.get(contestants[0].name)
    rows = []
    for contestant in contestants:
        row: dict[str, Any] = {"length": length, "pass": direction, "contestant": contestant.name}
        if contestant.name in reasons:
            rows.append(row | {"status": reasons[contestant.name]})
            continue
        spent = times[contestant.name]
        row |= {"status": "ok", "milliseconds": round(1000 * median(spent), 4)}
        if base and len(base) > 1:
            ratios = [mine / other for mine, other in zip(spent, base, strict=True)]
            tenths = quantiles(ratios, n=10, method="inclusive")
            row |= {
                "ratio": round(median(ratios), 3),
                "ratio_p10": round(tenths[0], 3),
                "ratio_p90": round(tenths[-1], 3),
            }
        rows.append(row)
    return rows


def _time(contestant: Contestant, inputs: Sequence[Tensor]) -> float:
    begin = time.perf_counter()
    y = contestant.run(inputs)
    if y.requires_grad:
        y.backward(torch.ones_like(y))
    spent = time.perf_counter() - begin
    for x in inputs:
        x.grad = None
    return spent


# ---------------------------------------------------------------------------- the contestants


def _draw_spectral(length: int, backward: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, length, CHANNELS), (CHANNELS,), (CHANNELS,))
    u, decay, frequency = (torch.randn(shape, generator=g) for shape in shapes)
    return [x.requires_grad_(backward) for x in (u, decay.abs(), frequency)]


def _spectral(method: str) -> Callable[[Sequence[Tensor]], Tensor]:
    def call(inputs: Sequence[Tensor]) -> Tensor:
        u, decay, frequency = inputs
        return spectral_conv(u, Modes(decay, frequency), method=method)[0]

    return call


def _copy(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].clone()


def _draw_window(length: int, backward: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, CHANNELS // HEADS)
    return [torch.randn(shape, generator=g).requires_grad_(backward) for _ in range(3)]


def _window(method: str) -> Callable[[Sequence[Tensor]], Tensor]:
    def call(inputs: Sequence[Tensor]) -> Tensor:
        return window_attention(*inputs, window=WINDOW, method=method)[0]

    return call


def _full_attention(inputs: Sequence[Tensor]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


_OPERATORS: dict[str, tuple[Callable[[int, bool], list[Tensor]], list[Contestant]]] = {
    "spectral": (
        _draw_spectral,
        [
            Contestant("scan", _spectral("scan")),
            Contestant("chunked", _spectral("chunked")),
            Contestant("fft (the paper's)", _spectral("fft")),
            Contestant("copy of the input", _copy, exact=False),
        ],
    ),
    "window": (
        _draw_window,
        [
            Contestant("chunked", _window("chunked")),
            Contestant("full causal attention", _full_attention, exact=False),
        ],
    ),
}
