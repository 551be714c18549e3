"""What a memory recalls: the well-posed tasks and harder ones, at up to 1,024 times the length.

Models of equal size: the paper's SWH; SWH with a memory (`nn/memory.py`), with and without its
short convolution, with each of its write gates; a Transformer, one with the memory's trick, keys of
the token before (`nn/attention.py`), and one with short convolutions; and linear models that others
use (`baselines/mixers.py`).

On the tasks of the suite `synthetic` its rows stand for the paper's SWH and the Transformer,
trained on 2 to 5 times as many sequences as the others are here. "mixed" models have seen longer
sequences (`Ability.mixed`) in the second half of their training, and "long" ones still longer, in
more steps (`LONG`, `LONGER`): how far a memory reaches depends on what it has learned to leave out.

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
from spectral_window.lab.figures import INK, MUTED, SERIES, Panel, sheet
from spectral_window.lab.jobs import Log
from spectral_window.nn.mixers import MIXERS

OURS, PUBLISHED, TRANSFORMER = "SWH with memory", "SWH", "Transformer"
CLOSING, SHIFTED = "SWH with memory, closing gate", "Transformer, shifted keys"
CONVOLVED = "SWH with memory, short convolutions"
CONVOLVED_CLOSING = "SWH with memory, short convolutions, closing gate"
REFLECTING = "SWH with memory, reflecting"
CONVOLVED_REFLECTING = "SWH with memory, short convolutions, reflecting"
CONVOLVED_TRANSFORMER = MIXERS["conv_attention"].label
LINEAR = {
    MIXERS[name].label: {"mixer": name}
    for name in ("gated_deltanet", "kimi_delta", "mamba2", "rg_lru")
}
MODELS: dict[str, dict[str, Any]] = {
    CONVOLVED: {"mixer": "memory", "short_convolution": True},
    CONVOLVED_CLOSING: {"mixer": "memory", "short_convolution": True, "write_gate": "closing"},
    OURS: {"mixer": "memory"},
    CLOSING: {"mixer": "memory", "write_gate": "closing"},
    CONVOLVED_REFLECTING: {
        "mixer": "memory",
        "short_convolution": True,
        "write_gate": "reflecting",
    },
    REFLECTING: {"mixer": "memory", "write_gate": "reflecting"},
    PUBLISHED: synthetic.MODELS["SWH"],
    TRANSFORMER: synthetic.MODELS["Transformer"],
    SHIFTED: {"mixer": "attention", "shifted_keys": True},
    CONVOLVED_TRANSFORMER: {"mixer": "conv_attention"},
    **LINEAR,
}
MEMORIES = (  # read in segments, so asked FAR too
    *(CONVOLVED, CONVOLVED_CLOSING, CONVOLVED_REFLECTING),
    *(OURS, CLOSING, REFLECTING),
)
RECOMMENDED = CONVOLVED_REFLECTING  # but for its window, which has to be shorter than a sequence
RIVALS = (PUBLISHED, TRANSFORMER, SHIFTED, CONVOLVED_TRANSFORMER)
TRAINED_LONG = f"{RECOMMENDED}, trained at up to 4,096"
LOOKS: dict[str, tuple[str, Any]] = {  # colour and line of what is drawn; the last is on top
    PUBLISHED: (SERIES[0], "-"),
    TRANSFORMER: (SERIES[1], "-"),
    CONVOLVED_TRANSFORMER: (SERIES[1], "--"),
    **dict(zip(LINEAR, (*((color, "-") for color in SERIES[3:]), (MUTED, ":")), strict=True)),
    CONVOLVED_CLOSING: (SERIES[2], "--"),
    CONVOLVED: (SERIES[2], (0, (1, 1.5))),
    TRAINED_LONG: (INK, "-"),
    RECOMMENDED: (SERIES[2], "-"),
}
ROWS = {1: 2048, 4: 512, 32: 512, 256: 64, 1024: 32}  # of a test, by times the base length
FAR = (256, 1024)  # for the memories alone
LONG = tuple(2**k for k in range(8))  # times the base length, of "long" training
LONGER = 2  # times the steps
TRAININGS = ("fixed", "mixed", "long")
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

    def lengths(self, training: str) -> tuple[int, ...]:
        """The lengths of a training, one of `TRAININGS`."""
        return tuple(
            self.base * k for k in {"fixed": (1,), "mixed": self.mixed, "long": LONG}[training]
        )

    def probe(self, model: str, training: str, seed: int) -> Probe:
        reach = [k for k in self.reach if k not in FAR or model in MEMORIES]
        return Probe(
            self.task,
            synthetic.WELL_POSED_SHAPE | MODELS[model],
            tuple(Exam(self.task, self.base * k, ROWS[k]) for k in reach),
            options=self.options,
            lengths=self.lengths(training),
            rows=self.rows,
            steps=self.steps * (LONGER if training == "long" else 1),
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
    "Permutations of three": Ability("permutations"),
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
    if quick:
        few = _trials(("Gap of 1 to 4",), (CONVOLVED, *RIVALS), "fixed", (0,))
        return [[dataclasses.replace(t, run=synthetic.shorten(t.run)) for t in few]]
    every, first = synthetic.SEEDS, synthetic.SEEDS[:1]
    long = [name for name, ability in KNOWN.items() if FAR[0] in ability.reach]
    hard = [*HARDER, *HARDEST]
    plan: list[tuple[Collection[str], Sequence[str], str, Sequence[int]]] = [
        (KNOWN, (CONVOLVED, CONVOLVED_CLOSING, OURS, CLOSING), "fixed", every),
        (hard, (CONVOLVED, CONVOLVED_CLOSING), "mixed", every),
        (HARDEST, (CONVOLVED_REFLECTING, REFLECTING), "mixed", every),
        (KNOWN, (CONVOLVED_REFLECTING,), "fixed", every),
        (HARDER, (CONVOLVED_REFLECTING,), "mixed", every),
        (KNOWN, tuple(LINEAR), "fixed", first),
        (hard, tuple(LINEAR), "mixed", first),
        (hard, RIVALS, "mixed", every),
        (long, (CONVOLVED, CONVOLVED_CLOSING), "mixed", every),
        (long, (CONVOLVED_REFLECTING,), "mixed", every),
        (long, (CONVOLVED, CONVOLVED_REFLECTING), "long", every),
        (KNOWN, (SHIFTED, CONVOLVED_TRANSFORMER), "fixed", every),
        (long, (SHIFTED, CONVOLVED_TRANSFORMER), "mixed", every),
        (HARDER, (CONVOLVED, *RIVALS), "fixed", first),
        (HARDER, (OURS, CLOSING), "mixed", first),
        (MORE, (CONVOLVED, *RIVALS), "mixed", first),
        (MORE, (CONVOLVED_REFLECTING,), "mixed", first),
        (KNOWN, tuple(LINEAR), "fixed", every[1:]),
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
    """Labels: the line of the table, the model, and the training, one of `TRAININGS`."""
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
    return [(a, t) for a in ABILITIES for t in TRAININGS if (a, t) in there]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The shares as a Markdown table, a line for each task and model, means over seeds."""
    reach = (1, 4, 32, *FAR)
    text = "| task | trained at | model | seeds | " + " | ".join(f"{k:,}x" for k in reach) + " |\n"
    text += "|---|---|---|---|" + "---|" * len(reach) + "\n"
    for ability, training in lines(rows):
        first, *more = ABILITIES[ability].lengths(training)
        trained = f"{first:,} ... {more[-1]:,}" if more else f"{first:,}"
        for model in MODELS:
            of = shares(rows, ability, model, training)
            if of:
                seeds = min(map(len, of.values()))
                cells = " | ".join(_cell(of.get(k, ())) for k in reach)
                text += f"| {ability} | {trained} | {model} | {seeds} | {cells} |\n"
    return text


def _cell(scores: Sequence[float]) -> str:
    """The mean over seeds, with a third digit where two would hide the errors."""
    if not scores:
        return "-"
    mean = sum(scores) / len(scores)
    return f"{mean:.3f}" if mean >= 0.99 else f"{mean:.2f}"


def figure(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Share of right answers against length, a panel a task, as a PNG. Tasks of the suite
    `synthetic` as trained at one length, the harder ones at mixed lengths."""
    drawn = [(name, "fixed" if name in KNOWN else "mixed") for name in (*KNOWN, *HARDER, *HARDEST)]
    there = set(lines(rows))
    panels = [_panel(rows, *line) for line in drawn if line in there]
    if not panels:
        panels = [_panel(rows, *line) for line in there]
    about = "right answers, means over seeds; band: their range; dotted: chance"
    return sheet(panels, min(4, len(panels)), about, path, legend_columns=3, handlelength=2.6)


def look(model: str) -> dict[str, Any]:
    """Colour and line of a model, as matplotlib takes them."""
    color, line = LOOKS[model]
    return {"color": color, "ls": line, "lw": 2.4 if model == RECOMMENDED else 1.4}


def _panel(rows: Sequence[dict[str, Any]], ability: str, training: str) -> Panel:
    runs = {model: (model, training) for model in LOOKS}
    runs[TRAINED_LONG] = RECOMMENDED, "long"
    drawn = {name: points for name, run in runs.items() if (points := shares(rows, ability, *run))}
    return Panel(
        f"recall-{ability}",
        ability,
        "share of right answers against length",
        lambda axes: _paint(axes, drawn, ABILITIES[ability]),
        width=3.6,
        height=2.7,
    )


def _paint(axes: Axes, drawn: Mapping[str, Shares], ability: Ability) -> None:
    for model, points in drawn.items():
        axes.plot(
            list(points), [sum(p) / len(p) for p in points.values()], marker="o", ms=3,
            clip_on=False, label=model, zorder=3, **look(model),
        )  # fmt: skip
        if model == RECOMMENDED:
            low, high = zip(*((p[0], p[-1]) for p in points.values()), strict=True)
            axes.fill_between(list(points), low, high, color=LOOKS[model][0], alpha=0.15, lw=0)
    axes.axhline(synthetic.chance(ability.task, **ability.options), color=MUTED, lw=0.9, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, ability.reach[-1])
    axes.xaxis.set_major_locator(FixedLocator(list(ability.reach)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}x"))
    axes.set_ylim(0, 1.03)
