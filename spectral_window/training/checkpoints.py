"""Checkpoints that survive a kill at any moment and that notice any damage.

A checkpoint is a folder `step-N` that appears all at once or not at all:

1. the files are written into `.tmp-N-PID` and each is forced to the disk (fsync);
2. `manifest.json` comes last: size and SHA-256 of every file, the step, what the run was about, and
   a hash of itself;
3. the folder is renamed to `step-N` (one atomic operation) and the parent folder is forced to the
   disk;
4. only when the new checkpoint has been read back and agrees with its manifest are the oldest ones
   removed, and at least two stay.

So a process killed in 1-3 leaves a temporary folder that the next start removes, and everything
older untouched. `newest` reads every checkpoint from the highest step down and takes the first
whose every byte agrees; it says which ones it refused and why. Time stamps play no part. This file
knows nothing of models: see `state.py` for the contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spectral_window.errors import IntegrityError, ResourceError

SCHEMA = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    about: dict[str, Any],
    keep: int = 2,
    needs: int = 0,
) -> Path:
    """Write checkpoint `step` under `root` by calling `write(folder)`, verify it, prune to the
    `keep` newest.

    about: JSON values stored in the manifest (what resume compares).  needs: bytes expected, for
    the message when the disk is full.  Returns the final folder.  Raises ResourceError if it cannot
    be written; the older ones stay.
    """
    final, temporary = root / f"step-{step}", root / f".tmp-{step}-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        manifest = {"schema": SCHEMA, "step": step, "about": about, "files": files}
        _write_text(
            temporary / MANIFEST, json.dumps(manifest | {"sha256": _self_hash(manifest)}, indent=1)
        )
        _sync_folder(temporary)
        if final.exists():  # a damaged one of the same step, or the same step again
            discard(final)
        os.rename(temporary, final)
        _sync_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _no_room(error, final, needs) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    verify(final)
    _prune(root, max(keep, 2), newest_step=step)
    return final


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file was read and agreed with it.  Raises
    IntegrityError, saying which."""
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not _PLAIN.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise IntegrityError(f"{name} is missing ({folder}): resume from another checkpoint")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise IntegrityError(
                f"{name} has {size} bytes instead of {entry['bytes']} ({folder}): it was cut or changed"
            )
        if _sha256(path) != entry["sha256"]:
            raise IntegrityError(
                f"{name} does not match its SHA-256 ({folder}): its contents were damaged or changed"
            )
    return manifest


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that verifies, or None; and for each one refused, a line
    saying why."""
    refused: list[str] = []
    for _, folder in _steps(root):
        try:
            verify(folder)
        except IntegrityError as error:
            refused.append(f"checkpoint {folder.name} is refused: {error}")
        else:
            return folder, refused
    return None, refused


def clean(root: Path) -> list[str]:
    """Remove what a killed save or prune left behind; the names removed. Call only while no other
    run uses `root`."""
    leftovers = sorted(root.glob(".tmp-*")) if root.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in leftovers]


def discard(folder: Path) -> None:
    """Remove a folder so that a kill halfway leaves a temporary name, never half a checkpoint under
    its own name."""
    doomed = folder.with_name(f".tmp-old-{folder.name}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON: a reader, or a kill, sees the old file or the new one,
    nothing between."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        _write_text(temporary, json.dumps(value, indent=2, allow_nan=False) + "\n")
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _no_room(error, path, 0) from error


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` by `write(temporary)` and one rename; an existing one is replaced."""
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            _sync_file(path)
        _sync_folder(temporary)
        if folder.exists():
            discard(folder)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _no_room(error, folder, 0) from error


# -------------------------------------------------------------------------------------------- parts


def _steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint by name, highest step first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _prune(root: Path, keep: int, newest_step: int) -> None:
    """Remove the oldest, keeping `keep` that verify; one known to be damaged does not count and
    goes when older."""
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except OSError:
        raise IntegrityError(
            f"{MANIFEST} is missing ({folder}): the checkpoint was not finished"
        ) from None
    except ValueError:
        raise IntegrityError(f"{MANIFEST} is not JSON ({folder}): it was damaged") from None
    if not isinstance(manifest, dict):
        raise IntegrityError(f"{MANIFEST} is not an object ({folder}): it was damaged")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise IntegrityError(
            f"schema {schema} is newer than {SCHEMA} ({folder}): upgrade spectral-window to resume it"
        )
    stated = manifest.pop("sha256", None)
    if stated != _self_hash(manifest) or schema != SCHEMA:
        raise IntegrityError(f"{MANIFEST} does not match its own hash ({folder}): it was damaged")
    if folder.name != f"step-{manifest['step']}":
        raise IntegrityError(
            f"{MANIFEST} is of step {manifest['step']} ({folder}): the folder was renamed"
        )
    return manifest


def _self_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    _sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(error: Exception, path: Path, needs: int) -> ResourceError:
    folder = next((p for p in (path, *path.parents) if p.is_dir()), Path("."))
    free = shutil.disk_usage(folder).free
    what = (
        f"needs about {needs:,} bytes, {free:,} are free" if needs else f"{free:,} bytes are free"
    )
    reason = getattr(error, "strerror", None) or str(error)
    return ResourceError(
        f"cannot write: {reason} ({path}): {what}; make room or choose another folder"
    )
