"""Read a run folder: what a training left on disk, and nothing that it did not.

A run folder holds `config.json` (what was asked), `metrics.jsonl` (what happened, a line at a
time), `result.json` (how it ended), `model/` (the weights) and perhaps `samples.json` (text it
wrote). Any of these can be absent: a run may be unfinished, interrupted or deleted. `read` never
fails for that reason and never fills a gap; it lists what is missing, and the report prints that
word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spectral_window.nn.mixers import MIXERS
from spectral_window.training.metrics import MetricsLog

SAMPLE = ("prompt", "text", "settings")  # of a sample; what it lacks is empty


@dataclass(frozen=True)
class Points:
    """One curve. All arrays have the same length; `value` is a loss in nats per token."""

    tokens: np.ndarray
    seconds: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True)
class Run:
    """A run folder as read. `missing` names the parts that were absent or unreadable."""

    folder: Path
    label: str
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    missing: tuple[str, ...] = ()

    def number(self, *names: str) -> float | None:
        """The first of `names` that result.json holds as a finite number, or None."""
        for name in names:
            value = self.result.get(name)
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                return value
        return None

    def recipe(self, name: str) -> Any:
        """A setting of the recipe, or None."""
        recipe = self.config.get("recipe")
        return recipe.get(name) if isinstance(recipe, Mapping) else None

    def environment(self) -> Mapping[str, Any]:
        """Versions, processor, threads and date as the run wrote them."""
        for source in (self.result, self.config):
            environment = source.get("environment")
            if isinstance(environment, Mapping):
                return environment
        return {}

    def command(self) -> str | None:
        """The command that made the run."""
        for source in (self.config, self.result):
            command = source.get("command")
            if isinstance(command, str) and command:
                return command
            if isinstance(command, list) and command:
                return " ".join(str(word) for word in command)
        return None

    def fingerprint(self) -> str | None:
        """The sha256 that names the tokens it was trained and measured on."""
        data = self.config.get("data")
        fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
        return fingerprint if isinstance(fingerprint, str) else None

    def train(self) -> Points:
        """Training loss against tokens and seconds."""
        return _points(self.metrics, "loss")

    def evaluations(self) -> Points:
        """Held-out loss against tokens and seconds."""
        return _points(self.metrics, "eval_loss")

    def resumes(self) -> list[int]:
        """Tokens seen when the run was continued from a checkpoint, once for each time."""
        return [int(row["tokens"]) for row in self.metrics if row.get("event") == "resume"]


def read(folder: Path | str, label: str | None = None) -> Run:
    """Read the run in `folder`.

    `label` is the name to show; None takes it from the model's mixer, else from the folder. Never
    raises for absent or damaged files: they are named in `Run.missing`.
    """
    folder = Path(folder)
    missing: list[str] = []
    config = _read_object(folder / "config.json", missing)
    result = _read_object(folder / "result.json", missing)
    metrics = _read_metrics(folder / "metrics.jsonl", missing)
    samples: tuple[Mapping[str, Any], ...] = ()
    if (folder / "samples.json").exists():
        written = _read_json(folder / "samples.json", missing)
        if isinstance(written, list):
            whole = dict.fromkeys(SAMPLE, "")
            samples = tuple({**whole, **item} for item in written if isinstance(item, Mapping))
    else:
        missing.append("samples.json")
    if not (folder / "model" / "config.json").is_file():
        missing.append("model")
    return Run(
        folder, label or _label(folder, config), config, result, metrics, samples, tuple(missing)
    )


def read_all(folders: list[Path]) -> list[Run]:
    """Read several runs, each with its own label: two SWH runs get their folders' names."""
    runs = [read(folder) for folder in folders]
    labels = [run.label for run in runs]
    return [
        run
        if labels.count(run.label) == 1
        else read(run.folder, f"{run.label} ({run.folder.name})")
        for run in runs
    ]


def _label(folder: Path, config: Mapping[str, Any]) -> str:
    model = config.get("model")
    mixer = model.get("mixer") if isinstance(model, Mapping) else None
    part = MIXERS.get(str(mixer))
    return (part and part.label) or folder.name


def _read_json(path: Path, missing: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(path.name)
    except (OSError, ValueError):
        missing.append(f"{path.name} (unreadable)")
    return None


def _read_object(path: Path, missing: list[str]) -> Mapping[str, Any]:
    content = _read_json(path, missing)
    return content if isinstance(content, Mapping) else {}


def _read_metrics(path: Path, missing: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The rows in the order of their steps. A step written twice (once before a crash, once after
    the resume) counts as it was written last."""
    try:
        written = MetricsLog(path).read() if path.exists() else None
    except OSError:
        written = None
    if written is None:
        missing.append(path.name)
        return ()
    rows: dict[tuple[int, str], Mapping[str, Any]] = {}
    for row in written:
        kind = str(row.get("event") or ("eval" if "eval_loss" in row else "train"))
        rows[row["step"], kind] = row
    return tuple(rows[key] for key in sorted(rows))


def _points(rows: tuple[Mapping[str, Any], ...], key: str) -> Points:
    columns: list[tuple[float, float, float]] = []
    for row in rows:
        triple = (row.get("tokens"), row.get("seconds"), row.get(key))
        if all(isinstance(x, (int, float)) and math.isfinite(x) for x in triple):
            columns.append(triple)  # type: ignore[arg-type]
    table = np.asarray(columns, dtype=np.float64).reshape(-1, 3)
    return Points(table[:, 0], table[:, 1], table[:, 2])
