"""`spectral-window eval`: how well a model predicts a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectral_window.cli.options import Debug, Device, Json, Model, Threads
from spectral_window.cli.output import print_json, print_table, warn
from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import scratch_folder, write_json

if TYPE_CHECKING:
    from spectral_window.data.blocks import TokenStream
    from spectral_window.training.loading import Loaded, Run

EXAMPLE = "eval runs/tiny --data texts/"


def run(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to measure on, as for train. Default: what the run held out.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="About so many tokens, evenly spread. Default: all."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**31 - 1,
            metavar="T",
            help="Tokens a sequence. Default: what the run was trained with.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Instead of text: tasks of lm-eval (pip install 'spectral-window[judge]'), by "
            "name or as .yaml files.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="T", help="With --tasks: tokens of a question at most. Default: all."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --tasks: questions a task. Default: all."),
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(
            metavar="T,...",
            help="Instead of the loss: questions about what was hidden in so many tokens of the "
            "text, as 1k,4k,1M, and the loss by position.",
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --needle: questions a length.")
    ] = 50,
    repeats: Annotated[
        bool,
        typer.Option(
            "--repeats",
            help="Instead of one loss: the loss by how often the last tokens occurred before.",
        ),
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL...", help="With --repeats: models to compare, of the same tokenizer."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --needle or --repeats: write long-context or repeats .json and .png there.",
        ),
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Measure a model on text (loss in nats a token, perplexity, bits per byte) or on tasks."""
    from spectral_window.data.sources import find_sources
    from spectral_window.data.text import open_corpus
    from spectral_window.training.evaluate import evaluate
    from spectral_window.training.loading import load, read_run

    if tasks is not None:
        if data or length or max_tokens or needle or repeats:
            raise UserError("--tasks beside a measure of text (eval): give one")
        return _judge(model, tasks, max_length, limit, json, device)
    if max_length or limit:
        raise UserError("--max-length or --limit without --tasks (eval): they are of tasks")
    if needle is not None and repeats:
        raise UserError("--needle beside --repeats (eval): give one")
    if out is not None and needle is None and not repeats:
        raise UserError("--out without --needle or --repeats (eval): only they make files")
    if beside and not repeats:
        raise UserError("--beside without --repeats (eval): only it compares models")
    lengths = [] if needle is None else _read_lengths(needle)
    notes: list[str] = []
    data = data or []
    sources = find_sources(data, notes) if data else []  # refused before the model loads
    folder = Path(os.path.expanduser(model))
    trained = read_run(folder) if (folder / "data").is_dir() else None
    if not data and trained is None:
        raise UserError(f"no text to measure on ({model}): name some with --data")
    loaded = load(model, device=device)
    warn([*notes, *loaded.notes])
    length = length or loaded.model.config.training_length
    with scratch_folder() as scratch:
        if sources:
            stream = tokenize(sources, loaded.tokenizer, scratch, " ".join(data))
        else:
            assert trained is not None
            corpus = open_corpus(trained.folder / "data")
            warn(corpus.notes)
            _check_text(trained, corpus.fingerprint)
            if corpus.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
                raise UserError(
                    f"tokens of another tokenizer ({trained.folder / 'data'}): use --data"
                )
            stream = corpus.valid
        if lengths:
            return _long_context(loaded, stream, lengths, questions, out, json)
        if repeats:
            others = [load(name, device=device) for name in beside or ()]
            return _repeats([loaded, *others], stream, length, max_tokens, out, json)
        scores = evaluate(loaded.model, stream, length=length, max_tokens=max_tokens)
        documents = len(stream.documents)
        del stream  # its files are removed with the folder
    summary = {
        "model": str(loaded.folder),
        "data": data or "the run's held-out text",
        "documents": documents,
        "length": length,
        **scores,
    }
    if json:
        return print_json(summary)
    rows = [
        ("loss", f"{scores['loss']:.4f} nats a token"),
        ("perplexity", f"{scores['perplexity']:.3f}"),
        ("bits per byte", f"{scores['bits_per_byte']:.4f} (comparable between tokenizers)"),
        ("tokens", f"{scores['tokens']:,} predicted, in sequences of {length:,}"),
        ("text", f"{scores['bytes']:,} bytes in {documents:,} documents"),
    ]
    title = f"{loaded.folder} on {' '.join(data) or summary['data']}"
    return print_table(title, ("", ""), rows, numbers=False)


def _judge(
    model: str, tasks: str, max_length: int | None, limit: int | None, json: bool, device: str
) -> None:
    from spectral_window.training.judge import judge
    from spectral_window.training.loading import load

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("no task (--tasks): name some, as hellaswag,lambada_openai")
    loaded = load(model, device=device)
    warn(loaded.notes)
    found = judge(loaded, names, max_length=max_length, limit=limit)
    scores = {
        task: {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
    counts = {task: n["effective"] for task, n in found["n-samples"].items()}
    if json:
        settings = {"model": str(loaded.folder), "max_length": max_length}
        return print_json({**settings, "questions": counts, "results": scores})
    rows = [
        (task, key.removesuffix(",none"), f"{value:.4f}", f"{counts.get(task, 0):,}")
        for task, values in scores.items()
        for key, value in values.items()
        if "stderr" not in key and key != "sample_len"
    ]
    return print_table(str(loaded.folder), ("task", "measure", "score", "questions"), rows)


def _read_lengths(text: str) -> list[int]:
    from spectral_window.lab.long_context import read_lengths

    return read_lengths(text)


def _long_context(
    loaded: Loaded,
    stream: TokenStream,
    lengths: list[int],
    questions: int,
    out: Path | None,
    json: bool,
) -> None:
    from spectral_window.lab.long_context import measure, picture

    found = {"model": str(loaded.folder), **measure(loaded.model, stream, lengths, count=questions)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "long-context.json", found)
        picture(found, _name(loaded), out / "long-context.png")
    if json:
        return print_json(found)
    title = f"{loaded.folder}: {questions} questions each, chance {found['chance']:.2f}"
    rows = [
        (row["task"], f"{row['length']:,}", f"{row['right']:.2f}") for row in found["questions"]
    ]
    print_table(title, ("question", "tokens", "right"), rows)
    rows = [
        (f"{row['from']:,} to {row['to']:,}", f"{row['loss']:.4f}", f"{row['short']:.4f}")
        for row in found["loss"]
    ]
    head = ("positions", "one row", f"rows of {found['training_length']:,}")
    return print_table("loss, nats a token", head, rows)


def _repeats(
    models: list[Loaded],
    stream: TokenStream,
    length: int,
    max_tokens: int | None,
    out: Path | None,
    json: bool,
) -> None:
    from spectral_window.lab.repeats import measure, picture

    first, *others = models
    for other in others:
        warn(other.notes)
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise UserError(
                f"another tokenizer than that of {first.folder} ({other.folder}): compare models "
                "of one"
            )
    folders = [str(one.folder) for one in models]
    if len(set(folders)) < len(folders):
        raise UserError("a model twice (eval --beside): name each once")
    names = [_name(one) for one in models]
    if len(set(names)) < len(names):
        names = folders
    found = measure(
        {name: one.model for name, one in zip(names, models, strict=True)},
        stream,
        length=length,
        max_tokens=max_tokens,
    )
    found = {"models": dict(zip(names, folders, strict=True)), **found}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "repeats.json", found)
        picture(found, out / "repeats.png")
    if json:
        return print_json(found)
    rows = [
        (
            row["context"],
            row["next"],
            f"{row['tokens']:,}",
            *(f"{x:.4f}" for x in row["loss"].values()),
        )
        for row in found["rows"]
    ]
    head = (f"last {found['context_tokens']} tokens", "next token", "tokens", *names)
    return print_table(f"loss, nats a token, rows of {length:,}", head, rows)


def _name(loaded: Loaded) -> str:
    """The folder that a user knows a model by: of a run, or its own."""
    folder = loaded.folder
    return folder.parent.name if folder.name == "model" else folder.name


def _check_text(run: Run, fingerprint: str) -> None:
    """Raise IntegrityError unless the run's prepared text is the one it recorded, if it did."""
    if run.data_fingerprint not in (None, fingerprint):
        raise IntegrityError(
            f"not the text of the run (data fingerprint, {run.folder / 'data'}): put its own back, "
            "or name text with --data"
        )


def tokenize(sources: list[Any], tokenizer: Any, folder: Path, name: str) -> TokenStream:
    """Tokenize all `sources` into one stream, as training does, with nothing held out.

    Takes constant memory: the tokens are in a file in `folder`.
    """
    import numpy as np

    from spectral_window.data.arrays import FileArray
    from spectral_window.data.blocks import TokenStream
    from spectral_window.data.formats import ReadOptions, ReadReport
    from spectral_window.data.sources import read
    from spectral_window.data.tokenizers import plain_text

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
    warn(report.lines())
    array = FileArray(folder / "tokens", "<u4")
    return TokenStream(array, np.asarray(starts, dtype=np.int64), size, name)
