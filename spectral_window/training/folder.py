"""The run folder: whether it may be used, and holding it for one run alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spectral_window.errors import ResourceError, UserError
from spectral_window.training.parallel import World

# What a run writes, besides the prepared text in data/ (which is checked and reused).
RUN_FILES = ("config.json", "metrics.jsonl", "result.json", "samples.json", "report.html")
RUN_FOLDERS = ("checkpoints", "model")


def check(out: Path, resume: bool | str, overwrite: bool) -> None:
    """Raise UserError if `out` may not be used so. Changes nothing."""
    if resume not in (True, False, "auto"):
        raise UserError(f"resume={resume!r} (train): use True, False or 'auto'")
    if out.exists() and not out.is_dir():
        raise UserError(f"the output is a file ({out}): choose a folder")
    if resume is True and not (out / "checkpoints").is_dir():
        raise UserError(f"no checkpoint to resume ({out}): leave --resume out to begin")
    if not resume and not overwrite and out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"the output folder is not empty ({out}): "
            "choose another, or use --resume or --overwrite"
        )


def remove_run(out: Path) -> None:
    """Remove an earlier run from `out`, and nothing else that may lie there."""
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


class Claim:
    """A folder held by a lock that the system lets go when the process ends, however it ends.

    Until `began` is set, a folder that the claim itself made is removed on release.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.began = out, False
        self._created = False
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Raises UserError if another run holds the folder, ResourceError if it is not writable."""
        self._created = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = (self.out / ".lock").open("w")
            free = _lock(self._file, self.out / ".lock")
        except OSError as error:
            raise ResourceError(
                f"cannot write: {error.strerror} ({self.out}): choose another folder"
            ) from None
        if not free:
            self._file.close()
            raise UserError(
                f"another run is using this folder ({self.out}): wait for it or choose another"
            )

    def release(self) -> None:
        if self._file is not None:
            (self.out / ".lock").unlink(missing_ok=True)
            self._file.close()
        if self._created and not self.began:
            shutil.rmtree(self.out, ignore_errors=True)


@contextmanager
def claim(out: Path, world: World) -> Iterator[Claim]:
    """Hold `out` for this run alone within the block: one claim for all processes of `world`."""
    held = Claim(out)
    world.first(held.take)
    try:
        yield held
    finally:
        if world.is_first:
            held.release()


def _lock(file: IO[str], path: Path) -> bool:
    """Whether the lock was free and is now ours."""
    if os.name == "nt":  # no lock there
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # The holder may have removed the file between our opening and our locking it.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
