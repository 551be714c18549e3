"""Language models with a memory beside the window, against the baselines, at equal size.

The stages of `lm.py` with other variants: SWH with a memory (`nn/memory.py`), the Transformer and
what others use (`baselines/mixers.py`). Main and seeds take the nearest of them, sweep and
`branches` take all.

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
from spectral_window.lab import variants  # noqa: F401 - registers its mixer
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
CONVOLVED: dict[str, dict[str, Any]] = {
    "SWH with memory, short convolutions": {"mixer": "memory", "short_convolution": True},
    "SWH with memory, short convolutions, W = 128": {
        "mixer": "memory",
        "short_convolution": True,
        "window": 128,
    },
}
SIGMOID = list(CONVOLVED)[-1]
RECOMMENDED = f"{SIGMOID}, reflecting gate"
FIRST = f"{SIGMOID}, memory in the first layer alone"
VARIANTS: dict[str, dict[str, Any]] = {
    **NEAREST,
    "SWH with memory, closing gate": {"mixer": "memory", "write_gate": "closing"},
    **CONVOLVED,
    RECOMMENDED: {**CONVOLVED[SIGMOID], "write_gate": "reflecting"},
    FIRST: {**CONVOLVED[SIGMOID], "mixer": "memory_variant", "memory_in": "first"},
    **{MIXERS[name].label: {"mixer": name} for name in BASELINES},
}
LONGEST = (*NEAREST, *CONVOLVED, RECOMMENDED, FIRST, MIXERS["conv_attention"].label)
PLAN = lm.Plan(VARIANTS, ("sweep", "main", "seeds", "branches"), LONGEST, tuple(VARIANTS))
FEW = lm.Plan(NEAREST, ("sweep", "main", "seeds"), tuple(NEAREST))  # of the quick version
TITLES = {
    "stopped": "as far as all of these came, 65,536 held-out tokens",
    "main": "all tokens",
    "stopped-branches": "of a quarter of the tokens, as far as all of these came, 65,536 held-out",
    "branches": "a quarter of the tokens",
    "sweep": "the sweep",
}
OURS = "SWH with memory"
COLORS = {"SWH": SERIES[0], "Transformer": SERIES[1], OURS: SERIES[2]}
LINES: dict[str, Any] = {  # what follows a family's name -> its line in a picture
    "": "-",
    "short convolutions": "--",
    "short convolutions, W = 128": (0, (6, 1)),
    "shifted keys": "-.",
    "closing gate": (0, (1, 3)),
    "short convolutions, W = 128, reflecting gate": "-",
    "short convolutions, W = 128, memory in the first layer alone": (0, (4, 1, 1, 1)),
}
SHORT = {
    RECOMMENDED: "SWH with memory, recommended",
    SIGMOID: "SWH with memory, sigmoid gate",
    FIRST: "SWH with memory, sigmoid gate, first layer alone",
    next(iter(CONVOLVED)): "SWH with memory, short conv., W = 32",
    OURS: "SWH with memory, W = 32",
    "Transformer, short convolutions": "Transformer, short conv.",
}
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
    """Rows of the parts "stopped" and "stopped-branches": the runs of `main` and of `branches`,
    among them those of models that did not end it and were stopped after half of their tokens, each
    at the last evaluation that all of them have."""
    cut = []
    for part, name in (("main", "stopped"), ("branches", "stopped-branches")):
        ended = [row for row in rows if row["part"] == part]
        whole = max((row["tokens"] for row in ended), default=0)
        known = {row["variant"] for row in ended}
        late = [
            row
            for row in unfinished
            if (row["part"], row["variant"] in known) == (part, False) and row["tokens"] > whole / 2
        ]
        if not late or not ended:
            continue
        last = min(row["eval_curve"][-1][0] for row in late)
        for row in (*ended, *late):
            curve = [point for point in row["eval_curve"] if point[0] <= last]
            if curve and curve[-1][0] == last:
                at = {"part": name, "tokens": int(last), "eval_loss": curve[-1][1]}
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
    """A PNG: held-out loss against tokens, and where it ended, of the longest part that the
    recommended model ended, or else of that in which most models came far; where no model has a
    curve, where each part ended."""
    there = {part: models for part in TITLES if (models := ends(rows, part))}
    far = [part for part in there if part != "sweep" and len(_curves(there[part])) > 1]
    ended = [part for part in ("main", "branches") if part in far and RECOMMENDED in there[part]]
    most = next(iter(ended), max(far, key=lambda part: len(there[part]), default=None))
    panels = []
    if most is not None:
        curves = _curves(there[most])
        panels.append(
            Panel(
                f"losses-{most}",
                "Held-out loss while training",
                "held-out nats per token against training tokens",
                lambda axes: _paint_curves(axes, curves),
            )
        )
    for part, models in there.items():
        if most not in (None, part):
            continue
        tokens = next(iter(models.values()))[1][0]["tokens"]
        panels.append(
            Panel(
                f"ends-{part}",
                f"After {tokens / 1e6:.3g} million tokens",
                "held-out nats per token of each model",
                lambda axes, models=models: _paint_ends(axes, models),  # type: ignore[misc]
                width=5.6,
                height=1.3 + 0.27 * len(models),
            )
        )
    about = "held-out text, nats per token, equal parameters; a dot a seed"
    return sheet(panels, min(2, len(panels)), about, path, margin=1.2, legend_columns=3)


def _curves(models: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Model -> the curve of its first seed, of those with more than an end."""
    return {
        variant: of[0]["eval_curve"]
        for variant, (_, of) in models.items()
        if len(of[0]["eval_curve"]) > 2
    }


def _look(variant: str) -> tuple[str, Any]:
    """The colour of a model's family, and the line of one of its members."""
    family, _, form = variant.partition(", ")
    return COLORS.get(family, MUTED), LINES.get(form, "-.")


def short(variant: str) -> str:
    """The name of a model in a picture."""
    return SHORT.get(variant, variant)


def _paint_curves(axes: Axes, curves: Mapping[str, list[Any]]) -> None:
    others = itertools.cycle(("-.", (0, (1, 3)), ":", "--"))
    for variant, points in curves.items():
        late = [(tokens, loss) for tokens, loss in points if tokens > 0.1 * points[-1][0]]
        color, line = _look(variant)
        style = next(others) if color == MUTED else line
        width = 2.6 if variant == RECOMMENDED else 1.6
        axes.plot(*zip(*late, strict=True), color=color, ls=style, lw=width, label=short(variant))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if x else "0")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token")


def _paint_ends(axes: Axes, models: Mapping[str, Any]) -> None:
    for y, (variant, (loss, of)) in enumerate(models.items()):
        for row in of:
            axes.plot(row["eval_loss"], y, "o", ms=5, color=_look(variant)[0])
        axes.annotate(
            f"{loss:.3f}", (max(row["eval_loss"] for row in of), y), xytext=(7, 0),
            textcoords="offset points", va="center", fontsize=9, color=_look(variant)[0],
        )  # fmt: skip
    name_lines(axes, [short(model) for model in models])
    axes.margins(x=0.2)
    axes.set_xlabel("nats per token")
