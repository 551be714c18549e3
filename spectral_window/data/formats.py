"""Bytes to text: plain text, JSON lines, Parquet and the rows of a hub data set, each as a stream.

Every reader is a generator whose memory does not depend on the size of the file. Every fault it
can meet is a UserError that names the file and the byte, line or row.
"""

from __future__ import annotations

import codecs
import gc
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from spectral_window.errors import NetworkError, UserError

BLOCK = 1 << 18  # bytes read at a time
MAX_LINE = 1 << 24  # bytes of one JSON line: a record has to fit in memory
MAX_RATIO = 1000  # decompressed bytes for each compressed byte; more is a bomb, not text
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
BAD_CHARACTER = "\ufffd"
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class ReadOptions:
    """How to read: see `prepare` in text.py for the meaning of each."""

    txt_documents: str = "file"
    errors: str = "strict"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("txt_documents", ("file", "paragraph")),
            ("errors", ("strict", "replace")),
            ("skip_bad", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                choice = " or ".join(repr(value) for value in allowed)
                raise UserError(f"{name} is {getattr(self, name)!r}: choose {choice}")


@dataclass
class ReadReport:
    """What reading forgave: characters replaced, records skipped (of so many records)."""

    replaced: int = 0
    skipped: int = 0
    records: int = 0


# ---------------------------------------------------------------------------- plain text


def utf8_blocks(path: str, options: ReadOptions, report: ReadReport) -> Iterator[str]:
    """The text of a file, with CRLF as LF. A byte that is not UTF-8, or a NUL, is a UserError with
    its offset in the (decompressed) file, or U+FFFD with errors="replace"."""
    strict = options.errors == "strict"
    data, offset, begun = b"", 0, False  # `offset` is the place of data[0] in the file
    for block, final in _with_end(byte_blocks(path)):
        data += block
        if not begun:
            if len(data) < 3 and not final:
                continue
            begun = True
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"UTF-16 text ({path}, byte 0): convert it to UTF-8 (iconv does)")
            if data.startswith(codecs.BOM_UTF8):
                data, offset = data[3:], 3
        if strict:
            text, used = _decode_strict(data, offset, final, path)
        else:
            text, used, replaced = _decode_anyhow(data, final)
            report.replaced += replaced
        data, offset = data[used:], offset + used
        if text.endswith("\r") and not final:  # its LF may come with the next block
            text, data, offset = text[:-1], b"\r" + data, offset - 1
        yield text.replace("\r\n", "\n")


def _decode_strict(data: bytes, offset: int, final: bool, path: str) -> tuple[str, int]:
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        place = f"{path}, byte {offset + error.start}"
        raise UserError(f"not UTF-8 ({place}): convert it, or read with errors=replace") from None
    if "\0" in text:
        place = f"{path}, byte {offset + data.index(0)}"
        raise UserError(
            f"a NUL byte, so not plain text ({place}): convert it, or read with errors=replace"
        )
    return text, used


def _decode_anyhow(data: bytes, final: bool) -> tuple[str, int, int]:
    """(text, bytes used, characters replaced)."""
    parts, start, replaced = [], 0, 0
    while True:
        try:
            text, used = codecs.utf_8_decode(data[start:], "strict", final)
        except UnicodeDecodeError as error:
            parts.append(data[start : start + error.start].decode() + BAD_CHARACTER)
            start, replaced = start + error.end, replaced + 1
            continue
        text = "".join([*parts, text])
        return text.replace("\0", BAD_CHARACTER), start + used, replaced + text.count("\0")


def _with_end(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Every block, and an empty one that is marked as the end."""
    for block in blocks:
        yield block, False
    yield b"", True


def byte_blocks(path: str) -> Iterator[bytes]:
    """The bytes of a regular file, decompressed if its name says so, at most BLOCK at a time."""
    compression = COMPRESSION.get(os.path.splitext(path.lower())[1])
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # never open a pipe: it would wait for ever
            raise UserError(f"not a regular file ({path}): save the text to a file first")
        if compression is None:
            with open(path, "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    yield block
            return
        import pyarrow  # reads both formats in constant memory and notices a missing end

        size, limit = 0, MAX_RATIO * info.st_size + BLOCK
        with pyarrow.input_stream(path, compression=compression) as stream:
            while block := stream.read(BLOCK):
                size += len(block)
                if size > limit:
                    raise UserError(f"grows more than {MAX_RATIO} times ({path}): not text")
                yield block
    except OSError as error:
        what = "truncated or corrupt" if error.errno is None else "cannot read"
        raise UserError(f"{what} ({path}): {error.strerror or error}") from None


# ---------------------------------------------------------------------------- records


class Row(NamedTuple):
    """A record's place and its text, or None and what is wrong with it."""

    where: str
    text: str | None
    fault: str = ""


def texts_of(
    rows: Iterable[Row], options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """(text, where) of every row. A bad row is a UserError, or counted with `skip_bad`."""
    for where, text, fault in rows:
        report.records += 1
        if text is None:
            if not options.skip_bad:
                raise UserError(f"{fault} ({where}): repair the record, or read with skip_bad")
            report.skipped += 1
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            if options.errors == "strict":
                fault = f"a lone surrogate \\u{ord(text[error.start]):04x}"
                raise UserError(
                    f"{fault} ({where}): repair it, or read with errors=replace"
                ) from None
            text, replaced = LONE_SURROGATE.subn(BAD_CHARACTER, text)
            report.replaced += replaced
        yield text, where


def _row(where: str, record: Any) -> Row:
    """The row of a dict-like record: its `text`, which must be a string."""
    if not isinstance(record, dict):
        return Row(where, None, "not an object with a 'text' field")
    if "text" not in record:
        fields = ", ".join(list(record)[:10]) or "none"
        return Row(where, None, f"no 'text' field, only: {fields}")
    value = record["text"]
    if not isinstance(value, str):
        return Row(where, None, f"'text' is {json.dumps(value, default=str)[:40]}, not a string")
    return Row(where, value)


def json_rows(path: str) -> Iterator[Row]:
    """A row for every line that is not blank."""
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(), object_pairs_hook=_no_key_twice)
        except UnicodeDecodeError as error:
            yield Row(f"{where}, byte {error.start} of the line", None, "not UTF-8")
        except json.JSONDecodeError as error:
            yield Row(f"{where}, column {error.colno}", None, f"bad JSON, {error.msg}")
        except (ValueError, RecursionError) as error:
            yield Row(where, None, f"bad JSON, {str(error).split(':')[0][:80]}")
        else:
            yield _row(where, record)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("the same key twice")
    return record


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; one longer than MAX_LINE is an error, found without holding all of it."""
    number, size = 1, 0
    parts: list[bytes] = []
    for block in byte_blocks(path):
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield number, b"".join([*parts, end])
            number, parts, size = number + 1, [], 0
        parts.append(rest)
        size += len(rest)
        if size > MAX_LINE:
            limit = f"{MAX_LINE >> 20} MiB"
            raise UserError(f"a line of more than {limit} ({path}, line {number}): split it")
    yield number, b"".join(parts)


def parquet_rows(path: str) -> Iterator[Row]:
    """A row for every row of the string column `text`; other columns are not read."""
    import pyarrow
    import pyarrow.parquet

    if not path.lower().endswith(".parquet"):
        raise UserError(f"Parquet compresses inside ({path}): unpack the file first")
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            if "text" not in schema.names:
                columns = ", ".join(schema.names[:20])
                raise UserError(f"no 'text' column ({path}): its columns are {columns}")
            kind = schema.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"column 'text' is {kind} ({path}): store it as a string column")
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _row(f"{path}, row {number}", {"text": value})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"not a readable Parquet file ({path}): {_one_line(error)}") from None


def hub_rows(spec: str) -> Iterator[Row]:
    """The rows of `hub:NAME[:CONFIG[:SPLIT]]`; NAME may be a local folder of data files too."""
    try:
        import datasets
    except ImportError:
        hint = "pip install 'spectral-window[hub]'"
        raise UserError(f"the hub needs the datasets library ({spec}): {hint}") from None
    name, config, split = [*spec.removeprefix("hub:").split(":"), "", ""][:3]
    records: Any = None
    number = 0
    try:
        records = iter(
            datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        )
        for record in records:
            number += 1
            if number == 1 and "text" not in record:
                columns = ", ".join(list(record)[:20])
                raise UserError(f"no 'text' column ({spec}): its columns are {columns}")
            yield _row(f"{spec}, row {number}", record)
    except UserError:
        raise
    except (FileNotFoundError, ValueError) as error:  # no such data set, configuration or split
        raise UserError(f"cannot read the data set ({spec}): {_one_line(error)}") from None
    except OSError as error:  # no connection, a timeout, HF_HUB_OFFLINE
        where = f"{spec}, row {number + 1}" if number else spec
        raise NetworkError(f"the hub did not answer ({where}): {_one_line(error)}") from None
    finally:
        # Stopping early leaves Arrow's reader half-way, and it aborts the process if it is still
        # there when Python ends (apache/arrow issue 45214): let it go now.
        del records
        gc.collect()


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
