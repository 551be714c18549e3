"""A report of runs: one HTML file that stands alone, read from run folders and from nothing else.

The page needs no network: styles, script and figures are inside it, and its content policy forbids
any request. What a folder does not hold is printed as "missing"; no number is guessed, no curve is
drawn without its data.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from spectral_window.files import write_bytes
from spectral_window.lab import figures
from spectral_window.lab.figures import Panel, svg
from spectral_window.lab.runs import Run, read, read_all
from spectral_window.lab.summary import (
    MEASURES,
    MISSING,
    Verdict,
    bits_text,
    compare,
    evaluation_text,
    growth_text,
    loss_text,
    oscillators,
    parameters,
    parameters_text,
    state_bytes,
)

SHOWN_CONTEXTS = {1024: "1k", 32768: "32k", 1048576: "1M"}


def write(
    runs: Sequence[Path | str], out_html: Path | str, *, verdict: Verdict | None = None
) -> Path:
    """Write the report of the run folders `runs` to the file `out_html`; returns its path.

    verdict: what to say instead of that of the numbers, where they decide nothing.

    Folders that are absent or unfinished are allowed: the page says "missing" where their numbers
    would stand.
    """
    out_html = Path(out_html)
    found = read_all([Path(run) for run in runs])
    states = [state_bytes(run) for run in found]
    verdict = verdict or compare(found)
    return render(
        "report.html.j2",
        out_html,
        title=verdict.headline,
        verdict=verdict,
        cards=[_card(run, color) for run, color in zip(found, _colors(found), strict=True)],
        labels=[run.label for run in found],
        rows=_rows(found, states),
        figures=_figures(found, states),
        points=_points_table(found),
        measured_on=evaluation_text(found),
        samples=[(run.label, f"s{i}", list(run.samples)) for i, run in enumerate(found)],
        commands=[(run.label, run.command() or MISSING) for run in found],
        environment=_environment_rows(found),
        absent=[(run.label, _inside(run.folder, out_html), run.missing) for run in found],
    )


def render(template: str, out_html: Path, **content: Any) -> Path:
    """Write the page `template` of templates/, filled with `content`, to `out_html`, whole or not
    at all; returns it."""
    page = _templates().get_template(template).render(**content)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    # JSON can spell half a surrogate pair, UTF-8 cannot
    write_bytes(out_html, page.encode("utf-8", errors="backslashreplace"))
    return out_html


def summary_figure(
    runs: Sequence[Path | str], out_png: Path | str, *, verdict: Verdict | None = None
) -> Path:
    """One picture of the comparison for a README: loss on the left, memory on the right, numbers
    beneath; PNG. verdict: as in `write`."""
    found = read_all([Path(run) for run in runs])
    colors = _colors(found)
    series = _series(found, colors)
    verdict = verdict or compare(found)
    with mpl.rc_context({**figures.STYLE, "font.size": 10.5}):
        figure = Figure(figsize=(11.0, 5.9))
        figure.text(0.05, 0.925, verdict.headline, fontsize=17, weight="bold", va="center")
        detail = verdict.detail.split(". ")[0] + "."
        figure.text(0.05, 0.868, detail, color=figures.MUTED, va="center")
        title: dict[str, Any] = {"loc": "left", "fontsize": 10.5}
        left = figure.add_axes((0.075, 0.335, 0.39, 0.44))
        right = figure.add_axes((0.585, 0.335, 0.365, 0.44))
        figures.paint_loss(left, series, "tokens")
        left.set_title("Learning: held-out loss (dots), training loss (thin)", **title)
        figures.paint_state(
            right,
            [
                (run.label, color, state_bytes(run))
                for run, color in zip(found, colors, strict=True)
            ],
        )
        right.set_title("Writing: memory kept while generating", **title)
        _numbers_beneath(figure, found, colors)
        out_png = Path(out_png)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png, dpi=160, metadata={"Software": None})
    return out_png


def training_figure(run: Path | str, out_png: Path | str) -> Path:
    """Loss of one long run: training (thin, smoothed), held-out (dots), where it was resumed, and
    the bits per byte at its end.

    Writes `out_png` and, beside it, the same picture as .svg. Returns `out_png`.
    """
    one = read(Path(run))
    train, evaluations, bits = one.train(), one.evaluations(), one.number("bits_per_byte")
    out_png = Path(out_png)
    with mpl.rc_context({**figures.STYLE, "font.size": 10.5}):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        axes = figure.add_subplot()
        color = figures.SERIES[0]
        series = [figures.Series("held-out loss", color, train, evaluations)]
        figures.paint_loss(axes, series, "tokens")
        if len(train) or len(evaluations):
            if len(train):
                axes.plot([], [], color=color, lw=0.9, alpha=0.5, label="training loss, smoothed")
            _mark_resumes(axes, one.resumes())
            axes.legend(loc="upper right", labelcolor=figures.INK)
        if len(evaluations) and bits is not None:
            axes.annotate(
                f"{bits:.3f} bits per byte", (evaluations.tokens[-1], evaluations.value[-1]),
                xytext=(-4, 26), textcoords="offset points", ha="right", color=color, weight="bold",
                fontsize=12,
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8, "shrinkB": 4},
            )  # fmt: skip
        axes.set_title(_training_title(one), loc="left", fontsize=11, color=figures.INK)
        return figures.save(figure, out_png, salt="training")


def _rows(runs: Sequence[Run], states: Sequence[list[tuple[int, int]]]) -> list[dict[str, Any]]:
    rows = [
        _row(m.name, m.note, [m.value(run) for run in runs], m.text, m.better, m.margin)
        for m in MEASURES
    ]
    for context, name in SHOWN_CONTEXTS.items():
        sizes: list[float | None] = [dict(state).get(context) for state in states]
        rows.append(_row(f"State after {name} tokens", "", sizes, figures.size, "low"))
    texts = [growth_text(state) for state in states]
    cells = [{"text": t, "best": False, "missing": t == MISSING} for t in texts]
    return [*rows, {"name": "State as text grows", "note": "", "cells": cells}]


def _row(
    name: str,
    note: str,
    values: Sequence[float | None],
    text: Callable[[float], str],
    better: str,
    margin: float = 0.0,
) -> dict[str, Any]:
    """A row of the comparison; a cell is best when it is ahead by more than the share `margin`."""
    texts = [MISSING if v is None else text(v) for v in values]
    ranked = sorted((v for v in values if v is not None), reverse=better == "high")
    best = None
    if better and len(ranked) > 1 and len(set(texts)) > 1:
        ahead = abs(ranked[0] - ranked[1]) > margin * abs(ranked[0])
        best = text(ranked[0]) if ahead else None
    cells = [{"text": t, "best": t == best, "missing": t == MISSING} for t in texts]
    return {"name": name, "note": note, "cells": cells}


def _card(run: Run, color: str) -> dict[str, str]:
    return {
        "label": run.label,
        "class": f"s{figures.SERIES.index(color)}",
        "loss": loss_text(run),
        "bits": bits_text(run),
        "size": parameters_text(run),
    }


def _colors(runs: Sequence[Run]) -> list[str]:
    return [figures.SERIES[i % len(figures.SERIES)] for i in range(len(runs))]


def _series(runs: Sequence[Run], colors: Sequence[str]) -> list[figures.Series]:
    return [
        figures.Series(run.label, color, run.train(), run.evaluations())
        for run, color in zip(runs, colors, strict=True)
    ]


def _figures(runs: Sequence[Run], states: Sequence[list[tuple[int, int]]]) -> dict[str, Any]:
    """The page's figures, as SVG elements, by name."""
    colors = _colors(runs)
    series = _series(runs, colors)
    drawn: dict[str, Any] = {}
    ends = "; ".join(f"{r.label} ends at {loss_text(r)}" for r in runs)
    for against in ("tokens", "seconds"):
        loss = Panel(
            f"loss-{against}",
            f"Loss against {against}",
            f"Training and held-out loss in nats per token against {against}. {ends}.",
            partial(figures.paint_loss, series=series, against=against),
        )
        drawn[f"loss_{against}"] = svg(loss)
    sizes = "; ".join(
        f"{run.label}: {figures.size(state[-1][1]) if state else MISSING}"
        for run, state in zip(runs, states, strict=True)
    )
    grown = [(r.label, c, s) for r, c, s in zip(runs, colors, states, strict=True)]
    state = Panel(
        "state",
        "Memory kept while generating, against tokens read",
        f"Both axes logarithmic. After a million tokens: {sizes}.",
        partial(figures.paint_state, series=grown),
    )
    drawn["state"] = svg(state)
    drawn["dynamics"] = []
    for index, (run, color) in enumerate(zip(runs, colors, strict=True)):
        decays, frequencies = oscillators(run)
        if decays:
            drawn["dynamics"].append((run.label, *_dynamics(index, decays, frequencies, color)))
    return drawn


def _dynamics(
    index: int, decays: list[np.ndarray], frequencies: list[np.ndarray], color: str
) -> tuple[str, str, str]:
    life = np.log(2) / np.maximum(np.concatenate(decays), 1e-9)
    words = (
        f"Half of the channels forget half of what they heard within {np.median(life):.2g} tokens; "
        f"the slowest tenth keeps it for {np.quantile(life, 0.9):.2g} tokens or more."
    )
    ridges = Panel(
        f"ridges-{index}", "Half-lives of the learned oscillators, by layer", words,
        lambda axes: figures.paint_half_lives(axes, decays, color),
    )  # fmt: skip
    poles = Panel(
        f"poles-{index}", "Frequency and half-life of every learned oscillator", words,
        lambda axes: figures.paint_poles(axes, decays, frequencies, color),
    )  # fmt: skip
    return words, svg(ridges), svg(poles)


def _points_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The numbers behind the curves: one line for each held-out evaluation."""
    rows = []
    for run in runs:
        evaluations = run.evaluations()
        for tokens, seconds, loss in zip(
            evaluations.tokens, evaluations.seconds, evaluations.value, strict=True
        ):
            rows.append(
                {
                    "model": run.label,
                    "tokens": f"{tokens:.0f}",
                    "seconds": f"{seconds:.1f}",
                    "loss": f"{loss:.4f}",
                }
            )
    return rows


def _numbers_beneath(figure: Figure, runs: Sequence[Run], colors: Sequence[str]) -> None:
    """The table of the README picture: a line for each run."""
    columns = [MEASURES[i] for i in (0, 1, 3, 4, 5, 7)]
    xs = (0.285, 0.405, 0.52, 0.645, 0.775, 0.895)  # right of "SWH with memory"
    for x, measure in zip(xs, columns, strict=True):
        figure.text(x, 0.2, measure.name.lower(), color=figures.MUTED, fontsize=9.5, ha="center")
    line = mpl.lines.Line2D([0.05, 0.95], [0.178, 0.178], color=figures.RULE, lw=0.8)
    figure.add_artist(line)
    for k, (run, color) in enumerate(zip(runs, colors, strict=True)):
        y = 0.125 - 0.062 * k
        figure.text(0.05, y, run.label, color=color, weight="bold", fontsize=11.5)
        for x, measure in zip(xs, columns, strict=True):
            value = measure.value(run)
            text = MISSING if value is None else measure.text(value)
            figure.text(x, y, text, ha="center", fontsize=11)


def _mark_resumes(axes: mpl.axes.Axes, resumes: Sequence[int]) -> None:
    for tokens in resumes:
        axes.axvline(tokens, color=figures.MUTED, lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            "resumed here", (tokens, 0.98), xycoords=("data", "axes fraction"), xytext=(5, 0),
            textcoords="offset points", va="top", color=figures.MUTED, fontsize=9.5,
        )  # fmt: skip


def _training_title(run: Run) -> str:
    parts = [run.label]
    if parameters(run) is not None:
        parts.append(parameters_text(run))
    if (tokens := run.number("tokens")) is not None:
        parts.append(f"{figures.count(tokens)} tokens")
    if (seconds := run.number("wall_seconds")) is not None:
        parts.append(figures.duration(seconds))
    return ", ".join(parts)


def _environment_rows(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Environment as the runs wrote it; a value on which they differ is given for each."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for key, value in _flat(run.environment()):
            rows.setdefault(key, []).append((run.label, value))
    return [(key, _together(values)) for key, values in rows.items()]


def _together(values: Sequence[tuple[str, str]]) -> str:
    texts = [value for _, value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{label}: {value}" for label, value in values)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append(
                (f"{prefix}{key}".replace("_", " "), "none" if value is None else str(value))
            )
    return rows


def _inside(folder: Path, out_html: Path) -> str:
    """The folder as seen from the page: no absolute path of the machine that made it."""
    try:
        return shlex.quote(str(folder.resolve().relative_to(out_html.resolve().parent)))
    except ValueError:
        return folder.name


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("spectral_window.lab", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
