"""`spectral-window eval`: how well a model predicts a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from spectral_window.commands.show import print_json, print_table, tell
from spectral_window.data.arrays import FileArray
from spectral_window.data.blocks import TokenStream
from spectral_window.data.formats import ReadOptions, ReadReport
from spectral_window.data.sources import find_sources, read
from spectral_window.data.text import open_corpus
from spectral_window.data.tokenizers import plain_text
from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import scratch_folder
from spectral_window.training.evaluate import evaluate
from spectral_window.training.loading import load, read_json

LENGTH = 1024  # tokens an evaluated sequence, where no run says what the model was trained with


def run(
    *,
    model: str,
    data: list[str],
    max_tokens: int | None,
    length: int | None,
    device: str,
    json: bool,
) -> None:
    """Print loss, perplexity and bits per byte; see `spectral-window eval --help`."""
    notes: list[str] = []
    sources = find_sources(data, notes) if data else []  # refused before the model loads
    trained = _run_of(model)
    length = length or _trained_length(trained)
    if not data and trained is None:
        raise UserError(f"no text to measure on ({model}): name some with --data")
    loaded = load(model, device=device)
    tell([*notes, *loaded.notes])
    with scratch_folder() as folder:
        if sources:
            stream = tokenize(sources, loaded.tokenizer, folder, " ".join(data))
        else:
            assert trained is not None
            corpus = open_corpus(trained / "data")
            tell(corpus.notes)
            _check_text(trained, corpus.fingerprint)
            if corpus.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
                raise UserError(f"tokens of another tokenizer ({trained / 'data'}): use --data")
            stream = corpus.valid
        scores = evaluate(loaded.model, stream, length=length, max_tokens=max_tokens)
        documents = len(stream.documents)
        del stream  # its files go away with the folder
    facts = {
        "model": str(loaded.folder),
        "data": data or "the run's held-out text",
        "documents": documents,
        "length": length,
        **scores,
    }
    if json:
        return print_json(facts)
    rows = [
        ("loss", f"{scores['loss']:.4f} nats a token"),
        ("perplexity", f"{scores['perplexity']:.3f}"),
        ("bits per byte", f"{scores['bits_per_byte']:.4f} (comparable between tokenizers)"),
        ("tokens", f"{scores['tokens']:,} predicted, in sequences of {length:,}"),
        ("text", f"{scores['bytes']:,} bytes in {documents:,} documents"),
    ]
    title = f"{loaded.folder} on {' '.join(data) or facts['data']}"
    return print_table(title, ("", ""), rows, numbers=False)


def _run_of(model: str) -> Path | None:
    """The run folder that `model` is, or None for a model from elsewhere."""
    folder = Path(os.path.expanduser(model))
    return folder if (folder / "data").is_dir() and (folder / "config.json").is_file() else None


def _check_text(run: Path, fingerprint: str) -> None:
    """Raise IntegrityError unless the run's prepared text is what it recorded, if it did."""
    recorded = read_json(run / "config.json").get("data")
    known = recorded.get("fingerprint") if isinstance(recorded, dict) else None
    if known not in (None, fingerprint):
        raise IntegrityError(
            f"not the text of the run (data fingerprint, {run / 'data'}): put its own back, or "
            "name text with --data"
        )


def _trained_length(run: Path | None) -> int:
    recipe = read_json(run / "config.json").get("recipe") if run is not None else None
    length = recipe.get("sequence_length") if isinstance(recipe, dict) else None
    return length if isinstance(length, int) and length > 0 else LENGTH


def tokenize(sources: list[Any], tokenizer: Any, folder: Path, name: str) -> TokenStream:
    """All of `sources` as one stream, as in training but nothing held out; memory is constant."""
    backend, report = plain_text(tokenizer), ReadReport()
    tokens = documents = size = 0
    starts: list[int] = []
    with (folder / "tokens").open("wb") as file:
        for piece in read(sources, ReadOptions(), report):
            ids = backend.encode(piece.text, add_special_tokens=False).ids
            if piece.first:
                starts.append(tokens)
                ids = [tokenizer.bos_token_id, *ids]
                documents += 1
            np.asarray(ids, dtype="<u4").tofile(file)
            tokens += len(ids)
            size += len(piece.text.encode())
    if not documents:
        raise UserError(f"no text ({name}): name files that hold some")
    tell(report.lines())
    array = FileArray(folder / "tokens", "<u4")
    return TokenStream(array, np.asarray(starts, dtype=np.int64), size, name)
