"""How many pairs a state of a given size can hold: recall of 8 to 64 pairs at 256 tokens.

Two questions, each a panel: how the share of right answers falls with the number of pairs, models
of equal size; and what it is at 64 pairs against the bytes of the state, for models of three widths
and memories of one to four heads. A Transformer's state is what it holds after the 256 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from spectral_window.files import write_text
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.lab.experiments import recall, synthetic
from spectral_window.lab.experiments.experiment import Experiment, Trial
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.figures import Panel, sheet
from spectral_window.lab.jobs import Log

LENGTH = 256
PAIRS = (8, 16, 32, 64)
WIDTH, WIDTHS = 64, (96, 128)  # of the first panel, and the second's others
HEADS = (2, 4, 8)  # of the memory, beside one
MODELS = (
    recall.RECOMMENDED, recall.CONVOLVED, recall.PUBLISHED, recall.CONVOLVED_TRANSFORMER,
    *recall.LINEAR,
)  # fmt: skip
SIZED = tuple(m for m in MODELS if m not in (recall.PUBLISHED, recall.RECOMMENDED))
Rows = Sequence[dict[str, Any]]


def probe(model: str, pairs: int, width: int, heads: int = 1) -> Probe:
    """heads: of a memory."""
    shape = synthetic.WELL_POSED_SHAPE | {"hidden_size": width} | recall.MODELS[model]
    if heads > 1:
        shape["memory_heads"] = heads
    options = {"pairs": pairs, "keys": 2 * PAIRS[-1]}
    tests = (Exam("mqar", LENGTH, 512),)
    return Probe(
        "mqar", shape, tests, options=options, lengths=(LENGTH,), rows=32, steps=1500, lr=3e-3
    )


def trials(*, quick: bool = False) -> list[Trial[Probe]]:
    """All probes; `quick` shows the way and no result: ten steps of two."""
    if quick:
        few = [_trial(model, PAIRS[0], WIDTH) for model in MODELS[:2]]
        return [Trial(t.name, synthetic.shorten(t.run), t.labels) for t in few]
    return list(_all())


def _all() -> Iterator[Trial[Probe]]:
    for pairs in reversed(PAIRS):
        yield from (_trial(model, pairs, WIDTH) for model in MODELS)
    for width in WIDTHS:
        yield from (_trial(model, PAIRS[-1], width) for model in SIZED)
    for width in (WIDTH, *WIDTHS):
        for heads in HEADS:
            yield _trial(recall.CONVOLVED, PAIRS[-1], width, heads)


def _trial(model: str, pairs: int, width: int, heads: int = 1) -> Trial[Probe]:
    """Labels: model, pairs, width, heads, and the bytes of the state after a sequence, float32."""
    run = probe(model, pairs, width, heads)
    labels = {"model": model, "pairs": pairs, "width": width, "heads": heads}
    name = f"{pairs} pairs, {model}, {width} channels" + f", {heads} heads" * (heads > 1)
    return Trial(
        name, run, labels | {"state_bytes": SWHForCausalLM(run.config()).state_bytes(LENGTH)}
    )


def run(
    out: Path, work: Path, *, quick: bool, workers: int, command: str, log: Log = print
) -> dict[str, Any]:
    """Run what is missing; out/capacity.json, .md and .png are written at the end, and when it is
    stopped. Raises Interrupted on a signal; the next call continues."""
    experiment = Experiment(
        "capacity", out, work, quick=quick, workers=workers, command=command, log=log
    )
    every, saved = trials(quick=quick), dict[str, Any]()
    try:
        experiment.run(every)
    finally:
        saved = experiment.save(experiment.rows(every))
        if saved["rows"]:
            write_text(out / "capacity.md", table(saved["rows"]))
            figure(saved["rows"], out / "capacity.png")
    return saved


def right(row: dict[str, Any]) -> float:
    """The share of right answers."""
    (test,) = row["tests"][:1]
    return float(test["right"] / test["asked"])


def table(rows: Rows) -> str:
    """A Markdown table, a line for each model and state, the largest state last."""
    text = (
        "| model | channels | state | " + " | ".join(f"{pairs} pairs" for pairs in PAIRS) + " |\n"
    )
    text += "|---|---|---|" + "---|" * len(PAIRS) + "\n"
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: (row["state_bytes"], row["model"])):
        form = _name(row), row["width"], row["state_bytes"]
        found.setdefault(form, {})[row["pairs"]] = right(row)
    for (name, width, size), shares in found.items():
        cells = (f"{shares[pairs]:.3f}" if pairs in shares else "-" for pairs in PAIRS)
        text += f"| {name} | {width} | {size / 1024:,.1f} KiB | " + " | ".join(cells) + " |\n"
    return text


def _name(row: dict[str, Any]) -> str:
    return row["model"] + (f", {row['heads']} heads" if row["heads"] > 1 else "")


def figure(rows: Rows, path: Path) -> Path:
    """Both panels as a PNG."""
    panels = [
        Panel(
            "capacity-pairs", f"{WIDTH} channels, 2 layers", "right answers against pairs",
            lambda axes: _paint_pairs(axes, rows),
        ),
        Panel(
            "capacity-bytes", f"{PAIRS[-1]} pairs", "right answers against bytes of state",
            lambda axes: _paint_bytes(axes, rows),
        ),
    ]  # fmt: skip
    about = "multi-query recall at 256 tokens: share of right answers, one seed"
    return sheet(panels, 2, about, path, legend_columns=3, handlelength=2.6)


def _paint_pairs(axes: Axes, rows: Rows) -> None:
    for model in MODELS:
        points = sorted(
            (row["pairs"], right(row))
            for row in rows
            if (row["model"], row["width"], row["heads"]) == (model, WIDTH, 1)
        )
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o", ms=4, label=model, **recall.look(model)
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(PAIRS)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("pairs")
    axes.set_ylim(0, 1.03)


def _paint_bytes(axes: Axes, rows: Rows) -> None:
    for model in SIZED:
        points = sorted(
            (row["state_bytes"] / 1024, right(row))
            for row in rows
            if (row["model"], row["pairs"]) == (model, PAIRS[-1])
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, **recall.look(model))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("KiB of state")
    axes.set_ylim(0, 1.03)
