"""Language models with a memory beside the window, against the baselines, at equal size.

The stages of `lm.py` with other variants: SWH with a memory (`nn/memory.py`), the Transformer and
what others use (`baselines/mixers.py`). Sweep, main and seeds take the nearest of them, `branches`
takes all.

The page is a table and a figure of held-out losses. Each model counts with its best pair of
learning rate and initial width in the part that is shown, the mean over seeds where there are
several; a model that has no row there is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from spectral_window.files import write_text
from spectral_window.lab.baselines.mixers import BASELINES
from spectral_window.lab.experiments import lm
from spectral_window.lab.experiments.trainings import Text
from spectral_window.lab.figures import MUTED, SERIES, Panel, count, name_lines, sheet
from spectral_window.lab.jobs import Log
from spectral_window.nn.mixers import MIXERS

NEAREST = {name: lm.VARIANTS[name] for name in lm.BOTH} | {
    "SWH with memory": {"mixer": "memory"},
    "Transformer, shifted keys": {"mixer": "attention", "shifted_keys": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **NEAREST,
    "SWH with memory, closing gate": {"mixer": "memory", "write_gate": "closing"},
    "SWH with memory, short convolutions": {"mixer": "conv_memory"},
    **{MIXERS[name].label: {"mixer": name} for name in BASELINES},
}
PLAN = lm.Plan(VARIANTS, ("sweep", "main", "seeds", "branches"), tuple(NEAREST), tuple(VARIANTS))
FEW = lm.Plan(NEAREST, ("sweep", "main", "seeds"), tuple(NEAREST))  # of the quick version
TITLES = {
    "stopped": "as far as all of these came, 65,536 held-out tokens",
    "main": "all tokens",
    "branches": "a quarter of the tokens",
    "sweep": "the sweep",
}
OURS = "SWH with memory"
COLORS = {"SWH": SERIES[0], "Transformer": SERIES[1]}
Rows = Sequence[Mapping[str, Any]]


def run(
    out: Path,
    work: Path,
    *,
    size: str,
    text: Text,
    workers: int,
    command: str,
    tokens: int | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """As `lm.run`; writes the page too."""
    saved = lm.run(
        out, work, size=size, text=text, workers=workers, command=command, tokens=tokens,
        plan=FEW if size == "quick" else PLAN, log=log,
    )  # fmt: skip
    write(saved, out, f"lm-{size}")
    return saved


def write(results: Mapping[str, Any], out: Path, name: str) -> None:
    """out/NAME.md and out/NAME.png of the rows of a suite; nothing where there are none."""
    if rows := results.get("rows"):
        rows = [*rows, *stopped(rows, results.get("unfinished", ()))]
        write_text(out / f"{name}.md", table(rows))
        figure(rows, out / f"{name}.png")


def stopped(rows: Rows, unfinished: Rows) -> list[dict[str, Any]]:
    """Rows of the part "stopped": the main runs, among them those that were stopped after nine
    tenths of their tokens, each at the last evaluation that all of them have."""
    main = [row for row in rows if row["part"] == "main"]
    whole = max((row["tokens"] for row in main), default=0)
    late = [row for row in unfinished if row["part"] == "main" and row["tokens"] > 0.9 * whole]
    if not late or not main:
        return []
    last = min(row["eval_curve"][-1][0] for row in late)
    cut = []
    for row in (*main, *late):
        curve = [point for point in row["eval_curve"] if point[0] <= last]
        if curve and curve[-1][0] == last:
            at = {"part": "stopped", "tokens": int(last), "eval_loss": curve[-1][1]}
            cut.append({**row, **at, "eval_curve": curve})
    return cut


def ends(rows: Rows, part: str) -> dict[str, tuple[float, list[Mapping[str, Any]]]]:
    """Model -> (its mean held-out loss in a part, the rows it is the mean of), the best first."""
    counted = {
        variant: lm.counted(rows, part, variant)  # type: ignore[arg-type]
        for variant in {row["variant"] for row in rows}
    }
    means = {
        variant: (sum(row["eval_loss"] for row in of) / len(of), of)
        for variant, of in counted.items()
        if of
    }
    return dict(sorted(means.items(), key=lambda item: item[1][0]))


def table(rows: Rows) -> str:
    """A Markdown table per part. The last column is the perplexity against the best model that is
    not ours: below 0 is better."""
    text = ""
    for part, title in TITLES.items():
        models = ends(rows, part)
        if not models:
            continue
        tokens = next(iter(models.values()))[1][0]["tokens"]
        others = [loss for variant, (loss, _) in models.items() if not variant.startswith(OURS)]
        text += f"{tokens:,} tokens a model ({title}):\n\n"
        text += "| model | parameters | learning rate, initial width | held-out nats per token "
        text += "| perplexity against the best other |\n|---|---|---|---|---|\n"
        for variant, (loss, of) in models.items():
            seeds = f" ({len(of)} seeds)" if len(of) > 1 else ""
            beside = f"{math.exp(loss - min(others)) - 1:+.1%}" if others else "-"
            text += (
                f"| {variant} | {of[0]['parameters']:,} | {of[0]['lr']:g}, "
                f"{of[0]['initializer_range']:g} | {loss:.3f}{seeds} | {beside} |\n"
            )
        text += "\n"
    return text


def figure(rows: Rows, path: Path) -> Path:
    """Held-out loss against tokens of the longest runs there are, and where each part's ended, as a
    PNG."""
    there = {part: models for part in TITLES if (models := ends(rows, part))}
    longest = next((part for part, models in there.items() if len(_curves(models)) > 1), None)
    panels = []
    if longest is not None:
        curves = _curves(there[longest])
        panels.append(
            Panel(
                f"losses-{longest}",
                f"Held-out loss: {TITLES[longest]}",
                "held-out nats per token against training tokens",
                lambda axes: _paint_curves(axes, curves),
            )
        )
    for part, models in there.items():
        tokens = next(iter(models.values()))[1][0]["tokens"]
        panels.append(
            Panel(
                f"ends-{part}",
                f"After {tokens / 1e6:.3g} million tokens",
                "held-out nats per token of each model",
                lambda axes, models=models: _paint_ends(axes, models),  # type: ignore[misc]
                height=1.3 + 0.27 * len(models),
            )
        )
    about = "held-out text, nats per token, equal parameters; a dot a seed"
    return sheet(panels, min(2, len(panels)), about, path, margin=1.1, legend_columns=2)


def _curves(models: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Model -> the curve of its first seed, of those with more than an end."""
    return {
        variant: of[0]["eval_curve"]
        for variant, (_, of) in models.items()
        if len(of[0]["eval_curve"]) > 2
    }


def _color(variant: str) -> str:
    return SERIES[2] if variant.startswith(OURS) else COLORS.get(variant, MUTED)


def _paint_curves(axes: Axes, curves: Mapping[str, list[Any]]) -> None:
    styles = itertools.cycle(("--", ":", "-.", (0, (1, 3)), "-"))  # of those in one colour
    for variant, points in curves.items():
        late = [(tokens, loss) for tokens, loss in points if tokens > 0.05 * points[-1][0]]
        color = _color(variant)
        style: Any = next(styles) if color == MUTED else "-"
        axes.plot(*zip(*late, strict=True), color=color, ls=style, lw=1.6, label=variant)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if x else "0")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token")


def _paint_ends(axes: Axes, models: Mapping[str, Any]) -> None:
    for y, (variant, (loss, of)) in enumerate(models.items()):
        for row in of:
            axes.plot(row["eval_loss"], y, "o", ms=5, color=_color(variant))
        axes.annotate(
            f"{loss:.3f}", (max(row["eval_loss"] for row in of), y), xytext=(7, 0),
            textcoords="offset points", va="center", fontsize=9, color=_color(variant),
        )  # fmt: skip
    name_lines(axes, list(models))
    axes.margins(x=0.2)
    axes.set_xlabel("nats per token")
