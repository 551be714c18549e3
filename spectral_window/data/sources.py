"""Read a user's text, wherever it lies, as one stream of pieces in constant memory.

A source is a string: a file, a folder, a glob, `stdlib` (the sources and docstrings of the running
Python's standard library) or `hub:NAME[:CONFIG[:SPLIT]]` (a data set streamed by the `datasets`
library). What is a document:

    .py .md            the file
    .txt and others    the file, or with `txt_documents="paragraph"` each block between blank lines
    .jsonl .parquet    each record's `text`
    hub:               each row's `text`

Text files may be compressed (.gz, .zst). A document can be longer than memory, so it travels as
pieces of at most `PIECE` characters. A piece ends just before white space that follows a visible
character: a byte-level tokenizer splits there anyway, so the tokens of the pieces together are the
tokens of the document. Only a run of more than `PIECE` characters without white space is cut
inside. Where a document is cut depends on its text alone.

Text is strict UTF-8. A byte order mark at the start of a file is dropped and CRLF is read as LF;
nothing else changes.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from spectral_window.data.formats import (
    COMPRESSION,
    ReadOptions,
    ReadReport,
    hub_rows,
    json_rows,
    parquet_rows,
    texts_of,
    utf8_blocks,
)
from spectral_window.errors import IntegrityError, UserError

PIECE = 1 << 16  # characters; a first piece also identifies its document when text is held out
KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
ARCHIVES = re.compile(r"\.(tar|tgz|zip|7z|rar|bz2|xz)(\.|$)")
# Left out of `stdlib`: tests, tables of code points, old copies, packages of others.
STDLIB_SKIP = {"test", "tests", "idle_test", "encodings", "lib2to3"}
STDLIB_SKIP |= {"site-packages", "dist-packages"}
# ... and files that differ from one machine to the next.
STDLIB_LOCAL = re.compile(r"_sysconfigdata.*|(site|user)customize\.py|python-config\.py")
PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


class Source(NamedTuple):
    """One thing to read: `kind` is one of KINDS or "hub", `name` the path or the hub reference."""

    kind: str
    name: str


class Piece(NamedTuple):
    """Some text of a document, whether it is the document's first, and its place for messages."""

    text: str
    first: bool
    where: str


# ---------------------------------------------------------------------------- which files


def find_sources(specs: Iterable[str]) -> list[Source]:
    """The files and data sets that `specs` name, in order, each once. Reads nothing but folders.

    A folder stands for its files of the KINDS, sorted, without hidden ones; a file that is named,
    or matched by a glob, is read whatever its suffix. Raises UserError for a source that is
    missing, empty, or no regular file (a pipe, a device).
    """
    if isinstance(specs, (str, os.PathLike)):
        raise TypeError(f"sources is {specs!r}: pass a list of strings")
    found: dict[str, Source] = {}
    for spec in specs:
        for source in _find(os.fspath(spec)):
            place = source.name if source.kind == "hub" else os.path.realpath(source.name)
            found.setdefault(place, source)
    if not found:
        raise UserError("no data: name a file, a folder, a glob, 'stdlib' or 'hub:NAME'")
    return list(found.values())


def _find(spec: str) -> list[Source]:
    if spec == "stdlib":
        return _stdlib()
    if spec.startswith("hub:"):
        if not spec.removeprefix("hub:").split(":")[0]:
            raise UserError(f"no data set named ({spec}): write hub:NAME or hub:NAME:CONFIG")
        return [Source("hub", spec)]
    if "://" in spec:
        raise UserError(f"cannot read from the web ({spec}): download it and name the file")
    if not spec or "\0" in spec:
        raise UserError(f"not a path ({spec!r}): name a file, a folder, a glob or 'stdlib'")
    path = os.path.expanduser(spec)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        matches = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        if matches:
            return [_file(name) for name in sorted(matches)]
        what = "no file matches" if glob.has_magic(path) else error.strerror
        raise UserError(f"{what} ({spec[:200]}): check the path") from None
    if stat.S_ISREG(mode):
        return [_file(path)]
    if not stat.S_ISDIR(mode):
        raise UserError(f"not a regular file ({spec}): save the text to a file first")
    files = [Source(kind, name) for name in _walk(path) if (kind := _kind(name))]
    if not files:
        raise UserError(f"no text in the folder ({spec}): looked for {' '.join(KINDS)}, .gz, .zst")
    return files


def _walk(folder: str, skip: Iterable[str] = ()) -> Iterator[str]:
    """The regular files below `folder`, sorted; hidden files and folders are left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in skip)
        for name in sorted(files):
            path = os.path.join(root, name)
            if name[0] != "." and os.path.isfile(path):
                yield path


def _kind(path: str) -> str:
    """The suffix that says how to read `path`, without compression; "" if it says nothing."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSION:
        suffix = os.path.splitext(stem)[1]
    return suffix if suffix in KINDS else ""


def _file(path: str) -> Source:
    if ARCHIVES.search(os.path.basename(path).lower()):
        raise UserError(f"archives are not read ({path}): unpack it and name the folder")
    return Source(_kind(path) or ".txt", path)


def _stdlib() -> list[Source]:
    root = sysconfig.get_path("stdlib")
    files = [
        Source(".py", path)
        for path in _walk(root, STDLIB_SKIP)
        if path.endswith(".py") and not STDLIB_LOCAL.fullmatch(os.path.basename(path))
    ]
    if not files:
        raise UserError(f"this Python has no library sources ({root}): name your own text")
    return files


def file_identity(sources: Iterable[Source]) -> list[list[str | int]]:
    """Path, size and time of every file: equal as long as nothing changed."""
    rows: list[list[str | int]] = []
    for kind, name in sources:
        if kind == "hub":
            rows.append([name])
        else:
            info = os.stat(name)
            rows.append([os.path.abspath(name), info.st_size, info.st_mtime_ns])
    return rows


# ---------------------------------------------------------------------------- the stream


def read(sources: Iterable[Source], options: ReadOptions, report: ReadReport) -> Iterator[Piece]:
    """The documents of `sources` as pieces; a document without a visible character is left out.

    Adds to `report` what was forgiven. Raises UserError with the file and the byte, line or row at
    fault, and IntegrityError when more than 1 % of the records had to be skipped.
    """
    yield from _pieces(_texts(sources, options, report))
    if report.skipped > 0.01 * report.records:
        raise IntegrityError(
            f"{report.skipped} of {report.records} records are bad, more than 1 %: repair the data"
        )


def _texts(sources: Iterable[Source], options: ReadOptions, report: ReadReport) -> Iterator[Piece]:
    """Text as it comes, in lengths of any size; an empty first one only opens a document."""
    for kind, name in sources:
        if kind in (".jsonl", ".parquet", "hub"):
            rows = {".jsonl": json_rows, ".parquet": parquet_rows, "hub": hub_rows}[kind](name)
            for text, where in texts_of(rows, options, report):
                yield Piece(text, True, where)
        elif kind == ".txt" and options.txt_documents == "paragraph":
            yield from _paragraphs(utf8_blocks(name, options, report), name)
        else:
            yield Piece("", True, name)
            for block in utf8_blocks(name, options, report):
                yield Piece(block, False, name)


def _pieces(texts: Iterable[Piece]) -> Iterator[Piece]:
    """The same text in pieces of at most PIECE characters."""
    buffer, first, where = "", True, ""
    for text, begins, place in texts:
        if begins:
            yield from _last_piece(buffer, first, where)
            buffer, first, where = "", True, place
        buffer += text
        start = 0
        while len(buffer) - start > PIECE:
            end = _cut(buffer, start)
            yield Piece(buffer[start:end], first, where)
            start, first = end, False
        buffer = buffer[start:]
    yield from _last_piece(buffer, first, where)


def _last_piece(text: str, first: bool, where: str) -> Iterator[Piece]:
    if text and not (first and text.isspace()):
        yield Piece(text, first, where)


def _cut(text: str, start: int) -> int:
    """The last place within PIECE after `start` where white space follows a visible character."""
    end = start + PIECE
    while (space := max(text.rfind(mark, start + 1, end) for mark in " \n\t")) > start:
        run = start + len(text[start:space].rstrip())  # where this white space begins
        if run > start and text[run] in " \n\t":  # rarer spaces are visible to some tokenizers
            return run
        end = run
    return start + PIECE


def _paragraphs(blocks: Iterable[str], where: str) -> Iterator[Piece]:
    """Every run of lines between blank lines as a document, without the line ends around it."""
    buffer, first = "", True
    for block in blocks:
        *whole, buffer = PARAGRAPH_END.split(buffer + block)
        for text in whole:
            if not first or text:
                yield Piece(_from_first_line(text) if first else text, first, where)
            first = True
        if len(buffer) > PIECE:  # let a paragraph without end through, but not a blank line begun
            keep = len(buffer.rstrip(" \t\n"))
            if len(buffer) - keep > PIECE:
                keep = len(buffer)
            yield Piece(_from_first_line(buffer[:keep]) if first else buffer[:keep], first, where)
            buffer, first = buffer[keep:], False
    yield Piece((_from_first_line(buffer) if first else buffer).rstrip("\n"), first, where)


def _from_first_line(text: str) -> str:
    """Without blank lines in front, but with the indentation of the first line."""
    blank = len(text) - len(text.lstrip(" \t\n"))
    return text[text.rfind("\n", 0, blank) + 1 :]
