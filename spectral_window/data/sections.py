"""The text in sections: where files may be divided, so that several processes read them.

A section is a run of consecutive sources: many small files, or a part of a large one. Borders stand
only where a reader of the whole file has one too, so the documents and pieces of all sections, one
section after another, are those of the whole text:

    .jsonl .ndjson .json   before a line
    .parquet               before a row group
    hub:                   before a shard (a file of the data set)
    .txt .md .py           before a paragraph, where paragraphs are the documents; otherwise a file
                           is one document, and it is divided between two of its pieces

Everything else is read whole: compressed files, CSV (a line end may stand inside quotes), a JSON
array, and a long document with `errors="replace"`. The borders depend on the files and not on the
number of processes.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from spectral_window.data import sources as reading
from spectral_window.data.formats import (
    Extent,
    ReadOptions,
    ReadReport,
    byte_blocks,
    placed_blocks,
)
from spectral_window.data.kinds import split_suffix
from spectral_window.data.records import hub_shards, is_array, parquet_groups
from spectral_window.data.sources import Piece, Source, pieces
from spectral_window.errors import UserError

SECTION = 1 << 24  # bytes of a section, about: seconds of work
MOST = 4096  # sections, about: of more text they are larger
# Two line ends with nothing visible between, after and before something: here a reader ends a
# paragraph, wherever it began to read.
PARAGRAPH_BORDER = re.compile(rb"[^ \t\r\n]\r?\n[ \t]*\r?\n(?=[^ \t\r\n])")


class Section(NamedTuple):
    """A run of the text.

    Attributes:
        split: "train" or "valid": of which sources it is.
        sources: files, and runs of files.
        limit: bytes of text after which no document begins; None for no limit.
    """

    split: str
    sources: tuple[Source, ...]
    limit: int | None = None

    def __str__(self) -> str:
        first, last = self.sources[0], self.sources[-1]
        if len(self.sources) > 1:
            return f"{len(self.sources)} files, {first.name} to {last.name}"
        start, stop, _ = first.extent
        if not start and stop is None:
            return first.name
        unit = {".parquet": "row groups", "hub": "shards"}.get(first.kind, "bytes")
        return f"{first.name}, {unit} {start:,} to {'the end' if stop is None else f'{stop:,}'}"


def hub_share(spec: str, part: int, parts: int) -> Extent:
    """Return the shards of a data set that one of several readers takes, in the order of the whole.

    Every shard is of one reader; of more readers than shards some have none. Reader `worker` of
    `workers` in process `rank` of `world` is part `rank * workers + worker` of `world * workers`.

    Raises:
        UserError: no such part, or no such data set.
        NetworkError: the hub did not answer.
    """
    if parts < 1 or not 0 <= part < parts:
        raise UserError(f"part {part} of {parts}: parts count from 0")
    shards = hub_shards(spec)
    return Extent(shards * part // parts, shards * (part + 1) // parts)


def hub_sections(split: str, sources: Iterable[Source]) -> list[Section]:
    """Return a section of each shard of the data sets, and of each of the files, in order."""
    sections = []
    for source in sources:
        shards = hub_shards(source.name) if source.kind == "hub" else 1
        if shards < 2:
            sections.append(Section(split, (source,)))
            continue
        for part in range(shards):
            run = source._replace(extent=Extent(part, part + 1))
            sections.append(Section(split, (run,)))
    return sections


def sections_of(split: str, sources: Iterable[Source], options: ReadOptions) -> list[Section]:
    """Return the sections of `sources`, in order.

    Large files are read once for this, without decoding them if they hold records.

    Raises:
        UserError: an error in a file that is divided.
    """
    sources = list(sources)
    sizes = [0 if source.kind == "hub" else os.path.getsize(source.name) for source in sources]
    target = max(SECTION, sum(sizes) // MOST)
    sections: list[Section] = []
    run: list[Source] = []
    held = 0
    for source, size in zip(sources, sizes, strict=True):
        for part, bytes_ in _divided(source, size, options, target):
            run.append(part)
            held += bytes_
            if held >= target:
                sections.append(Section(split, tuple(run)))
                run, held = [], 0
    return [*sections, Section(split, tuple(run))] if run else sections


def _divided(
    source: Source, size: int, options: ReadOptions, every: int
) -> Iterator[tuple[Source, int]]:
    """Yield the runs of a source, of about `every` bytes, with their bytes."""
    kind, name = source.kind, source.name
    if size < 2 * every or split_suffix(name)[1]:
        yield source, size
    elif kind == ".parquet":
        yield from _row_groups(source, every)
    elif kind in (".jsonl", ".ndjson", ".json") and not is_array(kind, name):
        yield from _runs(source, size, _line_borders(name, every))
    elif kind not in (".txt", ".md", ".py"):
        yield source, size
    elif kind == ".txt" and options.txt_documents == "paragraph":
        yield from _runs(source, size, _paragraph_borders(name, every))
    elif options.errors == "strict":
        yield from _runs(source, size, _piece_borders(name, options, every))
    else:  # replaced characters are counted by run, but stand where a piece cannot see them
        yield source, size


class _Border(NamedTuple):
    """A place in a file: its byte, the lines before it, the bytes of its document before it."""

    at: int
    lines: int = 0
    before: int = 0


def _runs(source: Source, size: int, borders: Iterable[_Border]) -> Iterator[tuple[Source, int]]:
    """Yield the runs of a file between its start, the borders and its end."""
    begin = _Border(0)
    for border in borders:
        if border.at >= size:
            break
        extent = Extent(begin.at, border.at, begin.lines)
        yield source._replace(extent=extent, before=begin.before), border.at - begin.at
        begin = border
    extent = Extent(begin.at, None, begin.lines)
    yield source._replace(extent=extent, before=begin.before), size - begin.at


def _line_borders(path: str, every: int) -> Iterator[_Border]:
    """Yield the start of a line, about every so many bytes."""
    at = lines = 0
    wanted = every
    for block in byte_blocks(path):
        begin = 0
        while (end := block.find(b"\n", max(begin, wanted - at))) >= 0:
            lines += block.count(b"\n", begin, end + 1)
            begin = end + 1
            yield _Border(at + begin, lines)
            wanted = at + begin + every
        lines += block.count(b"\n", begin)
        at += len(block)


def _paragraph_borders(path: str, every: int) -> Iterator[_Border]:
    at, wanted = 0, every
    for block in byte_blocks(path):
        while found := PARAGRAPH_BORDER.search(block, max(0, wanted - at)):
            yield _Border(at + found.end())
            wanted = at + found.end() + every
        at += len(block)


def _piece_borders(path: str, options: ReadOptions, every: int) -> Iterator[_Border]:
    """Yield the start of a piece of a file that is one document.

    The next piece begins where the one before ends, so they are cut here one after another, which
    is quick beside the work on them.
    """
    recent: deque[tuple[int, int, str]] = deque()  # characters before a block, its byte, its text

    def texts() -> Iterator[Piece]:
        done = 0
        yield Piece("", True, path)
        for place, text in placed_blocks(path, options, ReadReport()):
            recent.append((done, place, text))
            text = text.replace("\r\n", "\n")
            done += len(text)
            yield Piece(text, False, path)

    characters = before = latest = 0
    wanted = every
    for piece in pieces(texts()):
        previous, latest = latest, len(piece.text)
        characters += latest
        before += len(piece.text.encode())
        while len(recent) > 1 and recent[1][0] <= characters:
            recent.popleft()
        # A run that ends with less than a piece's characters behind its last border but one would
        # be cut there otherwise than the whole text.
        if before < wanted or previous + latest <= reading.PIECE or not previous:
            continue
        start, place, text = recent[0]
        yield _Border(place + _bytes_of(text, characters - start), before=before)
        wanted = before + every


def _bytes_of(text: str, characters: int) -> int:
    """Return the bytes of the first characters of a text, where a CRLF is one of them."""
    size = 0
    for line in text.split("\r\n"):
        if characters <= len(line):
            return size + len(line[:characters].encode())
        size += len(line.encode()) + 2
        characters -= len(line) + 1
    return size


def _row_groups(source: Source, every: int) -> Iterator[tuple[Source, int]]:
    """Yield runs of whole row groups."""
    begin = rows = rows_before = held = number = 0
    groups = parquet_groups(source.name)
    for number, (count, size) in enumerate(groups, 1):
        rows, held = rows + count, held + size
        if held >= every or number == len(groups):
            extent = Extent(begin, None if number == len(groups) else number, rows_before)
            yield source._replace(extent=extent), held
            begin, rows_before, held = number, rows, 0
    if not number:
        yield source, 0
