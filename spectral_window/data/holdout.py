"""Which text is held out for evaluation.

A document goes to one side whole, by a hash of its first piece (`sources.PIECE` characters) and a
seed: to add documents moves no other, and equal documents never land on both sides. Two cases need
more than chance:

- chance held out none (or all) of a few documents: the one whose size is nearest to the wanted
  share is held out;
- there is only one document (or copies of one): its end is held out, from the start of a paragraph.

Whoever names the held-out text (`valid_sources`) gets exactly that, and an error if a document is
in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from spectral_window.data.sources import Piece
from spectral_window.errors import UserError

FEW = 10_000  # documents whose size is remembered, to choose one of a few
KEYS = 1 << 64


class Part(NamedTuple):
    """A piece on its side: `split` is "train" or "valid", `spec` its source's."""

    split: str
    text: str
    first: bool
    spec: str = ""


@dataclass
class Survey:
    """What a first reading of the training sources found. `complete` is False if it stopped early
    (a hub data set)."""

    documents: int = 0
    bytes: int = 0
    below: int = 0  # documents that chance holds out
    complete: bool = True
    few: list[tuple[int, int]] = field(default_factory=list)  # (key, bytes) of the first documents

    def add(self, piece: Piece, size: int, key: int, threshold: int) -> None:
        if piece.first:
            self.documents += 1
            self.below += key < threshold
            if self.documents <= FEW:
                self.few.append((key, 0))
        if self.documents <= FEW:
            self.few[-1] = (self.few[-1][0], self.few[-1][1] + size)
        self.bytes += size


class Split(NamedTuple):
    """A rule that puts every document on one side. Documents below `threshold` or equal to `chosen`
    are held out; with `cut_after` every document's text after so many bytes is."""

    seed: int
    threshold: int = 0
    chosen: int = -1
    cut_after: int = 0

    def side(self, first_piece: str) -> str:
        """Where the document that begins with this piece begins."""
        if self.cut_after:
            return "train"
        key = document_key(first_piece, self.seed)
        return "valid" if key < self.threshold or key == self.chosen else "train"

    def assign(self, pieces: Iterable[tuple[Piece, int]]) -> Iterator[Part]:
        """Each piece (with its bytes) on its side; of a document that is cut, both parts begin as
        documents."""
        split, done = "train", 0
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
    """A number below KEYS, the same for equal beginnings."""
    content = f"{seed}\0{first_piece}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def take_survey(
    pieces: Iterable[tuple[Piece, int]], fraction: float, seed: int, stop: int | None = None
) -> Survey:
    """Read the training pieces (with their bytes) once, up to `stop` bytes if given. Raises
    UserError if there are none."""
    survey, threshold = Survey(), int(fraction * KEYS)
    for piece, size in pieces:
        if stop is not None and survey.bytes >= stop:
            survey.complete = False
            break
        survey.add(piece, size, document_key(piece.text, seed) if piece.first else 0, threshold)
    if not survey.documents:
        raise UserError("no documents: the sources hold nothing but white space")
    return survey


def choose_split(survey: Survey, fraction: float, seed: int) -> Split:
    """What is held out of the surveyed text: see the module's text."""
    if 0 < survey.below < survey.documents or not survey.complete:
        return Split(seed, int(fraction * KEYS))
    if len({key for key, _ in survey.few}) > 1:
        wanted = fraction * survey.bytes
        key, _ = min(survey.few, key=lambda document: (abs(document[1] - wanted), document))
        return Split(seed, chosen=key)
    size = survey.few[0][1]
    return Split(seed, cut_after=max(1, min(round((1 - fraction) * size), size - 1)))


def paragraph_near(text: str, at: int) -> int:
    """The start of the paragraph nearest to character `at`, else of a line, else of a word, else
    `at`; never a place with nothing to see on one side, if there is another."""
    at = min(max(at, 1), max(len(text) - 1, 1))
    for mark in ("\n\n", "\n", " "):
        places = [text.rfind(mark, 0, at), text.find(mark, at)]
        ends = [place + len(mark) for place in places if place >= 0]
        ends = [end for end in ends if text[:end].strip() and text[end:].strip()]
        if ends:
            return min(ends, key=lambda end: abs(end - at))
    return at
