"""Panels: figures of one axes that know their title and how to paint themselves.

A page shows every panel as an SVG of its own, so that a phone stacks them and their letters stay
legible; a sheet puts several into one PNG. A value is a dot, its 95 % interval a bar.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectral_window.lab import figures
from spectral_window.lab.estimates import Estimate
from spectral_window.lab.figures import INK, MUTED, PAPER, STYLE


@dataclass(frozen=True)
class Panel:
    """One axes: `name` is its id on a page, `words` describe it to whoever cannot see it; the size
    is in inches."""

    name: str
    title: str
    words: str
    paint: Callable[[Axes], None]
    width: float = 5.0
    height: float = 3.3


def svg(panel: Panel) -> str:
    """The panel as an `<svg>` element, without its title, which stands on the page."""
    figure = figures.draw(panel.paint, panel.width, panel.height)
    return figures.to_svg(figure, panel.name, html.escape(panel.title), html.escape(panel.words))


def sheet(panels: Sequence[Panel], columns: int, about: str, path: Path) -> Path:
    """All panels in one PNG, `columns` in a row, one legend beneath, and `about` below it; returns
    `path`."""
    rows = -(-len(panels) // columns)
    heights = [max(p.height for p in panels[i * columns : (i + 1) * columns]) for i in range(rows)]
    with mpl.rc_context(STYLE):
        size = (columns * panels[0].width, sum(heights) + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
        named: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel.paint(axes)
            axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(str(name), handle)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        if named:
            # in two lines where one would reach `about`
            ncols = len(named) if len(named) <= columns + 1 else -(-len(named) // 2)
            figure.legend(
                list(named.values()), list(named), loc="outside lower left", ncols=ncols,
                fontsize=9, labelcolor=INK,
            )  # fmt: skip
        figure.supxlabel(about, fontsize=8, color=MUTED, x=0.995, ha="right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def dot(
    axes: Axes, score: Estimate | None, y: float, color: str, label: str | None,
    hollow: bool = False,
) -> None:  # fmt: skip
    """A value with its interval, or nothing where it is missing."""
    if score is None:
        return
    if np.isfinite([score.low, score.high]).all():
        axes.plot([score.low, score.high], [y, y], color=color, lw=1.2, alpha=0.7)
    axes.plot(score.value, y, "o", ms=5, color=color, mfc=PAPER if hollow else color, label=label)


def name_lines(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)


def say(axes: Axes, text: str, y: float) -> None:
    axes.text(0.02, y, text, transform=axes.get_yaxis_transform(), va="center", color=MUTED,
              fontsize=9)  # fmt: skip
