"""The folder of tokens: how it is written, whole or not at all, and how it is read back.

    corpus.json        what was asked for, what came out, and the size and sha256 of every file
    train.tokens       the tokens as raw little-endian uint16 (uint32 for a large vocabulary)
    train.documents    where each document begins, as raw little-endian int64
    valid.tokens       the same for the held-out text
    valid.documents
    tokenizer/         as `save_pretrained` writes it

It is built beside its place and renamed into it; what a killed process left is removed by the next.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spectral_window.data.blocks import TokenStream
from spectral_window.data.formats import ReadReport
from spectral_window.data.holdout import Part
from spectral_window.data.tokenizers import HFTokenizer, plain_text, vocabulary_size
from spectral_window.errors import IntegrityError, ResourceError, UserError

FORMAT, SCHEMA = "spectral-window tokens", 1
INDEX = "corpus.json"
SPLITS = ("train", "valid")
CONTENT = [f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "documents")]
CONTENT.append("tokenizer/tokenizer.json")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
BATCH = 1 << 20  # characters tokenized at a time


# ---------------------------------------------------------------------------- writing


def write_folder(
    folder: Path,
    parts: Iterable[Part],
    tokenizer: HFTokenizer,
    request: dict[str, Any],
    report: ReadReport,
) -> None:
    """Tokenize `parts` into `folder`, replacing what is there once all is written.

    Raises UserError when a split stays empty, ResourceError when the disk refuses.
    """
    building = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        building.mkdir()
        _write(building, parts, tokenizer, request, report)
        _put_in_place(building, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        free = f"{_free_bytes(folder) >> 20} MiB are free there"
        raise ResourceError(f"cannot write the tokens ({folder}): {reason}; {free}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(
    folder: Path,
    parts: Iterable[Part],
    tokenizer: HFTokenizer,
    request: dict[str, Any],
    report: ReadReport,
) -> None:
    vocab_size = vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    entries = _save_tokenizer(tokenizer, folder)
    writers = {name: _StreamWriter(folder, name, dtype, tokenizer.eos_token_id) for name in SPLITS}
    backend = plain_text(tokenizer)
    try:
        for batch in _batches(parts):
            texts = [part.text for part in batch]
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            for part, encoding in zip(batch, encodings, strict=True):
                writers[part.split].add(part, encoding.ids)
        for writer in writers.values():
            entries |= writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
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
        "request": request,
        "files": entries,
    }
    with open(folder / INDEX, "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _save_tokenizer(tokenizer: HFTokenizer, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and sha256 of its files."""
    try:
        tokenizer.save_pretrained(folder / "tokenizer")
    except OSError:
        raise
    except Exception as error:  # the Rust library reports a full disk by a plain Exception
        raise OSError(str(error)) from None
    return {
        f"tokenizer/{path.name}": {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted((folder / "tokenizer").iterdir())
    }


class _StreamWriter:
    """Writes the tokens and document starts of one split, and hashes them on the way."""

    def __init__(self, folder: Path, split: str, dtype: str, separator: int):
        self.dtype, self.separator = DTYPES[dtype], separator
        self.names = (f"{split}.tokens", f"{split}.documents")
        self.files = [open(folder / name, "wb") for name in self.names]  # noqa: SIM115 (see close)
        self.hashes = [hashlib.sha256(), hashlib.sha256()]
        self.tokens = self.documents = self.bytes = 0

    def add(self, part: Part, ids: list[int]) -> None:
        if part.first:
            self._put(1, np.array([self.tokens], dtype="<i8"))
            self.documents += 1
            ids = [self.separator, *ids]
        self._put(0, np.array(ids, dtype=self.dtype))
        self.tokens += len(ids)
        self.bytes += len(part.text.encode())

    def _put(self, which: int, array: np.ndarray) -> None:
        self.hashes[which].update(array.data)
        self.files[which].write(array.data)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Name -> size and sha256 of both files, which are then safe on the disk."""
        entries = {}
        for name, file, content in zip(self.names, self.files, self.hashes, strict=True):
            file.flush()
            os.fsync(file.fileno())
            entries[name] = {"size": file.tell(), "sha256": content.hexdigest()}
        return entries

    def counts(self) -> dict[str, int]:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):  # a full disk, reported already by `add` or `finish`
                file.close()


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename the finished folder into its place; what it replaces is removed last."""
    replaced = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(replaced)
    building.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left beside `folder`."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*-*"):
        kind, _, pid = path.name.removeprefix(f".{folder.name}.").partition("-")
        if kind in ("tmp", "old") and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # asking would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder.parent).free
    except OSError:
        return 0


# ---------------------------------------------------------------------------- reading


def open_folder(folder: Path) -> tuple[dict[str, Any], TokenStream, TokenStream]:
    """(index, train, valid), with every size checked."""
    index = _read_index(folder)
    if index is None:
        raise UserError(f"no prepared text ({folder}): prepare it first")
    streams = []
    try:
        for name, entry in {**dict.fromkeys(CONTENT), **index["files"]}.items():
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                raise _broken(folder / name, f"{size} bytes instead of {entry['size']}")
        if index["dtype"] == "uint16" and index["vocab_size"] > 1 << 16:
            raise _broken(folder / INDEX, f"uint16 cannot hold {index['vocab_size']} ids")
        for split in SPLITS:
            counts = index["splits"][split]
            tokens = np.memmap(folder / f"{split}.tokens", dtype=DTYPES[index["dtype"]], mode="r")
            documents = np.memmap(folder / f"{split}.documents", dtype="<i8", mode="r")
            if (len(tokens), len(documents)) != (counts["tokens"], counts["documents"]):
                raise _broken(folder / f"{split}.tokens", f"not {counts['tokens']} tokens")
            streams.append(TokenStream(tokens, documents, counts["bytes"], f"{split} of {folder}"))
        if not isinstance(index["fingerprint"], str):
            raise TypeError("fingerprint")
    except OSError as error:
        raise _broken(Path(error.filename or folder), error.strerror or str(error)) from None
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _broken(folder / INDEX, f"not an index of tokens, {error!r}") from None
    return index, streams[0], streams[1]


def verify(folder: Path, index: dict[str, Any], names: Iterable[str]) -> None:
    """Compare the sha256 of the named files with the index; IntegrityError at the first wrong."""
    for name in names:
        if sha256(folder / name) != index["files"][name]["sha256"]:
            raise _broken(folder / name, "its content changed (sha256)")


def reusable(folder: Path, request: dict[str, Any], overwrite: bool) -> bool:
    """Whether `folder` answers `request`; UserError when something else is there."""
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
    made = index.get("request")
    made = made if isinstance(made, dict) else {}
    changed = ", ".join(key for key in request if made.get(key) != request[key])
    place = f"{folder}; differs: {changed}"
    raise UserError(f"prepared from another request ({place}): choose a new folder, or overwrite")


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise _broken(path, f"unreadable, {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise _broken(path, f"the mark '{FORMAT}' is missing")
    if index.get("schema") != SCHEMA:
        raise _broken(path, f"schema {index.get('schema')!r}, this version reads {SCHEMA}")
    return index


def _broken(path: Path, what: str) -> IntegrityError:
    return IntegrityError(f"{what} ({path}): remove the folder and prepare the text again")


def tokenizer_identity(spec: str) -> str:
    """The spec, and for a folder also the sha256 of what is in it."""
    path = Path(spec).expanduser() / "tokenizer.json"
    return f"{spec} {sha256(path)}" if path.is_file() else spec


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """The hexadecimal sha256 of a value that JSON can spell."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
