"""Prepared text on an object store: published once, then read piece by piece through a cache.

    publish("corpus/", "s3://bucket/corpus")             from where the text was prepared
    open_corpus("s3://bucket/corpus", cache=PieceCache(folder, limit))

Any URL that fsspec opens will do (s3://, gs://, https://, memory://). Beside the files of the
folder (shards.py) stand

    pieces.json     the bytes of a piece, sizes and SHA-256 of the files; written last
    NAME.pieces     of each file of tokens or documents: the first number and the SHA-256 of every
                    piece

A read fetches the pieces that it needs. They are kept in a folder of at most `limit` bytes, under
the SHA-256 of their content, which is checked whenever one is read; the least recently used are
removed. So a corpus that is larger than the disk trains, in the same order as from the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spectral_window.data import shards
from spectral_window.data.arrays import SortedFileArray
from spectral_window.data.blocks import ConversationBlocks, PackedBlocks, TokenStream
from spectral_window.errors import (
    IntegrityError,
    NetworkError,
    SpectralWindowError,
    UserError,
)
from spectral_window.files import (
    cannot_write,
    hash_file,
    locked,
    remove_leftovers,
    write_bytes,
    write_folder,
)

PIECES, SUFFIX = "pieces.json", ".pieces"
FORMAT, SCHEMA = "spectral-window pieces", 1
PIECE = 1 << 18  # bytes: some ten milliseconds of a store's time, as long as it needs to answer
SMALLEST_PIECE = 1 << 12
TABLE = np.dtype([("first", "<i8"), ("sha256", "S64")])
LIMIT = 10_000_000_000  # bytes of a cache
HELD = 4  # pieces that a process holds in memory
AHEAD, THREADS = 64, 16  # blocks that are fetched before they are read, and by how many threads
ATTEMPTS, FIRST_WAIT = 6, 0.25  # of a read; each wait is about twice the one before
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
PACKAGES = {"s3": "spectral-window[s3]", "s3a": "spectral-window[s3]", "gs": "spectral-window[gs]"}

_T = TypeVar("_T")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Return whether this is a URL and not a path."""
    return URL.match(os.fspath(place)) is not None


class Store:
    """A folder at a URL.

    Args:
        url: of the folder.

    Raises:
        UserError: an unknown scheme, or one whose library is missing.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_opened": None}

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the path in it; connections are of one process."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            scheme = self.url.partition("://")[0]
            try:
                files, path = fsspec.core.url_to_fs(self.url)
            except ImportError:
                package = PACKAGES.get(scheme, f"what fsspec needs for {scheme}://")
                raise UserError(
                    f"the library for {scheme}:// is missing ({self.url}): pip install '{package}'"
                ) from None
            except ValueError as error:
                known = "s3://, gs://, https:// or a folder"
                raise UserError(f"not a usable URL ({self.url}), {error}: use {known}") from None
            self._opened = os.getpid(), files, path
        return self._opened[1:]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of a file, or a range of them.

        Raises:
            UserError: no such file, or no permission.
            NetworkError: the store did not answer, or not with what was asked for.
        """

        def attempt() -> bytes | None:
            files, path = self._open()
            if stop is None:
                return files.cat_file(f"{path}/{name}")
            content = files.cat_file(f"{path}/{name}", start=start, end=stop)
            return content if len(content) == stop - start else None

        return self._persist(attempt, name)

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file; raises what `read` does."""

        def attempt() -> bool:
            files, path = self._open()
            folder = f"{path}/{name}".rpartition("/")[0]
            with contextlib.suppress(Exception):  # most stores have no folders
                files.makedirs(folder, exist_ok=True)
            if isinstance(content, Path):
                files.put_file(str(content), f"{path}/{name}")
            else:
                files.pipe_file(f"{path}/{name}", content)
            return True

        self._persist(attempt, name)

    def _persist(self, attempt: Callable[[], _T | None], name: str) -> _T:
        """Return what `attempt` does; None is an answer that lacks a part."""
        where, wait, reason = f"{self.url}/{name}", FIRST_WAIT, ""
        for number in range(ATTEMPTS):
            if number:
                time.sleep(wait * random.uniform(0.5, 1.5))  # so that many readers do not meet
                wait *= 2
            try:
                result = attempt()
            except SpectralWindowError:
                raise
            except FileNotFoundError:
                raise UserError(f"no such file ({where}): publish the prepared text") from None
            except PermissionError as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"not allowed ({where}): {reason}; check the keys") from None
            except Exception as error:  # each store has classes of its own for a broken connection
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                continue
            if result is not None:
                return result
            reason = "part of the answer is missing"
        raise NetworkError(f"the store did not answer {ATTEMPTS} times ({where}): {reason}")


class PieceCache:
    """A folder with the pieces that were used last, at most `limit` bytes of them.

    Several processes can share it. A piece has the name of its SHA-256, so it can be of any corpus.

    Args:
        folder: where; None for spectral-window/tokens in the user's folder for caches.
        limit: bytes.

    Raises:
        UserError: a bad limit.
        ResourceError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = LIMIT):
        if limit < 1:
            raise UserError(f"a cache of {limit} bytes: give at least those of a piece")
        if folder is None:
            caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            folder = Path(caches) / "spectral-window" / "tokens"
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(error, self.folder) from None
        self._reset()

    def _reset(self) -> None:
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def get(self, sha256: str, fetch: Callable[[], bytes], where: str) -> bytes:
        """Return the piece with this SHA-256, from the cache or by `fetch`.

        Raises:
            IntegrityError: what was fetched is another piece; `where` is named.
            ResourceError: the piece cannot be written.
        """
        with self._lock:
            content = self._held.get(sha256)
        if content is None:
            content = self._stored(sha256)
        if content is None:  # threads fetch side by side; two may fetch the same
            content = fetch()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise IntegrityError(
                    f"its content changed (sha256) ({where}): publish the text again"
                )
            with self._lock:
                self._store(sha256, content)
        with self._lock:
            self._held[sha256] = content
            self._held.move_to_end(sha256)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        return content

    def _stored(self, sha256: str) -> bytes | None:
        """Return the piece if it is here; a damaged one is removed."""
        path = self.folder / sha256
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                os.utime(path)  # it was used just now
                return content
            with locked(self.folder / ".lock"):
                path.unlink()
        except OSError:
            pass
        return None

    def _store(self, sha256: str, content: bytes) -> None:
        try:
            with locked(self.folder / ".lock"):
                self._make_room(len(content))
                write_bytes(self.folder / sha256, content, sync=False)
        except OSError as error:
            raise cannot_write(error, self.folder, len(content)) from None

    def _make_room(self, size: int) -> None:
        """Remove the least recently used pieces until `size` bytes are free.

        How many bytes are used stands in `.used`, so that the folder is listed only when it is
        full; what is written by a process that is killed stands there before the piece does.
        """
        used = self.folder / ".used"
        try:
            held = int(used.read_text())
        except (OSError, ValueError):
            held = self.limit  # count
        if held + size > self.limit:
            remove_leftovers(self.folder)
            pieces = []
            for entry in os.scandir(self.folder):
                if not entry.name.startswith(".") and entry.is_file():
                    info = entry.stat()
                    pieces.append((info.st_mtime_ns, entry.name, info.st_size))
            held = sum(piece[2] for piece in pieces)
            room = self.limit - size
            if held > room:
                room -= self.limit // 10  # so that the next pieces need no list
            for _, name, bytes_ in sorted(pieces):
                if held <= max(0, room):
                    break
                (self.folder / name).unlink(missing_ok=True)
                held -= bytes_
        used.write_text(str(held + size))


class RemoteArray(SortedFileArray):
    """A file of numbers in a store that reads like a FileArray; the pieces are in a cache.

    Args:
        store: where it is.
        name: of the file.
        dtype: of its numbers.
        entry: what pieces.json says of the file.
        piece: bytes of a piece.
        cache: keeps the pieces.

    Raises:
        IntegrityError: the table of pieces is not that of pieces.json.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        dtype: str,
        entry: dict[str, Any],
        piece: int,
        cache: PieceCache,
    ):
        self.path, self.dtype, self.sha256 = f"{store.url}/{name}", np.dtype(dtype), entry["sha256"]
        self.largest, self.rising = entry["largest"], entry["rising"]
        self._store, self._name, self._cache = store, name, cache
        self._size, self._piece = entry["size"], piece
        self._count = self._size // self.dtype.itemsize
        table = store.read(name + SUFFIX)
        count = -(-self._size // piece)
        wrong = hashlib.sha256(table).hexdigest() != entry["table"]
        if wrong or len(table) != count * TABLE.itemsize:
            raise shards.broken(self.path + SUFFIX, f"not the table of {PIECES}")
        self._table = np.frombuffer(table, TABLE)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _numbers(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        start, stop = start * size, stop * size
        parts = []
        for number in range(start // self._piece, -(-stop // self._piece)):
            at = number * self._piece
            parts.append(self._content(number)[max(0, start - at) : stop - at])
        return np.frombuffer(b"".join(parts), self.dtype)

    def _content(self, number: int) -> bytes:
        start = number * self._piece
        stop = min(start + self._piece, self._size)
        return self._cache.get(
            self._table["sha256"][number].decode(),
            lambda: self._store.read(self._name, start, stop),
            f"{self.path}, bytes {start:,} to {stop:,}",
        )

    def _below(self, value: int) -> int:
        piece = int(self._table["first"].searchsorted(value)) - 1
        if piece < 0:
            return 0
        numbers = np.frombuffer(self._content(piece), self.dtype)
        return piece * (self._piece // self.dtype.itemsize) + int(numbers.searchsorted(value))


def read_ahead(order: Iterable[int], blocks: PackedBlocks | ConversationBlocks) -> Iterable[int]:
    """Return the same order, of which the blocks that come next are fetched by threads.

    Args:
        order: indices of blocks.
        blocks: the blocks; if they are on the disk, the order itself is returned.
    """
    tokens = blocks.stream.tokens
    return _Ahead(order, blocks, tokens) if isinstance(tokens, RemoteArray) else order


class _Ahead:
    def __init__(
        self, order: Iterable[int], blocks: PackedBlocks | ConversationBlocks, tokens: RemoteArray
    ):
        self.order, self.blocks = order, blocks
        # what is fetched must still be there when it is read
        self.ahead = min(AHEAD, tokens._cache.limit // tokens._piece // 8)

    def __iter__(self) -> Iterator[int]:
        pool, coming = ThreadPoolExecutor(THREADS), deque[int]()
        try:
            for index in self.order:
                if self.ahead:
                    pool.submit(self.blocks.__getitem__, index)  # an error is met when it is read
                coming.append(index)
                if len(coming) > self.ahead:
                    yield coming.popleft()
            yield from coming
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def publish(folder: str | os.PathLike[str], url: str, *, piece: int = PIECE) -> None:
    """Copy a prepared folder to an object store, with the table of its pieces.

    Args:
        folder: the folder, which is verified.
        url: the destination; files of an earlier copy are replaced.
        piece: bytes that are fetched at a time. A multiple of 4096.

    Raises:
        UserError: no prepared text, a bad size, or a store that does not allow it.
        IntegrityError: a file of the folder has changed.
        NetworkError: the store did not answer.
    """
    if piece < SMALLEST_PIECE or piece % SMALLEST_PIECE:
        raise UserError(f"a piece of {piece} bytes: give a multiple of {SMALLEST_PIECE}")
    folder, store = Path(folder), Store(url)
    index, train, valid, _ = shards.open_folder(folder)
    files: dict[str, Any] = {}
    for split, stream in zip(shards.SPLITS, (train, valid), strict=True):
        for kind, array in (("tokens", stream.tokens), ("documents", stream.documents)):
            assert not isinstance(array, np.ndarray)
            name = f"{split}.{kind}"
            table = _table(folder / name, array.dtype, piece)
            files[name] = {
                "size": (folder / name).stat().st_size,
                "sha256": array.sha256,
                "largest": array.largest,
                "rising": getattr(array, "rising", False),
                "table": hashlib.sha256(table).hexdigest(),
            }
            store.write(name, folder / name)
            store.write(name + SUFFIX, table)
    for path in sorted((folder / "tokenizer").iterdir()):
        store.write(f"tokenizer/{path.name}", path)
    store.write(shards.INDEX, folder / shards.INDEX)
    head = {"format": FORMAT, "schema": SCHEMA, "fingerprint": index["fingerprint"]}
    text = shards.signed_text({**head, "piece": piece, "files": files})
    store.write(PIECES, text.encode())


def _table(path: Path, dtype: np.dtype, piece: int) -> bytes:
    rows = []
    with path.open("rb") as file:
        while content := file.read(piece):
            first = int(np.frombuffer(content, dtype, 1)[0])
            rows.append((first, hashlib.sha256(content).hexdigest()))
    return np.array(rows, TABLE).tobytes()


def open_published(
    url: str, cache: PieceCache
) -> tuple[Path, dict[str, Any], TokenStream, TokenStream]:
    """Open what `publish` wrote.

    Returns:
        A local folder with the index and the tokenizer, the index, and both streams.

    Raises:
        UserError: nothing is there, or the cache is smaller than a piece.
        IntegrityError: the files do not fit together.
        NetworkError: the store did not answer.
    """
    store = Store(url)
    content = store.read(PIECES)
    try:
        record = json.loads(content)
        del record["sha256"]
        good = shards.signed_text(record).encode() == content
        good &= (record["format"], record["schema"]) == (FORMAT, SCHEMA)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise shards.broken(f"{store.url}/{PIECES}", "not a table of pieces, or it was changed")
    piece = record["piece"]
    if cache.limit < piece:
        raise UserError(
            f"a cache of {cache.limit:,} bytes for pieces of {piece:,} ({store.url}): give more"
        )
    text = store.read(shards.INDEX)
    index = shards.parse_index(text, f"{store.url}/{shards.INDEX}")
    index.pop("signed")
    files = record["files"]

    def array(name: str, dtype: str) -> RemoteArray:
        return RemoteArray(store, name, dtype, files[name], piece, cache)

    try:
        train, valid = shards.streams_of(index, store.url, array)
        folder = _mirror(store, index, text, cache)
        sums = {name: entry["sha256"] for name, entry in files.items()}
        tokenizer = "tokenizer/tokenizer.json"
        sums[tokenizer] = hash_file(folder / tokenizer)
        shards.check_fingerprint(index, sums, store.url)
    except (KeyError, TypeError, AttributeError) as error:
        where = f"{store.url}/{shards.INDEX}"
        raise shards.broken(where, f"not an index of tokens, {error!r}") from None
    return folder, index, train, valid


def _mirror(store: Store, index: dict[str, Any], text: bytes, cache: PieceCache) -> Path:
    """Return a local folder with the index and the tokenizer."""
    names = [name for name in index["files"] if shards.TOKENIZER_FILE.fullmatch(name)]
    files = {name: index["files"][name].get("sha256") for name in names}
    folder = cache.folder / f".corpus-{index['fingerprint'][:16]}"

    def write(building: Path) -> None:
        (building / "tokenizer").mkdir()
        for name in names:
            (building / name).write_bytes(store.read(name))
        (building / shards.INDEX).write_bytes(text)

    with locked(cache.folder / ".lock"):
        try:
            shards.verify(folder, files, names)
        except (OSError, IntegrityError):
            write_folder(folder, write)
    shards.verify(folder, files, names)
    return folder
