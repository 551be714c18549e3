"""The run folder: whether a run may use it, and the lock that keeps other runs out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spectral_window.data.shards import unfinished
from spectral_window.errors import ResourceError, UserError
from spectral_window.files import cannot_write, check_name, remove_leftovers, try_lock
from spectral_window.training.parallel import World, launch, restarts

# What a run writes, besides the prepared text in data/ (which is checked and reused).
RUN_FILES = ("config.json", "metrics.jsonl", "result.json", "samples.json", "report.html")
RUN_FOLDERS = ("checkpoints", "model", "tracker")
DATA, LOCK = "data", ".lock"
# Where torchrun has lost a machine, its process may still hold the lock, until it notices too.
RESTART_SECONDS = 30.0
_POLL_SECONDS = 0.1


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


def is_restarted(out: Path) -> bool:
    """Whether torchrun has started this process again for the run in `out`.

    A run records the launch that trains it, so that a restart is not taken for a second run in its
    folder, and an older run there not for the one that is to be gone on with.
    """
    if launch() is None:
        return False
    if not any((out / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS)):
        return restarts() > 0  # it was killed before it recorded anything
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8"))["launch"] == launch()
    except (OSError, ValueError, LookupError, TypeError):
        return False


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

    def take(self, seconds: float = 0.0) -> None:
        """Raises UserError if another run holds the folder, ResourceError if it is not writable.

        What killed runs left in it is removed. seconds: how long to wait for the other run.
        """
        until = time.monotonic() + seconds
        while not self._try() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        if self._file is None:
            raise UserError(
                f"another run is using this folder ({self.out}): wait for it or choose another"
            )
        remove_leftovers(self.out)
        remove_leftovers(self.out / "checkpoints")

    def _try(self) -> bool:
        self._made = [path for path in (self.out, *self.out.parents) if not path.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._before = set(os.listdir(self.out))
            self._file = (self.out / LOCK).open("w")
            free = try_lock(self._file, self.out / LOCK)
            if free and os.name != "nt":
                self._folder = os.open(self.out, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(error, self.out) from None
        if not free:
            self._file.close()
            self._file = None
        return free

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
def claim(out: Path, world: World, seconds: float = 0.0) -> Iterator[Claim]:
    """Lock `out` for this run within the block: one lock for all processes of `world`. seconds: how
    long to wait for the run that holds it."""
    lock = Claim(out)
    try:
        world.first(lambda: lock.take(seconds))
        yield lock
    finally:
        if world.is_first:
            lock.release()
