"""Bytes to text: plain and compressed files as a stream.

Every reader is a generator whose memory does not depend on the size of the file. Every error in a
file is a UserError that names the file and the byte.
"""

from __future__ import annotations

import codecs
import os
import stat
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from spectral_window.data.kinds import COMPRESSION, split_suffix
from spectral_window.errors import UserError

BLOCK = 1 << 18  # bytes read at a time
MAX_RATIO = 1000  # decompressed bytes per compressed byte; more is a decompression bomb
SHOWN = 5  # names that a line mentions
BAD_CHARACTER = "\ufffd"


class Extent(NamedTuple):
    """A run of a file, between two borders that a reader of the whole file sees too.

    Attributes:
        start: its first byte; of Parquet, its first row group; of a data set, its first shard.
        stop: the end, in the same unit; None for the end of the file.
        records: the lines or rows of the file that stand before it.
    """

    start: int = 0
    stop: int | None = None
    records: int = 0


WHOLE = Extent()


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading; see `prepare` in text.py."""

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
    """What was replaced or left out while reading.

    Attributes:
        replaced: characters that were replaced.
        skipped: records that were skipped.
        records: records in total.
        blank: records whose text is empty or white space.
        without: files without a document.
        damaged: files that were damaged.
        shared: training documents that are held-out text too.
        shared_at: where the first of them are.
        documents: training documents in total.
        bytes: bytes of training text.
        cut: conversations that were cut before a question.
        ended: answers that end with the row.
        lost: questions that are longer than a row.
        notes: other messages.
    """

    replaced: int = 0
    skipped: int = 0
    records: int = 0
    blank: int = 0
    without: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    shared: int = 0
    shared_at: list[str] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0
    cut: int = 0
    ended: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, other: ReadReport) -> None:
        """Add the report of the text that follows."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        del self.shared_at[SHOWN:]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        counted = (
            (self.cut, "conversations longer than a row were cut before a question"),
            (self.ended, "answers longer than a row end with it"),
            (self.lost, "questions longer than a row were left out"),
            (self.replaced, "characters that are not UTF-8 were replaced"),
            (self.skipped, f"bad records of {self.records:,} were left out"),
            (self.blank, "records hold nothing but white space"),
            (self.shared, "documents of the training text are held-out text and were left out"),
        )
        named = (
            (self.damaged, "damaged files were left out"),
            (self.without, "files hold no document"),
        )
        return [
            *self.notes,
            *(f"{what}: {count:,}" for count, what in counted if count),
            *(f"{what}: {some(names)}" for names, what in named if names),
        ]


def some(names: list[str], count: int | None = None) -> str:
    """Return the number of names and the first few of them: `7 (a, b, c, d, e, ...)`."""
    count = len(names) if count is None else count
    return f"{count:,} ({', '.join(names[:SHOWN])}{', ...' if count > SHOWN else ''})"


class UnreadableFile(UserError):
    """A file is damaged or gone: nothing more can be read from it."""


# ---------------------------------------------------------------------------- plain text


def utf8_blocks(
    path: str, options: ReadOptions, report: ReadReport, extent: Extent = WHOLE
) -> Iterator[str]:
    """Yield the text of a file, or of a run of it, with CRLF as LF.

    A byte that is not UTF-8, or a NUL, is a UserError with its offset in the (decompressed) file;
    with errors="replace" it becomes U+FFFD.
    """
    for _, text in placed_blocks(path, options, report, extent):
        yield text.replace("\r\n", "\n")


def placed_blocks(
    path: str, options: ReadOptions, report: ReadReport, extent: Extent = WHOLE
) -> Iterator[tuple[int, str]]:
    """Yield the same text with its CRLF, each block with the place of its first byte."""
    strict = options.errors == "strict"
    data, offset = b"", extent.start  # `offset` is the place of data[0] in the file
    started = offset > 0
    for block, final in _with_end(byte_blocks(path, extent)):
        data += block
        if not started:
            if len(data) < 3 and not final:
                continue
            started = True
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"UTF-16 text ({path}, byte 0): convert it to UTF-8 (iconv does)")
            if data.startswith(codecs.BOM_UTF8):
                data, offset = data[3:], 3
        if strict:
            text, used = _decode_strict(data, offset, final, path)
        else:
            text, used, replaced = _decode_anyhow(data, final)
            report.replaced += replaced
        place = offset
        data, offset = data[used:], offset + used
        if text.endswith("\r") and not final:  # its LF may come with the next block
            text, data, offset = text[:-1], b"\r" + data, offset - 1
        yield place, text


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
    """Decode with replacement; return the text, the bytes used and the characters replaced."""
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
    """Yield every block with False, then an empty one with True."""
    for block in blocks:
        yield block, False
    yield b"", True


def byte_blocks(path: str, extent: Extent = WHOLE) -> Generator[bytes]:
    """Yield the bytes of a regular file, decompressed by its suffix, at most BLOCK at a time.

    A compressed file is always read whole.
    """
    compression = COMPRESSION.get(split_suffix(path)[1])
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe could wait for ever
            raise UserError(f"not a regular file ({path}): save the text to a file first")
        if compression is None:
            with open(path, "rb", buffering=0) as file:
                file.seek(extent.start)
                left = sys.maxsize if extent.stop is None else extent.stop - extent.start
                while block := file.read(min(BLOCK, left)):
                    left -= len(block)
                    yield block
            return
        if not info.st_size:
            raise UnreadableFile(
                f"truncated or corrupt ({path}): an empty file, not a compressed one"
            )
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
        raise UnreadableFile(f"{what} ({path}): {error.strerror or error}") from None
