"""Arrays in files with a known SHA-256: verified when opened, read slice by slice.

The file is not mapped into memory. A mapped file that is cut short ends the process with SIGBUS
when a missing page is read, without a message, and one that is overwritten gives other numbers.
Here the whole file is hashed once, and each later read asks the operating system whether the file
has changed (inode, size and times). If it has, it is hashed again: a file that was only touched or
moved can still be read, any other raises an IntegrityError that names it.
"""

from __future__ import annotations

import hashlib
import operator
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from spectral_window.errors import IntegrityError

CHUNK = 1 << 20  # bytes hashed at a time
STRIDE = 512  # of this many sorted numbers one is kept in memory, as an index for searches


class FileArray:
    """A file of numbers that can be sliced like an array, in constant memory.

    The attribute `largest` is the largest number, -1 if there is none. A pickle contains the path
    and what was verified, so a worker process opens the file again.

    Args:
        path: the file.
        dtype: of its numbers.
        sha256: of its bytes; None for the one it has when opened.

    Raises:
        IntegrityError: the file cannot be read or has changed; also raised while reading.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str, sha256: str | None = None):
        self.path, self.dtype, self.sha256 = os.fspath(path), np.dtype(dtype), sha256
        self._open()
        self._verify()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            start, stop, step = item.indices(self._count)
            if step != 1:
                return np.asarray(self)[item]
            return self._numbers(start, max(start, stop))
        index = operator.index(item)
        index += self._count if index < 0 else 0
        if not 0 <= index < self._count:
            raise IndexError(f"index {item} of {self._count} numbers")
        return self._numbers(index, index + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def tolist(self) -> list[int]:
        """Return all numbers as Python integers."""
        return self[:].tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_fd", "_close")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()  # the first read compares the file with what was verified

    def _open(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise broken(self.path, error.strerror or str(error)) from None
        self._close = weakref.finalize(self, os.close, self._fd)

    def _numbers(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        data = self._read(start * size, (stop - start) * size)
        # Checked after reading, so that a change before or during the read is noticed.
        if self._identity() != self._verified:
            self._verify()
            data = self._read(start * size, (stop - start) * size)
        if len(data) != (stop - start) * size:
            raise broken(self.path, "it was cut short while in use")
        return np.frombuffer(data, self.dtype)

    def _read(self, at: int, size: int) -> bytes:
        """Return `size` bytes from byte `at`, fewer at the end of the file."""
        parts: list[bytes] = []
        try:
            while size and (part := _pread(self._fd, size, at)):
                parts.append(part)
                at, size = at + len(part), size - len(part)
        except OSError as error:
            raise broken(self.path, error.strerror or str(error)) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _identity(self) -> tuple[int, ...]:
        stat = os.fstat(self._fd)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def _verify(self) -> None:
        """Read and hash the whole file."""
        identity, content, size = self._identity(), hashlib.sha256(), 0
        self.largest = -1
        while block := self._read(size, CHUNK):
            content.update(block)
            whole = len(block) // self.dtype.itemsize
            self._scan(np.frombuffer(block, self.dtype, whole), size // self.dtype.itemsize)
            size += len(block)
        if self.sha256 is not None and content.hexdigest() != self.sha256:
            raise broken(self.path, "its content changed (sha256)")
        if size % self.dtype.itemsize:
            raise broken(self.path, f"{size} bytes are no whole number of {self.dtype}")
        self.sha256, self._verified = content.hexdigest(), identity
        self._count = size // self.dtype.itemsize

    def _scan(self, numbers: np.ndarray, place: int) -> None:
        """Process the next numbers of the file; the first of them is at index `place`."""
        self.largest = max(self.largest, int(numbers.max(initial=0)))


class SortedFileArray(FileArray):
    """A FileArray of ascending numbers, which can be searched; `rising` is whether they ascend."""

    def _verify(self) -> None:
        self.rising, self._marks = True, np.empty(0, self.dtype)
        super()._verify()

    def _scan(self, numbers: np.ndarray, place: int) -> None:
        self.rising &= bool((np.diff(numbers, prepend=self.largest) > 0).all())
        self._marks = np.concatenate([self._marks, numbers[-place % STRIDE :: STRIDE]])
        super()._scan(numbers, place)

    def searchsorted(self, values: Any) -> np.ndarray:
        """Return how many numbers are below each of `values`, like the method of NumPy arrays."""
        return np.array([self._below(value) for value in values], dtype=np.int64)

    def _below(self, value: int) -> int:
        start = max(0, int(self._marks.searchsorted(value)) - 1) * STRIDE
        return start + int(self[start : start + STRIDE].searchsorted(value))


def broken(path: str | Path, what: str) -> IntegrityError:
    """Return the error for a damaged file of prepared text."""
    return IntegrityError(f"{what} ({path}): remove the folder and prepare the text again")


def _pread(fd: int, size: int, at: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, at)
    os.lseek(fd, at, os.SEEK_SET)  # Windows; no other thread or process uses this descriptor
    return os.read(fd, size)
