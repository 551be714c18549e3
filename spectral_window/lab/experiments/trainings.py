"""Trainings of language models as jobs: a recipe with some knobs changed, run by `train`.

A training is kept as a row: how it ended, and its two curves. As a probe's, its key names all that
decides it, so that a row found in earlier results stands for the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from spectral_window import nn
from spectral_window.data.text import open_corpus
from spectral_window.errors import IntegrityError
from spectral_window.lab import runs
from spectral_window.lab.jobs import Job
from spectral_window.nn.mixers import MIXERS
from spectral_window.training.recipes import FREE_ON_RESUME, Recipe, resolve
from spectral_window.training.text import prepare_text

TEXT = {"data", "valid", "drop_shared"}  # known by the tokens that they make
FREE = FREE_ON_RESUME | TEXT
CURVE = 100  # points that are kept of a training curve
KEPT = (
    "parameters", "steps", "tokens", "train_loss", "eval_loss", "perplexity", "bits_per_byte",
    "eval_tokens", "eval_length", "tokens_per_second", "peak_memory_bytes", "wall_seconds",
    "command", "environment",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What all trainings of a suite read: sources of `data` and `valid`, and where their tokens
    are kept."""

    data: tuple[str, ...]
    valid: tuple[str, ...]
    tokens: Path

    def prepare(self, recipe: Recipe) -> None:
        """Make the tokens, once and before any training starts; raises as `prepare_text`."""
        prepare_text(self.given_to(recipe), self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Names the tokens, wherever the text lies; known after `prepare`."""
        return open_corpus(self.tokens).fingerprint

    def given_to(self, recipe: Recipe) -> Recipe:
        """The recipe that reads this text; its own where nothing was named."""
        named = {"data": self.data, "valid": self.valid}
        return recipe.replace(**{name: sources for name, sources in named.items() if sources})


@dataclass(frozen=True)
class Training:
    """One run of the recipe `recipe` with `knobs` changed; `place`: its folder in the suite's."""

    recipe: str
    knobs: dict[str, Any]
    place: str
    about: dict[str, Any] = field(default_factory=dict)  # what the row says beside: part, variant

    def words(self) -> list[str]:
        """The knobs as on the command line."""
        return [f"{key}={_word(value)}" for key, value in self.knobs.items()]

    def resolved(self) -> Recipe:
        """The recipe as it will run, but for its text."""
        return resolve(self.recipe, self.words())

    def key(self, text: Text) -> str:
        """Names the run: the same recipe and the same tokens, the same key."""
        recipe = {k: v for k, v in self.resolved().traces().items() if k not in TEXT}
        if recipe["matmul_precision"] == "auto":  # keys are older: float32 was called so in them
            recipe["matmul_precision"] = "medium"
        named = json.dumps([recipe, text.fingerprint], sort_keys=True)
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    def job(self, folder: Path, text: Text) -> Job:
        """The run as a job; its result.json ends it."""
        out = folder / self.place
        words = [*self._plugin(), "train", self.recipe, *self.words(), "--out", str(out)]
        words += ["--corpus", str(text.tokens)]
        for option, sources in (("--data", text.data), ("--valid", text.valid)):
            words += [option, *sources] if sources else []
        return Job(
            self.place,
            tuple(words),
            out / "result.json",
            begun=out / "config.json",
            resume=("--resume",),
        )

    def _plugin(self) -> list[str]:
        """The words that make a mixer known that is not the package's own."""
        mixer = MIXERS.get(str(self.knobs.get("mixer")))
        outside = mixer is not None and not mixer.__module__.startswith(f"{nn.__name__}.")
        return ["--plugin", mixer.__module__] if mixer is not None and outside else []

    def row(self, folder: Path, text: Text) -> dict[str, Any] | None:
        """How the run in `folder` ended, or None where it has not. Raises IntegrityError where it
        is another run."""
        run = runs.read(folder / self.place)
        if run.number("eval_loss") is None:
            return None
        mine = self.resolved().to_dict()
        theirs = run.config.get("recipe", {})
        free = FREE | ({"matmul_precision"} if mine["matmul_precision"] == "auto" else set())
        other = [k for k, v in mine.items() if k not in free and theirs.get(k, v) != v]
        if other:
            raise IntegrityError(
                f"the run in {run.folder} differs in {', '.join(other)}: choose another --work"
            )
        train, held = run.train(), run.evaluations()
        step = max(1, math.ceil(len(train) / CURVE))
        curves = {
            "train_curve": _points(train.tokens[step - 1 :: step], _blocks(train.value, step)),
            "eval_curve": _points(held.tokens, held.value),
        }
        key = {"key": self.key(text), "recipe": self.recipe, "knobs": self.words()}
        return self.about | key | {name: run.result.get(name) for name in KEPT} | curves


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def _blocks(values: Any, step: int) -> Any:
    """Means of `step` values each; a rest is left out."""
    count = len(values) // step
    return values[: count * step].reshape(count, step).mean(1)


def _points(tokens: Any, values: Any) -> list[list[float]]:
    return [[float(t), round(float(v), 5)] for t, v in zip(tokens, values, strict=False)]
