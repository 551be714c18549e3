"""What the tests' child processes do. They end by themselves, or are killed."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from spectral_window import files
from spectral_window.errors import SpectralWindowError
from spectral_window.training import checkpoints, train
from spectral_window.training.recipes import Recipe
from tests.processes import THREADS

KILLED = 9
ACTS = (
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "mkdir"),
    (Path, "unlink"),
)


def train_child(
    recipe: dict[str, Any], out: str, corpus: str, file_limit: int = 0, report: Any = None
) -> None:
    """Train or resume; the exit code is the one of the command line. file_limit: the largest file
    in bytes that may be written, which stands in for a full disk."""
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    try:
        train(Recipe.from_dict(recipe), out, corpus=corpus, resume="auto")
    except SpectralWindowError as error:
        if report is not None:
            report.put(str(error))
        sys.exit(error.exit_code)


def write_numbers(folder: Path, step: int) -> None:
    """The contents of a checkpoint that knows its step."""
    (folder / "numbers.bin").write_bytes(bytes([step]) * 500)
    (folder / "text.json").write_text(f'{{"step": {step}}}')


def save_child(root: str, step: int, die_at: int, report: Any = None) -> None:
    """Save a checkpoint, and die without a word just before the `die_at`-th act on the disk."""
    acts = 0

    def dying(act: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal acts
            acts += 1
            if acts == die_at:
                os._exit(KILLED)
            return act(*args, **kwargs)

        return wrapped

    for owner, name in ACTS:
        setattr(owner, name, dying(getattr(owner, name)))
    files.shutil.rmtree = dying(shutil.rmtree)  # type: ignore[attr-defined]
    checkpoints.save(Path(root), step, lambda folder: write_numbers(folder, step), about={})
    if report is not None:
        report.put(acts)
