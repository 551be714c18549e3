"""Figures of the laboratory: their style, panels, and what more than one page paints.

A figure is drawn once with the light theme's colours. As SVG, each of those colours becomes a CSS
variable (`var(--ink, #1f2328)`), so the page's own light or dark theme paints it, and its text
takes the page's font. As PNG the colours stay as they are, on an opaque light ground that reads
well in both themes of a code-hosting site.

A `Panel` is a figure of one axes that knows its title and how to paint itself. A page shows every
panel as an SVG of its own (`svg`), so that a phone stacks them and their letters stay legible; a
`sheet` puts several into one PNG. A value is a dot, its 95 % interval a bar.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from spectral_window.lab.estimates import Estimate
from spectral_window.lab.runs import Points

PAPER, INK, MUTED, RULE = "#fcfcfa", "#1f2328", "#656c76", "#dcdfe3"
SERIES = ("#2f5fb3", "#b8541a", "#3d7a3f", "#8a4d9e", "#8b6c00", "#4f6672")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    color: f"s{i}" for i, color in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "legend.handlelength": 1.2,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",  # real text: it takes the page's font, can be selected and searched
    "text.parse_math": False,  # a run called "$x" is a name, not mathematics
}


@dataclass(frozen=True)
class Series:
    """One run in a figure: its name, its colour and its two curves."""

    label: str
    color: str
    train: Points
    evaluations: Points


def count(value: float) -> str:
    """12_300_000 -> '12.3M'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in binary units: 401_408 -> '392 KiB'. The space does not break."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = 0
    while value >= 1023.5 and step < len(units) - 1:
        value, step = value / 1024, step + 1
    number = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{number}\N{NO-BREAK SPACE}{units[step]}"


def duration(seconds: float) -> str:
    """Seconds as text: 118.4 -> '1 min 58 s'. The spaces do not break."""
    if seconds < 99.95:
        text = f"{seconds:.3g} s"
    elif seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        text = f"{minutes} min {rest:02d} s"
    else:
        hours, minutes = divmod(round(seconds / 60), 60)
        text = f"{hours} h {minutes:02d} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def smooth(value: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Mean over a centred window of `share` of the curve; the window shrinks evenly at both ends,
    so nothing lags."""
    n = len(value)
    half = np.minimum(int(n * share / 2) + 1, np.minimum(np.arange(n), np.arange(n)[::-1]))
    total = np.concatenate([[0.0], np.cumsum(value)])
    return (total[np.arange(n) + half + 1] - total[np.arange(n) - half]) / (2 * half + 1)


@dataclass(frozen=True)
class Panel:
    """One axes: `name` is its id on a page, `words` describe it to a reader who cannot see it; the
    size is in inches. empty: nothing was measured, so that it only says "missing"."""

    name: str
    title: str
    words: str
    paint: Callable[[Axes], None]
    width: float = 5.0
    height: float = 3.3
    empty: bool = False


def svg(panel: Panel) -> str:
    """The panel as an `<svg>` element, without its title, which stands on the page."""
    figure = draw(panel.paint, panel.width, panel.height)
    return to_svg(figure, panel.name, html.escape(panel.title), html.escape(panel.words))


def sheet(
    panels: Sequence[Panel], columns: int, about: str, path: Path, *, dpi: int = 150,
    margin: float = 0.8, title_size: float = 10.0, legend_columns: int | None = None,
    **legend: Any,
) -> Path:  # fmt: skip
    """All panels in one PNG, `columns` in a row, one legend beneath, and `about` below it; returns
    `path`.

    margin: inches for legend and `about`. legend: options of matplotlib's legend.
    """
    rows = -(-len(panels) // columns)
    heights = [max(p.height for p in panels[i * columns : (i + 1) * columns]) for i in range(rows)]
    with mpl.rc_context(STYLE):
        size = (columns * panels[0].width, sum(heights) + margin)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
        named: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel.paint(axes)
            axes.set_title(panel.title, loc="left", fontsize=title_size, color=INK)
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(str(name), handle)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        note = figure.supxlabel(about, fontsize=8, color=MUTED, x=0.995, ha="right")
        if named:
            if legend_columns is None:  # in two lines where one would reach `about`
                legend_columns = len(named) if len(named) <= columns + 1 else -(-len(named) // 2)
            for ncols in range(min(len(named), legend_columns), 0, -1):
                key = figure.legend(
                    list(named.values()), list(named), loc="outside lower left", ncols=ncols,
                    **({"fontsize": 9, "labelcolor": INK} | legend),
                )  # fmt: skip
                figure.draw_without_rendering()
                if ncols == 1 or not key.get_window_extent().overlaps(note.get_window_extent()):
                    break
                key.remove()  # `about` is longer than was thought of
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
    return path


def save(figure: Figure, png: Path, salt: str = "") -> Path:
    """Write `figure` as `png` and as .svg beside it, with its letters as shapes; returns `png`.

    salt: of the SVG's ids; by default the name of the file.
    """
    png.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt or png.stem}):
        figure.savefig(png, dpi=160, metadata={"Software": None})
        figure.savefig(png.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    return png


def draw(paint: Callable[[Axes], None], width: float = 5.0, height: float = 3.3) -> Figure:
    """A figure of one axes, `width` x `height` inches, filled in by `paint`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        return figure


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """`figure` as an `<svg>` element for a web page: themed by CSS variables, scalable, named for
    screen readers.

    `name` is unique on the page (it prefixes every id). `title` and `description` must be escaped
    for HTML.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable}, {color})")
    svg = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font-size: \1", svg)
    head = re.search(r'viewBox="([^"]+)"', svg)
    assert head is not None
    body = svg[svg.index(">", svg.index("viewBox")) + 1 :]
    return (
        f'<svg viewBox="{head[1]}" role="img" aria-labelledby="{name}-t {name}-d" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-t">{title}</title><desc id="{name}-d">{description}</desc>{body}'
    )


def paint_loss(axes: Axes, series: Sequence[Series], against: str) -> None:
    """Training loss (thin, smoothed) and held-out loss (dots on a line) against "tokens" or
    "seconds"."""
    ceiling, floor = [], []
    for one in series:
        train, evaluations = one.train, one.evaluations
        if len(train):
            value = smooth(train.value)
            axes.plot(getattr(train, against), value, color=one.color, lw=0.9, alpha=0.5)
            ceiling.append(value[len(value) // 25])
            floor.append(value.min())
        if len(evaluations):
            axes.plot(
                getattr(evaluations, against), evaluations.value, color=one.color, lw=1.6,
                marker="o", ms=3.6, label=one.label,
            )  # fmt: skip
            ceiling.append(np.sort(evaluations.value)[-2:].min())
            floor.append(evaluations.value.min())
        elif len(train):
            axes.lines[-1].set_label(one.label)
    if not ceiling:
        write_missing(axes)
        return
    low, high = min(floor), max(ceiling)
    pad = 0.08 * (high - low) + 1e-3
    axes.set_ylim(low - pad, high + pad)  # the fall of the very first steps would hide the rest
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if against == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x else "0"))
        axes.set_xlabel("training tokens")
    else:
        axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper right")


def paint_state(axes: Axes, series: Sequence[tuple[str, str, Sequence[tuple[int, int]]]]) -> None:
    """Bytes a decoder keeps against tokens read, log-log. `series`: (label, colour, [(context,
    bytes), ...])."""
    drawn = [one for one in series if one[2]]
    if not drawn:
        write_missing(axes)
        return
    for label, color, points in drawn:
        x, y = zip(*points, strict=True)
        axes.loglog(x, y, color=color, lw=1.8, label=label)
        axes.plot(x[-1], y[-1], "o", color=color, ms=4, clip_on=False)
        axes.annotate(
            size(y[-1]), (x[-1], y[-1]), xytext=(-7, 6), textcoords="offset points",
            ha="right", color=color, fontsize=10,
        )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _binary(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: size(y)))
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = [4.0**k for k in range(4, 11)]
    axes.set_xticks([t for t in ticks if drawn[0][2][0][0] <= t <= drawn[0][2][-1][0]])
    axes.margins(y=0.12)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("memory of the past")
    axes.legend(loc="upper left")


def paint_half_lives(axes: Axes, decays: Sequence[np.ndarray], color: str) -> None:
    """A ridge per layer: how many channels forget half within how many tokens; dashed: as
    initialised.

    `decays`: per layer, |alpha| of each channel, per token.
    """
    if not decays:
        write_missing(axes)
        return
    grid = np.logspace(-1, 3, 240)
    step = 1.0
    for layer, decay in enumerate(decays):
        life = np.log(2) / np.maximum(np.abs(decay), np.log(2) / 1e3)
        base = -layer * step
        ridge = _density(np.log10(grid), np.log10(life), 0.11)
        scale = 0.85 * step / max(ridge.max(), _initial(grid).max())
        axes.fill_between(grid, base, base + ridge * scale, color=color, alpha=0.22, lw=0)
        axes.plot(grid, base + ridge * scale, color=color, lw=1.2)
        axes.plot(grid, base + _initial(grid) * scale, color=MUTED, lw=0.8, ls=(0, (3, 2)))
    axes.set_xscale("log")
    axes.set_xlim(grid[0], grid[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks([-k * step for k in range(len(decays))], _layer_names(len(decays)))
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("half-life of a channel, tokens")


def paint_poles(
    axes: Axes, decays: Sequence[np.ndarray], frequencies: Sequence[np.ndarray], color: str
) -> None:
    """Every oscillator as a dot: its frequency (folded into 0 ... pi) against its half-life; later
    layers are darker."""
    if not decays:
        write_missing(axes)
        return
    for layer, (decay, frequency) in enumerate(zip(decays, frequencies, strict=True)):
        life = np.log(2) / np.maximum(np.abs(decay), np.log(2) / 1e3)
        folded = np.abs((frequency + np.pi) % (2 * np.pi) - np.pi)
        shade = 0.25 + 0.6 * (layer + 1) / len(decays)
        axes.plot(folded, life, "o", ms=2.3, mew=0, alpha=shade, color=color, rasterized=False)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 1e3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.05, np.pi + 0.05)
    axes.set_xticks([0, np.pi / 2, np.pi], ["0", "π/2", "π"])
    axes.set_xlabel("frequency, radians per token")
    axes.set_ylabel("half-life, tokens")


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
    """One line per name, from the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)


def write_line(axes: Axes, text: str, y: float) -> None:
    """A line of text in place of values."""
    axes.text(0.02, y, text, transform=axes.get_yaxis_transform(), va="center", color=MUTED,
              fontsize=9)  # fmt: skip


def write_missing(axes: Axes) -> None:
    """The picture of data that is not there."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes, color=MUTED)


def _layer_names(n: int) -> list[str]:
    every = max(1, -(-n // 8))
    return [f"layer {k + 1}" if k % every == 0 else "" for k in range(n)]


def _binary(value: float) -> str:
    """Context lengths are powers of two: 32768 -> '32k', 1048576 -> '1M'."""
    for unit, text in ((2**20, "M"), (2**10, "k")):
        if value >= unit:
            return f"{value / unit:g}{text}"
    return f"{value:g}"


def _density(grid: np.ndarray, samples: np.ndarray, width: float) -> np.ndarray:
    z = (grid[:, None] - samples[None, :]) / width
    return np.exp(-0.5 * z * z).sum(1) / (len(samples) * width * np.sqrt(2 * np.pi))


def _initial(grid: np.ndarray) -> np.ndarray:
    """Density over log10(half-life) when alpha ~ N(0, 1), the paper's initialisation: derived, not
    measured."""
    decay = np.log(2) / grid
    return np.sqrt(2 / np.pi) * np.exp(-0.5 * decay**2) * decay * np.log(10)
