"""Numbers in a file that is known by its sha256: verified when it is opened, read slice by slice.

The file is not mapped into memory. A mapped file that is cut short kills the process (SIGBUS) when
a missing page is touched, without a word; and one that somebody overwrites gives other numbers.
Here the whole file is hashed once, and each later read asks the system whether the file is still
the one that was hashed (its inode, size and times). If not, it is hashed again: a file that was
only touched or moved is read on, any other is an IntegrityError that names it.
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
STRIDE = 512  # of so many sorted numbers one is kept in memory, to find the others


class FileArray:
    """The numbers of the file `path`, as an array that can be sliced; it never grows in memory.

    `sha256` is what the bytes must have (None: whatever they have when opened). `largest` is the
    largest number, -1 if there is none. Pickled, it is the path and what was verified, so that a
    worker process opens the file again. Raises IntegrityError, also while reading, when the file is
    not what it was.
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
        """All numbers as Python's."""
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
        # Asked after reading: what was read is then older than any change that goes unnoticed.
        if self._identity() != self._verified:
            self._verify()
            data = self._read(start * size, (stop - start) * size)
        if len(data) != (stop - start) * size:
            raise broken(self.path, "it was cut short while in use")
        return np.frombuffer(data, self.dtype)

    def _read(self, at: int, size: int) -> bytes:
        """`size` bytes from byte `at`, fewer at the end of the file."""
        parts: list[bytes] = []
        try:
            while size and (part := _pread(self._fd, size, at)):
                parts.append(part)
                at, size = at + len(part), size - len(part)
        except OSError as error:
            raise broken(self.path, error.strerror or str(error)) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _identity(self) -> tuple[int, ...]:
        found = os.fstat(self._fd)
        times = found.st_mtime_ns, found.st_ctime_ns
        return (found.st_dev, found.st_ino, found.st_size, *times)

    def _verify(self) -> None:
        """Read and hash the whole file."""
        identity, content, size = self._identity(), hashlib.sha256(), 0
        self.largest = -1
        while block := self._read(size, CHUNK):
            content.update(block)
            whole = len(block) // self.dtype.itemsize
            self._look(np.frombuffer(block, self.dtype, whole), size // self.dtype.itemsize)
            size += len(block)
        if self.sha256 is not None and content.hexdigest() != self.sha256:
            raise broken(self.path, "its content changed (sha256)")
        if size % self.dtype.itemsize:
            raise broken(self.path, f"{size} bytes are no whole number of {self.dtype}")
        self.sha256, self._verified = content.hexdigest(), identity
        self._count = size // self.dtype.itemsize

    def _look(self, numbers: np.ndarray, place: int) -> None:
        """Called for all numbers of the file in order; the first of these is at index `place`."""
        self.largest = max(self.largest, int(numbers.max(initial=0)))


class SortedFileArray(FileArray):
    """A FileArray whose numbers rise: `rising` says whether they do, and they can be searched."""

    def _verify(self) -> None:
        self.rising, self._marks = True, np.empty(0, self.dtype)
        super()._verify()

    def _look(self, numbers: np.ndarray, place: int) -> None:
        self.rising &= bool((np.diff(numbers, prepend=self.largest) > 0).all())
        self._marks = np.concatenate([self._marks, numbers[-place % STRIDE :: STRIDE]])
        super()._look(numbers, place)

    def searchsorted(self, values: Any) -> np.ndarray:
        """How many numbers are below each of `values`: as the array method of this name."""
        return np.array([self._below(value) for value in values], dtype=np.int64)

    def _below(self, value: int) -> int:
        start = max(0, int(self._marks.searchsorted(value)) - 1) * STRIDE
        return start + int(self[start : start + STRIDE].searchsorted(value))


def broken(path: str | Path, what: str) -> IntegrityError:
    """The error for a file of prepared text that is not what was written."""
    return IntegrityError(f"{what} ({path}): remove the folder and prepare the text again")


def _pread(fd: int, size: int, at: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, at)
    os.lseek(fd, at, os.SEEK_SET)  # Windows, where no other thread or process shares the place
    return os.read(fd, size)
