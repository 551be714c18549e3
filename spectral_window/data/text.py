"""From text to tokens on disk, and back: `prepare` and `open_corpus`.

`prepare` reads the sources (sources.py), decides what is held out (holdout.py), gets or trains the
tokenizer (tokenizers.py) and writes a folder of tokens (shards.py). Every document in it is
`<|endoftext|>` and its tokens, so a model also learns where documents end, and no token of the
stream is without use as a label.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from spectral_window.data import shards
from spectral_window.data.blocks import PackedBlocks, ShuffledBlocks, TokenStream
from spectral_window.data.formats import SHOWN, ReadOptions, ReadReport, some
from spectral_window.data.holdout import (
    Part,
    Split,
    Survey,
    choose_split,
    document_key,
    take_survey,
)
from spectral_window.data.sources import (
    Piece,
    Source,
    file_identity,
    find_sources,
    read,
    without_damaged,
)
from spectral_window.data.tokenizers import HFTokenizer, bpe_size, load_tokenizer
from spectral_window.errors import IntegrityError, UserError

__all__ = ["Corpus", "PackedBlocks", "ShuffledBlocks", "TokenStream", "open_corpus", "prepare"]

SAMPLE = 1 << 26  # bytes of text that train a bpe tokenizer, spread over the corpus
LISTED = 10  # sources that the summary mentions
TELL_EVERY = 1 << 20  # bytes of text between two calls of `progress`

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared folder: the `train` and `valid` streams and the `tokenizer` that made them.

    `fingerprint` is the sha256 that names these tokens: equal on every machine and in every folder.
    `index` is what corpus.json says, for example how many characters had to be replaced; `notes`
    are lines worth telling.
    """

    folder: Path
    train: TokenStream
    valid: TokenStream
    fingerprint: str
    index: dict[str, Any] = field(repr=False)
    notes: list[str] = field(repr=False)

    @cached_property
    def tokenizer(self) -> HFTokenizer:
        return load_tokenizer(str(self.folder / "tokenizer"))

    @property
    def vocab_size(self) -> int:
        """Token ids are below this number: a model needs at least so many embeddings."""
        return self.index["vocab_size"]

    def sizes(self) -> dict[str, Any]:
        """Documents, bytes of text and tokens of each split, and of each source in it."""
        splits = {name: dict(self.index["splits"][name]) for name in shards.SPLITS}
        return {**splits, "sources": self.index.get("sources", [])}

    def summary(self) -> list[str]:
        """The same and the notes as lines."""
        rows = self.sizes()["sources"]
        lines = []
        for split in shards.SPLITS:
            lines.append(f"{split}: {_counted(self.index['splits'][split])}")
            given = [row for row in rows if row["split"] == split]
            if len(given) > 1:
                lines += [f"  {row['source']}: {_counted(row)}" for row in given[:LISTED]]
            if len(given) > LISTED:
                where = self.folder / shards.INDEX
                lines.append(f"  and {len(given) - LISTED:,} more sources ({where})")
        return [*lines, *self.index.get("notes", []), *self.notes]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in shards.COUNTS)


def open_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Open what `prepare` wrote, after every byte was compared with the sha256 of its file.

    Raises UserError when nothing is there, IntegrityError naming the file that is not what was
    written. The tokens raise it later too, when they change while they are in use.
    """
    folder = Path(folder)
    index, train, valid, notes = shards.open_folder(folder)
    return Corpus(folder, train, valid, index["fingerprint"], index, notes)


def prepare(
    sources: list[str],
    tokenizer_spec: str,
    folder: str | os.PathLike[str],
    *,
    valid_fraction: float = 0.02,
    valid_sources: list[str] | None = None,
    seed: int = 0,
    txt_documents: str = "file",
    errors: str = "strict",
    skip_bad: bool = False,
    drop_shared: bool = False,
    max_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Turn `sources` into a folder of tokens, and open it.

    A second call with the same request and unchanged files opens what is there. Memory is constant
    in the size of the text, which is read twice, and once more to train a tokenizer.

    - `tokenizer_spec`: see `load_tokenizer`; `bpe:N` learns from the training split only, from at
      most 64 MiB of it.
    - `valid_fraction`: how much to hold out, above 0 and below 1. `valid_sources` names the
      held-out text instead.
    - `seed`: changes which documents are held out, nothing else.
    - `txt_documents`: "file", or "paragraph" when .txt files are many texts between blank lines.
    - `errors`: "strict", or "replace" to read U+FFFD where the bytes are not UTF-8. `skip_bad`
      leaves out bad records, at most 1 %, and whole files that are damaged or gone. `drop_shared`
      leaves out training documents that `valid_sources` hold too, else an error. The index counts
      all of them.
    - `max_bytes`: stop after the document that reaches so many bytes of text. Use it with `hub:`.
    - `overwrite`: replace a folder that was prepared from another request, or is damaged.
    - `progress(stage, done, total)`: bytes of text; the stages are "reading", "tokenizer" (bpe
      only) and "tokens"; total is None while unknown.

    Raises UserError (bad input, a split without text, the folder holds something else),
    NetworkError, or ResourceError (disk full). After any of them, and after Ctrl-C, the folder is
    as it was.
    """
    folder = Path(folder)
    options = ReadOptions(txt_documents, errors, skip_bad)
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction is {valid_fraction}: give a number between 0 and 1")
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes is {max_bytes}: give at least 1, or None for all")
    tokenizer = None
    if tokenizer_spec.startswith("bpe:"):
        bpe_size(tokenizer_spec)  # a bad size is an error before anything is read
    else:
        tokenizer = load_tokenizer(tokenizer_spec)
    notes: list[str] = []
    train = find_sources(sources, notes)
    valid = find_sources(valid_sources, notes) if valid_sources else []
    request = {
        "sources": [os.fspath(spec) for spec in sources],
        "valid_sources": [os.fspath(spec) for spec in valid_sources or []],
        "files": shards.digest(file_identity(train + valid)),
        "tokenizer": shards.tokenizer_identity(tokenizer_spec),
        "valid_fraction": valid_fraction,
        "seed": seed,
        "max_bytes": max_bytes,
        **asdict(options),
        **({"drop_shared": True} if drop_shared else {}),  # folders older than it stay the same
    }
    if shards.reusable(folder, request, overwrite):
        try:
            return open_corpus(folder)
        except IntegrityError:
            if not overwrite:
                raise

    texts = _Texts(train, valid, options, max_bytes, progress, drop_shared)
    survey = texts.survey(valid_fraction, seed)
    split = Split(seed) if valid else choose_split(survey, valid_fraction, seed)
    if tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_spec, train_texts=texts.sample(split, survey))
    report = ReadReport(notes=notes, damaged=texts.damaged)
    shards.write_folder(folder, texts.parts(split, survey, report), tokenizer, request, report)
    return open_corpus(folder)


class _Texts:
    """The text of both splits, to be read as often as needed."""

    def __init__(
        self,
        train: list[Source],
        valid: list[Source],
        options: ReadOptions,
        max_bytes: int | None,
        progress: Progress | None,
        drop_shared: bool = False,
    ):
        self.identity = file_identity(train + valid)
        report = ReadReport()
        if options.skip_bad:
            train, valid = without_damaged(train, report), without_damaged(valid, report)
        self.damaged = report.damaged
        self.train, self.valid, self.options = train, valid, options
        self.max_bytes, self.progress, self.drop_shared = max_bytes, progress, drop_shared
        held_out = read(valid, options, ReadReport())
        self.held_out_keys = {document_key(piece.text, 0) for piece in held_out if piece.first}
        if valid and not self.held_out_keys:
            raise UserError("no documents in valid_sources: they hold nothing but white space")

    def training(
        self, stage: str, total: int | None, report: ReadReport | None = None
    ) -> Iterator[tuple[Piece, int]]:
        """The training sources' pieces with their bytes, as far as `max_bytes`."""
        done = told = documents = 0
        shared: list[str] = []  # where documents of the held-out text are met
        kept = True
        report = report or ReadReport()
        for piece in read(self.train, self.options, report):
            if piece.first:
                if self.max_bytes is not None and done >= self.max_bytes:
                    break
                documents += 1
                kept = document_key(piece.text, 0) not in self.held_out_keys
                if not kept:
                    report.shared += 1
                    shared += [piece.where][: SHOWN - len(shared)]
            if not kept:
                continue
            size = len(piece.text.encode())
            yield piece, size
            done += size
            if self.progress and done - told >= TELL_EVERY:
                told = done
                self.progress(stage, done, total)
        if report.shared and (not self.drop_shared or report.shared == documents):
            what = f"held-out text is training text too, documents: {some(shared, report.shared)}"
            todo = "remove them from one, or leave them out of training with drop_shared=true"
            if self.drop_shared:
                todo = "no other document is left to learn from; name other text"
            raise UserError(f"{what}: {todo}")
        if self.progress:
            self.progress(stage, done, done)

    def survey(self, fraction: float, seed: int) -> Survey:
        """A first reading, that also finds most faults before anything is written."""
        remote = any(source.kind == "hub" for source in self.train)
        pieces = self.training("reading", self.max_bytes)
        return take_survey(pieces, fraction, seed, stop=SAMPLE if remote else None)

    def sample(self, split: Split, survey: Survey) -> Iterator[str]:
        """At most SAMPLE bytes of the training split, spread over the text that was surveyed."""
        share = min(1.0, SAMPLE / survey.bytes)
        pieces = self.training("tokenizer", survey.bytes)
        if not survey.complete:
            pieces = _first(pieces, survey.bytes)
        for i, part in enumerate(split.assign(pieces)):
            if part.split == "train" and int((i + 1) * share) > int(i * share):
                yield part.text

    def parts(self, split: Split, survey: Survey, report: ReadReport) -> Iterator[Part]:
        """All text, piece by piece, on its side."""
        total = survey.bytes if survey.complete else self.max_bytes
        yield from split.assign(self.training("tokens", total, report))
        for piece in read(self.valid, self.options, report):
            yield Part("valid", piece.text, piece.first, piece.spec)
        known = set(map(tuple, self.identity))
        now = file_identity([*self.train, *self.valid])
        changed = [row[0] for row in now if tuple(row) not in known]
        if changed:
            raise UserError(f"changed while it was read ({changed[0]}): prepare the text again")


def _first(pieces: Iterator[tuple[Piece, int]], stop: int) -> Iterator[tuple[Piece, int]]:
    """The pieces up to `stop` bytes."""
    done = 0
    for piece, size in pieces:
        yield piece, size
        done += size
        if done >= stop:
            return
