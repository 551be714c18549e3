"""Trainings of language models: a recipe with overrides, run by the command `train`.

A training leaves a row: how it ended, and its two curves. Its key names all that decides it, so a
row in earlier results stands for the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
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
CURVE = 100  # points of a training curve that a row has
RESULTS = (  # of result.json that a row has
    "parameters", "steps", "tokens", "train_loss", "eval_loss", "perplexity", "bits_per_byte",
    "eval_tokens", "eval_length", "tokens_per_second", "peak_memory_bytes", "wall_seconds",
    "command", "environment",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What all trainings of an experiment read: sources of `data` and `valid` (none: the recipe's
    own), and the folder of their tokens."""

    data: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    tokens: Path = Path("tokens")

    def prepare(self, recipe: Recipe) -> None:
        """Make the tokens, once and before any training starts; raises as `prepare_text`."""
        prepare_text(self.given_to(recipe), self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Names the tokens, wherever the text lies. `prepare` makes them."""
        return open_corpus(self.tokens).fingerprint

    def given_to(self, recipe: Recipe) -> Recipe:
        """The recipe that reads this text; its own where nothing was named."""
        named = {"data": self.data, "valid": self.valid}
        return recipe.replace(**{name: sources for name, sources in named.items() if sources})


RECIPES_OWN = Text()


@dataclass(frozen=True)
class Training:
    """One run of the recipe `recipe` with `overrides`; `place` is its run folder in `work`."""

    recipe: str
    overrides: dict[str, Any]
    place: str = ""
    text: Text = RECIPES_OWN

    def words(self) -> list[str]:
        """The overrides as on the command line."""
        return [f"{key}={_word(value)}" for key, value in self.overrides.items()]

    def resolved(self) -> Recipe:
        """The recipe as it will run, but for its text."""
        return resolve(self.recipe, self.words())

    @property
    def key(self) -> str:
        """Names the run: the same recipe and the same tokens, the same key."""
        recipe = {k: v for k, v in self.resolved().traces().items() if k not in TEXT}
        if recipe["matmul_precision"] == "auto":  # keys are older: float32 was called so in them
            recipe["matmul_precision"] = "medium"
        named = json.dumps([recipe, self.text.fingerprint], sort_keys=True)
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    def job(self, work: Path) -> Job:
        """The run as a job, which ends in its result.json."""
        out, text = work / self.place, self.text
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
        """The words that register a mixer which is not the package's own."""
        mixer = MIXERS.get(str(self.overrides.get("mixer")))
        outside = mixer is not None and not mixer.__module__.startswith(f"{nn.__name__}.")
        return ["--plugin", mixer.__module__] if mixer is not None and outside else []

    def read(self, work: Path) -> dict[str, Any] | None:
        """Its row, or None where it has not ended in `work`. Raises IntegrityError where another
        run is in its place."""
        run = runs.read(work / self.place)
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
        train, evaluations = run.train(), run.evaluations()
        step = max(1, math.ceil(len(train) / CURVE))
        curves = {
            "train_curve": _points(train.tokens[step - 1 :: step], _blocks(train.value, step)),
            "eval_curve": _points(evaluations.tokens, evaluations.value),
        }
        about = {"key": self.key, "recipe": self.recipe, "knobs": self.words()}
        return about | {name: run.result.get(name) for name in RESULTS} | curves


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
