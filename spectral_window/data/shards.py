"""The folder of tokens: written atomically, and verified when it is read.

corpus.json        the request, the results, and the SHA-256 of every file and of itself
train.tokens       the tokens as raw little-endian uint16 (uint32 for a large vocabulary)
train.documents    the start of each document, as raw little-endian int64
valid.tokens       the same for the held-out text
valid.documents
tokenizer/         as `save_pretrained` writes it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spectral_window.data.arrays import FileArray, SortedFileArray, broken
from spectral_window.data.blocks import TokenStream
from spectral_window.data.formats import ReadReport
from spectral_window.data.holdout import Part
from spectral_window.data.tokenizers import HFTokenizer, plain_text, vocabulary_size
from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import (
    cannot_write,
    hash_file,
    remove_leftovers,
    try_lock,
    write_folder,
)

FORMAT, SCHEMA = "spectral-window tokens", 1
INDEX = "corpus.json"
SPLITS = ("train", "valid")
CONTENT = [f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "documents")]
CONTENT.append("tokenizer/tokenizer.json")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
COUNTS = ("documents", "bytes", "tokens")
FIRST_KEYS = {
    *("format", "schema", "fingerprint", "dtype", "vocab_size", "separator", "splits", "files"),
    *("characters_replaced", "records_skipped", "request"),
}
TOKENIZER_FILE = re.compile(r"tokenizer/[A-Za-z0-9_-][A-Za-z0-9._-]*")
LARGEST_INDEX = 1 << 26  # bytes
BATCH = 1 << 20  # characters tokenized at a time
EACH = 256  # characters that a text counts for besides its own: its encoding takes kilobytes


SECTION = "section.json"
CHUNK = 1 << 20  # bytes copied at a time
WAIT = 0.5  # seconds between two looks whether another process is done


class Coded(NamedTuple):
    """A document, or a piece of one: its tokens, with the separator if it is the first, and the
    bytes of text that they stand for."""

    split: str
    spec: str
    first: bool
    ids: list[int]
    size: int


class Written(NamedTuple):
    """The tokens of a section of the text, in a folder of its own.

    Attributes:
        folder: with the same files of tokens as the whole.
        sources: of each split, the counts of each source.
        files: the size and SHA-256 of each file.
        report: of the reading.
    """

    folder: Path
    sources: dict[str, dict[str, dict[str, int]]]
    files: dict[str, dict[str, Any]]
    report: ReadReport


# ---------------------------------------------------------------------------- writing


def write_corpus(
    folder: Path,
    codes: Iterable[Coded | Written],
    tokenizer: HFTokenizer,
    request: dict[str, Any],
    report: ReadReport,
    roles: Sequence[int] | None = None,
) -> None:
    """Write `codes` to `folder`; an existing folder is replaced once all is written.

    Args:
        folder: the destination.
        codes: what to write, in order: tokens, or sections that are written already.
        tokenizer: which made them.
        request: what was asked for.
        report: what was replaced or left out.
        roles: of conversations, see `TokenStream`.

    Raises:
        UserError: a split is empty.
        ResourceError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, folder) from None
    remove_leftovers(folder.parent, folder.name)
    write_folder(
        folder, lambda building: _write(building, codes, tokenizer, request, report, roles)
    )


def _write(
    folder: Path,
    codes: Iterable[Coded | Written],
    tokenizer: HFTokenizer,
    request: dict[str, Any],
    report: ReadReport,
    roles: Sequence[int] | None,
) -> None:
    vocab_size = vocabulary_size(tokenizer)
    dtype = dtype_of(vocab_size)
    entries = _save_tokenizer(tokenizer, folder)
    writers, written = _write_streams(folder, codes, dtype)
    entries |= written
    for name, hint in (
        ("train", "add text, or lower valid_fraction"),
        ("valid", "add text, raise valid_fraction, or name valid_sources"),
    ):
        if not writers[name].documents:
            raise UserError(f"no text for the {name} split: {hint}")
    index = {
        "format": FORMAT,
        "schema": SCHEMA,
        "fingerprint": digest([dtype, [entries[name]["sha256"] for name in CONTENT]]),
        "dtype": dtype,
        "vocab_size": vocab_size,
        "separator": tokenizer.eos_token_id,
        "splits": {name: writer.counts() for name, writer in writers.items()},
        "characters_replaced": report.replaced,
        "records_skipped": report.skipped,
        "documents_shared": report.shared,
        "sources": _source_rows(writers, request),
        "notes": report.lines(),
        "request": request,
        "files": entries,
        **({} if roles is None else {"roles": list(roles)}),
    }
    (folder / INDEX).write_text(signed_text(index), encoding="utf-8", newline="")


def dtype_of(vocab_size: int) -> str:
    """Return the type of the tokens of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _write_streams(
    folder: Path, codes: Iterable[Coded | Written], dtype: str
) -> tuple[dict[str, _StreamWriter], dict[str, dict[str, Any]]]:
    """Write the streams of both splits; return what wrote them, and their entries."""
    writers = {name: _StreamWriter(folder, name, dtype) for name in SPLITS}
    entries: dict[str, dict[str, Any]] = {}
    try:
        for code in codes:
            if isinstance(code, Written):
                for writer in writers.values():
                    writer.append(code)
            else:
                writers[code.split].add(code)
        for writer in writers.values():
            entries |= writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    return writers, entries


def write_section(folder: Path, codes: Iterable[Coded], dtype: str, report: ReadReport) -> Written:
    """Write the tokens of a section to a folder of its own, atomically.

    Raises:
        ResourceError: it cannot be written.
    """

    def write(building: Path) -> None:
        writers, files = _write_streams(building, codes, dtype)
        sources = {name: writer.sources for name, writer in writers.items()}
        record = {"sources": sources, "files": files, "report": asdict(report)}
        (building / SECTION).write_text(signed_text(record), encoding="utf-8", newline="")

    write_folder(folder, write)
    written = open_section(folder)
    assert written is not None
    return written


def open_section(folder: Path) -> Written | None:
    """Return the section in a folder; None if there is none, or if a byte of it has changed."""
    try:
        text = (folder / SECTION).read_text(encoding="utf-8")
        record = json.loads(text)
        del record["sha256"]
        if text != signed_text(record):
            return None
        for name, entry in record["files"].items():
            if hash_file(folder / name) != entry["sha256"]:
                return None
        report = ReadReport(**record["report"])
        return Written(folder, record["sources"], record["files"], report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def unfinished(folder: Path) -> Path:
    """Return the place for the sections of a `folder` that is not finished."""
    return folder.with_name(f".{folder.name}.sections")


@contextlib.contextmanager
def sections_folder(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield where the sections of an unfinished `folder` are, and whether another process had it.

    One process at a time has the place; others wait. It is removed when the work is done, and kept
    if that ends with an error.

    Raises:
        ResourceError: the place cannot be written.
    """
    place = unfinished(folder)
    waited = False
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            file = open(place / "lock", "w")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # its owner removed it just now
            continue
        except OSError as error:
            raise cannot_write(error, place) from None
        with file:
            if try_lock(file, place / "lock"):
                remove_leftovers(place)
                yield place, waited
                break
        waited = True
        time.sleep(WAIT)
    shutil.rmtree(place, ignore_errors=True)


def _source_rows(
    writers: dict[str, _StreamWriter], request: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the counts of each source in each split it belongs to."""
    specs = {"train": request["sources"], "valid": request["valid_sources"]}
    rows = []
    for split, writer in writers.items():
        for spec in dict.fromkeys([*specs[split], *writer.sources]):
            counts = writer.sources.get(spec, dict.fromkeys(COUNTS, 0))
            rows.append({"split": split, "source": spec, **counts})
    return rows


def code_texts(parts: Iterable[Part], tokenizer: HFTokenizer) -> Iterator[Coded]:
    """Yield the tokens of pieces of text; a document starts with the separator."""
    backend, separator = plain_text(tokenizer), tokenizer.eos_token_id
    for batch in batches(parts):
        texts = [part.text for part in batch]
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        for part, encoding in zip(batch, encodings, strict=True):
            ids = [separator, *encoding.ids] if part.first else encoding.ids
            yield Coded(part.split, part.spec, part.first, ids, len(part.text.encode()))


def batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Yield the parts in groups of about `BATCH` characters, fewer where they are short."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text) + EACH
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _save_tokenizer(tokenizer: HFTokenizer, folder: Path) -> dict[str, dict[str, Any]]:
    """Save the tokenizer; return name -> size and SHA-256 of its files."""
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        f"tokenizer/{path.name}": {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted((folder / "tokenizer").iterdir())
    }


class _StreamWriter:
    """Writes and hashes the tokens and the document starts of one split."""

    def __init__(self, folder: Path, split: str, dtype: str):
        self.dtype = DTYPES[dtype]
        self.names = (f"{split}.tokens", f"{split}.documents")
        self.files = [open(folder / name, "wb") for name in self.names]  # noqa: SIM115 (see close)
        self.hashes = [hashlib.sha256(), hashlib.sha256()]
        self.sources: dict[str, dict[str, int]] = {}  # spec -> its COUNTS
        self.tokens = self.documents = 0

    def add(self, code: Coded) -> None:
        counts = self.sources.setdefault(code.spec, dict.fromkeys(COUNTS, 0))
        if code.first:
            self._put(1, np.array([self.tokens], dtype="<i8"))
            self.documents += 1
            counts["documents"] += 1
        self._put(0, np.array(code.ids, dtype=self.dtype))
        self.tokens += len(code.ids)
        counts["tokens"] += len(code.ids)
        counts["bytes"] += code.size

    def _put(self, which: int, array: np.ndarray) -> None:
        self.hashes[which].update(array.data)
        self.files[which].write(array.data)

    def append(self, section: Written) -> None:
        """Add the tokens of a section; raises IntegrityError if they are not those written."""
        for which in (1, 0):  # where its documents start depends on the tokens before
            name, content = self.names[which], hashlib.sha256()
            with open(section.folder / name, "rb") as file:
                while block := file.read(CHUNK):
                    content.update(block)
                    if which:
                        self._put(1, np.frombuffer(block, "<i8") + np.int64(self.tokens))
                    else:
                        self._put(0, np.frombuffer(block, self.dtype))
            if content.hexdigest() != section.files[name]["sha256"]:
                raise broken(section.folder / name, "its content changed (sha256)")
        self.tokens += section.files[self.names[0]]["size"] // np.dtype(self.dtype).itemsize
        self.documents += section.files[self.names[1]]["size"] // 8
        for spec, counts in section.sources[self.names[0].partition(".")[0]].items():
            mine = self.sources.setdefault(spec, dict.fromkeys(COUNTS, 0))
            for kind in COUNTS:
                mine[kind] += counts[kind]

    def finish(self) -> dict[str, dict[str, Any]]:
        """Flush both files; return name -> size and SHA-256."""
        entries = {}
        for name, file, content in zip(self.names, self.files, self.hashes, strict=True):
            file.flush()
            entries[name] = {"size": file.tell(), "sha256": content.hexdigest()}
        return entries

    def counts(self) -> dict[str, int]:
        return {kind: sum(row[kind] for row in self.sources.values()) for kind in COUNTS}

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):  # a full disk was reported by `add` or `finish`
                file.close()


# ---------------------------------------------------------------------------- reading


def open_folder(folder: Path) -> tuple[dict[str, Any], TokenStream, TokenStream, list[str]]:
    """Verify every byte of a folder; return its index, train and valid streams, and notes."""
    index = _read_index(folder)
    if index is None:
        raise UserError(f"no prepared text ({folder}): prepare it first")
    notes = []
    if not index.pop("signed"):
        notes.append(f"prepared by an older version ({folder}): its counts of text are not signed")
    try:
        files = _check_files(folder, index)

        def array(name: str, dtype: str) -> Any:
            kind = FileArray if name.endswith(".tokens") else SortedFileArray
            opened = kind(folder / name, dtype, files[name])
            files[name] = opened.sha256
            return opened

        train, valid = streams_of(index, str(folder), array)
        verify(folder, files, [name for name in files if name.startswith("tokenizer/")])
        check_fingerprint(index, files, str(folder))
    except OSError as error:
        raise broken(Path(error.filename or folder), error.strerror or str(error)) from None
    except IntegrityError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise broken(folder / INDEX, f"not an index of tokens, {error!r}") from None
    return index, train, valid, notes


def streams_of(
    index: dict[str, Any], place: str, array: Callable[[str, str], Any]
) -> tuple[TokenStream, TokenStream]:
    """Return the train and valid streams of a folder, checked against its index.

    Args:
        index: the content of corpus.json.
        place: the folder, or where it is.
        array: opens a file by its name and dtype, as a FileArray or what reads like one.

    Raises:
        IntegrityError: they do not fit together.
    """
    where = f"{place}/{INDEX}"
    dtype, vocab_size, separator = (index[k] for k in ("dtype", "vocab_size", "separator"))
    if not 0 <= separator < vocab_size:
        raise broken(where, f"not an index of tokens, separator {separator} of {vocab_size} ids")
    if dtype == "uint16" and vocab_size > 1 << 16:
        raise broken(where, f"uint16 cannot hold {vocab_size} ids")
    roles = None if index.get("roles") is None else tuple(index["roles"])
    streams = []
    for split in SPLITS:
        tokens, documents = (
            array(f"{split}.tokens", DTYPES[dtype]),
            array(f"{split}.documents", "<i8"),
        )
        counts = {kind: index["splits"][split][kind] for kind in COUNTS}
        if not all(type(count) is int and count > 0 for count in counts.values()):
            raise broken(where, f"not an index of tokens, {split}: {counts}")
        if (len(tokens), len(documents)) != (counts["tokens"], counts["documents"]):
            raise broken(f"{place}/{split}.tokens", f"not {counts['tokens']} tokens")
        if tokens.largest >= vocab_size:
            what = f"token {tokens.largest} of a vocabulary of {vocab_size}"
            raise broken(f"{place}/{split}.tokens", what)
        if documents[0] != 0 or not documents.rising or documents.largest >= len(tokens):
            raise broken(f"{place}/{split}.documents", "no places where documents begin")
        streams.append(
            TokenStream(tokens, documents, counts["bytes"], f"{split} of {place}", roles)
        )
    return streams[0], streams[1]


def check_fingerprint(index: dict[str, Any], files: Mapping[str, str | None], place: str) -> None:
    """Raise IntegrityError unless these are the SHA-256 of the files of the index."""
    if index["fingerprint"] != digest([index["dtype"], [files[name] for name in CONTENT]]):
        raise broken(f"{place}/{INDEX}", "its files are not those of its fingerprint")


def _check_files(folder: Path, index: dict[str, Any]) -> dict[str, str | None]:
    """Check the sizes of the files; return name -> SHA-256 (None where an old index has none)."""
    files: dict[str, str | None] = {}
    for name, entry in {**dict.fromkeys(CONTENT), **index["files"]}.items():
        if name not in CONTENT and not TOKENIZER_FILE.fullmatch(name):
            raise broken(folder / INDEX, f"not an index of tokens, a file {name!r}")
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise broken(folder / name, f"{size} bytes instead of {entry['size']}")
        files[name] = entry.get("sha256")
    for path in sorted((folder / "tokenizer").iterdir()):
        if f"tokenizer/{path.name}" not in files and not path.name.startswith("."):
            raise broken(path, "a file that is not listed in corpus.json")
    return files


def verify(folder: Path, files: dict[str, str | None], names: Iterable[str]) -> None:
    """Compare the named files with their SHA-256; where `files` has None, fill it in.

    Raises:
        IntegrityError: the first file that differs.
    """
    for name in names:
        sha256 = hash_file(folder / name)
        if sha256 != (files[name] or sha256):
            raise broken(folder / name, "its content changed (sha256)")
        files[name] = sha256


def reusable(folder: Path, request: dict[str, Any], overwrite: bool) -> bool:
    """Return whether `folder` was prepared by the same request.

    Raises:
        UserError: the folder contains something else.
    """
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise UserError(f"not a folder ({folder}): choose another place for the tokens")
    index = _read_index(folder)
    if index is None:
        if any(folder.iterdir()):
            raise UserError(f"the folder holds something else ({folder}): choose a new one")
        return False
    if index.get("request") == request:
        return True
    if overwrite:
        return False
    previous = index.get("request")
    previous = previous if isinstance(previous, dict) else {}
    changed = ", ".join(key for key in request if previous.get(key) != request[key])
    place = f"{folder}; differs: {changed}"
    raise UserError(f"prepared from another request ({place}): choose a new folder, or overwrite")


def _read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index, with the key `signed` added; None if there is none."""
    path = folder / INDEX
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST_INDEX else b"null"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise broken(path, f"unreadable, {error}") from None
    if size > LARGEST_INDEX:
        raise broken(path, f"larger than {LARGEST_INDEX >> 20} MiB")
    return parse_index(content, path)


def parse_index(content: bytes, path: str | Path) -> dict[str, Any]:
    """Return the index that the content of corpus.json is, with the key `signed` added.

    Raises:
        IntegrityError: it is none, or was changed; `path` is named.
    """
    try:
        text = content.decode()
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken(path, f"unreadable, {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise broken(path, f"the mark '{FORMAT}' is missing")
    if index.get("schema") != SCHEMA:
        raise broken(path, f"schema {index.get('schema')!r}, this version reads {SCHEMA}")
    signed = index.pop("sha256", None) is not None
    # The first version of this format did not sign its index, and had these keys only.
    if text != signed_text(index) if signed else not index.keys() <= FIRST_KEYS:
        raise broken(path, "it was changed (sha256)")
    return index | {"signed": signed}


def signed_text(index: dict[str, Any]) -> str:
    """Return the content of corpus.json: the index and its SHA-256, in one fixed spelling."""
    return json.dumps(index | {"sha256": digest(index)}, indent=1)


def tokenizer_identity(spec: str) -> str:
    """Return the spec, and for a folder also the SHA-256 of its tokenizer."""
    path = Path(os.path.expanduser(spec)) / "tokenizer.json"
    return f"{spec} {hash_file(path)}" if path.is_file() else spec


def digest(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
