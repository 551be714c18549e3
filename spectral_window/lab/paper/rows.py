"""Rows of results, checked before anything is computed from them.

A row can be wrong: a loss that is not a number, more right answers than questions, a field that a
killed process or a hand left out. Such a row must neither stop the page nor vanish: `sound` takes
it out of the numbers, with a line that names it and the reason, and the page prints that line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from spectral_window.lab.experiments.efficiency import FORMS
from spectral_window.lab.experiments.efficiency_measure import MODELS

Check = Callable[[Any], bool]
NAMES = (
    "form", "part", "measure", "model", "variant", "contestant", "training", "seed", "lr", "length",
)  # fmt: skip


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_curve(value: Any) -> bool:
    """[[tokens, loss], ...]."""
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 and all(map(is_number, point))
        for point in value
    )


def is_tests(value: Any) -> bool:
    """Scores of a probe: never more right than asked, and something asked."""
    return isinstance(value, list) and all(
        isinstance(test, dict)
        and is_text(test.get("task"))
        and all(is_count(test.get(name)) for name in ("length", "right", "asked"))
        and test["right"] <= test["asked"] > 0
        for test in value
    )


def _is_probe(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("task")) and is_count(value.get("seed"))


LANGUAGE_MODEL: dict[str, Check] = {
    "part": is_text, "variant": is_text, "seed": is_count, "train_curve": is_curve,
    "eval_curve": is_curve,
} | dict.fromkeys(
    ("lr", "initializer_range", "eval_loss", "train_loss", "parameters", "tokens"), is_number
)  # fmt: skip
WANTED: dict[str, dict[str, Check]] = {
    "synthetic": {
        "form": is_text, "model": is_text, "training": is_text, "probe": _is_probe,
        "parameters": is_number, "batch_right": is_count, "batch_asked": is_count,
        "tests": is_tests,
    },
    "efficiency": {
        "form": FORMS.__contains__, "contestant": MODELS.__contains__, "length": is_count,
        "layers": is_count, "status": is_text,
    },
    "ablate": {"measure": is_text, "overrides": lambda value: isinstance(value, dict)},
}  # fmt: skip
WHERE_MEASURED: dict[str, Check] = {
    "milliseconds": lambda value: is_number(value) and value > 0,
    "ratio": lambda value: value is None or is_number(value),
    "peak_bytes": lambda value: value is None or is_number(value),
}


def sound(suite: str, content: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The suite with the rows that can be counted on, and a line for each other one.

    content: what `results.load` gave, or None (then None and no lines).
    """
    if content is None:
        return None, []
    rows, faults = [], []
    for row in content["rows"]:
        wrong = fault(suite, row)
        if wrong:
            faults.append(f"{_name(row)}: {wrong}")
        else:
            rows.append(row)
    whole = dict(content) | {"rows": rows}
    if suite == "synthetic":
        whole["ceilings"] = [line for line in content.get("ceilings") or () if _is_ceiling(line)]
    return whole, faults


def fault(suite: str, row: Any) -> str:
    """What is wrong with `row`, in words; "" if nothing is."""
    if not isinstance(row, dict):
        return "not an object"
    wanted = dict(LANGUAGE_MODEL if suite.startswith("lm-") else WANTED[suite])
    if suite == "efficiency" and row.get("status") == "ok":
        wanted |= WHERE_MEASURED
    if suite == "ablate":
        text = {"eval_loss": is_number}
        probe = {"tests": is_tests, "parameters": is_number}
        wanted |= text if row.get("measure") == "text" else probe
    for name, check in wanted.items():
        try:
            right = check(row.get(name))
        except TypeError:  # an unhashable value where a name should be
            right = False
        if not right:
            return f"{name} is missing" if name not in row else f"{name} is {_short(row[name])}"
    return ""


def _is_ceiling(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and is_text(line.get("task"))
        and is_count(line.get("length"))
        and is_number(line.get("ceiling"))
    )


def _name(row: Any) -> str:
    if not isinstance(row, dict):
        return "a row"
    words = [f"{row[name]}" for name in NAMES if isinstance(row.get(name), str)]
    words += [f"{name} {row[name]}" for name in NAMES if is_number(row.get(name))]
    return ", ".join(words) or "a row"


def _short(value: Any) -> str:
    text = "null" if value is None else f"{value}"
    return text if len(text) <= 60 else text[:57] + "..."
