"""`spectral-window analyze`: what a model's kernels and branches have learned."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectral_window.cli.options import Debug, Device, Json, Model, Threads
from spectral_window.cli.output import print_json, print_table, warn
from spectral_window.commands.eval import tokenize
from spectral_window.files import scratch_folder, write_json

if TYPE_CHECKING:
    from spectral_window.data.blocks import TokenStream
    from spectral_window.training.loading import Loaded, Run

EXAMPLE = "analyze runs/tiny --out runs/tiny/analysis"
TOKENS, QUICK_TOKENS = 16_384, 2_048
FILES = 24  # of Python's library, if there is no other text: some 100,000 tokens
QUICK_NOTE = "quick: few tokens, so the losses and energies are rough"


def run(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to measure the branches on, as for train. Default: what the run held out, "
            "else a part of Python's own library.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write analysis.json and pictures (PNG, SVG) there."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="About so many tokens a number. Default: 16384."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="2,048 tokens a measurement: rough losses, in seconds.")
    ] = False,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """What a model has learned: its kernels, what each branch is worth, how far they moved."""
    from spectral_window.data.sources import find_sources
    from spectral_window.lab.analyze import analyze, initial_model, read_kernels
    from spectral_window.training.loading import load, run_of

    notes: list[str] = []
    data = data or []
    sources = find_sources(data, notes) if data else []  # refused before the model loads
    loaded = load(model, device=device)
    warn([*notes, *loaded.notes])
    kernels = read_kernels(loaded.model)  # a Transformer is refused before the text is read
    trained = run_of(loaded.folder)
    recipe = (trained.recipe if trained else None) or {}
    seed = recipe.get("seed")
    initial = None if seed is None else read_kernels(initial_model(loaded.model, seed))
    with scratch_folder() as folder:
        if sources:
            text = " ".join(data)
            stream = tokenize(sources, loaded.tokenizer, folder, text)
        else:
            text, stream = _default_text(loaded, trained, folder)
        with _progress_bar() as progress:
            summary = analyze(
                loaded.model,
                stream,
                length=loaded.model.config.training_length,
                max_tokens=max_tokens or (QUICK_TOKENS if quick else TOKENS),
                begun=initial,
                progress=progress,
            )
        del stream  # its files are removed with the folder
    summary = {
        "model": str(loaded.folder),
        "data": text,
        "seed": seed,
        **({"note": QUICK_NOTE} if quick else {}),
        **summary,
    }
    if out is not None:
        from spectral_window.lab.kernel_figures import draw_all

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "analysis.json", summary)
        draw_all(summary, kernels, out, initial)
    if json:
        return print_json(summary)
    return _print_analysis(summary)


def _default_text(loaded: Loaded, trained: Run | None, folder: Path) -> tuple[str, TokenStream]:
    """Find the text that the run held out, in its folder or in the --corpus of its command, if it
    is still the same; otherwise take a part of Python's library, with a warning."""
    from spectral_window.data.sources import find_sources
    from spectral_window.data.text import open_corpus

    places = []
    if trained:
        places.append(trained.folder / "data")
        words = shlex.split(trained.command)
        places += [Path(after) for word, after in pairwise(words) if word == "--corpus"]
    for place in places:
        if (place / "corpus.json").is_file():
            corpus = open_corpus(place)
            if trained and corpus.fingerprint == trained.data_fingerprint:
                return "the run's held-out text", corpus.valid
    if trained:
        warn(["the run's held-out text is not here: measured on a part of Python's library"])
    sources = find_sources(["stdlib"])
    some = sources[:: max(1, len(sources) // FILES)][:FILES]
    name = "a part of Python's library"
    return name, tokenize(some, loaded.tokenizer, folder, name)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading the text with branches silenced")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_analysis(summary: dict[str, Any]) -> None:
    layers, window = summary["layers"], summary["window"]
    if "note" in summary:
        print(summary["note"])
    print_table(
        f"{summary['model']}: kernel {summary['kernel']}, fusion {summary['fusion']}, "
        f"window {window}\n"
        "half-lives of the kernels, tokens",
        ("layer", "5 %", "25 %", "median", "75 %", "95 %", "longest", f"beyond {window}"),
        [
            (
                str(layer["layer"]),
                *(_tokens(value) for value in layer["half_life"].values()),
                f"{layer['past_window']:.1%}",
            )
            for layer in layers
        ],
    )
    branches = summary["branches"]
    rows = [
        (
            str(layer["layer"]),
            f"{layer['energy']['spectral_share']:.1%}",
            *(f"{layer['silenced'][branch]:+.4f}" for branch in branches),
        )
        for layer in layers
    ]
    rows.append(("all", "", *(f"{summary['silenced'][branch]:+.4f}" for branch in branches)))
    print_table(
        f"what each branch is worth on {summary['data']}: loss {summary['loss']:.4f} nats a token",
        ("layer", "spectral energy", *(f"loss without {branch}" for branch in branches)),
        rows,
    )
    has_initial = all("half_life_log2_ratio" in layer["drift"] for layer in layers)
    rows = []
    for layer in layers:
        drift = layer["drift"]
        row: tuple[str, ...] = (
            str(layer["layer"]),
            _tokens(drift["initial_half_life"]["median"]),
            _tokens(layer["half_life"]["median"]),
            f"{drift['half_life_ks']:.3f}",
            f"{drift['frequency_ks']:.3f}" if "frequency_ks" in drift else "",
            f"{drift['ks_5_percent']:.3f}",
        )
        if has_initial:
            row += (f"{drift['slower_by_half']:.1%}", f"{drift['faster_by_half']:.1%}")
        rows.append(row)
    head = ("layer", "began", "now", "KS", "KS freq.", "chance", "slower", "faster")
    print_table(
        "drift: median half-life, distance of distributions (1 of 20 equal ones is above chance)"
        + (
            f",\nchannels 1.5 times slower or faster than at first (seed {summary['seed']})"
            if has_initial
            else ""
        ),
        head if has_initial else head[:6],
        rows,
    )


def _tokens(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.2g}"
