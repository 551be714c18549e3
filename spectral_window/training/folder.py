"""The run folder: whether a run may use it, and the lock that keeps other runs out."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spectral_window.data.shards import unfinished
from spectral_window.errors import ResourceError, UserError
from spectral_window.files import cannot_write, check_name, remove_leftovers, try_lock
from spectral_window.training.parallel import World

# What a run writes, besides the prepared text in data/ (which is checked and reused).
RUN_FILES = ("config.json", "metrics.jsonl", "result.json", "samples.json", "report.html")
RUN_FOLDERS = ("checkpoints", "model", "tracker")
DATA, LOCK = "data", ".lock"


def check(out: Path, resume: bool | str, overwrite: bool) -> None:
    """Raise UserError if `out` must not be used in this way. Changes nothing."""
    if resume not in (True, False, "auto"):
        raise UserError(f"resume={resume!r} (train): use True, False or 'auto'")
    check_name(out, "the output folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"the output is a file ({out}): choose a folder")
    if resume is True and not any(
        (out / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS, LOCK)
    ):
        raise UserError(f"no checkpoint to resume ({out}): leave --resume out to begin")
    finished = set(os.listdir(out) if out.is_dir() else ())
    finished -= {unfinished(out / DATA).name}  # a stopped preparation goes on from it
    if not resume and not overwrite and finished:
        raise UserError(
            f"the output folder is not empty ({out}): "
            "choose another, or use --resume or --overwrite"
        )


def remove_run(out: Path) -> None:
    """Remove an earlier run from `out`, and no other file there."""
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


class Claim:
    """A lock on a folder, which the system releases when the process ends, however it ends.

    Until `began` is set, releasing it removes what the claim or its run made: the folder, those
    above it, or new files in it. Sections of prepared text are kept: they may be hours of work.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.began = out, False
        self._made: list[Path] = []  # folders, the innermost first
        self._before: set[str] = set()
        self._file: IO[str] | None = None
        self._folder = -1  # a descriptor: while it is open no other folder has its number

    def take(self) -> None:
        """Raises UserError if another run holds the folder, ResourceError if it is not writable.

        What killed runs left in it is removed.
        """
        self._made = [path for path in (self.out, *self.out.parents) if not path.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._before = set(os.listdir(self.out))
            self._file = (self.out / LOCK).open("w")
            free = try_lock(self._file, self.out / LOCK)
            if os.name != "nt":
                self._folder = os.open(self.out, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(error, self.out) from None
        if not free:
            self._file.close()
            self._file = None
            raise UserError(
                f"another run is using this folder ({self.out}): wait for it or choose another"
            )
        remove_leftovers(self.out)
        remove_leftovers(self.out / "checkpoints")

    def confirm(self) -> None:
        """ResourceError if the folder was removed or replaced since: half a run must not return."""
        if not self._is_ours():
            raise ResourceError(
                f"the run's folder was removed or replaced ({self.out}): restore the folder, then "
                "--resume; or train again"
            )

    def _is_ours(self) -> bool:
        if self._folder < 0:  # of another process's claim, or Windows, where it cannot be removed
            return True
        try:
            return os.path.samestat(os.fstat(self._folder), self.out.stat())
        except OSError:
            return False

    def release(self) -> None:
        ours = self._is_ours()
        if self._file is not None:
            if ours:
                (self.out / LOCK).unlink(missing_ok=True)
            self._file.close()
            if not self.began and ours:
                self._undo()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def _undo(self) -> None:
        if self._made and not unfinished(self.out / DATA).is_dir():
            shutil.rmtree(self.out, ignore_errors=True)
            for path in self._made[1:]:
                with contextlib.suppress(OSError):  # something else is in it by now
                    path.rmdir()
        elif DATA not in self._before:
            shutil.rmtree(self.out / DATA, ignore_errors=True)


@contextmanager
def claim(out: Path, world: World) -> Iterator[Claim]:
    """Lock `out` for this run within the block: one lock for all processes of `world`."""
    lock = Claim(out)
    try:
        world.first(lock.take)
        yield lock
    finally:
        if world.is_first:
            lock.release()
