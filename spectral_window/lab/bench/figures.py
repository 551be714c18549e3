"""A picture per bench, drawn from the rows: lines over size, one panel per case.

    scaling    seconds against T of a one-layer SWH and Llama; the operators against T
    decode     milliseconds a token against context, above the time of reading the weights
    memory_op  milliseconds against T, above the time of a matrix product
    serve      tokens a second against clients
    spectral, window, prefill, train, memory_layer   how many times as long as ours, or as a copy

Panels without rows are left out; a picture without any shows "missing". Each names processor and
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from spectral_window.lab.bench import Rows
from spectral_window.lab.bench.delta import COPY, HEADS, PRODUCT
from spectral_window.lab.bench.models import GEMMS, READING
from spectral_window.lab.bench.operators import CHANNELS, FRESH, FRESH_COPY, GIVEN, PASSES
from spectral_window.lab.figures import MUTED, SERIES, Panel, sheet, write_missing

Points = Sequence[tuple[float, float]]
Lines = Mapping[str, Points]
FORWARD, BOTH = PASSES
INK_OF = {  # a name keeps its colour in every picture
    "SWH": 0, "scan": 5, GIVEN: 0, "ours": 0,
    "Llama": 1, "Llama, DynamicCache": 1, "the paper's FFT": 1, "naive chunks (the paper's)": 1,
    "Llama, StaticCache": 3, "Mamba2": 2, "chunked": 2, "local-attention": 2, "ours, chunked": 5,
    "RecurrentGemma": 4, "full causal attention": 4, "SWH, plain methods": 5, "window": 3,
    "spectral": 0, "Transformer": 1, FRESH: 3, "train": 0, "prefill": 1, "decode": 2,
    "one by one": 1, "scheduler": 0, "HTTP": 3,
}  # fmt: skip
ROOFLINE = (GEMMS, READING, "copy", "clone", FRESH_COPY, PRODUCT, COPY)


def draw_all(groups: Mapping[str, Rows], folder: Path) -> list[Path]:
    """Write BENCH.png into `folder` for every bench that has rows."""
    written = []
    for name, panels in PICTURES.items():
        if groups.get(name):
            path = folder / f"{name}.png"
            drawn = panels(groups[name])
            drawn = [one for one in drawn if not one.empty] or drawn[:1]
            written.append(write(drawn, _about(groups[name]), path))
    return written


def panel(title: str, lines: Lines, across: str, up: str, ticks: Callable = str) -> Panel:
    """A panel of log-log lines, with what stands at its axes. `ticks` formats an abscissa."""
    drawn = {name: sorted(points) for name, points in lines.items() if points}
    paint = partial(_paint, drawn, across, up, ticks)
    return Panel("", title, "", paint, width=4.6, height=3.2, empty=not drawn)


def _paint(lines: Mapping[str, Points], across: str, up: str, ticks: Callable, axes: Axes) -> None:
    """Lines with a dot at each measured size; what the hardware needs is dashed and grey."""
    if not lines:
        write_missing(axes)
        return
    for name, points in lines.items():
        x, y = zip(*points, strict=True)
        bound = name in ROOFLINE
        axes.loglog(
            x, y, color=MUTED if bound else SERIES[INK_OF.get(name, 5)], label=name,
            lw=1.2 if bound else 1.7, ls=(0, (3, 2)) if bound else "-",
            marker=None if bound and len(x) > 1 else "o", ms=3.6, clip_on=False,
            zorder=3 if INK_OF.get(name) == 0 else 2,
        )  # fmt: skip
    sizes = sorted({x for points in lines.values() for x, _ in points})
    every = -(-len(sizes) // 6)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::-1][::every]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ticks(x)))
    axes.yaxis.set_major_locator(LogLocator(subs=_subdivision(lines), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
    axes.margins(y=0.12)
    axes.set_xlabel(across)
    axes.set_ylabel(up)


def _subdivision(lines: Lines) -> tuple[float, ...]:
    values = [y for points in lines.values() for _, y in points]
    spread = max(values) / min(values)
    if spread < 3:
        return (1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 7.0, 8.0, 9.0)
    return (1.0,) if spread > 300 else (1.0, 3.0) if spread > 10 else (1.0, 2.0, 3.0, 5.0)


def write(panels: Sequence[Panel], about: str, path: Path, rows: int = 1) -> Path:
    """The panels in `rows` rows as one PNG, one legend below all, since lines cross every corner,
    and `about` what they were measured on."""
    columns = len(panels) // rows
    return sheet(
        panels, columns, about, path, dpi=160, margin=0.5, title_size=10.5,
        legend_columns=3 * columns, fontsize=8.5, frameon=False, labelcolor="linecolor",
    )  # fmt: skip


def _about(groups: Rows) -> str:
    """What the shown rows (those of most threads) were measured on."""
    last = groups[-1]
    threads = max(group["threads"] for group in groups)
    text = f"{last['environment']['processor']}, {threads} thread{'s' * (threads > 1)}"
    return text + (", a quick trial" if last["quick"] else "")


def _rows(groups: Rows, dtype: str, **where: Any) -> Rows:
    """Measured rows of most threads in `dtype` that are as `where` says."""
    threads = max(group["threads"] for group in groups)
    return [
        row
        for group in groups
        if group["dtype"] == dtype and group["threads"] == threads
        for row in group["rows"]
        if row["status"] == "ok" and all(row.get(key) == want for key, want in where.items())
    ]


def _lines(rows: Rows, across: str, up: str, per: float = 1.0) -> dict[str, list]:
    lines: dict[str, list] = {}
    for row in rows:
        if across in row and up in row:
            lines.setdefault(row["contestant"], []).append((row[across], row[up] / per))
    return lines


def _over_copy(rows: Rows) -> dict[str, list]:
    """Times a copy, by length."""
    timed = [row for row in rows if "ratio" in row]
    copies = {row["length"]: row["ratio"] for row in timed if row["contestant"] == "copy"}
    lines: dict[str, list] = {}
    for row in timed:
        if row["contestant"] not in ("copy", "clone") and row["length"] in copies:
            point = (row["length"], row["ratio"] / copies[row["length"]])
            lines.setdefault(row["contestant"], []).append(point)
    return lines


def _spectral(groups: Rows) -> list[Panel]:
    return [
        panel(
            f"convolution, {direction}, float32",
            _over_copy(_rows(groups, "float32", **{"pass": direction})),
            "tokens", "times a copy of the input", tokens,
        )
        for direction in PASSES
    ]  # fmt: skip


def _window(groups: Rows) -> list[Panel]:
    return [
        panel(
            f"window attention, {direction}, {dtype}",
            _lines(_rows(groups, dtype, **{"pass": direction}), "window", "ratio"),
            "window", "times ours", _plain,
        )
        for direction, dtype in ((FORWARD, "float32"), (FORWARD, "bfloat16"), (BOTH, "float32"))
    ]  # fmt: skip


def _prefill(groups: Rows) -> list[Panel]:
    return [
        panel(
            f"prefill, {dtype}", _lines(_rows(groups, dtype), "length", "ratio"),
            "tokens of the prompt", "times SWH", tokens,
        )
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


def _train(groups: Rows) -> list[Panel]:
    panels = []
    for dtype in ("float32", "bfloat16"):
        lines = _lines(_rows(groups, dtype), "length", "ratio")
        # measured forwards; a step has three times as many
        lines[GEMMS] = [(x, 3 * y) for x, y in lines.get(GEMMS, [])]
        title = f"training step of 4,096 tokens, {dtype}"
        panels.append(panel(title, lines, "tokens a sequence", "times SWH", tokens))
    return panels


def _decode(groups: Rows) -> list[Panel]:
    panels = []
    for dtype in ("float32", "bfloat16"):
        lines = _lines(_rows(groups, dtype), "context", "milliseconds")
        far = max((x for points in lines.values() for x, _ in points), default=0)
        if READING in lines:  # the same bytes at any context
            lines[READING] = [*lines[READING], (far, lines[READING][-1][1])]
        panels.append(
            panel(f"a token more, {dtype}", lines, "context, tokens", "milliseconds", _round)
        )
    return panels


def _scaling(groups: Rows) -> list[Panel]:
    rows = _rows(groups, "float32")
    slopes = {(r["part"], r["contestant"]): r["slope"] for r in rows if "slope" in r}
    operators = {
        part: _lines([r for r in rows if r["part"] == part], "length", "milliseconds").get(name, [])
        for part, name in (("window", "ours"), ("spectral", "scan"))
    }
    model = _lines([r for r in rows if r["part"] == "prefill"], "length", "milliseconds", 1000)

    def title(text: str, *keys: tuple[str, str]) -> str:
        shown = [f"{slopes[key]:.2f}" for key in keys if key in slopes]
        return f"{text}: slope {' and '.join(shown)}" if shown else text

    both = ("window", "ours"), ("spectral", "scan")
    return [
        panel(title("prefill, one layer", ("prefill", "SWH")), model, "tokens", "seconds", tokens),
        panel(title("operators", *both), operators, "tokens", "milliseconds", tokens),
    ]


def _memory_op(groups: Rows) -> list[Panel]:
    return [
        panel(
            f"memory, {heads} x {CHANNELS // heads}, {BOTH}, float32",
            _lines(
                _rows(groups, "float32", **{"pass": BOTH}, heads=heads), "length", "milliseconds"
            ),
            "tokens", "milliseconds", tokens,
        )
        for heads in HEADS
    ]  # fmt: skip


def _memory_layer(groups: Rows) -> list[Panel]:
    panels = []
    for dtype in ("float32", "bfloat16"):
        rows = [
            row | {"heads": int(row["contestant"].split()[1]), "contestant": row["part"]}
            for row in _rows(groups, dtype)
            if row["contestant"].partition(" ")[2][:1].isdigit() and row.get("length") != 1024
        ]
        panels.append(
            panel(
                f"layer with a memory, {dtype}", _lines(rows, "heads", "ratio"),
                "heads of the memory", "times the paper's layer", _plain,
            )
        )  # fmt: skip
    return panels


def _serve(groups: Rows) -> list[Panel]:
    return [
        panel(
            f"a server, {dtype}", _lines(_rows(groups, dtype), "batch", "tokens_per_s"),
            "clients at once", "tokens a second", _plain,
        )
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


PICTURES: dict[str, Callable[[Rows], list[Panel]]] = {
    "spectral": _spectral,
    "window": _window,
    "prefill": _prefill,
    "decode": _decode,
    "train": _train,
    "scaling": _scaling,
    "memory_op": _memory_op,
    "memory_layer": _memory_layer,
    "serve": _serve,
}


def tokens(x: float) -> str:
    """Powers of two: 16384 -> 16k."""
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


def _round(x: float) -> str:
    """Thousands: 32000 -> 32k."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}"


def _plain(x: float) -> str:
    return f"{x:g}"
