"""Pictures of an analysis (`lab/analyze.py`): kernels over time and over frequency, their poles and
half-lives, what each branch is worth, and how far the kernels have moved.

Every picture is written as PNG and as SVG. A model of many layers shows `ROWS` of them, evenly
spaced from the first to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from spectral_window.lab import figures
from spectral_window.lab.analyze import SHOWN, Kernels, impulse_response

ROWS = 4
BRANCH_COLORS = {"spectral": figures.SERIES[0], "window": figures.SERIES[1]}
CHANNEL_COLORS = dict(zip(SHOWN, figures.SERIES, strict=False))
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10.0, "color": figures.INK}


def draw_all(
    analysis: dict[str, Any],
    kernels: Sequence[Kernels],
    out: Path,
    begun: Sequence[Kernels] | None = None,
) -> list[Path]:
    """Every picture of `analysis` (from `analyze`) and the same model's `kernels`, in `out`.

    begun: the kernels it began with, where they are known. Returns the PNG files; each has an .svg
    beside it.
    """
    decays = [math.log(2) / np.maximum(each.half_life, 1e-9) for each in kernels]
    turns = [each.frequency for each in kernels if each.frequency is not None]
    pictures: dict[str, Callable[[], Figure]] = {
        "impulse": lambda: impulse_figure(analysis, kernels),
        "response": lambda: response_figure(analysis),
        "half_lives": lambda: figures.draw(lambda axes: _paint_half_lives(axes, decays)),
        "branches": lambda: branches_figure(analysis),
    }
    if turns:
        pictures["poles"] = lambda: figures.draw(
            lambda axes: figures.paint_poles(axes, decays, turns, figures.SERIES[0])
        )
    if begun is not None:
        pictures["drift"] = lambda: drift_figure(begun, kernels)
    return [figures.save(paint(), out / f"{name}.png") for name, paint in pictures.items()]


def impulse_figure(analysis: dict[str, Any], kernels: Sequence[Kernels]) -> Figure:
    """K[t] of the selected channels: a row per layer, a column per rank of the half-lives.

    Each panel is as long as its own kernel: four half-lives, 16 to 1,024 tokens.
    """
    rows = _some(analysis["layers"])
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.0, 0.5 + 1.55 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(SHOWN), squeeze=False, sharey=True)
        for line, layer in zip(grid, rows, strict=True):
            modes = kernels[layer["layer"] - 1].modes
            for axes, channel in zip(line, layer["channels"], strict=True):
                length = int(np.clip(4 * channel["half_life"], 16, 1024)) + 1
                value = impulse_response(modes, length)[channel["channel"]]
                color = CHANNEL_COLORS[channel["name"]]
                axes.axhline(0, color=figures.MUTED, lw=0.6)
                axes.plot(value, color=color, lw=1.2, marker="o" if length < 40 else "", ms=2.6)
                axes.set_xlim(-0.02 * length, 1.02 * length)
                axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
                axes.set_title(f"half-life {figures.count(channel['half_life'])}", **TITLE)
            line[0].set_ylabel(f"layer {layer['layer']}")
        for axes, (name, color) in zip(grid[-1], CHANNEL_COLORS.items(), strict=True):
            axes.set_xlabel(f"tokens\n{name}", color=color)
    return figure


def response_figure(analysis: dict[str, Any]) -> Figure:
    """|H| of the same channels over 0 ... pi radians per token, in decibels; a panel per layer."""
    layers = _some(analysis["layers"])
    columns = min(2, len(layers))
    lines = -(-len(layers) // columns)
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(4.5 * columns, 0.4 + 2.5 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
        for axes in grid.flat[len(layers) :]:
            axes.set_axis_off()
        for axes, layer in zip(grid.flat, layers, strict=False):
            for channel in layer["channels"]:
                size = np.array([np.nan if x is None else x for x in channel["response"]])
                axes.plot(
                    analysis["angles"],
                    20 * np.log10(np.maximum(size, 1e-4)),
                    color=CHANNEL_COLORS[channel["name"]],
                    lw=1.3,
                    label=channel["name"],
                )
            axes.set_title(f"layer {layer['layer']}", **TITLE)
            axes.set_xticks([0, np.pi / 2, np.pi], ["0", "π/2", "π"])
            axes.xaxis.set_tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("gain, dB")
        figure.supxlabel("frequency, radians per token", color=figures.MUTED, fontsize=10)
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SHOWN)
        )
    return figure


def branches_figure(analysis: dict[str, Any]) -> Figure:
    """Left: the share of each branch in the energy of the fusion's sum. Right: how much the loss
    rises when the branch is silenced in that layer alone."""
    with mpl.rc_context(figures.STYLE):
        layers = analysis["layers"]
        figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(layers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _paint_shares(left, analysis)
        _paint_rises(right, analysis)
        figure.legend(
            *right.get_legend_handles_labels(), loc="outside upper left", ncols=len(BRANCH_COLORS)
        )
    return figure


def drift_figure(begun: Sequence[Kernels], kernels: Sequence[Kernels]) -> Figure:
    """Half-life of every channel at the beginning and now; on the diagonal it has not moved."""
    layers = [k + 1 for k in range(len(kernels))]
    shown = _some([{"layer": layer} for layer in layers])
    lives = [np.maximum(each.half_life, 0.1) for each in (*begun, *kernels)]
    low, high = 0.8 * min(x.min() for x in lives), 1.25 * max(x.max() for x in lives)
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(0.5 + 2.5 * len(shown), 3.1), layout="constrained")
        row = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
        for axes, layer in zip(row, (one["layer"] for one in shown), strict=True):
            axes.plot((low, high), (low, high), color=figures.MUTED, lw=0.8, ls=(0, (3, 2)))
            axes.loglog(
                lives[layer - 1], lives[len(begun) + layer - 1], "o", ms=2.6, mew=0, alpha=0.6,
                color=figures.SERIES[0],
            )  # fmt: skip
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda x, _: figures.count(x)))
                axis.set_minor_locator(NullLocator())
            axes.set_title(f"layer {layer}", **TITLE)
        row[0].set_ylabel("half-life now, tokens")
        figure.supxlabel("half-life at the beginning, tokens", color=figures.MUTED, fontsize=10)
    return figure


def _paint_half_lives(axes: Axes, decays: Sequence[np.ndarray]) -> None:
    figures.paint_half_lives(axes, decays, figures.SERIES[0])
    axes.set_title("dashed: the paper's beginning, decays from N(0, 1)", **TITLE)


def _paint_shares(axes: Axes, analysis: dict[str, Any]) -> None:
    y = np.arange(len(analysis["layers"]))
    before = np.zeros(len(y))
    for branch in analysis["branches"]:
        share = np.array([_share(layer["energy"], branch) for layer in analysis["layers"]])
        axes.barh(y, share, left=before, height=0.6, color=BRANCH_COLORS[branch])
        for at, begin, part in zip(y, before, share, strict=True):
            if part >= 0.12:
                axes.text(
                    begin + part / 2, float(at), f"{part:.0%}", ha="center", va="center",
                    color=figures.PAPER,
                )  # fmt: skip
        before += share
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_yticks(y, [f"layer {layer['layer']}" for layer in analysis["layers"]])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the energy that enters the sum")


def _paint_rises(axes: Axes, analysis: dict[str, Any]) -> None:
    branches = analysis["branches"]
    height = 0.6 / len(branches)
    for place, branch in enumerate(branches):
        y = np.arange(len(analysis["layers"])) + (place - (len(branches) - 1) / 2) * height
        rise = [layer["silenced"][branch] for layer in analysis["layers"]]
        bars = axes.barh(y, rise, height=height, color=BRANCH_COLORS[branch], label=branch)
        axes.bar_label(bars, fmt="{:+.3f}", padding=3, fontsize=8.5, color=BRANCH_COLORS[branch])
    axes.axvline(0, color=figures.MUTED, lw=0.6)
    axes.margins(x=0.16)  # for the labels
    axes.tick_params(labelleft=False)
    axes.grid(False, axis="y")
    axes.set_xlabel("rise of the loss without it, nats per token")


def _share(energy: dict[str, float], branch: str) -> float:
    return energy[branch] / sum(value for key, value in energy.items() if key != "spectral_share")


def _some(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(layers) <= ROWS:
        return layers
    return [layers[round(k * (len(layers) - 1) / (ROWS - 1))] for k in range(ROWS)]
