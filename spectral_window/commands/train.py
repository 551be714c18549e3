"""`spectral-window train`: from a recipe and text to a run folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectral_window.cli.options import Debug, Threads
from spectral_window.cli.output import log
from spectral_window.errors import UserError

if TYPE_CHECKING:
    from spectral_window.data.remote import PieceCache
    from spectral_window.training.loading import Run

EXAMPLE = "train tiny steps=500 lr=1e-3 --data texts/ --out runs/mine"


def run(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="demo, tiny, small, memory or paper-lm: see `info RECIPE`. With --resume also a "
            "run's folder, which holds everything else.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings to override, e.g. steps=500 window=64 lr=1e-3 mixer=attention.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to learn from: files, folders, globs (.txt .md .py .jsonl .json .csv .tsv "
            ".parquet, also .gz .zst), 'stdlib' (Python's own library) or hub:NAME:CONFIG. "
            "Default: the recipe's.",
        ),
    ] = None,
    chat: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Instead of --data: conversations, a JSON record a line with 'messages' of 'role' "
            "and 'content'. The assistant's turns are learned.",
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text (or conversations) to measure on. Default: whole documents held out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run folder to make: settings, metrics, checkpoints, model, result. "
            "Default: runs/RECIPE.",
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the tokens are kept, so that several runs may share them; or a URL to "
            "which `publish` copied them. Default: in the run folder.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With a URL in --corpus: the folder for what was read from it last. Processes "
            "may share it. Default: spectral-window/tokens in the user's folder for caches.",
        ),
    ] = None,
    cache_bytes: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="N", help="With a URL in --corpus: bytes of that folder. Default: 1e10."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Begin from the weights of this model, a run folder or what save_pretrained "
            "wrote: it gives the architecture and the tokenizer. Default: random weights.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on, exactly, from the newest intact checkpoint in DIR. With "
            "schedule=constant, steps=MORE trains a finished run further.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run in DIR first.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            metavar="N",
            help="Processes that prepare the text. Default: one a core. The tokens are the same.",
        ),
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Train a model on text. Ctrl-C saves a checkpoint, and --resume RUN goes on from it."""
    from spectral_window.training.folder import check, is_restarted
    from spectral_window.training.initial import Initial
    from spectral_window.training.machine import keep_memory
    from spectral_window.training.progress import RichProgress
    from spectral_window.training.recipes import Recipe, read_overrides, resolve
    from spectral_window.training.trainer import train

    if resume and overwrite:
        raise UserError("--resume and --overwrite (train): one keeps what is there, the other not")
    if data and chat:
        raise UserError("--data and --chat (train): a run learns from one of them")
    run = _find_run(recipe) if resume else None
    if run is None:
        settings, command = resolve(recipe, overrides or []), context.obj
        folder = out if out is not None else Path("runs") / settings.name
    else:
        if out is not None:
            raise UserError(f"--out {out} (train): {run.folder} is the run to resume; leave it out")
        assert run.recipe is not None
        settings = Recipe.from_dict(run.recipe).replace(**read_overrides(overrides or []))
        folder, init, command = run.folder, init or run.init, run.command
        corpus = corpus or run.tokens
    if chat:
        settings = settings.replace(chat=True, data=tuple(chat))
    if not is_restarted(folder):
        check(folder, resume, overwrite)  # before a model is read, which can take long
    initial = None if init is None else Initial.read(init)
    if initial is not None:
        settings = initial.adopt(settings, read_overrides(overrides or []))
    for name, sources in (("data", data), ("valid", valid)):
        if sources:
            settings = settings.replace(**{name: tuple(sources)})
    keep_memory()  # every step allocates the same large tensors again
    train(
        settings,
        folder,
        resume=resume,
        overwrite=overwrite,
        corpus=corpus,
        progress=RichProgress(),
        command=command,
        init=initial,
        workers=workers,
        cache=_cache(corpus, cache, cache_bytes),
    )
    asked, what = ("--chat 'Hi'", "answers") if settings.chat else ("'Once'", "writes")
    log(f"spectral-window generate {shlex.quote(str(folder))} {asked}    {what} with the model")


def _cache(corpus: str | None, folder: Path | None, size: float | None) -> PieceCache | None:
    """The cache for a corpus at a URL; None for one on the disk."""
    from spectral_window.data.remote import LIMIT, PieceCache, is_url

    if corpus is None or not is_url(corpus):
        if folder is not None or size is not None:
            raise UserError("--cache without a URL in --corpus (train): a folder needs no cache")
        return None
    return PieceCache(folder, int(size or LIMIT))


def _find_run(name: str) -> Run | None:
    """Find the run that is named in place of a recipe; None for a recipe's name."""
    from spectral_window.training.loading import read_run
    from spectral_window.training.recipes import RECIPES

    folder = Path(os.path.expanduser(name))
    if name in RECIPES or not folder.is_dir():
        return None
    run = read_run(folder)
    if run is None or run.recipe is None:
        raise UserError(f"no run to resume ({folder}): type its whole command, with --resume")
    return run
