"""The language-model comparison, twice.

As published: unequal sizes, one constant learning rate and one width of the initial weights for
both, and a curve that is called validation loss but is the training loss, divided by the number of
accumulated micro-batches (8). Well-posed: equal parameters, the same sweep for every model, several
seeds, the loss on held-out text in nats per token, equal tokens. Stages, each from the one before:

    sweep       every variant at every learning rate and width of the initial weights, a twentieth
                of the tokens. Its best pair continues; a variant whose best width is not SWH's
                also continues with the best pair at SWH's width, because what is better early need
                not be better at the end
    main        SWH and Transformer, all tokens, the first seed; each one's better pair counts
    seeds       the same with that pair, the other seeds
    branches    SWH and each of its branches alone, a quarter of the tokens
    published   as above

A `Plan` says which variants pass through which stages: here the paper's, `memory.py` has another.

`size` is "small" (any text; hours on CPU cores, minutes on a GPU), "short" (half its parameters, a
million tokens, the sweep alone: minutes per model on any CPU core), "125m" (the paper's shape,
FineWeb-Edu, a GPU) or "125m-short" (the same shape, 20 million tokens of any text, one learning
rate: minutes on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_window.errors import unknown
from spectral_window.lab.experiments.experiment import Experiment, Trial
from spectral_window.lab.experiments.trainings import RECIPES_OWN, Text, Training
from spectral_window.lab.jobs import Log
from spectral_window.training.recipes import Recipe

Rows = Sequence[dict[str, Any]]
PAIR = ("lr", "initializer_range")  # what a sweep tries
Pair = dict[str, float]
VARIANTS: dict[str, dict[str, Any]] = {
    "SWH": {},
    "Transformer": {"mixer": "attention"},
    "window only": {"branches": ("window",)},
    "spectral only": {"branches": ("spectral",)},
}
BOTH = ("SWH", "Transformer")
BRANCHES = ("SWH", "window only", "spectral only")
STAGES = ("sweep", "main", "seeds", "branches", "published")
FIRST = 0  # the seed of whatever has only one
ACCUMULATION = 8  # micro-batches, by which the paper's printed loss is divided


@dataclass(frozen=True)
class Plan:
    """What is compared: variants (name -> changes of the recipe), the stages they pass through,
    and which variants are trained in `main` and `branches`."""

    variants: dict[str, dict[str, Any]]
    stages: tuple[str, ...]
    main: tuple[str, ...]
    branches: tuple[str, ...] = ()


PAPER = Plan(VARIANTS, STAGES, BOTH, BRANCHES)


@dataclass(frozen=True)
class Size:
    """A recipe, and how much of it each stage takes (optimiser steps).

    The sweep is every learning rate at every width of the initial weights, and the pairs `beyond`,
    which show that the grid has not ended too early. A single pair needs no sweep. A stage of no
    steps is left out.
    """

    recipe: str
    rates: tuple[float, ...]
    widths: tuple[float, ...]
    sweep: int
    main: int
    branches: int
    published: dict[str, Any]
    seeds: tuple[int, ...] = (FIRST, 1)
    overrides: tuple[tuple[str, Any], ...] = ()
    beyond: tuple[tuple[float, float], ...] = ()

    @property
    def swept(self) -> list[tuple[float, float]]:
        """The pairs of learning rate and width of the sweep."""
        return [*((rate, width) for width in self.widths for rate in self.rates), *self.beyond]


SIZES = {
    "small": Size(
        "paper-lm-small",
        rates=(2e-3, 4e-3, 8e-3),
        widths=(0.02, 0.05),
        beyond=((4e-3, 0.01),),
        sweep=256,
        main=4883,
        branches=1221,
        published={"steps": 512},
    ),
    "short": Size(
        "paper-lm-small",
        rates=(4e-3,),
        widths=(0.05, 0.02),
        sweep=256,
        main=0,
        branches=0,
        published={"steps": 0},
        overrides=(
            ("hidden_size", 128),
            ("num_hidden_layers", 2),
            ("dtype", "float32"),
            ("eval_every", 256),
        ),
    ),
    "125m": Size(
        "paper-lm",
        rates=(3e-4, 6e-4, 1.2e-3),
        widths=(0.02,),
        sweep=800,
        main=16_000,
        branches=4000,
        published={"steps": 2000},
    ),
    "125m-short": Size(
        "paper-lm",
        rates=(1e-3,),
        widths=(0.02,),
        sweep=0,
        main=305,
        branches=76,
        published={"steps": 305},
        seeds=(FIRST,),
        overrides=(
            ("micro_batch_size", 32),
            ("warmup_steps", 30),
            ("eval_every", 61),
            ("eval_tokens", 131_072),
            ("save_every", 305),
        ),
    ),
    "quick": Size(
        "tiny",
        rates=(1e-3,),
        widths=(0.05,),
        sweep=4,
        main=8,
        branches=4,
        published={"steps": 4},
        seeds=(FIRST,),
        overrides=(("warmup_steps", 2), ("eval_every", 4), ("log_every", 2)),
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
    plan: Plan = PAPER,
    log: Log = print,
) -> dict[str, Any]:
    """Run what is missing of `plan`; out/lm-SIZE.json is written after every stage, and when it is
    stopped.

    work: where the run folders are. tokens: of a main run, instead of the size's own; the other
    stages shrink with it. Raises Interrupted on a signal; the next call continues.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    suite = Suite(SIZES[size], tokens, plan, text)
    text.prepare(suite.recipe())
    experiment = Experiment(
        f"lm-{size}", out, work, quick=size == "quick", workers=workers, command=command, log=log
    )
    rows: list[dict[str, Any]] = []
    saved: dict[str, Any] = {}
    for stage in plan.stages:
        trials, ended = suite.stage(stage, rows), False
        log(stage)
        try:
            experiment.run(trials)
            ended = stage == plan.stages[-1]
        finally:
            rows += experiment.rows(trials)
            done = {row["key"] for row in rows}
            # until all is done, rows of an earlier call stay
            later = [row for key, row in experiment.earlier.items() if key not in done]
            saved = experiment.save(rows if ended else rows + later)
    return saved


def best(rows: Rows, part: str = "sweep") -> dict[str, Pair]:
    """The pair with the lowest held-out loss of a part's first seed, for each variant."""
    lowest: dict[str, tuple[float, Pair]] = {}
    for row in rows:
        if row["part"] == part and row["seed"] == FIRST:
            before = lowest.get(row["variant"])
            if before is None or row["eval_loss"] < before[0]:
                lowest[row["variant"]] = row["eval_loss"], _pair(row)
    return {variant: pair for variant, (_, pair) in lowest.items()}


def candidates(rows: Rows) -> dict[str, list[Pair]]:
    """The sweep's best pair for each variant, and, where that is of another width than SWH's, the
    best at SWH's width."""
    chosen = best(rows)
    width = chosen.get("SWH", {}).get("initializer_range")
    at_same_width = best([row for row in rows if row["initializer_range"] == width])
    pairs = {}
    for variant, pair in chosen.items():
        other = at_same_width.get(variant, pair)
        pairs[variant] = [pair] if other == pair else [pair, other]
    return pairs


def counted(rows: Rows, part: str, variant: str) -> list[dict[str, Any]]:
    """The rows that stand for a variant: all seeds at the pair that was best at the part's end."""
    pair = best(rows, part).get(variant)
    return [
        row
        for row in rows
        if (row["part"], row["variant"]) == (part, variant) and _pair(row) == pair
    ]


def _pair(row: dict[str, Any]) -> Pair:
    return {name: row[name] for name in PAIR}


class Suite:
    """The trials of each stage at one size. Labels: part, variant, seed, lr, initializer_range."""

    def __init__(
        self, size: Size, tokens: int | None, plan: Plan = PAPER, text: Text = RECIPES_OWN
    ):
        self.size, self.plan, self.text = size, plan, text
        per_step = self.recipe().tokens_per_step
        self.scale = tokens / (size.main * per_step) if tokens and size.main else 1.0

    def recipe(self) -> Recipe:
        """The recipe of this size, without overrides of a stage or variant."""
        return Training(self.size.recipe, dict(self.size.overrides)).resolved()

    def stage(self, stage: str, rows: Rows) -> list[Trial]:
        """rows: of the stages before; a variant that they lack is left out."""
        size, plan = self.size, self.plan
        pairs = [{"lr": rate, "initializer_range": width} for rate, width in size.swept]
        if stage == "sweep":
            return [
                self._trial(stage, name, FIRST, size.sweep, **pair)
                for name in plan.variants
                for pair in pairs
                if len(pairs) > 1
            ]
        if stage == "published":
            changes = {k: v for k, v in size.published.items() if k != "steps"} | AS_PUBLISHED
            steps = size.published["steps"]
            if not steps:
                return []
            return [self._trial(stage, variant, FIRST, steps, **changes) for variant in BOTH]
        if stage == "seeds":
            return [
                self._trial("main", variant, seed, size.main, **pair)
                for seed in size.seeds[1:]
                for variant, pair in best(rows, "main").items()
            ]
        steps, variants = size.branches, plan.branches
        if stage == "main":
            steps, variants = size.main, plan.main
        if not steps:
            return []
        tried = candidates(rows) if len(pairs) > 1 else dict.fromkeys(variants, pairs)
        return [
            self._trial(stage, variant, FIRST, steps, **pair)
            for variant in variants
            for pair in tried.get(variant, ())
        ]

    def _trial(self, part: str, variant: str, seed: int, steps: int, **changes: Any) -> Trial:
        labels = {"part": part, "variant": variant, "seed": seed}
        labels |= {name: changes[name] for name in PAIR}
        steps = max(2, round(steps * self.scale))
        overrides = {**dict(self.size.overrides), **self.plan.variants[variant], **changes}
        words = f"lr{changes['lr']:g}-init{changes['initializer_range']:g}-seed{seed}"
        place = f"{part}/{variant.replace(' ', '-').lower()}-{words}"
        overrides |= {"seed": seed, "steps": steps}
        return Trial(place, Training(self.size.recipe, overrides, place, self.text), labels)
