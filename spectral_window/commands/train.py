"""`spectral-window train`: a recipe and text in, a run folder out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from spectral_window.errors import UserError
from spectral_window.training.recipes import read_overrides, resolve


def run(
    *,
    recipe: str,
    overrides: list[str],
    data: list[str],
    valid: list[str],
    out: Path | None,
    corpus: Path | None,
    resume: bool,
    overwrite: bool,
    init: str | None,
    command: str | None,
) -> None:
    """Train as the recipe says; see `spectral-window train --help`."""
    from spectral_window.training.folder import check
    from spectral_window.training.initial import Initial
    from spectral_window.training.machine import keep_memory
    from spectral_window.training.progress import RichProgress
    from spectral_window.training.trainer import train

    if resume and overwrite:
        raise UserError("--resume and --overwrite (train): one keeps what is there, the other not")
    asked = resolve(recipe, overrides)
    folder = out if out is not None else Path("runs") / asked.name
    check(folder, resume, overwrite)  # before a model is read, which can take long
    begin = None if init is None else Initial.read(init)
    if begin is not None:
        asked = begin.adopt(asked, read_overrides(overrides))
    for name, sources in (("data", data), ("valid", valid)):
        if sources:
            asked = asked.replace(**{name: tuple(sources)})
    keep_memory()  # every step takes the same large tensors again
    train(
        asked,
        folder,
        resume=resume,
        overwrite=overwrite,
        corpus=corpus,
        progress=RichProgress(),
        command=command,
        init=begin,
    )
    where = shlex.quote(str(folder))
    print(f"spectral-window generate {where} 'Once'    writes with the model", file=sys.stderr)
