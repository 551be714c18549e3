"""The language-model comparison, twice.

As published: unequal sizes, one constant learning rate and one width of the initial weights for
both, and a curve that is called validation loss but is the training loss, divided by the number of
accumulated micro-batches (8). Well-posed: equal parameters, the same sweep for every model, several
seeds, the loss on held-out text in nats a token, equal tokens. Stages, each from the one before:

    sweep       every variant at every learning rate and width of the initial weights, a twentieth
                of the tokens; its best pair goes on, and for whoever prefers another width than SWH
                the best pair at SWH's width too: what is better early need not be so at the end
    main        SWH and Transformer, all tokens, the first seed; each one's better pair counts
    seeds       the same with that pair, the other seeds
    branches    SWH beside each of its branches alone, a quarter of the tokens
    published   as above

A `Plan` says which variants pass through which stages: `PAPER` the paper's; `MEMORY` the layer with
a memory beside its branches (`nn/memory.py`) against all others take (`baselines/mixers.py`):
the sweep, main and seeds with the nearest of them, `branches` with all.

`size` is "small" (any text; hours on CPU cores, minutes on a GPU), "short" (half its parameters, a
million tokens, the sweep alone: minutes a model on any CPU core), "125m" (the paper's shape,
FineWeb-Edu, a GPU) or "125m-short" (the same shape, 20 million tokens of any text, one learning
rate: minutes on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_window.errors import unknown
from spectral_window.lab import results
from spectral_window.lab.baselines.mixers import BASELINES
from spectral_window.lab.experiments.trainings import Text, Training
from spectral_window.lab.jobs import Say, run_all
from spectral_window.nn.mixers import MIXERS

Rows = Sequence[dict[str, Any]]
Knobs = dict[str, float]
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
CLOSE = {name: VARIANTS[name] for name in BOTH} | {
    "SWH with memory": {"mixer": "memory"},
    "Transformer, shifted keys": {"mixer": "attention", "shifted_keys": True},
}
CLOSING = {"SWH with memory, closing gate": {"mixer": "memory", "write_gate": "closing"}}
EVERY = CLOSE | CLOSING | {MIXERS[name].label: {"mixer": name} for name in BASELINES}
MEMORY = Plan(EVERY, ("sweep", "main", "seeds", "branches"), tuple(CLOSE), tuple(EVERY))
FEW = Plan(CLOSE, ("sweep", "main", "seeds"), tuple(CLOSE))  # of the quick version


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
    knobs: tuple[tuple[str, Any], ...] = ()
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
        knobs=(
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
        knobs=(
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
    plan: Plan = PAPER,
    say: Say = print,
) -> dict[str, Any]:
    """Run what is missing of `plan`; out/lm-SIZE.json is written after every stage, and when it is
    stopped.

    work: where the run folders are. tokens: of a main run, instead of the size's own; the other
    stages shrink with it. Raises Interrupted on a signal; the next call goes on.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    suite = _Suite(SIZES[size], tokens, plan)
    text.prepare(suite.size_recipe())
    name = f"lm-{size}"
    earlier = results.load(out, name) or {"rows": []}
    known = {row["key"]: row for row in earlier["rows"]}
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for stage in plan.stages:
        trainings = suite.stage(stage, rows)
        missing = [t for t in trainings if t.key(text) not in known]
        say(f"{stage}: {len(trainings)} trainings, {len(missing)} not in earlier results")
        jobs = [training.job(work, text) for training in missing]
        ended = False
        try:
            failed += run_all(jobs, workers=workers, say=say)
            ended = stage == plan.stages[-1]
        finally:
            for training in trainings:
                row = known.get(training.key(text)) or training.row(work, text)
                rows += [row | training.about] if row else []
            # until all is done, rows of an earlier call stay
            there = {row["key"] for row in rows}
            kept = rows if ended else rows + [r for k, r in known.items() if k not in there]
            results.keep(out, name, kept, quick=size == "quick", command=command, failed=failed)
    say(f"{len(rows)} rows: {out / (name + '.json')}")
    return results.load(out, name) or {}


def best(rows: Rows, part: str = "sweep") -> dict[str, Knobs]:
    """The knobs with the lowest held-out loss of a part's first seed, for each variant."""
    found: dict[str, tuple[float, Knobs]] = {}
    for row in rows:
        if row["part"] == part and row["seed"] == FIRST:
            known = found.get(row["variant"])
            if known is None or row["eval_loss"] < known[0]:
                found[row["variant"]] = row["eval_loss"], _knobs(row)
    return {variant: knobs for variant, (_, knobs) in found.items()}


def candidates(rows: Rows) -> dict[str, list[Knobs]]:
    """What the sweep found best for each variant, and, where that is of another width, what it
    found best at SWH's width."""
    chosen = best(rows)
    width = chosen.get("SWH", {}).get("initializer_range")
    alike = best([row for row in rows if row["initializer_range"] == width])
    found = {}
    for variant, knobs in chosen.items():
        other = alike.get(variant, knobs)
        found[variant] = [knobs] if other == knobs else [knobs, other]
    return found


def counted(rows: Rows, part: str, variant: str) -> list[dict[str, Any]]:
    """The rows that stand for a variant: all seeds at the knobs that were best at the part's
    end."""
    knobs = best(rows, part).get(variant)
    return [
        row
        for row in rows
        if (row["part"], row["variant"]) == (part, variant) and _knobs(row) == knobs
    ]


def _knobs(row: dict[str, Any]) -> Knobs:
    return {name: row[name] for name in ("lr", "initializer_range")}


class _Suite:
    """The trainings of each stage at one size."""

    def __init__(self, size: Size, tokens: int | None, plan: Plan = PAPER):
        self.size, self.plan = size, plan
        per_step = self.size_recipe().tokens_per_step
        self.scale = tokens / (size.main * per_step) if tokens and size.main else 1.0

    def size_recipe(self) -> Any:
        return Training(self.size.recipe, dict(self.size.knobs), "").resolved()

    def stage(self, stage: str, rows: Rows) -> list[Training]:
        """rows: of the stages before; a variant that they lack is left out."""
        size, plan = self.size, self.plan
        swept = [{"lr": rate, "initializer_range": width} for rate, width in size.swept]
        if stage == "sweep":
            return [
                self._training(stage, name, FIRST, size.sweep, **knobs)
                for name in plan.variants
                for knobs in swept
                if len(swept) > 1
            ]
        if stage == "published":
            knobs = {k: v for k, v in size.published.items() if k != "steps"} | AS_PUBLISHED
            steps = size.published["steps"]
            if not steps:
                return []
            return [self._training(stage, variant, FIRST, steps, **knobs) for variant in BOTH]
        if stage == "seeds":
            return [
                self._training("main", variant, seed, size.main, **knobs)
                for seed in size.seeds[1:]
                for variant, knobs in best(rows, "main").items()
            ]
        steps, variants = size.branches, plan.branches
        if stage == "main":
            steps, variants = size.main, plan.main
        if not steps:
            return []
        tried = candidates(rows) if len(swept) > 1 else dict.fromkeys(variants, swept)
        return [
            self._training(stage, variant, FIRST, steps, **knobs)
            for variant in variants
            for knobs in tried.get(variant, ())
        ]

    def _training(self, part: str, variant: str, seed: int, steps: int, **knobs: Any) -> Training:
        about = {"part": part, "variant": variant, "seed": seed}
        about |= {name: knobs[name] for name in ("lr", "initializer_range")}
        steps = max(2, round(steps * self.scale))
        every = {**dict(self.size.knobs), **self.plan.variants[variant], **knobs}
        words = f"lr{knobs['lr']:g}-init{knobs['initializer_range']:g}-seed{seed}"
        place = f"{part}/{variant.replace(' ', '-').lower()}-{words}"
        return Training(self.size.recipe, every | {"seed": seed, "steps": steps}, place, about)
