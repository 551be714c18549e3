"""Checkpoints that survive a kill at any moment, and that detect any damage.

A checkpoint is a folder `step-N` that appears all at once or not at all:

1. the files are written into a temporary folder and each is forced to the disk (fsync);
2. `manifest.json` comes last: the size and SHA-256 of every file, the step, what the run is about;
3. the folder is renamed to `step-N`, one atomic operation, and the parent is forced to the disk;
4. only when the new checkpoint has been read back and agrees with its manifest are the oldest ones
   removed, and at least two stay.

So a process killed in 1-3 leaves a temporary folder that the next start removes, and everything
older untouched. `newest` reads every checkpoint from the highest step down and takes the first
whose every byte agrees; it lists those that it refused and why. Time stamps play no part. The
contents of a checkpoint are in `state.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spectral_window.errors import IntegrityError
from spectral_window.files import cannot_write, discard, write_folder
from spectral_window.training import manifest

_NAME = re.compile(r"step-\d+")


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    about: dict[str, Any],
    keep: int = 2,
    needs: int = 0,
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write checkpoint `step` under `root` by `write(folder)`; verify it; keep the `keep` newest.

    about: JSON values stored in the manifest (what resume compares). needs: bytes expected, for the
    message when the disk is full. hashes: of files that `write` finds written, see `manifest.seal`.
    Returns the final folder. Raises ResourceError if it cannot be
    written; the older ones stay.
    """

    def write_and_seal(folder: Path) -> None:
        write(folder)
        manifest.seal(folder, hashes, step=step, about=about)

    final = root / f"step-{step}"
    try:
        root.mkdir(exist_ok=True)  # and never the run's folder: one that was removed stays so
    except OSError as error:
        raise cannot_write(error, root, needs) from error
    write_folder(final, write_and_seal, needs=needs)
    verify(final)
    _prune(root, max(keep, 2), newest_step=step)
    return final


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `folder`, after every byte agreed with it (IntegrityError)."""
    contents = manifest.verify(folder)
    if folder.name != f"step-{contents.get('step')}":
        raise IntegrityError(
            f"the checkpoint is of step {contents.get('step')} ({folder}): the folder was renamed"
        )
    return contents


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that verifies, or None; and a line for each refused."""
    refused: list[str] = []
    for _, folder in _steps(root):
        try:
            verify(folder)
        except IntegrityError as error:
            refused.append(f"checkpoint {folder.name} is refused: {error}")
        else:
            return folder, refused
    return None, refused


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(folder.name.removeprefix("step-"))


def _steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint by name, highest step first."""
    folders = [p for p in root.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(((step_of(folder), folder) for folder in folders), reverse=True)


def _prune(root: Path, keep: int, newest_step: int) -> None:
    """Remove the oldest, keeping `keep` that verify; a damaged one does not count as kept."""
    good = 1  # the newest one, just verified
    for step, folder in _steps(root):
        if step >= newest_step:
            continue  # a higher one was refused at resume; it is replaced when training gets there
        if good >= keep:
            discard(folder)
            continue
        try:
            verify(folder)
        except IntegrityError:
            continue
        good += 1
