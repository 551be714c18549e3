"""Atomic files and folders, hashes of files, and locks between processes.

Every file or folder is written under a temporary name `.tmp-*-PID` beside its destination, forced
to the disk (fsync) and then renamed, which is one atomic operation. After a kill or on a full disk
a reader finds either the old content or the new one. `remove_leftovers` removes the temporary files
of killed processes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from spectral_window.errors import ResourceError, UserError

_SCRATCH = "spectral-window-"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8). Raises ResourceError if it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace `path` by `content`. Raises ResourceError if it cannot be written.

    `sync`: False for what is checked when it is read, and need not survive a loss of power.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the parent may have been replaced by a file
            temporary.unlink(missing_ok=True)
        raise cannot_write(error, path, len(content)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON. Raises ResourceError if it cannot be written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_folder(folder: Path, write: Callable[[Path], None], *, needs: int = 0) -> None:
    """Create `folder` by `write(temporary)` and one rename; an existing folder is replaced.

    The parent folder must exist: one that was removed meanwhile is not created again.

    Args:
        folder: the destination.
        write: fills the temporary folder it is given.
        needs: expected bytes, for the message when the disk is full.

    Raises:
        ResourceError: it cannot be written. The destination is then as it was before.
    """
    temporary = _temporary(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for path in temporary.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        sync_folder(temporary)
        _put_in_place(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # tokenizers has no class of its own for a file that it cannot write
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise cannot_write(error, folder, needs) from error
        raise


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, on its disk, for files that are to be moved; it is removed
    at the end, with what is left in it.

    Raises:
        ResourceError: it cannot be made.
    """
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
    except OSError as error:
        raise cannot_write(error, path) from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; the folder it replaces is deleted last, or restored."""
    replaced = _temporary(folder, "old-")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if replaced.exists():
            os.rename(replaced, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder. A kill halfway leaves a temporary name, never half of the folder."""
    renamed = _temporary(folder, "old-")
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(folder, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete temporary files that killed processes left in `folder`.

    Files of a process that still runs are not touched.

    Args:
        folder: where to look.
        name: only leftovers of the file or folder of this name; None for all.
    """
    pattern = "*" if name is None else glob.escape(name)
    for path in [*folder.glob(f".tmp-{pattern}-*"), *folder.glob(f".tmp-old-{pattern}-*")]:
        if not _is_running(path.name.rpartition("-")[2]):
            _remove(path)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder; folders that killed processes left are removed first."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}[0-9]*-*"):
        if not _is_running(path.name.removeprefix(_SCRATCH).partition("-")[0]):
            _remove(path)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def check_name(path: Path, what: str) -> None:
    """Raise UserError for a path that no library can open: not UTF-8, or too long."""
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
    """Force the contents of the file `path` to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the directory entries of `folder` to the disk."""
    if os.name == "nt":  # Windows cannot open a folder; it journals renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(file: IO[str], path: Path) -> bool:
    """Lock an open file for this process; return False if another process holds the lock.

    The operating system releases the lock when the file is closed or the process ends, however it
    ends. Windows has no such lock; there the answer is always True.

    Args:
        file: the file, open for writing.
        path: its path.
    """
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # The owner may have deleted the file after it was opened here and before it was locked.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path` within the block; wait while another process holds it.

    Windows has no such lock; there nobody waits.
    """
    with path.open("a") as file:
        if os.name != "nt":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cannot_write(error: BaseException, path: Path, needs: int = 0) -> ResourceError:
    """Return the error for `path`, with the bytes it needs (0: unknown) and the free bytes."""
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
        with contextlib.suppress(OSError):  # it may belong to another user
            path.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    """Return whether another process has this id. True if `pid` is not a number."""
    if not pid.isdecimal() or os.name != "posix":  # on Windows os.kill would end the process
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()
