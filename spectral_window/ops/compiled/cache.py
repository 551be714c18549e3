"""Compiled code on disk: beside the source file, or in numba's cache folder (NUMBA_CACHE_DIR).

Compiling a kernel takes seconds, so numba stores the result. Three things differ from what it does
by itself. A file is run only if it is the one that was written: it begins with a digest, and what
is damaged is compiled anew and overwritten. It belongs to the text of every file that the kernel's
own imports, not of that one alone: what a kernel calls lies in several. And
no state of the folder is an error, be it full, read-only, damaged or missing: the kernel is then
compiled for this process.

The logger "spectral_window" reports once, at level INFO, that code is being compiled, and once, at
level WARNING, that it cannot be stored.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.serialize import dumps

_log = logging.getLogger("spectral_window")
_DIGEST = hashlib.sha256().digest_size
_IMPORT = re.compile(rb"^from spectral_window\.ops\.compiled\.(\w+) import", re.M)
_logged: set[int] = set()


class Compiled(NamedTuple):
    """A function compiled by numba, and what became of it on disk."""

    code: Any  # numba's C function
    seconds: float  # to load or to compile it
    was_stored: bool  # it was loaded, nothing was compiled
    file: Path | None  # where it is stored now; None: nowhere


def compile_function(function: Callable[[Any], None], signature: Any) -> Compiled:
    """Load the compiled `function` from the cache, or compile it into the cache."""
    begin = time.perf_counter()
    code: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
    files = None
    try:
        code._cache = _Cache(function)
        files = code._cache._cache_file
    except (OSError, RuntimeError) as error:  # "no locator available": no folder can be written
        _warn_not_stored(error)
        _log_compiling("nowhere")
    code.compile()
    seconds = time.perf_counter() - begin
    return Compiled(code, seconds, bool(code.cache_hits), files.held if files else None)


class _Cache(FunctionCache):
    """numba's cache of one function, for which no state of the folder is an error."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        super().__init__(function)
        source = Path(function.__code__.co_filename)
        name = self._impl.filename_base
        self._cache_file = _Store(Path(self._cache_path), name, _fingerprint(source))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        overload = None
        try:
            overload = super().load_overload(sig, target_context)
        except Exception as error:  # whatever unpickling or linking may raise
            _log.debug("%s cannot be loaded: %s", self._name, error)
        if overload is None:
            _log_compiling(self._cache_path)
        return overload

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn_not_stored(error)


class _Store:
    """Files of one function, one for every kind of CPU: a fingerprint of the sources, a digest of
    what follows, and the compiled code."""

    def __init__(self, folder: Path, name: str, fingerprint: bytes) -> None:
        self.folder, self.name, self.fingerprint = folder, name, fingerprint
        self.held: Path | None = None  # the file that was found or written

    def _path(self, key: Any) -> Path:
        return (
            self.folder / f"{self.name}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"
        )

    def _header(self, key: Any, data: bytes) -> bytes:
        return self.fingerprint + hashlib.sha256(repr(key).encode() + data).digest()

    def load(self, key: Any) -> Any:
        """What was saved under `key`; None where there is nothing, or it is damaged."""
        path = self._path(key)
        try:
            text = path.read_bytes()
        except OSError:
            return None
        header, data = text[: 2 * _DIGEST], text[2 * _DIGEST :]
        if header != self._header(key, data):
            return None
        self.held = path
        return pickle.loads(data)

    def save(self, key: Any, data: Any) -> None:
        path, text = self._path(key), dumps(data)
        draft = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex[:16]}")
        try:
            draft.write_bytes(self._header(key, text) + text)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        self.held = path


@cache
def _fingerprint(source: Path) -> bytes:
    """Of numba, of `source`, and of the files of this folder that it imports, directly or not."""
    texts: dict[Path, bytes] = {}
    missing = {source}
    while missing:
        path = missing.pop()
        texts[path] = path.read_bytes()
        names = _IMPORT.findall(texts[path])
        missing |= {Path(__file__).with_name(f"{name.decode()}.py") for name in names} - set(texts)
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(texts):
        digest.update(hashlib.sha256(texts[path]).digest())
    return digest.digest()


def _once(level: int) -> bool:
    first = level not in _logged
    _logged.add(level)
    return first


def _log_compiling(folder: str) -> None:
    if _once(logging.INFO):
        _log.info(
            "compiling loops for this CPU, up to a minute in all; stored for the next start in %s",
            folder,
        )


def _warn_not_stored(error: Exception) -> None:
    if _once(logging.WARNING):
        _log.warning(
            "compiled code cannot be stored (%s): every start compiles again for up to a minute; "
            "set NUMBA_CACHE_DIR to a folder with room that can be written",
            error,
        )
