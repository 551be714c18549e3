"""Read text from files, folders and data sets as one stream of pieces, in constant memory.

A source is a string: a file, a folder, a glob, `stdlib` (the sources and docstrings of the running
Python's standard library) or `hub:NAME[:CONFIG[:SPLIT]]` (a data set streamed by the `datasets`
library). The documents of a source are:

    .py .md                   the file
    .txt and others           the file, or with `txt_documents="paragraph"` each block between blank
                              lines
    .jsonl .ndjson .json      each record's `text`, a record a line; a .json may be one array
    .csv .tsv .parquet        each row's `text`
    hub:                      each row's `text`

All except Parquet may be compressed (.gz, .zst). A file of another format, by its suffix
(kinds.py), is refused. A document can be larger than memory, so it is read in pieces of at most
`PIECE` characters. A piece ends just before white space that follows a visible character. A
byte-level tokenizer splits there too, so the tokens of the pieces together are the tokens of the
document. Only a run of more than `PIECE` characters without white space is cut inside. The cuts of
a document depend on its text only.

Text is strict UTF-8. A byte order mark at the start of a file is dropped and CRLF is read as LF;
nothing else is changed.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from spectral_window.data.formats import (
    WHOLE,
    Extent,
    ReadOptions,
    ReadReport,
    UnreadableFile,
    byte_blocks,
    some,
    utf8_blocks,
)
from spectral_window.data.kinds import IN_FOLDERS, RECORDS, kind_in_folder, kind_of, split_suffix
from spectral_window.data.records import parquet_rows, rows_of, texts_of
from spectral_window.errors import IntegrityError, UserError, UserTypeError

PIECE = 1 << 16  # characters; the first piece also identifies a document for the hold-out
# Left out of `stdlib`: tests, tables of code points, old copies, packages of others.
STDLIB_SKIP = {"test", "tests", "idle_test", "encodings", "lib2to3"}
STDLIB_SKIP |= {"site-packages", "dist-packages"}
# ... and files that differ from one machine to the next.
STDLIB_LOCAL = re.compile(r"_sysconfigdata.*|(site|user)customize\.py|python-config\.py")
PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


class Source(NamedTuple):
    """A file or data set, or a run of one.

    Attributes:
        kind: of kinds.KINDS, or "hub".
        name: its path or hub reference.
        spec: what the user wrote.
        extent: which run.
        before: bytes of text of its first document that stand before the run.
    """

    kind: str
    name: str
    spec: str = ""
    extent: Extent = WHOLE
    before: int = 0


class Piece(NamedTuple):
    """A part of a document: its text, whether it is the first, its place, its source's spec."""

    text: str
    first: bool
    where: str
    spec: str = ""


# ---------------------------------------------------------------------------- which files


def find_sources(specs: Iterable[str], notes: list[str] | None = None) -> list[Source]:
    """Return the files and data sets that `specs` name, in order, each once.

    Only folders are read here. A folder stands for its files of the kinds IN_FOLDERS, sorted,
    without hidden ones; links to folders are not followed. A file that is named, or matched by a
    glob, is read by its suffix, and as text if the suffix is unknown.

    Args:
        specs: the sources.
        notes: gets a line for everything that is left out.

    Raises:
        UserError: a source is missing, empty, unreadable, of a refused format, or not a regular
            file (a pipe, a device).
    """
    if isinstance(specs, (str, os.PathLike)):
        raise UserTypeError(f"sources is {specs!r}: pass a list of strings")
    notes = [] if notes is None else notes
    sources: dict[str, Source] = {}
    twice: list[str] = []
    for spec in map(os.fspath, specs):
        for kind, name, *_ in _find(spec, notes):
            place = name if kind == "hub" else os.path.realpath(name)
            if place in sources:
                twice.append(name)
            sources.setdefault(place, Source(kind, name, spec))
    if not sources:
        raise UserError("no data: name a file, a folder, a glob, 'stdlib' or 'hub:NAME'")
    if twice:
        notes.append(f"named more than once, read once: {some(twice)}")
    return list(sources.values())


def _find(spec: str, notes: list[str]) -> list[Source]:
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
        names = sorted(glob.glob(path, recursive=True))
        files = [Source(kind_of(name), name) for name in names if os.path.isfile(name)]
        others = [name for name in names if not os.path.isfile(name)]
        if "**" not in path and others and files:  # ** also matches every folder on its way
            notes.append(f"matched by {spec} but no files, left out: {some(others)}")
        if files:
            return files
        what = "no file matches" if glob.has_magic(path) else error.strerror
        raise UserError(f"{what} ({spec[:200]}): check the path") from None
    if stat.S_ISREG(mode):
        return [Source(kind_of(path), path)]
    if not stat.S_ISDIR(mode):
        raise UserError(f"not a regular file ({spec}): save the text to a file first")
    return _folder(path, spec, notes)


def _folder(path: str, spec: str, notes: list[str]) -> list[Source]:
    """Return the files that a folder stands for; other content is added to `notes`."""
    files: list[Source] = []
    left_out: dict[str, list[str]] = {}  # why -> which
    for name in _walk(path):
        kind, mode = kind_in_folder(name), _mode(name)
        if stat.S_ISREG(mode):
            if kind:
                files.append(Source(kind, name))
                continue
            why = "files of other kinds, which must be named"
        elif stat.S_ISDIR(mode):
            why = "links to folders"
        else:
            why = "broken links" if stat.S_ISLNK(mode) else "pipes or devices"
        left_out.setdefault(why, []).append(os.path.relpath(name, path))
    lines = [f"{why}: {some(names)}" for why, names in left_out.items()]
    if not files:
        holds = "".join(f"; it holds {line}" for line in lines)
        raise UserError(f"no text in the folder ({spec}): looked for {' '.join(IN_FOLDERS)}{holds}")
    notes += [f"left out of {spec}: {line}" for line in lines]
    return files


def _mode(path: str) -> int:
    """Return the mode of `path` or of what it links to; for a broken link, that of the link."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return os.lstat(path).st_mode


def _walk(folder: str, skip: Iterable[str] = ()) -> Iterator[str]:
    """Yield the files below `folder`, sorted, and links to folders, which are not entered.

    Hidden files and folders are left out. Raises UserError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        what = f"cannot read a folder, {error.strerror} ({error.filename})"
        raise UserError(f"{what}: allow it, or name what is to be read in {folder}")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in skip)
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*files, *links]):
            if name[0] != ".":
                yield os.path.join(root, name)


def _stdlib() -> list[Source]:
    root = sysconfig.get_path("stdlib")
    files = [
        Source(".py", path)
        for path in _walk(root, STDLIB_SKIP)
        if path.endswith(".py")
        and os.path.isfile(path)
        and not STDLIB_LOCAL.fullmatch(os.path.basename(path))
    ]
    if not files:
        raise UserError(f"this Python has no library sources ({root}): name your own text")
    return files


def file_identity(sources: Iterable[Source]) -> list[list[str | int]]:
    """Return path, size and time of every file; equal as long as no file changes."""
    rows: list[list[str | int]] = []
    for kind, name, *_ in sources:
        if kind == "hub":
            rows.append([name])
            continue
        try:
            info = os.stat(name)
        except OSError as error:
            raise UserError(f"cannot read ({name}): {error.strerror}") from None
        rows.append([os.path.abspath(name), info.st_size, info.st_mtime_ns])
    return rows


def without_damaged(sources: Iterable[Source], report: ReadReport) -> list[Source]:
    """Return the sources whose files can be read to the end; add the others to `report`.

    Compressed files and Parquet are read for this test, other files only opened.
    """
    good = []
    for source in sources:
        try:
            if source.kind == ".parquet":
                deque(parquet_rows(source.name), 0)
            elif source.kind != "hub":
                blocks = byte_blocks(source.name)
                deque(blocks if split_suffix(source.name)[1] else islice(blocks, 1), 0)
                blocks.close()
        except UnreadableFile as error:
            report.damaged.append(str(error))
        else:
            good.append(source)
    return good


# ---------------------------------------------------------------------------- the stream


Reader = Callable[[Source, ReadOptions, ReadReport], Iterator[Piece]]


def read(
    sources: Iterable[Source],
    options: ReadOptions,
    report: ReadReport,
    reader: Reader | None = None,
) -> Iterator[Piece]:
    """Yield the documents of `sources` as pieces, except those without a visible character.

    Args:
        sources: what to read.
        options: how to read it.
        report: gets what was replaced or left out.
        reader: reads one source; by default its text.

    Raises:
        UserError: an error in a file, with its byte, line or row.
        IntegrityError: more than 1 % of the records were skipped.
    """
    yield from read_runs(sources, options, report, reader)
    check_skipped(report)


def read_runs(
    sources: Iterable[Source],
    options: ReadOptions,
    report: ReadReport,
    reader: Reader | None = None,
) -> Iterator[Piece]:
    """Yield what `read` does, of sources that are a part of all: the reports are to be added, and
    only then says `check_skipped` whether too many records are bad."""
    for source in sources:
        empty = True
        for piece in (reader or text_pieces)(source, options, report):
            empty = False
            yield piece._replace(spec=source.spec)
        if empty and source.spec != "stdlib":  # many of its modules are empty
            report.without.append(source.name)


def check_skipped(report: ReadReport) -> None:
    """Raise IntegrityError if more than 1 % of the records were skipped."""
    if report.skipped > 0.01 * report.records:
        raise IntegrityError(
            f"{report.skipped} of {report.records} records are bad, more than 1 %: repair the data"
        )


def text_pieces(source: Source, options: ReadOptions, report: ReadReport) -> Generator[Piece]:
    """Yield the documents of one source as pieces."""
    return pieces(_texts(source, options, report), source.before == 0, source.name)


def _texts(source: Source, options: ReadOptions, report: ReadReport) -> Iterator[Piece]:
    """Yield text in parts of any size; an empty first part only starts a document."""
    kind, name, _, extent, before = source
    if kind == "hub" or kind in RECORDS:
        rows = rows_of(kind, name, options, report, extent=extent)
        for text, where in texts_of(rows, options, report):
            report.blank += not text or text.isspace()
            yield Piece(text, True, where)
    elif kind == ".txt" and options.txt_documents == "paragraph":
        yield from _paragraphs(utf8_blocks(name, options, report, extent), name)
    else:
        if not before:
            yield Piece("", True, name)
        for block in utf8_blocks(name, options, report, extent):
            yield Piece(block, False, name)


def pieces(texts: Iterable[Piece], first: bool = True, where: str = "") -> Generator[Piece]:
    """Yield the same text in pieces of at most PIECE characters.

    `first`: whether the text up to the first document's start begins one itself.
    """
    buffer = ""
    for text, begins, place, _ in texts:
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
    """Return the last place within PIECE where white space follows a visible character."""
    end = start + PIECE
    while (space := max(text.rfind(mark, start + 1, end) for mark in " \n\t")) > start:
        run = start + len(text[start:space].rstrip())  # where this white space begins
        if run > start and text[run] in " \n\t":  # rarer spaces are visible to some tokenizers
            return run
        end = run
    return start + PIECE


def _paragraphs(blocks: Iterable[str], where: str) -> Iterator[Piece]:
    """Yield every run of lines between blank lines as a document, without line ends around it."""
    buffer, first = "", True
    for block in blocks:
        *whole, buffer = PARAGRAPH_END.split(buffer + block)
        for text in whole:
            if not first or text:
                yield Piece(_from_first_line(text) if first else text, first, where)
            first = True
        if len(buffer) > PIECE:  # pass on a long paragraph, except white space at its end
            end = len(buffer.rstrip(" \t\n"))
            if len(buffer) - end > PIECE:
                end = len(buffer)
            yield Piece(_from_first_line(buffer[:end]) if first else buffer[:end], first, where)
            buffer, first = buffer[end:], False
    yield Piece((_from_first_line(buffer) if first else buffer).rstrip("\n"), first, where)


def _from_first_line(text: str) -> str:
    """Return text without leading blank lines, but with the indentation of its first line."""
    blank = len(text) - len(text.lstrip(" \t\n"))
    return text[text.rfind("\n", 0, blank) + 1 :]
