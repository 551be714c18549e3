"""The choice of the text that is held out for evaluation.

Each document belongs to one split as a whole, chosen by a hash of its first piece (`sources.PIECE`
characters) and a seed. So adding documents moves no other document, and equal documents are never
in both splits. Two cases need another rule:

- if none (or all) of a few documents would be held out, the one whose size is nearest to the target
  fraction is held out;
- if there is only one document (or copies of one), its end is held out, from the start of a
  paragraph.

If the held-out text is named (`valid_sources`), exactly that is held out, and a document in both is
an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from spectral_window.data.sources import Piece

FEW = 10_000  # documents whose size is stored, to choose one of a few
KEYS = 1 << 64


class Part(NamedTuple):
    """A piece of text with its split, "train" or "valid", and the `spec` of its source."""

    split: str
    text: str
    first: bool
    spec: str = ""


@dataclass
class Survey:
    """Statistics of the training sources, from the first reading.

    Attributes:
        documents: number of documents.
        bytes: bytes of text.
        pieces: pieces of text.
        head: bytes of text before the first document begins, of one that began earlier.
        below: documents that the hash holds out.
        complete: False if the reading stopped early (a hub data set).
        few: (key, bytes) of the first documents, until the hash divides them: then nobody asks.
    """

    documents: int = 0
    bytes: int = 0
    pieces: int = 0
    head: int = 0
    below: int = 0
    complete: bool = True
    few: list[tuple[int, int]] = field(default_factory=list)

    @property
    def divided(self) -> bool:
        """Whether the hash holds out some documents, and not all."""
        return 0 < self.below < self.documents

    def add(self, piece: Piece, size: int, key: int, threshold: int) -> None:
        if piece.first:
            self.documents += 1
            self.below += key < threshold
            if self.documents <= FEW:
                self.few.append((key, 0))
        self._lengthen(size)
        self.bytes += size
        self.pieces += 1

    def follow(self, other: Survey) -> None:
        """Add the survey of the text that follows."""
        self._lengthen(other.head)
        self.few += other.few[: FEW - len(self.few)]
        self.documents += other.documents
        self.below += other.below
        self.bytes += other.bytes
        self.pieces += other.pieces
        self.complete &= other.complete
        if self.divided:
            self.few.clear()

    def _lengthen(self, size: int) -> None:
        """Add bytes to the latest document."""
        if not self.documents:
            self.head += size
        elif self.divided:
            self.few.clear()
        elif self.documents <= FEW:
            self.few[-1] = (self.few[-1][0], self.few[-1][1] + size)


class Split(NamedTuple):
    """The rule that assigns every document to a split.

    Documents with a key below `threshold` or equal to `chosen` are held out; with `cut_after`, the
    text of every document after that many bytes.
    """

    seed: int
    threshold: int = 0
    chosen: int = -1
    cut_after: int = 0

    def side(self, first_piece: str) -> str:
        """Return the split of the start of a document with this first piece."""
        if self.cut_after:
            return "train"
        key = document_key(first_piece, self.seed)
        return "valid" if key < self.threshold or key == self.chosen else "train"

    def assign(
        self, pieces: Iterable[tuple[Piece, int]], begun: str = "", done: int = 0
    ) -> Iterator[Part]:
        """Yield each piece (given with its bytes) with its split.

        Of a document that is cut, both parts start as documents.

        Args:
            pieces: the pieces.
            begun: the first piece of a document that began before them.
            done: the bytes of that document before them.
        """
        split = self.side(begun)
        if self.cut_after and done > self.cut_after:
            split = "valid"
        for (text, first, _, spec), size in pieces:
            if first:
                split, done = self.side(text), 0
            end, done = self.cut_after - done, done + size
            if self.cut_after and split == "train" and size > end:
                cut = paragraph_near(text, len(text.encode()[:end].decode(errors="ignore")))
                yield Part("train", text[:cut], first, spec)
                split, text, first = "valid", text[cut:], True
            if text:
                yield Part(split, text, first, spec)


def document_key(first_piece: str, seed: int) -> int:
    """Return a number below KEYS that depends on the first piece and the seed."""
    content = f"{seed}\0{first_piece}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def take_survey(
    pieces: Iterable[tuple[Piece, int]], fraction: float, seed: int, stop: int | None = None
) -> Survey:
    """Read the training pieces (given with their bytes) once, up to `stop` bytes."""
    survey, threshold = Survey(), int(fraction * KEYS)
    for piece, size in pieces:
        if stop is not None and survey.bytes >= stop:
            survey.complete = False
            break
        survey.add(piece, size, document_key(piece.text, seed) if piece.first else 0, threshold)
    return survey


def choose_split(survey: Survey, fraction: float, seed: int) -> Split:
    """Return the rule for the surveyed text (see the module's docstring)."""
    if survey.divided or not survey.complete:
        return Split(seed, int(fraction * KEYS))
    if len({key for key, _ in survey.few}) > 1:
        target = fraction * survey.bytes
        key, _ = min(survey.few, key=lambda document: (abs(document[1] - target), document))
        return Split(seed, chosen=key)
    size = survey.few[0][1]
    return Split(seed, cut_after=max(1, min(round((1 - fraction) * size), size - 1)))


def paragraph_near(text: str, at: int) -> int:
    """Return the start of the paragraph nearest to character `at`.

    If there is none, the start of a line, else of a word, else `at`. A place with only white space
    on one side is avoided.
    """
    at = min(max(at, 1), max(len(text) - 1, 1))
    for mark in ("\n\n", "\n", " "):
        places = [text.rfind(mark, 0, at), text.find(mark, at)]
        ends = [place + len(mark) for place in places if place >= 0]
        ends = [end for end in ends if text[:end].strip() and text[end:].strip()]
        if ends:
            return min(ends, key=lambda end: abs(end - at))
    return at
