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
is taken every contestant's hidden states are held to the same weights in float64 by the reference
methods. Contestants take turns, in one process (`bench/timing.py`): the milliseconds are medians,
`ratio` is the time over the Transformer's in the same round. Beyond 4,096 tokens two layers stand
in for all, as every row says: layers are alike, so times are compared a layer.

Every row is written when it is there, and not measured again by a later run of the same settings.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from spectral_window.errors import ResourceError, UserError
from spectral_window.files import write_json
from spectral_window.hf.config import SWHConfig
from spectral_window.lab.bench import PRECISION, child_environment, thread_counts
from spectral_window.lab.bench.figures import Panel, arrange, tokens
from spectral_window.lab.experiments.efficiency_measure import CONTESTANTS, DOES_NOT_FIT, Job, Row
from spectral_window.lab.results import load
from spectral_window.training.machine import precision

FORMS = {"published": "as published", "posed": "well-posed"}
PUBLISHED = (512, 1024, 2048, 4096)
LENGTHS = {"published": PUBLISHED, "posed": (*PUBLISHED, 8192, 16_384, 32_768, 65_536)}
QUICK = (128, 512)
WHOLE, FEW = 4096, 2  # beyond WHOLE tokens, and for peaks, FEW layers: the others are like them
MODULE = "spectral_window.lab.experiments.efficiency_measure"


def run(
    out: Path,
    *,
    quick: bool,
    shape: str = "125m",
    threads: int | None = None,
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure what `out/efficiency.json` does not hold yet, draw `out/efficiency.png`, and return
    the results.

    quick:   short lengths and two layers of 128 channels: a trial, marked as one.
    shape:   a size of the paper's preset.
    threads: None for as many as there are cores.
    command: what is recorded as having made the results.
    say:     takes a line of progress.

    Raises UserError for a folder with results of other settings, before any work, and ResourceError
    if nothing can be written. What fails to run has a row with the reason.
    """
    threads = thread_counts()[-1] if threads is None else threads
    if threads < 1:
        raise UserError(f"threads is {threads} (reproduce efficiency): use 1 or more")
    settings = _settings("tiny" if quick else shape, quick, threads)
    results = _open(out / "efficiency.json", settings, quick, command)
    keep = partial(_keep, results, out / "efficiency.json", say)
    for form in FORMS:
        _time(form, results, keep)
        (_count if form == "published" else _peaks)(results, keep)
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


def _open(path: Path, settings: dict[str, Any], quick: bool, command: str) -> dict[str, Any]:
    results = {
        "suite": "efficiency",
        "quick": quick,
        "command": command,
        "environment": {},
        "settings": settings,
        "rows": [],
    }
    before = load(path.parent, "efficiency")
    if before is not None:
        if (before.get("settings"), before.get("quick")) != (settings, quick):
            raise UserError(
                f"{path} holds results of other settings: choose another folder with --out"
            )
        return before
    path.parent.mkdir(parents=True, exist_ok=True)
    return results


def _keep(results: dict[str, Any], path: Path, say: Callable[[str], None], found: Row) -> None:
    """Put what was found into the row of the same form, contestant and length, and write."""
    key = ("form", "contestant", "length")
    row = next((r for r in results["rows"] if all(r[k] == found[k] for k in key)), None)
    if row is None:
        results["rows"].append(row := {})
    row |= found
    results["rows"].sort(
        key=lambda r: (
            list(FORMS).index(r["form"]), r["length"], list(CONTESTANTS).index(r["contestant"]),
        )
    )  # fmt: skip
    write_json(path, results)
    what = found.get("peak_status", found.get("status", "ok"))
    if what == "ok" and "milliseconds" in found:
        what = f"{found['milliseconds']:,.4g} ms, {found['layers']} layers"
    elif found.get("peak_bytes") is not None:
        what = f"peak {found['peak_bytes'] / 1e6:,.4g} MB"
    name = CONTESTANTS[found["contestant"]]
    say(f"{FORMS[found['form']]}, {found['length']:,} tokens, {name}: {what}")


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


def _time(form: str, results: dict[str, Any], keep: Callable[[Row], None]) -> None:
    """Race at every length that is not there for both contestants."""
    there = [row["length"] for row in results["rows"] if row["form"] == form and _is_settled(row)]
    plan = results["settings"]["lengths_and_layers"][form]
    left = [[length, layers] for length, layers in plan if there.count(length) < len(CONTESTANTS)]
    if not left:
        return
    job = _job("race", form, results) | {"lengths": left}
    try:
        for found in _in_child(job):
            if "environment" in found:
                results |= found
            else:
                there.append(found["length"])
                keep(found)
    except ResourceError as error:  # killed, say: the lengths it did not reach say so
        for length, layers in left:
            if length not in there:
                for name in CONTESTANTS:
                    about = {"form": form, "contestant": name, "length": length, "layers": layers}
                    keep({**about, "status": f"failed: {error}"})


def _count(results: dict[str, Any], keep: Callable[[Row], None]) -> None:
    """The published counter. All of it or nothing: a counter that is never reset has a history."""
    timed = _rows(results, "published")
    if len(timed) == len(_rows(results, "published", "peak_bytes")):
        return
    passes = {
        name: [[row["length"], row["layers"]] for row in timed if row["contestant"] == name]
        for name in CONTESTANTS
    }
    left = {(name, length) for name, of in passes.items() for length, _ in of}
    try:
        for found in _in_child(_job("count", "published", results) | {"passes": passes}):
            left.remove((found["contestant"], found["length"]))
            keep(found)
    except ResourceError as error:
        for name, length in sorted(left):
            about = {"form": "published", "contestant": name, "length": length}
            keep({**about, "peak_bytes": None, "peak_status": f"failed: {error}"})


def _peaks(results: dict[str, Any], keep: Callable[[Row], None]) -> None:
    """What one call adds, in a process for each contestant."""
    for name in CONTESTANTS:
        left = [
            row["length"]
            for row in _rows(results, "posed")
            if row["contestant"] == name and row.get("peak_bytes") is None
        ]
        if not left:
            continue
        job = _job("peak", "posed", results) | {"contestant": name, "lengths": left, "layers": FEW}
        try:
            for found in _in_child(job):
                left.remove(found["length"])
                keep(found)
        except ResourceError as error:
            for length in left:
                about = {"form": "posed", "contestant": name, "length": length}
                keep({**about, "peak_bytes": None, "peak_status": f"failed: {error}"})


def _job(task: str, form: str, results: dict[str, Any]) -> Job:
    settings = results["settings"]
    about = {key: settings[key] for key in ("shape", "threads")}
    return {"task": task, "form": form, "quick": results["quick"], **about}


def _in_child(job: Job) -> Iterator[Row]:
    """What a fresh process of `job`'s threads finds, as it finds it. Raises ResourceError if it
    fails."""
    command = [sys.executable, "-m", MODULE, json.dumps(job)]
    about = child_environment(job["threads"])
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=about, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        try:
            yield from map(json.loads, cast(Any, child.stdout))
        except BaseException:  # stopped: the process must not go on alone
            child.kill()
            raise
        if child.wait():
            errors.seek(0)
            said = errors.read().strip().splitlines()
            ended = f"ended with {child.returncode}; -9 means out of memory"
            raise ResourceError(said[-1][:200] if said and child.returncode > 0 else ended)


# ------------------------------------------------------------------------ what the rows say


def facts(results: dict[str, Any]) -> dict[str, Any]:
    """What a verdict needs, from the rows alone; None where rows are missing.

    slope:        form -> contestant -> slope of log(time a layer) over log T, all lengths
                  measured.
    time_ratio:   form -> SWH's time over the Transformer's at 4,096 tokens, the median over rounds.
    time_ratios:  the same at every length, form -> {T: ratio}.
    memory_ratio: form -> contestant -> peak at 4,096 tokens over that at 512.
    """
    timed = {form: _by_contestant(results, form, _layer_time) for form in FORMS}
    peaks = {form: _by_contestant(results, form, lambda r: r.get("peak_bytes")) for form in FORMS}
    ratios = {
        form: _by_contestant(results, form, lambda row: row.get("ratio"))["swh"] for form in FORMS
    }
    return {
        "slope": {f: {name: _slope(points) for name, points in timed[f].items()} for f in FORMS},
        "time_ratio": {form: ratios[form].get(4096) for form in FORMS},
        "time_ratios": ratios,
        "memory_ratio": {
            f: {name: _over(points, 4096, 512) for name, points in peaks[f].items()} for f in FORMS
        },
    }


def _by_contestant(
    results: dict[str, Any], form: str, value: Callable[[Row], float | None]
) -> dict[str, dict[int, float]]:
    """contestant -> {length: value} of the rows measured."""
    found: dict[str, dict[int, float]] = {name: {} for name in CONTESTANTS}
    for row in _rows(results, form):
        measured = value(row)
        if measured is not None:
            found[row["contestant"]][row["length"]] = measured
    return found


def _layer_time(row: Row) -> float:
    """Milliseconds a layer: rows of few layers stand beside rows of all."""
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
    """One measure of one form against T: contestant's name -> (T, value), rows that are missing
    left out."""

    measure: str  # "time" or "memory"
    form: str
    unit: str
    lines: dict[str, list[tuple[int, float]]]


def curves(results: dict[str, Any]) -> list[Curves]:
    """Time a layer, then peak memory, each as published and well-posed."""
    found = []
    for measure, units, value in (
        ("time", dict.fromkeys(FORMS, "milliseconds a layer"), _layer_time),
        (
            "memory",
            {"published": "MB, the process so far", "posed": "MB that one call adds"},
            lambda row: row["peak_bytes"] / 1e6 if row.get("peak_bytes") else None,
        ),
    ):
        for form in FORMS:
            values = _by_contestant(results, form, value)
            lines = {CONTESTANTS[name]: list(points.items()) for name, points in values.items()}
            found.append(Curves(measure, form, units[form], lines))
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """`curves` as PNG."""
    panels = [
        Panel(f"{c.measure}, {FORMS[c.form]}", c.lines, "tokens", c.unit, tokens)
        for c in curves(results)
    ]
    about = results["environment"]
    text = f"{about.get('processor', '')}, threads: {about.get('threads', '')}"
    text += ", a quick trial" if results["quick"] else ""
    arrange(panels, text, rows=2).savefig(path, dpi=160, metadata={"Software": None})
