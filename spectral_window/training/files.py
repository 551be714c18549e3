"""Writing all or nothing: a reader, a kill or a full disk sees the old file or the new one.

Everything is written under a temporary name `.tmp-*` beside its place, forced to the disk (fsync)
and renamed, which is one atomic operation. What a killed process leaves under such a name,
`remove_leftovers` removes when the next run starts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spectral_window.errors import ResourceError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8). Raises ResourceError if it cannot be written."""
    temporary = _temporary(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON. Raises ResourceError if it cannot be written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_folder(folder: Path, write: Callable[[Path], None], *, needs: int = 0) -> None:
    """Make `folder` by `write(temporary)` and one rename; an existing one is replaced.

    needs: bytes expected, for the message when the disk is full. Raises ResourceError if it cannot
    be written; then nothing of it stays.
    """
    temporary = _temporary(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            sync_file(path)
        sync_folder(temporary)
        if folder.exists():
            discard(folder)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(error, folder, needs) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Remove a folder so that a kill halfway leaves a temporary name, never half the folder."""
    doomed = _temporary(folder, "old-")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder`. Call it only while no other run uses it."""
    for path in folder.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force the contents of `path` to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path, kind: str = "") -> Path:
    return path.with_name(f".tmp-{kind}{path.name}-{os.getpid()}")


def _cannot_write(error: Exception, path: Path, needs: int = 0) -> ResourceError:
    disk = next((p for p in (path, *path.parents) if p.is_dir()), Path())
    room = f"{shutil.disk_usage(disk).free:,} bytes are free"
    if needs:
        room = f"it needs about {needs:,} bytes, {room}"
    reason = getattr(error, "strerror", None) or str(error)
    return ResourceError(
        f"cannot write: {reason} ({path}): {room}; make room or choose another folder"
    )
