"""Tables of the paper's reproduction: what each suite measured, beside what the paper prints.

The lines are those that the suite would have when complete, so a row that was not run is a line
that says "missing". Numbers come from `claims.scores`, `results`, `ablate.table` and the rows
themselves; nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectral_window.lab import estimates
from spectral_window.lab.estimates import Estimate
from spectral_window.lab.experiments import ablate, efficiency, lm, synthetic
from spectral_window.lab.experiments.efficiency_measure import MODELS as TIMED
from spectral_window.lab.figures import count, duration, size
from spectral_window.lab.paper import claims
from spectral_window.lab.paper.figures import PRINTED, WELL_POSED
from spectral_window.lab.paper.rows import is_number

MISSING = "missing"
MODELS = ("SWH", "Transformer", "window only", "spectral only")
Values = Mapping[str, Any]
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """`text`, a smaller `note` beneath it, what the column is sorted by (None: the text), and the
    name of a style."""

    text: str
    note: str = ""
    sort: float | None = None
    style: str = ""


@dataclass(frozen=True)
class Table:
    """`name` is its id on the page; the first column names the line, the first `texts` columns hold
    words, the others numbers."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    texts: int = 2


def words(text: Any) -> Cell:
    return Cell(str(text), style=f"s{MODELS.index(text)}" if text in MODELS else "")


def number(value: Any, form: str = "{:,.3f}") -> Cell:
    """A number as `form` writes it, or "missing" for whatever is not a finite one."""
    if not is_number(value):
        return Cell(MISSING, style="missing")
    return Cell(form.format(value), sort=value)


def estimate(score: Estimate | None, digits: int = 2) -> Cell:
    """A value above its 95 % interval."""
    if score is None:
        return Cell(MISSING, style="missing")
    note = "no interval"
    if math.isfinite(score.low) and math.isfinite(score.high):
        note = f"{score.low:.{digits}f} to {score.high:.{digits}f}"
    return Cell(f"{score.value:.{digits}f}", note, score.value)


# ---------------------------------------------------------------------------------- synthetic tasks


def synthetic_tables(suites: Values) -> list[Table]:
    """The published tasks beside the printed scores; the well-posed ones by length."""
    reach = [task for task in WELL_POSED if task not in ("sorting", "mqar")]
    short = [task for task in WELL_POSED if task not in reach]
    return [
        _published(suites),
        _well_posed(suites, "posed", "Well-posed, by length", reach, synthetic.REACH),
        _well_posed(
            suites, "posed-short", "Well-posed: sorting and several questions", short, (1, 2, 4)
        ),
    ]


def _published(suites: Values) -> Table:
    rows = []
    for (task, length), (name, says) in PRINTED.items():
        for model, printed in says.items():
            runs = _runs(suites, "published", model, "fixed", task)
            batch = [(row["batch_right"], row["batch_asked"]) for row in runs]
            taken = length == 32  # the paper's scores at other lengths are of fresh examples
            rows.append(
                (
                    Cell(name, f"T = {length}"),
                    words(model),
                    number(printed, "{:.2f}"),
                    _batch(batch) if taken else Cell("not taken so"),
                    estimate(claims.scores(suites, "published", task, length, model)),
                    number(claims.ceiling(suites, task, length)),
                    *_sizes(_runs(suites, "published", model, "fixed", _trained_on(task))),
                )
            )
    head = (
        "Task", "Model", "Paper prints", "One leftover batch", "Held-out examples", "Ceiling",
        "Seeds", "Parameters",
    )  # fmt: skip
    return Table("published-tasks", "As published", head, tuple(rows))


def _batch(counts: Sequence[tuple[int, int]]) -> Cell:
    """The paper's own scoring, for each seed."""
    if not counts or not all(asked for _, asked in counts):
        return Cell(MISSING, style="missing")
    whole = estimates.share(counts)
    each = ", ".join(f"{right}/{asked}" for right, asked in counts)
    return Cell(f"{whole.value:.2f}", each, whole.value)


def _trained_on(task: str) -> str:
    """The needle is asked of the associative model."""
    return "published-associative" if task == "published-needle" else task


def _well_posed(
    suites: Values, name: str, title: str, tasks: Sequence[str], reach: Sequence[int]
) -> Table:
    asked = dict.fromkeys(
        (trial.run.task, trial.labels["model"], trial.labels["training"])
        for trial in synthetic.trials()
        if trial.labels["form"] == "posed" and trial.run.task in tasks
    )
    rows = []
    for task, model, training in sorted(asked, key=lambda line: tasks.index(line[0])):
        called, base = WELL_POSED[task]
        scores = [claims.scores(suites, "posed", task, base * k, model, training) for k in reach]
        rows.append(
            (
                words(called),
                words(model),
                Cell(f"{base} to 256" if training == "mixed" else f"{base}"),
                *(estimate(score) for score in scores),
                *_sizes(_runs(suites, "posed", model, training, task)),
            )
        )
    head = ("Task", "Model", "Trained at", *(f"{k}x" for k in reach), "Seeds", "Parameters")
    return Table(name, title, head, tuple(rows))


def _runs(suites: Values, form: str, model: str, training: str, task: str) -> list[dict[str, Any]]:
    rows = (suites.get("synthetic") or {"rows": []})["rows"]
    return [
        row
        for row in rows
        if (row["form"], row["model"], row["training"]) == (form, model, training)
        and row["probe"]["task"] == task
    ]


def _sizes(rows: Rows) -> tuple[Cell, Cell]:
    """How many seeds, and parameters."""
    return (
        number(len(rows) or None, "{:d}"),
        number(rows[0]["parameters"] if rows else None, "{:,.0f}"),
    )


# ---------------------------------------------------------------------------------- language model


def language_tables(suite: Values | None, name: str) -> list[Table]:
    """How every stage ended, the sweep, and every run."""
    suites = {name: suite}
    rows = suite["rows"] if suite else []
    rates = sorted({*_rates(name), *(row["lr"] for row in rows if row["part"] == "sweep")})
    return [_ends(suites, rows, name), _sweep(rows, rates, name), _every(rows, name)]


def _rates(name: str) -> tuple[float, ...]:
    return lm.SIZES[name.removeprefix("lm-")].rates


def _ends(suites: Values, rows: Rows, name: str) -> Table:
    lines = []
    for part, said, variants in (
        ("main", "well-posed", lm.BOTH),
        ("branches", "branches", lm.BRANCHES),
        ("published", "as published", lm.BOTH),
    ):
        for variant in variants:
            runs = lm.counted(rows, part, variant)
            first: Values = runs[0] if runs else {}
            losses = claims.losses(suites, name, part, variant)
            printed = Cell("")
            if part == "published":
                printed = number(first["train_loss"] / lm.ACCUMULATION if runs else None)
            lines.append(
                (
                    words(variant),
                    words(said),
                    estimate(estimates.mean(losses) if losses else None, 3),
                    number(len(losses) or None, "{:d}"),
                    number(first.get("lr"), "{:g}"),
                    number(first.get("initializer_range"), "{:g}"),
                    _counted(first.get("tokens")),
                    number(first.get("parameters"), "{:,.0f}"),
                    printed,
                )
            )
    head = (
        "Model", "Stage", "Held-out loss, nats a token", "Seeds", "Learning rate",
        "Initial weights", "Tokens", "Parameters", "Training loss / 8, as printed",
    )  # fmt: skip
    return Table(f"{name}-ends", "How each stage ended", head, tuple(lines))


def _sweep(rows: Rows, rates: Sequence[float], name: str) -> Table:
    best = lm.best(rows)
    swept = [row for row in rows if row["part"] == "sweep"]
    asked = lm.SIZES[name.removeprefix("lm-")].swept
    widths = sorted({row["initializer_range"] for row in swept} | {width for _, width in asked})
    lines = []
    for variant in lm.VARIANTS:
        for width in widths:
            losses = {
                row["lr"]: row["eval_loss"]
                for row in swept
                if (row["variant"], row["initializer_range"]) == (variant, width)
            }
            cells = []
            for rate in rates:
                known = rate in losses or (rate, width) in asked
                cell = number(losses.get(rate)) if known else Cell("not tried")
                if best.get(variant) == {"lr": rate, "initializer_range": width}:
                    cell = Cell(cell.text, "best", cell.sort, "best")
                cells.append(cell)
            lines.append((words(variant), number(width, "{:g}"), *cells))
    head = ("Model", "Initial weights", *(f"{rate:g}" for rate in rates))
    title = "Held-out loss of the sweep, by width of the initial weights and learning rate"
    return Table(f"{name}-sweep-table", title, head, tuple(lines), texts=1)


def _every(rows: Rows, name: str) -> Table:
    lines = tuple(
        (
            words(row["variant"]),
            words(row["part"]),
            number(row["seed"], "{:d}"),
            number(row["lr"], "{:g}"),
            _counted(row["tokens"]),
            number(row["train_loss"]),
            number(row["eval_loss"]),
            number(row.get("bits_per_byte")),
            number(row.get("tokens_per_second"), "{:,.0f}"),
            _said(row.get("peak_memory_bytes"), size),
            _said(row.get("wall_seconds"), duration),
        )
        for row in rows
    )
    head = (
        "Model", "Stage", "Seed", "Learning rate", "Tokens", "Training loss", "Held-out loss",
        "Bits per byte", "Tokens/s", "Peak memory", "Time",
    )  # fmt: skip
    return Table(f"{name}-runs", "Every run", head, lines)


def _counted(value: Any) -> Cell:
    return _said(value, count)


def _said(value: Any, say: Any) -> Cell:
    return Cell(say(value), sort=value) if is_number(value) else number(None)


# --------------------------------------------------------------------------- efficiency, ablations


def efficiency_tables(suite: Values | None) -> list[Table]:
    """Every measurement, as published and well-posed."""
    rows = {
        (row["form"], row["length"], row["contestant"]): row
        for row in (suite["rows"] if suite else [])
    }
    lengths = {
        form: sorted({*of, *(length for shown, length, _ in rows if shown == form)})
        for form, of in efficiency.LENGTHS.items()
    }
    if suite and suite.get("quick"):
        lengths = {f: sorted({n for shown, n, _ in rows if shown == f}) for f in lengths}
    lines = tuple(
        _measurement(rows.get((form, length, key)), called, length, name)
        for form, called in efficiency.FORMS.items()
        for length in lengths[form]
        for key, name in TIMED.items()
    )
    head = (
        "Model", "Form", "T", "Layers", "Milliseconds", "Times the Transformer", "Peak memory",
        "Parameters",
    )  # fmt: skip
    return [Table("efficiency-rows", "Every measurement", head, lines)]


def _measurement(row: Values | None, form: str, length: int, name: str) -> tuple[Cell, ...]:
    at = (words(name), words(form), number(length, "{:,d}"))
    if row is None:
        return (*at, *(number(None) for _ in range(5)))
    if row["status"] != "ok":
        return (*at, number(row["layers"], "{:d}"), Cell(row["status"], style="missing"),
                *(Cell("") for _ in range(3)))  # fmt: skip
    return (
        *at,
        number(row["layers"], "{:d}"),
        _spread(row, "milliseconds", "", "{:,.4g}"),
        _spread(row, "ratio", "ratio_", "{:.2f}"),
        _peak(row),
        number(row.get("parameters"), "{:,.0f}"),
    )


def _peak(row: Values) -> Cell:
    """Bytes, and of how many layers where those are not the row's."""
    cell, layers = _said(row.get("peak_bytes"), size), row.get("peak_layers")
    if cell.sort is None or not is_number(layers) or layers == row["layers"]:
        return cell
    return Cell(cell.text, f"{layers} layers", cell.sort)


def _spread(row: Values, key: str, prefix: str, form: str) -> Cell:
    """A median above its 10th and 90th percentiles."""
    cell, ends = number(row.get(key), form), [row.get(f"{prefix}p{q}") for q in (10, 90)]
    if cell.sort is None or not all(map(is_number, ends)):
        return cell
    return Cell(cell.text, " to ".join(form.format(end) for end in ends), cell.sort)


def ablation_tables(suite: Values | None) -> list[Table]:
    """One line a variant, as `ablate.table` gives them."""
    tasks = [f"{ablate.TASK} {reach}x" for reach in ablate.REACH]
    lines = tuple(
        (
            words(line["variant"]),
            words(line["group"]),
            number(line["parameters"], "{:,.0f}"),
            estimate(line["text"], 3),
            *(estimate(line[measure]) for measure in tasks),
            *(_seeds(line[measure]) for measure in ("text", tasks[0])),
        )
        for line in ablate.table(dict(suite or {"rows": []}))
    )
    head = ("Variant", "Group", "Parameters", "Text, nats a token")
    seeds = ("Seeds, text", "Seeds, recall")
    named = tuple(measure.capitalize() for measure in tasks)
    return [Table("ablations", "Every variant", (*head, *named, *seeds), lines)]


def _seeds(score: Estimate | None) -> Cell:
    return number(None if score is None else score.seeds, "{:d}")
