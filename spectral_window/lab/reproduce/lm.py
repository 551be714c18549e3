"""The language-model comparison, twice.

As published: unequal sizes, one constant learning rate, initial weights of 0.02, and a curve that
is called validation loss but is the training loss, divided by the number of accumulated
micro-batches (8). Well-posed: equal parameters, the same sweep of learning rates for every model,
initial weights wide enough for the Transformer, several seeds, the loss on held-out text in nats a
token, equal tokens. Stages, each from the one before:

    sweep       every variant at every rate, a twentieth of the tokens; its best rate goes on
    init        the paper's initial weights (0.02) against ours, at the best rate
    main        SWH and Transformer, all tokens, all seeds
    branches    each branch alone beside both, a quarter of the tokens
    published   as above

`size` is "small" (any text; hours on CPU cores) or "125m" (the paper's shape, FineWeb-Edu, a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_window.errors import unknown
from spectral_window.lab import results
from spectral_window.lab.jobs import Say, run_all
from spectral_window.lab.trainings import Text, Training

VARIANTS: dict[str, dict[str, Any]] = {
    "SWH": {},
    "Transformer": {"mixer": "attention"},
    "window only": {"branches": ("window",)},
    "spectral only": {"branches": ("spectral",)},
}
BOTH = ("SWH", "Transformer")
ACCUMULATION = 8  # micro-batches, by which the paper's printed loss is divided


@dataclass(frozen=True)
class Size:
    """A recipe, and how much of it each stage takes (optimiser steps)."""

    recipe: str
    rates: tuple[float, ...]
    sweep: int
    main: int
    branches: int
    published: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1)
    knobs: tuple[tuple[str, Any], ...] = ()


SIZES = {
    "small": Size(
        "paper-lm-small",
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        sweep=256,
        main=4883,
        branches=1221,
        published={"steps": 512},
    ),
    "125m": Size(
        "paper-lm",
        rates=(3e-4, 6e-4, 1.2e-3),
        sweep=800,
        main=16_000,
        branches=4000,
        published={"steps": 2000},
    ),
    "quick": Size(
        "tiny",
        rates=(1e-3,),
        sweep=4,
        main=8,
        branches=4,
        published={"steps": 4},
        seeds=(0,),
        knobs=(("warmup_steps", 2), ("eval_every", 4), ("log_every", 2)),
    ),
}
# what the paper's code does and the recipes do not
AS_PUBLISHED = {
    "match": None,
    "schedule": "constant",
    "warmup_steps": 0,
    "lr": 6e-4,
    "initializer_range": 0.02,
}


def run(
    out: Path,
    work: Path,
    *,
    size: str,
    text: Text,
    workers: int,
    command: str,
    tokens: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run what is missing and write out/lm-SIZE.json after every stage.

    work: where the run folders are. tokens: of a main run, instead of the size's own; the other
    stages shrink with it. Raises Interrupted on a signal; the next call goes on.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    suite = _Suite(SIZES[size], tokens)
    text.prepare(suite.size_recipe())
    name = f"lm-{size}"
    earlier = results.load(out, name) or {"rows": []}
    known = {row["key"]: row for row in earlier["rows"]}
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for stage in ("sweep", "init", "main", "branches", "published"):
        trainings = suite.stage(stage, best_rates(rows))
        missing = [t for t in trainings if t.key(text) not in known]
        say(f"{stage}: {len(trainings)} trainings, {len(missing)} not in earlier results")
        jobs = [training.job(work, text) for training in missing]
        failed += run_all(jobs, workers=workers, say=say)
        for training in trainings:
            row = known.get(training.key(text)) or training.row(work, text)
            rows += [training.about | row] if row else []
        results.keep(out, name, rows, quick=size == "quick", command=command, failed=failed)
    say(f"{len(rows)} rows: {out / (name + '.json')}")
    return results.load(out, name) or {}


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learning rate with the lowest held-out loss of the sweep, for each variant."""
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["part"] == "sweep":
            found = (row["eval_loss"], row["lr"])
            best[row["variant"]] = min(best.get(row["variant"], found), found)
    return {variant: rate for variant, (_, rate) in best.items()}


class _Suite:
    """The trainings of each stage at one size."""

    def __init__(self, size: Size, tokens: int | None):
        self.size = size
        per_step = self.size_recipe().tokens_per_step
        self.scale = 1.0 if tokens is None else tokens / (size.main * per_step)

    def size_recipe(self) -> Any:
        return Training(self.size.recipe, dict(self.size.knobs), "").resolved()

    def stage(self, stage: str, rates: dict[str, float]) -> list[Training]:
        size = self.size
        if stage == "sweep":
            return [
                self._training(stage, name, f"lr{rate:g}", steps=size.sweep, lr=rate)
                for name in VARIANTS
                for rate in size.rates
            ]
        if stage == "init":
            narrow = AS_PUBLISHED["initializer_range"]
            return [
                self._training(
                    stage, v, "0.02", steps=size.sweep, lr=rates[v], initializer_range=narrow
                )
                for v in BOTH
                if v in rates
            ]
        if stage == "published":
            knobs = {**size.published, **AS_PUBLISHED}
            return [self._training(stage, variant, "seed0", **knobs) for variant in BOTH]
        chosen = BOTH if stage == "main" else tuple(VARIANTS)
        steps = size.main if stage == "main" else size.branches
        seeds = size.seeds if stage == "main" else size.seeds[:1]
        return [
            self._training(stage, v, f"seed{seed}", steps=steps, lr=rates[v], seed=seed)
            for seed in seeds
            for v in chosen
            if v in rates
        ]

    def _training(self, part: str, variant: str, suffix: str, **knobs: Any) -> Training:
        steps = max(2, round(knobs.pop("steps") * self.scale))
        all_knobs = {**dict(self.size.knobs), **VARIANTS[variant], **knobs, "steps": steps}
        place = f"{part}/{variant.replace(' ', '-').lower()}-{suffix}"
        about = {
            "part": part,
            "variant": variant,
            "seed": knobs.get("seed", 0),
            "lr": knobs["lr"],
        }
        return Training(self.size.recipe, all_knobs, place, about)
