"""`spectral-window analyze`: what a model's kernels and branches have learned."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from spectral_window.commands.evaluate import LENGTH, tokenize
from spectral_window.commands.show import print_json, print_table, tell
from spectral_window.data.blocks import TokenStream
from spectral_window.data.sources import find_sources
from spectral_window.data.text import open_corpus
from spectral_window.files import scratch_folder, write_json
from spectral_window.lab.analyze import analyze, initial_model, read_kernels
from spectral_window.training.loading import Loaded, load, read_json

TOKENS, QUICK_TOKENS = 16_384, 2_048
FILES = 24  # of Python's library, where no other text is known: some 100,000 tokens
QUICK_NOTE = "quick: few tokens, so the losses and energies are rough"


def run(
    *,
    model: str,
    data: list[str],
    out: Path | None,
    max_tokens: int | None,
    quick: bool,
    json: bool,
    device: str,
) -> None:
    """Print the analysis and, with `out`, write analysis.json and the pictures there."""
    notes: list[str] = []
    sources = find_sources(data, notes) if data else []  # refused before the model loads
    loaded = load(model, device=device)
    tell([*notes, *loaded.notes])
    kernels = read_kernels(loaded.model)  # a Transformer is refused before the text is read
    trained = _trained(loaded.folder)
    recipe = trained.get("recipe", {})
    seed = recipe.get("seed")
    begun = None if seed is None else read_kernels(initial_model(loaded.model, seed))
    with scratch_folder() as folder:
        if sources:
            text = " ".join(data)
            stream = tokenize(sources, loaded.tokenizer, folder, text)
        else:
            text, stream = _known_text(loaded, trained, folder)
        with _bar() as progress:
            facts = analyze(
                loaded.model,
                stream,
                length=recipe.get("sequence_length", LENGTH),
                max_tokens=max_tokens or (QUICK_TOKENS if quick else TOKENS),
                begun=begun,
                progress=progress,
            )
        del stream  # its files go away with the folder
    facts = {
        "model": str(loaded.folder),
        "data": text,
        "seed": seed,
        **({"note": QUICK_NOTE} if quick else {}),
        **facts,
    }
    if out is not None:
        from spectral_window.lab.kernel_figures import draw_all

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "analysis.json", facts)
        draw_all(facts, kernels, out, begun)
    if json:
        return print_json(facts)
    return _show(facts)


def _trained(folder: Path) -> dict[str, Any]:
    """What the run that a model folder lies in wrote about itself, with its folder, or {}."""
    for place in (folder.parent, folder.parent.parent):  # run/model, run/checkpoints/step-N
        path = place / "config.json"
        if path.is_file() and isinstance((found := read_json(path)).get("recipe"), dict):
            return {**found, "folder": place}
    return {}


def _known_text(loaded: Loaded, trained: dict[str, Any], folder: Path) -> tuple[str, TokenStream]:
    """What the run held out: from its folder, or from where its command kept the tokens, if they
    are still the same; else a part of Python's library, with a warning."""
    places = []
    if trained:
        places.append(trained["folder"] / "data")
        words = shlex.split(str(trained.get("command", "")))
        places += [Path(after) for word, after in pairwise(words) if word == "--corpus"]
    for place in places:
        if (place / "corpus.json").is_file():
            corpus = open_corpus(place)
            if corpus.fingerprint == trained.get("data", {}).get("fingerprint"):
                return "the run's held-out text", corpus.valid
    if trained:
        tell(["the run's held-out text is not here: measured on a part of Python's library"])
    sources = find_sources(["stdlib"])
    some = sources[:: max(1, len(sources) // FILES)][:FILES]
    name = "a part of Python's library"
    return name, tokenize(some, loaded.tokenizer, folder, name)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, while it is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading the text with branches silenced")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(facts: dict[str, Any]) -> None:
    layers, window = facts["layers"], facts["window"]
    if "note" in facts:
        print(facts["note"])
    print_table(
        f"{facts['model']}: kernel {facts['kernel']}, fusion {facts['fusion']}, window {window}\n"
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
    branches = facts["branches"]
    rows = [
        (
            str(layer["layer"]),
            f"{layer['energy']['spectral_share']:.1%}",
            *(f"{layer['silenced'][branch]:+.4f}" for branch in branches),
        )
        for layer in layers
    ]
    rows.append(("all", "", *(f"{facts['silenced'][branch]:+.4f}" for branch in branches)))
    print_table(
        f"what each branch is worth on {facts['data']}: loss {facts['loss']:.4f} nats a token",
        ("layer", "spectral energy", *(f"loss without {branch}" for branch in branches)),
        rows,
    )
    known = all("half_life_log2_ratio" in layer["drift"] for layer in layers)
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
        if known:
            row += (f"{drift['slower_by_half']:.1%}", f"{drift['faster_by_half']:.1%}")
        rows.append(row)
    head = ("layer", "began", "now", "KS", "KS freq.", "chance", "slower", "faster")
    print_table(
        "drift: median half-life, distance of distributions (1 of 20 equal ones is above chance)"
        + (
            f",\nchannels 1.5 times slower or faster than at first (seed {facts['seed']})"
            if known
            else ""
        ),
        head if known else head[:6],
        rows,
    )


def _tokens(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.2g}"
