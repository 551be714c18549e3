"""Time and memory of a forward pass against T: as the paper took them, and as a user gets them.

                as published                              well-posed
    baseline    T x T scores in memory, each layer's      PyTorch's fused attention, once
                mixer evaluated twice (`published.py`)
    SWH         chunks in memory, FFT, evaluated twice    this package's methods
    sizes       SWH has two maps a layer more             equally many parameters
    memory      peak counter of one process, never        what one call adds, each in a process of
                reset, baseline first: SWH shows the      its own
                baseline's peak at every T

Batch 1, float32, hidden states out, random weights: time does not depend on them. Before any time
is taken each model's hidden states are compared with those of the same weights in float64 by the
reference methods. The models take turns, in one process (`bench/timing.py`): the milliseconds are
medians, `ratio` is the time over the Transformer's in the same round. Beyond 4,096 tokens two
layers stand for all, as every row says: all layers are equal, so times are compared per layer.

Every row is written when it is there, and not measured again by a later run of the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spectral_window.errors import ResourceError, UserError
from spectral_window.hf.config import SWHConfig
from spectral_window.lab.bench import PRECISION
from spectral_window.lab.bench.figures import panel, tokens, write
from spectral_window.lab.experiments.efficiency_measure import DOES_NOT_FIT, MODELS, measure
from spectral_window.lab.jobs import Log, Row, child_environment, rows_of, thread_counts
from spectral_window.lab.results import load, save
from spectral_window.training.machine import precision

NAME = "efficiency"
FORMS = {"published": "as published", "posed": "well-posed"}
PUBLISHED = (512, 1024, 2048, 4096)
LENGTHS = {"published": PUBLISHED, "posed": (*PUBLISHED, 8192, 16_384, 32_768, 65_536)}
QUICK = (128, 512)
WHOLE, FEW = 4096, 2  # beyond WHOLE tokens, and for peaks, FEW layers: the others are like them


def run(
    out: Path,
    *,
    quick: bool,
    shape: str = "125m",
    threads: int | None = None,
    command: str,
    log: Log,
) -> dict[str, Any]:
    """Measure what `out/efficiency.json` does not hold yet, draw `out/efficiency.png`, and return
    the results.

    quick:   short lengths and two layers of 128 channels: a trial, marked as one.
    shape:   a size of the paper's preset.
    threads: None for as many as there are cores.
    command: what is recorded as having made the results.
    log:     takes a line of progress.

    Raises UserError for a folder with results of other settings, before any work, and ResourceError
    if nothing can be written. What fails to run has a row with the reason.
    """
    threads = thread_counts()[-1] if threads is None else threads
    if threads < 1:
        raise UserError(f"threads is {threads} (reproduce efficiency): use 1 or more")
    settings = _settings("tiny" if quick else shape, quick, threads)
    results = _open(out, settings, quick, command)
    add = partial(_save, results, out, log)
    for form in FORMS:
        _time(form, results, add)
        (_count if form == "published" else _peaks)(results, add)
    draw(results, out / "efficiency.png")
    return results


def _settings(shape: str, quick: bool, threads: int) -> dict[str, Any]:
    config = SWHConfig.preset("paper", size=shape)
    few = min(FEW, config.num_hidden_layers)

    def layers(length: int) -> int:
        return few if quick or length > WHOLE else config.num_hidden_layers

    return {
        "shape": shape,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "window": config.window,
        "batch": 1,
        "threads": threads,
        "dtype": "float32",
        "matmul_precision": precision(PRECISION, "cpu").in_force,
        "published_evaluations_a_layer": 2,
        "lengths_and_layers": {
            form: [[length, layers(length)] for length in (QUICK if quick else LENGTHS[form])]
            for form in FORMS
        },
    }


# ------------------------------------------------------------------------------ what is on disk


def _open(out: Path, settings: dict[str, Any], quick: bool, command: str) -> dict[str, Any]:
    """The results in `out`, or new ones. Raises UserError for those of other settings."""
    before = load(out, NAME)
    if before is not None:
        if (before.get("settings"), before.get("quick")) != (settings, quick):
            raise UserError(
                f"{out / NAME}.json holds results of other settings: choose another folder with "
                "--out"
            )
        return before
    return {
        "suite": NAME,
        "quick": quick,
        "command": command,
        "environment": {},
        "settings": settings,
        "rows": [],
    }


def _save(results: dict[str, Any], out: Path, log: Log, new: Row) -> None:
    """Put `new` into the row of the same form, contestant and length, and write."""
    key = ("form", "contestant", "length")
    row = next((r for r in results["rows"] if all(r[k] == new[k] for k in key)), None)
    if row is None:
        results["rows"].append(row := {})
    row |= new
    results["rows"].sort(
        key=lambda r: (
            list(FORMS).index(r["form"]),
            r["length"],
            list(MODELS).index(r["contestant"]),
        )
    )
    save(out, NAME, results)
    what = new.get("peak_status", new.get("status", "ok"))
    if what == "ok" and "milliseconds" in new:
        what = f"{new['milliseconds']:,.4g} ms, {new['layers']} layers"
    elif new.get("peak_bytes") is not None:
        what = f"peak {new['peak_bytes'] / 1e6:,.4g} MB"
    log(f"{FORMS[new['form']]}, {new['length']:,} tokens, {MODELS[new['contestant']]}: {what}")


def _rows(results: dict[str, Any], form: str, has: str = "milliseconds") -> list[Row]:
    """The rows of `form` that were measured and hold a value of `has`."""
    return [
        r
        for r in results["rows"]
        if r["form"] == form and r["status"] == "ok" and r.get(has) is not None
    ]


def _is_settled(row: Row) -> bool:
    return row["status"] == "ok" or row["status"].startswith(DOES_NOT_FIT)


# ---------------------------------------------------------------------- processes of their own


def _time(form: str, results: dict[str, Any], add: Callable[[Row], None]) -> None:
    """Time every length that is not there for both models."""
    there = [row["length"] for row in results["rows"] if row["form"] == form and _is_settled(row)]
    plan = results["settings"]["lengths_and_layers"][form]
    left = [[length, layers] for length, layers in plan if there.count(length) < len(MODELS)]
    if not left:
        return
    try:
        for row in _measure("time", form, results, lengths=left):
            if "environment" in row:
                results |= row
            else:
                there.append(row["length"])
                add(row)
    except ResourceError as error:  # killed, for example: the lengths it did not reach say so
        for length, layers in left:
            if length not in there:
                for name in MODELS:
                    about = {"form": form, "contestant": name, "length": length, "layers": layers}
                    add({**about, "status": f"failed: {error}"})


def _count(results: dict[str, Any], add: Callable[[Row], None]) -> None:
    """The published counter. All of it or nothing: a counter that is never reset has a history."""
    timed = _rows(results, "published")
    if len(timed) == len(_rows(results, "published", "peak_bytes")):
        return
    sizes = {
        name: [[row["length"], row["layers"]] for row in timed if row["contestant"] == name]
        for name in MODELS
    }
    left = {(name, length) for name, of in sizes.items() for length, _ in of}
    try:
        for row in _measure("count", "published", results, sizes=sizes):
            left.remove((row["contestant"], row["length"]))
            add(row)
    except ResourceError as error:
        for name, length in sorted(left):
            about = {"form": "published", "contestant": name, "length": length}
            add({**about, "peak_bytes": None, "peak_status": f"failed: {error}"})


def _peaks(results: dict[str, Any], add: Callable[[Row], None]) -> None:
    """What one call adds, in a process for each model."""
    for name in MODELS:
        left = [
            row["length"]
            for row in _rows(results, "posed")
            if row["contestant"] == name and row.get("peak_bytes") is None
        ]
        if not left:
            continue
        try:
            for row in _measure(
                "peak", "posed", results, contestant=name, lengths=list(left), layers=FEW
            ):
                left.remove(row["length"])
                add(row)
        except ResourceError as error:
            for length in left:
                about = {"form": "posed", "contestant": name, "length": length}
                add({**about, "peak_bytes": None, "peak_status": f"failed: {error}"})


def _measure(task: str, form: str, results: dict[str, Any], **more: Any) -> Iterator[Row]:
    """What a fresh process finds, as it finds it (see `efficiency_measure.py`)."""
    settings = results["settings"]
    about = {"task": task, "form": form, "quick": results["quick"], "shape": settings["shape"]}
    return rows_of(measure, about | more, child_environment(settings["threads"]))


# ------------------------------------------------------------------------ what the rows say


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """What a verdict needs, from the rows alone; None where rows are missing.

    slope:        form -> model -> slope of log(time a layer) over log T, all lengths
                  measured.
    time_ratio:   form -> SWH's time over the Transformer's at 4,096 tokens, the median over rounds.
    time_ratios:  the same at every length, form -> {T: ratio}.
    memory_ratio: form -> model -> peak at 4,096 tokens over that at 512.
    """
    timed = {form: _by_model(results, form, _layer_time) for form in FORMS}
    peaks = {form: _by_model(results, form, lambda r: r.get("peak_bytes")) for form in FORMS}
    ratios = {form: _by_model(results, form, lambda row: row.get("ratio"))["swh"] for form in FORMS}
    return {
        "slope": {f: {name: _slope(points) for name, points in timed[f].items()} for f in FORMS},
        "time_ratio": {form: ratios[form].get(4096) for form in FORMS},
        "time_ratios": ratios,
        "memory_ratio": {
            f: {name: _over(points, 4096, 512) for name, points in peaks[f].items()} for f in FORMS
        },
    }


def _by_model(
    results: dict[str, Any], form: str, value: Callable[[Row], float | None]
) -> dict[str, dict[int, float]]:
    """model -> {length: value} of the rows measured."""
    points: dict[str, dict[int, float]] = {name: {} for name in MODELS}
    for row in _rows(results, form):
        measured = value(row)
        if measured is not None:
            points[row["contestant"]][row["length"]] = measured
    return points


def _layer_time(row: Row) -> float:
    """Milliseconds per layer: rows of few layers stand beside rows of all."""
    return row["milliseconds"] / row["layers"]


def _slope(points: dict[int, float]) -> float | None:
    if len(points) < 2:
        return None
    x, y = np.log(np.array(sorted(points.items()))).T
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def _over(points: dict[int, float], length: int, base: int) -> float | None:
    if not points.get(length) or not points.get(base):
        return None
    return float(f"{points[length] / points[base]:.4g}")


@dataclass(frozen=True)
class Curves:
    """One measure of one form against T: model's name -> (T, value), rows that are missing
    left out."""

    measure: str  # "time" or "memory"
    form: str
    unit: str
    lines: dict[str, list[tuple[int, float]]]


def curves(results: dict[str, Any]) -> list[Curves]:
    """Time per layer, then peak memory, each as published and well-posed."""
    curves = []
    for kind, units, value in (
        ("time", dict.fromkeys(FORMS, "milliseconds a layer"), _layer_time),
        (
            "memory",
            {"published": "MB, the process so far", "posed": "MB that one call adds"},
            lambda row: row["peak_bytes"] / 1e6 if row.get("peak_bytes") else None,
        ),
    ):
        for form in FORMS:
            values = _by_model(results, form, value)
            lines = {MODELS[name]: list(points.items()) for name, points in values.items()}
            curves.append(Curves(kind, form, units[form], lines))
    return curves


def draw(results: dict[str, Any], path: Path) -> None:
    """`curves` as PNG."""
    panels = [
        panel(f"{c.measure}, {FORMS[c.form]}", c.lines, "tokens", c.unit, tokens)
        for c in curves(results)
    ]
    about = results["environment"]
    text = f"{about.get('processor', '')}, threads: {about.get('threads', '')}"
    text += ", a quick trial" if results["quick"] else ""
    write(panels, text, path, rows=2)
