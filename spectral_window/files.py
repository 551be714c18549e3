"""Writing all or nothing: a reader, a kill or a full disk sees the old file or the new one.

Everything is written under a temporary name `.tmp-*-PID` beside its place, forced to the disk
(fsync) and renamed, which is one atomic operation. What a killed process leaves under such a name,
`remove_leftovers` removes at the next start.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spectral_window.errors import ResourceError, UserError

_SCRATCH = "spectral-window-"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8). Raises ResourceError if it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. Raises ResourceError if it cannot be written."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # where its folder became a file, say
            temporary.unlink(missing_ok=True)
        raise cannot_write(error, path, len(content)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON. Raises ResourceError if it cannot be written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_folder(folder: Path, write: Callable[[Path], None], *, needs: int = 0) -> None:
    """Make `folder` by `write(temporary)` and one rename; an existing one is replaced.

    needs: bytes expected, for the message when the disk is full. Raises ResourceError if it cannot
    be written; then nothing of it stays. The folder above must exist: one that was removed is not
    made again.
    """
    temporary = _temporary(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for path in temporary.iterdir():
            sync_file(path)
        sync_folder(temporary)
        if folder.exists():
            discard(folder)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # tokenizers has no class of its own for a file that it cannot write
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise cannot_write(error, folder, needs) from error
        raise


def discard(folder: Path) -> None:
    """Remove a folder so that a kill halfway leaves a temporary name, never half the folder."""
    doomed = _temporary(folder, "old-")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in `folder`: of the file `name` alone, or of all.

    What belongs to another process that still runs stays.
    """
    pattern = "*" if name is None else glob.escape(name)
    for path in [*folder.glob(f".tmp-{pattern}-*"), *folder.glob(f".tmp-old-{pattern}-*")]:
        if not _is_running(path.name.rpartition("-")[2]):
            _remove(path)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for the block; those of killed processes are removed first."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}[0-9]*-*"):
        if not _is_running(path.name.removeprefix(_SCRATCH).partition("-")[0]):
            _remove(path)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def check_name(path: Path, what: str) -> None:
    """UserError for a path that some library below us cannot open: not UTF-8, or too long."""
    try:
        os.fspath(path).encode("utf-8")
        path.exists()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 ({path}): choose another name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{what} is not usable, {reason} ({str(path)[:80]}): choose another"
        ) from None


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


def cannot_write(error: BaseException, path: Path, needs: int = 0) -> ResourceError:
    """The error for `path`, with the bytes it needs (0: unknown) and the bytes that are free."""
    disk = next((p for p in (path, *path.parents) if p.is_dir()), Path())
    space = f"{shutil.disk_usage(disk).free:,} bytes are free"
    if needs:
        space = f"it needs about {needs:,} bytes, {space}"
    reason = getattr(error, "strerror", None) or str(error)
    return ResourceError(
        f"cannot write: {reason} ({path}): {space}; make room or choose another folder"
    )


def _temporary(path: Path, kind: str = "") -> Path:
    return path.with_name(f".tmp-{kind}{path.name}-{os.getpid()}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # of another user
            path.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    """Whether a process of another number than ours has this one; what is no number might."""
    if not pid.isdecimal() or os.name != "posix":  # elsewhere asking would end the process
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()
