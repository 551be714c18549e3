"""What a memory recalls: the well-posed tasks and harder ones, at up to 1,024 times the length.

Models of equal size: the paper's SWH, SWH with a memory (`nn/memory.py`) whose write gate is a
sigmoid or one that can close, a Transformer, one with the memory's trick, keys of the token before
(`nn/attention.py`), and linear models that others use (`baselines/mixers.py`).

On the tasks of the suite `synthetic` its rows stand for the paper's SWH and the Transformer,
trained on 2 to 5 times as many sequences as the others are here. "mixed" models have seen longer
sequences (`Ability.mixed`) in the second half of their training.

Every test at the base length has 2,048 held-out sequences; longer ones have fewer (`ROWS`). Beyond
1,024 tokens a model with a state of constant size reads a text in segments, each from the state
that the one before left (`hf/model.py`), so at 1,024 times nothing but that state has come from the
beginning.

The stages are in the order of what they decide, and results are written after each: a suite that is
stopped early lacks rows, and what is there stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from spectral_window.files import write_text
from spectral_window.lab import results
from spectral_window.lab.experiments import synthetic
from spectral_window.lab.experiments.experiment import Experiment, Trial
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.figures import INK, MUTED, PAPER, SERIES, Panel, sheet
from spectral_window.lab.jobs import Log
from spectral_window.nn.mixers import MIXERS

OURS, PUBLISHED, TRANSFORMER = "SWH with memory", "SWH", "Transformer"
CLOSING, SHIFTED = "SWH with memory, closing gate", "Transformer, shifted keys"
CONVOLVED = "SWH with memory, short convolutions"
LINEAR = ("gated_deltanet", "mamba2")
MODELS: dict[str, dict[str, Any]] = {
    OURS: {"mixer": "memory"},
    CONVOLVED: {"mixer": "memory", "short_convolution": True},
    CLOSING: {"mixer": "memory", "write_gate": "closing"},
    PUBLISHED: synthetic.MODELS["SWH"],
    TRANSFORMER: synthetic.MODELS["Transformer"],
    SHIFTED: {"mixer": "attention", "shifted_keys": True},
    **{MIXERS[name].label: {"mixer": name} for name in LINEAR},
}
COLORS = {
    PUBLISHED: SERIES[0],
    TRANSFORMER: SERIES[1],
    SHIFTED: SERIES[3],
    **{MIXERS[name].label: color for name, color in zip(LINEAR, SERIES[4:], strict=True)},
    CLOSING: MUTED,
    CONVOLVED: INK,
    OURS: SERIES[2],  # the last is painted on top
}
ROWS = {1: 2048, 4: 512, 32: 512, 256: 64, 1024: 32}  # of a test, by times the base length
FAR = (256, 1024)  # for the memories alone
EACH = 5  # probes in one process
Shares = dict[int, list[float]]


@dataclass(frozen=True)
class Ability:
    """One line of the table: a task with its options, the length it is trained at, how long and on
    how many sequences a step, the multiples of that length at which it is asked, and those that
    training with mixed lengths draws from."""

    task: str
    options: dict[str, Any] = field(default_factory=dict)
    base: int = 32
    steps: int = 800
    rows: int = 32
    reach: tuple[int, ...] = (1, 4, 32)
    mixed: tuple[int, ...] = (1, 2, 4)

    def probe(self, model: str, training: str, seed: int) -> Probe:
        reach = [k for k in self.reach if k not in FAR or model in (OURS, CONVOLVED, CLOSING)]
        return Probe(
            self.task,
            synthetic.WELL_POSED_SHAPE | MODELS[model],
            tuple(Exam(self.task, self.base * k, ROWS[k]) for k in reach),
            options=self.options,
            lengths=tuple(self.base * k for k in (self.mixed if training == "mixed" else (1,))),
            rows=self.rows,
            steps=self.steps,
            lr=3e-3,
            seed=seed,
        )


KNOWN = {  # to the suite `synthetic` too, so mixed lengths are its own
    name: dataclasses.replace(ability, rows=64, reach=(1, 4, 32, *FAR), mixed=(1, 2, 4, 8))
    for name, ability in {
        "Recall, 4 pairs": Ability("recall", steps=400),
        "Needle": Ability("needle", steps=400),
        "Induction": Ability("induction", steps=800),
    }.items()
} | {"MQAR, 8 pairs": Ability("mqar", base=64, steps=600, reach=(1, 4))}
HARDER = {
    "Gap of 1 to 4": Ability("gap", {"gap": 4}),
    "Gap of 1 to 12, 2 pairs": Ability("gap", {"gap": 12, "pairs": 2}),
    "Value before key": Ability("value-first"),
    "Keys of two tokens": Ability("two-token-keys"),
    "Overwritten keys": Ability("overwriting"),
}
HARDEST = {
    "Two hops": Ability("two-hops"),
    "Parity": Ability("parity"),
}
MORE = {
    "Gap of 1": Ability("gap", {"gap": 1}),
    "Gap of 1 to 8, 2 pairs": Ability("gap", {"gap": 8, "pairs": 2}),
    "Gap of 1 to 16, 2 pairs": Ability("gap", {"gap": 16, "pairs": 2}, base=64),
    "Recall, 8 pairs": Ability("recall", {"pairs": 8}),
    "Recall, 16 of 32 keys": Ability("recall", {"pairs": 16, "keys": 32}, base=64),
}
ABILITIES = KNOWN | HARDER | HARDEST | MORE


def stages(*, quick: bool = False) -> list[list[Trial[Probe]]]:
    """The suite, what decides most first; `quick` shows the way and no result: ten steps of each
    model on one task."""
    every = (OURS, PUBLISHED, TRANSFORMER, SHIFTED)
    if quick:
        few = [*_trials(("Gap of 1 to 4",), every, "fixed", (0,))]
        return [[dataclasses.replace(t, run=synthetic.shorten(t.run)) for t in few]]
    first, others = synthetic.SEEDS[:1], synthetic.SEEDS[1:]
    long = [name for name, ability in KNOWN.items() if FAR[0] in ability.reach]
    rest = (PUBLISHED, TRANSFORMER, SHIFTED)
    linear = tuple(MIXERS[name].label for name in LINEAR)
    plan: list[tuple[Collection[str], Sequence[str], str, Sequence[int]]] = [
        (KNOWN, (OURS,), "fixed", first),
        (HARDER, (OURS,), "mixed", first),
        (HARDER, (TRANSFORMER,), "mixed", first),
        (KNOWN, (CLOSING,), "fixed", synthetic.SEEDS),
        (HARDER, (CLOSING,), "mixed", first),
        (KNOWN, (OURS,), "fixed", others),
        (KNOWN, (CONVOLVED,), "fixed", synthetic.SEEDS),
        (HARDER, (CONVOLVED,), "mixed", first),
        (KNOWN, linear, "fixed", first),
        (HARDER, (PUBLISHED,), "mixed", first),
        (HARDER, (OURS,), "mixed", others),
        (HARDER, (SHIFTED,), "mixed", first),
        (KNOWN, (SHIFTED,), "fixed", first),
        (HARDEST, every, "mixed", first),
        (long, (OURS,), "mixed", first),
        (HARDER, rest, "mixed", others),
        (MORE, every, "mixed", first),
        (long, (OURS,), "mixed", others),
        (HARDER, every, "fixed", first),
        ({**HARDEST, **MORE}, every, "mixed", others),
        (HARDER, every, "fixed", others),
        (KNOWN, (SHIFTED,), "fixed", others),
        (long, (SHIFTED,), "mixed", synthetic.SEEDS),
    ]
    named = {ability.task: name for name, ability in KNOWN.items()}
    shared = [
        _trial(named[t.run.task], t.labels["model"], t.labels["training"], t.run)
        for t in synthetic.trials()
        if t.labels["form"] == "posed"
        and t.run.task in named
        and t.labels["model"] in (PUBLISHED, TRANSFORMER)
    ]
    return [*(list(_trials(*part)) for part in plan), shared]


def _trial(ability: str, model: str, training: str, probe: Probe) -> Trial[Probe]:
    """Labels: the line of the table, the model, and training with "fixed" or "mixed" lengths."""
    name = f"{ability}, {model}, {training}, seed {probe.seed}"
    return Trial(name, probe, {"ability": ability, "model": model, "training": training})


def _trials(
    abilities: Collection[str],
    models: Sequence[str],
    training: str,
    seeds: Sequence[int],
) -> Iterator[Trial[Probe]]:
    for seed in seeds:
        for name in abilities:
            for model in models:
                yield _trial(name, model, training, ABILITIES[name].probe(model, training, seed))


def run(
    out: Path,
    work: Path,
    *,
    earlier: Path | None = None,
    quick: bool,
    workers: int,
    command: str,
    log: Log = print,
) -> dict[str, Any]:
    """Run what is missing of the suite; out/recall.json, .md and .png are written after each stage,
    and when it is stopped.

    earlier: the folder of synthetic.json, whose rows are not measured again. work: where each probe
    leaves its row. Raises Interrupted on a signal; the next call continues.
    """
    shared = (results.load(earlier, "synthetic") if earlier else None) or {"rows": []}
    experiment = Experiment(
        "recall", out, work, quick=quick, workers=workers, command=command, log=log,
        earlier=({k: v for k, v in row.items() if k != "form"} for row in shared["rows"]),
    )  # fmt: skip
    plan, saved = stages(quick=quick), dict[str, Any]()
    for trials in plan:
        try:
            experiment.run(trials, each=8 if quick else EACH)
        finally:
            rows = experiment.rows(chain.from_iterable(plan))
            saved = experiment.save(rows)
            if rows:
                write_text(out / "recall.md", table(rows))
                figure(rows, out / "recall.png")
    return saved


# ------------------------------------------------------------------------------------ table, figure


def shares(rows: Sequence[dict[str, Any]], ability: str, model: str, training: str) -> Shares:
    """Reach (times the base length) -> the share of right answers of each seed, ascending."""
    base, by_reach = ABILITIES[ability].base, Shares()
    for row in rows:
        if (row["ability"], row["model"], row["training"]) == (ability, model, training):
            for test in row["tests"]:
                reach = by_reach.setdefault(test["length"] // base, [])
                reach.append(test["right"] / test["asked"])
    return {reach: sorted(by_reach[reach]) for reach in sorted(by_reach)}


def lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(ability, training) of every line of the table, in the suite's order."""
    there = {(row["ability"], row["training"]) for row in rows}
    return [(a, t) for a in ABILITIES for t in ("fixed", "mixed") if (a, t) in there]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The shares as a Markdown table, means over seeds; how many, where they are not
    three. Models without a row are left out."""
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    head = "| task | trained at | asked at | " + " | ".join(models) + " |\n"
    text = head + "|---|---|---|" + "---|" * len(models) + "\n"
    for ability, training in lines(rows):
        about = ABILITIES[ability]
        of = [shares(rows, ability, model, training) for model in models]
        shown = [k for k in (1, 4, 32, *FAR) if any(k in one for one in of)]
        trained = f"{about.base}" + (
            f" ... {about.base * about.mixed[-1]}" if training == "mixed" else ""
        )
        asked = ", ".join(f"{k:,}x" for k in shown)
        cells = " | ".join(_cell([one[k] for k in shown if k in one]) for one in of)
        text += f"| {ability} | {trained} | {asked} | {cells} |\n"
    return text


def _cell(scores: Sequence[Sequence[float]]) -> str:
    """What the seeds of one model scored at each length: "1.000, 0.97 (1 seed)"."""
    if not scores:
        return "-"
    means = [sum(values) / len(values) for values in scores]
    text = ", ".join(f"{mean:.3f}" if mean >= 0.99 else f"{mean:.2f}" for mean in means)
    seeds = min(map(len, scores))
    many = "" if seeds == len(synthetic.SEEDS) else f" ({seeds} seed{'s' * (seeds > 1)})"
    return text + many


def figure(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Share of right answers against length, a panel a task, as a PNG."""
    there = [ability for ability in ABILITIES if any(r["ability"] == ability for r in rows)]
    panels = [_panel(rows, ability) for ability in there]
    about = "right answers; bands: range over seeds; dotted: chance"
    return sheet(panels, min(4 if len(panels) <= 8 else 5, len(panels)), about, path)


def _panel(rows: Sequence[dict[str, Any]], ability: str) -> Panel:
    drawn = {
        (model, training): points
        for model in COLORS
        for training in ("fixed", "mixed")
        if (points := shares(rows, ability, model, training))
    }
    return Panel(
        f"recall-{ability}",
        ability,
        "share of right answers against length",
        lambda axes: _paint(axes, drawn, ABILITIES[ability]),
        width=3.6,
        height=2.7,
    )


def _paint(axes: Axes, drawn: Mapping[tuple[str, str], Shares], ability: Ability) -> None:
    for (model, training), points in drawn.items():
        x, color, mixed = list(points), COLORS[model], training == "mixed"
        axes.plot(
            x, [sum(p) / len(p) for p in points.values()], color=color, lw=1.7, marker="o", ms=3.6,
            ls=(0, (4, 2)) if mixed else "-", mfc=PAPER if mixed else color, clip_on=False,
            label=f"{model}, mixed lengths" if mixed else model, zorder=3,
        )  # fmt: skip
        axes.fill_between(
            x, [p[0] for p in points.values()], [p[-1] for p in points.values()],
            color=color, alpha=0.15, lw=0,
        )  # fmt: skip
    axes.axhline(synthetic.chance(ability.task, **ability.options), color=MUTED, lw=0.9, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, ability.reach[-1])
    axes.xaxis.set_major_locator(FixedLocator(list(ability.reach)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}x"))
    axes.set_ylim(0, 1.03)
