"""Figures of the paper's reproduction: each suite as panels, whose titles say what was found.

A model keeps its colour in all of them. A value is a dot, its 95 % interval a bar or a band, what
the paper prints a hollow diamond, and the best that any solver can do an upright line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from spectral_window.lab import estimates
from spectral_window.lab.bench import figures as bench_figures
from spectral_window.lab.estimates import Estimate
from spectral_window.lab.experiments import ablate, efficiency, lm, synthetic
from spectral_window.lab.experiments.efficiency_measure import MODELS
from spectral_window.lab.figures import (
    INK,
    MUTED,
    PAPER,
    SERIES,
    Panel,
    count,
    dot,
    name_lines,
    write_line,
    write_missing,
)
from spectral_window.lab.paper import claims

Values = Mapping[str, Any]
Rows = Sequence[dict[str, Any]]
COLORS = dict(zip(("SWH", "Transformer", "window only", "spectral only"), SERIES, strict=False))
# as published: (task, length) -> what it is called, and what the paper prints
PRINTED = {
    asked: (name, claims.PRINTED[asked])
    for asked, name in {
        ("published-associative", 32): "Associative recall",
        ("published-induction", 32): "Induction",
        ("published-sorting", 32): "Sorting",
        ("published-associative", 128): "4 times as long",
        ("published-needle", 256): "Needle, 8 times",
    }.items()
}
WELL_POSED = {  # task -> what it is called, and the length it is trained at
    "recall": ("Recall", 32),
    "needle": ("Needle", 32),
    "induction": ("Induction", 32),
    "sorting": ("Sorting", 32),
    "mqar": ("Multi-query recall", 64),
}
DASHED = (0, (4, 2))


# ---------------------------------------------------------------------------------- synthetic tasks


def published_panel(suites: Values) -> Panel:
    """The five published tasks: our scores, the paper's, and the ceiling."""
    learned = [asked for asked in PRINTED if asked[1] == 32]
    near = [
        best is not None and abs(PRINTED[asked][1]["SWH"] - best) < 0.01
        for asked in learned
        for best in [claims.ceiling(suites, *asked)]
    ]
    title = "As published: scores beside their ceilings"
    if all(near):
        title = "The scores printed for SWH at T = 32 are the ceilings"
    words = "; ".join(
        f"{name}: ceiling {_two(claims.ceiling(suites, *asked))}, "
        + ", ".join(
            f"{model} here {_two(_value(claims.scores(suites, 'published', *asked, model)))}, "
            f"printed {printed:.2f}"
            for model, printed in says.items()
        )
        for asked, (name, says) in PRINTED.items()
    )
    return Panel("published", title, words, lambda axes: _paint_published(axes, suites))


def _paint_published(axes: Axes, suites: Values) -> None:
    scores = {
        (asked, model): claims.scores(suites, "published", *asked, model)
        for asked in PRINTED
        for model in lm.BOTH
    }
    if not any(scores.values()):
        write_missing(axes)
        return
    for y, (asked, (_, says)) in enumerate(PRINTED.items()):
        best = claims.ceiling(suites, *asked)
        if best is not None:
            axes.plot([best, best], [y - 0.4, y + 0.4], color=INK, lw=1.6, label="ceiling")
        for shift, (model, printed) in zip((-0.17, 0.17), says.items(), strict=True):
            axes.plot(
                printed, y + shift, "D", ms=8.5, mfc=PAPER, mec=COLORS[model], mew=1.1,
                label=f"{model}, printed", clip_on=False,
            )  # fmt: skip
            dot(axes, scores[asked, model], y + shift, COLORS[model], f"{model}, here")
    name_lines(axes, [name for name, _ in PRINTED.values()])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of right answers")


def well_posed_panels(suites: Values) -> list[Panel]:
    """The well-posed tasks: score against length."""
    return [_well_posed_panel(suites, task, *about) for task, about in WELL_POSED.items()]


def _well_posed_panel(suites: Values, task: str, name: str, base: int) -> Panel:
    reach = synthetic.REACH if base == 32 and task != "sorting" else (1, 2, 4)
    lines: dict[tuple[str, str], dict[int, Estimate]] = {}
    for model in ("Transformer", "window only", "SWH"):  # the last is painted on top
        for training in ("fixed", "mixed"):
            scores = {
                k: claims.scores(suites, "posed", task, base * k, model, training) for k in reach
            }
            if points := {k: score for k, score in scores.items() if score}:
                lines[model, training] = points
    ours, theirs = (lines.get((model, "fixed"), {}) for model in lm.BOTH)
    far = 4  # every task is asked there, and the models differ most
    title = f"{name}: missing"
    if far in ours and far in theirs:
        title = f"{name} at {far}x: SWH {ours[far].value:.2f}, "
        title += f"Transformer {theirs[far].value:.2f}"
    words = "; ".join(
        f"{model}, {training} lengths: "
        + ", ".join(f"{score.value:.2f} at {k} times" for k, score in points.items())
        for (model, training), points in lines.items()
    )
    return Panel(
        f"posed-{task}",
        title,
        words,
        lambda axes: _paint_reach(axes, lines, reach, synthetic.chance(task)),
        width=4.0,
        height=2.9,
    )


def _paint_reach(
    axes: Axes,
    lines: Mapping[tuple[str, str], Mapping[int, Estimate]],
    reach: Sequence[int],
    chance: float,
) -> None:
    if not lines:
        write_missing(axes)
        return
    for (model, training), points in lines.items():
        x, color = list(points), COLORS[model]
        mixed = training == "mixed"
        axes.plot(
            x, [p.value for p in points.values()], color=color, lw=1.7, marker="o", ms=3.6,
            ls=DASHED if mixed else "-", mfc=PAPER if mixed else color, clip_on=False,
            label=f"{model}, mixed lengths" if mixed else model,
        )  # fmt: skip
        axes.fill_between(
            x, [p.low for p in points.values()], [p.high for p in points.values()],
            color=color, alpha=0.15, lw=0,
        )  # fmt: skip
    axes.axhline(chance, color=MUTED, lw=0.9, ls=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(reach)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("times the training length")
    axes.set_ylabel("share of right answers")


# ---------------------------------------------------------------------------------- language model


def language_panels(suite: Mapping[str, Any] | None, name: str) -> list[Panel]:
    """Held-out loss against tokens, the sweep, the branches, and what the paper prints; `name`
    tells the panels of several sizes apart."""
    rows = suite["rows"] if suite else []
    ends = {v: claims.losses({name: suite}, name, "main", v) for v in lm.BOTH}
    title = "Held-out loss: missing"
    if all(ends.values()):
        means = [f"{v} {estimates.mean(end).value:.3f}" for v, end in ends.items()]
        title = f"Held-out loss: {', '.join(means)}"
    best = lm.best(rows)
    rates = ", ".join(f"{v} {best[v]['lr']:g}" for v in lm.BOTH if v in best)
    alone = {v: claims.losses({name: suite}, name, "branches", v) for v in lm.BRANCHES}
    order = sorted((min(end), v) for v, end in alone.items() if end)
    return [
        Panel(f"{name}-curves", title, "Held-out loss against training tokens, a line a seed.",
              lambda axes: _paint_curves(axes, rows, "main", "eval_curve", 1.0)),
        Panel(f"{name}-sweep", f"Best learning rate: {rates or 'missing'}",
              "Held-out loss of short runs against the learning rate, a line for each width of the "
              "initial weights, the best one strong; a ring marks the best rate.",
              lambda axes: _paint_sweep(axes, rows, best)),
        Panel(f"{name}-branches",
              f"Branches: lowest loss, {order[0][1]}" if order else "Branches: missing",
              "; ".join(f"{v}: {loss:.3f}" for loss, v in order),
              lambda axes: _paint_branches(axes, alone)),
        Panel(f"{name}-published", f"What is printed: training loss / {lm.ACCUMULATION}",
              "Training loss of the published form, divided as the paper's code does.",
              lambda axes: _paint_curves(axes, rows, "published", "train_curve", lm.ACCUMULATION)),
    ]  # fmt: skip


def _paint_curves(axes: Axes, rows: Rows, part: str, curve: str, divisor: float) -> None:
    shown = [row for name in lm.BOTH for row in lm.counted(rows, part, name) if len(row[curve]) > 1]
    if not shown:
        write_missing(axes)
        return
    late = []
    for row in shown:
        tokens, loss = np.array(row[curve]).T
        axes.plot(
            tokens, loss / divisor, color=COLORS.get(row["variant"], MUTED), label=row["variant"],
            lw=1.5, alpha=1.0 if row["seed"] == 0 else 0.55,
        )  # fmt: skip
        late.append(loss[tokens > 0.06 * tokens[-1]] / divisor)
    values = np.concatenate(late)
    pad = 0.08 * np.ptp(values) + 1e-3
    axes.set_ylim(values.min() - pad, values.max() + pad)  # the first fall would hide the rest
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x else "0"))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token" if divisor == 1 else f"nats per token / {divisor:g}")


def _paint_sweep(axes: Axes, rows: Rows, best: Mapping[str, Mapping[str, float]]) -> None:
    if not best:
        write_missing(axes)
        return
    swept = [row for row in rows if row["part"] == "sweep"]
    widths = sorted({row["initializer_range"] for row in swept})
    rates = {row["lr"] for row in swept}
    for variant, color in COLORS.items():
        for width in widths:
            points = sorted(
                (row["lr"], row["eval_loss"])
                for row in swept
                if (row["variant"], row["initializer_range"]) == (variant, width)
            )
            if not points:
                continue
            chosen = best[variant]["initializer_range"] == width
            axes.plot(
                *zip(*points, strict=True), color=color, lw=1.7 if chosen else 0.8, marker="o",
                ms=3.6 if chosen else 2, alpha=1 if chosen else 0.45,
                label=f"{variant}, {width:g}" if chosen else None,
            )  # fmt: skip
            if chosen:
                rate = best[variant]["lr"]
                axes.plot(rate, dict(points)[rate], "o", ms=10, mfc="none", mec=color)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(rates)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss, nats per token")


def _paint_branches(axes: Axes, alone: Mapping[str, Sequence[float]]) -> None:
    if not any(alone.values()):
        write_missing(axes)
        return
    for y, (variant, losses) in enumerate(alone.items()):
        if not losses:
            write_line(axes, "missing", y)
        for loss in losses:
            axes.plot(loss, y, "o", ms=6, color=COLORS[variant])
            axes.annotate(f"{loss:.3f}", (loss, y), xytext=(0, 8), textcoords="offset points",
                          ha="center", color=COLORS[variant], fontsize=9)  # fmt: skip
    name_lines(axes, list(alone))
    axes.margins(x=0.15)
    axes.set_xlabel("held-out loss, nats per token")


# -------------------------------------------------------------------------------------- efficiency


def efficiency_panels(suite: Mapping[str, Any] | None) -> list[Panel]:
    """Time a layer, then peak memory, against T: as published, and well-posed."""
    rows = [row for row in (suite or {"rows": []})["rows"] if row["status"] == "ok"]
    summary = efficiency.summary({"rows": rows})
    summaries = {"time": ("slope", "{} T^{:.2f}"), "memory": ("memory_ratio", "{} {:.1f}x")}
    panels = []
    for curves in efficiency.curves({"rows": rows}):
        fact, said = summaries[curves.measure]
        ends = ", ".join(
            said.format(MODELS[key], value)
            for key, value in summary[fact][curves.form].items()
            if value is not None
        )
        words = "; ".join(
            f"{name}: " + ", ".join(f"{y:.4g} at {x}" for x, y in points)
            for name, points in curves.lines.items()
        )
        title = f"{curves.measure.capitalize()}, {efficiency.FORMS[curves.form]}"
        title += f": {ends}" if ends else ""
        drawn = bench_figures.panel("", curves.lines, "tokens", curves.unit, bench_figures.tokens)
        place = f"efficiency-{curves.form}-{curves.measure}"
        panels.append(Panel(place, title, words, drawn.paint))
    return panels


# --------------------------------------------------------------------------------------- ablations


def ablation_panels(suite: Mapping[str, Any] | None) -> list[Panel]:
    """A row for each group: the loss on text, and recall at 1 and 4 times the training length, as
    `ablate.table` has them."""
    panels = []
    table = ablate.table(dict(suite or {"rows": []}))
    for group in ablate.GROUPS:
        lines = [line for line in table if line["group"] == group]
        paper = next(name for name, changed in ablate.GROUPS[group].items() if not changed)
        height = 0.9 + 0.36 * len(lines)
        for place, measures, finding in (
            ("text", ("text",), _spread),
            ("recall", ("recall 1x", "recall 4x"), _solved),
        ):
            ends = {line["variant"]: line[measures[0]].value for line in lines if line[measures[0]]}
            title = f"{group.capitalize()}: {finding(ends) if ends else 'missing'}"
            words = "; ".join(
                f"{line['variant']}: " + ", ".join(f"{m} {_two(_value(line[m]))}" for m in measures)
                for line in lines
            )
            paint = _dots(lines, measures, paper)
            panels.append(Panel(f"ablate-{group}-{place}", title, words, paint, height=height))
    return panels


def _spread(ends: Mapping[str, float]) -> str:
    """With two seeds the lowest is seldom the best, so none is called that."""
    return f"loss {min(ends.values()):.3f} to {max(ends.values()):.3f}"


def _solved(ends: Mapping[str, float]) -> str:
    return f"recall of 0.95 or more in {sum(v >= 0.95 for v in ends.values())} of {len(ends)}"


def _dots(lines: Sequence[Values], measures: Sequence[str], paper: str) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        if not any(line[m] for line in lines for m in measures):
            write_missing(axes)
            return
        values = []
        for y, line in enumerate(lines):
            if not any(line[m] for m in measures):
                write_line(axes, "missing", y)
            for place, measure in enumerate(measures):  # the first is the one that is trained
                score, first = line[measure], place == 0
                label = measure if len(measures) > 1 else None
                shift = 0.22 * (place - (len(measures) - 1) / 2)
                dot(axes, score, y + shift, INK, label, hollow=not first)
                values += [score.value] if score else []
                if score and first and line["variant"] == paper:
                    axes.axvline(score.value, color=INK, lw=0.9, ls=DASHED, zorder=1)
        name_lines(axes, [line["variant"] for line in lines])
        if measures[0] == "text":
            pad = 0.5 * (max(values) - min(values)) + 0.02  # two seeds: their bars may run on
            axes.set_xlim(min(values) - pad, max(values) + pad)
            axes.set_xlabel("held-out loss, nats per token")
        else:
            axes.set_xlim(-0.02, 1.02)
            axes.set_xlabel("share of right answers")

    return paint


def _value(score: Estimate | None) -> float | None:
    return None if score is None else score.value


def _two(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2f}"
