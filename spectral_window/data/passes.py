"""What is done with the text, a section at a time: survey, sample, tokens.

Each is a function of a module over what can be pickled, so that it runs in any process; the results
of the sections together, in order, are those of the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectral_window.data import shards
from spectral_window.data.chat import code_conversations
from spectral_window.data.formats import SHOWN, WHOLE, ReadOptions, ReadReport
from spectral_window.data.holdout import Part, Split, Survey, document_key, take_survey
from spectral_window.data.sections import Section
from spectral_window.data.sources import Piece, Reader, read_runs, text_pieces
from spectral_window.data.tokenizers import HFTokenizer, vocabulary_size

TICK = 1 << 20  # bytes of text between two calls of a `tick`

Tick = Callable[[int], None]  # of the bytes done


@dataclass(frozen=True)
class Text:
    """How the text is read.

    Attributes:
        options: of reading.
        held_out: the keys of documents of the held-out sources, ascending; every process has
            them all, 8 bytes for each document.
        reader: reads one source; by default its text.
    """

    options: ReadOptions
    held_out: np.ndarray = field(default_factory=lambda: held_out_keys(()))
    reader: Reader | None = None

    def training(
        self, section: Section, report: ReadReport, tick: Tick | None = None
    ) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces of a section with their bytes, without documents that are held out."""
        ticked = report.bytes
        begun = self.begun(section)
        include = not (begun and self.holds_out(begun))
        for piece in read_runs(section.sources, self.options, report, self.reader):
            if piece.first:
                if section.limit is not None and report.bytes >= section.limit:
                    break
                report.documents += 1
                include = not self.holds_out(piece.text)
                if not include:
                    report.shared += 1
                    report.shared_at += [piece.where][: SHOWN - len(report.shared_at)]
            if not include:
                continue
            size = len(piece.text.encode())
            yield piece, size
            report.bytes += size
            if tick and report.bytes - ticked >= TICK:
                ticked = report.bytes
                tick(ticked)

    def holds_out(self, first_piece: str) -> bool:
        """Return whether a document with this first piece is held out."""
        if not len(self.held_out):
            return False
        key = np.uint64(document_key(first_piece, 0))
        at = int(self.held_out.searchsorted(key))
        return at < len(self.held_out) and bool(self.held_out[at] == key)

    def begun(self, section: Section) -> str:
        """Return the first piece of the document that a section continues, "" if none."""
        source = section.sources[0]
        if not source.before:
            return ""
        whole = source._replace(extent=WHOLE, before=0)
        with closing(text_pieces(whole, self.options, ReadReport())) as read:
            return next(read).text


def held_out_keys(documents: Iterable[Piece]) -> np.ndarray:
    """Return what `Text` takes as `held_out`, of pieces of the held-out sources."""
    numbers = (document_key(piece.text, 0) for piece in documents if piece.first)
    keys = np.fromiter(numbers, np.uint64)
    keys.sort()
    return keys


def survey_section(
    text: Text,
    fraction: float,
    seed: int,
    section: Section,
    *,
    stop: int | None = None,
    tick: Tick | None = None,
) -> tuple[ReadReport, Survey]:
    """Read a section for the first time; finds most faults before anything is written.

    Args:
        text: how it is read.
        fraction: of the text, which is held out.
        seed: of what is held out.
        section: what is read.
        stop: bytes after which to stop.
        tick: called now and then.
    """
    report = ReadReport()
    return report, take_survey(text.training(section, report, tick), fraction, seed, stop)


def sample(
    text: Text,
    split: Split,
    share: float,
    section: Section,
    *,
    before: int = 0,
    stop: int | None = None,
    tick: Tick | None = None,
) -> Iterator[str]:
    """Yield pieces of the training split, spread evenly over the text.

    Args:
        text: how it is read.
        split: what is held out.
        share: the part of the pieces that is wanted.
        section: what is read.
        before: pieces of the text before the section.
        stop: bytes after which to stop.
        tick: called now and then.
    """
    report = ReadReport()
    parts = _assigned(text, split, section, report, stop, tick)
    for i, part in enumerate(parts, before):
        if part.split == "train" and int((i + 1) * share) > int(i * share):
            yield part.text


class SampleTask(NamedTuple):
    """A section, and how many pieces stand before it."""

    section: Section
    before: int

    def __str__(self) -> str:
        return str(self.section)


def sample_section(text: Text, split: Split, share: float, task: tuple[Section, int]) -> list[str]:
    """Return the sample of a section, given with the pieces before it."""
    section, before = task
    return list(sample(text, split, share, section, before=before))


def code_section(
    text: Text,
    split: Split,
    tokenizer: HFTokenizer,
    chat: int | None,
    section: Section,
    report: ReadReport,
    tick: Tick | None = None,
) -> Iterator[shards.Coded]:
    """Yield the tokens of a section.

    Args:
        text: how it is read.
        split: what is held out.
        tokenizer: makes the tokens.
        chat: tokens in a row of conversations; None for text.
        section: what is read.
        report: gets what was replaced or left out.
        tick: called now and then.
    """
    if section.split == "valid":
        pieces = read_runs(section.sources, text.options, report, text.reader)
        parts: Iterator[Part] = (
            Part("valid", piece.text, piece.first, piece.spec) for piece in pieces
        )
    else:
        parts = _assigned(text, split, section, report, None, tick)
    if chat is None:
        return shards.code_texts(parts, tokenizer)
    return code_conversations(parts, tokenizer, chat, report)


class SectionTask(NamedTuple):
    """A section, and the folder for its tokens."""

    section: Section
    folder: Path

    def __str__(self) -> str:
        return str(self.section)


def write_section(
    text: Text,
    split: Split,
    tokenizer: HFTokenizer,
    chat: int | None,
    task: SectionTask,
) -> tuple[ReadReport, shards.Written]:
    """Write the tokens of a section to the given folder, unless they are there."""
    section, folder = task
    written = shards.open_section(folder)
    if written is None:
        report = ReadReport()
        codes = code_section(text, split, tokenizer, chat, section, report)
        dtype = shards.dtype_of(vocabulary_size(tokenizer))
        written = shards.write_section(folder, codes, dtype, report)
    return written.report, written


def _assigned(
    text: Text,
    split: Split,
    section: Section,
    report: ReadReport,
    stop: int | None,
    tick: Tick | None,
) -> Iterator[Part]:
    pieces = text.training(section, report, tick)
    if stop is not None:
        pieces = _first(pieces, stop)
    return split.assign(pieces, text.begun(section), section.sources[0].before)


def _first(pieces: Iterator[tuple[Piece, int]], stop: int) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces up to `stop` bytes."""
    done = 0
    for piece, size in pieces:
        yield piece, size
        done += size
        if done >= stop:
            return
