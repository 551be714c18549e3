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
from spectral_window.data.formats import ReadOptions, ReadReport
from spectral_window.data.holdout import (
    Part,
    Split,
    Survey,
    choose_split,
    document_key,
    take_survey,
)
from spectral_window.data.sources import Piece, Source, file_identity, find_sources, read
from spectral_window.data.tokenizers import HFTokenizer, bpe_size, load_tokenizer
from spectral_window.errors import UserError

__all__ = ["Corpus", "PackedBlocks", "ShuffledBlocks", "TokenStream", "open_corpus", "prepare"]

SAMPLE = 1 << 26  # bytes of text that train a bpe tokenizer, spread over the corpus
TELL_EVERY = 1 << 20  # bytes of text between two calls of `progress`

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared folder: the `train` and `valid` streams and the `tokenizer` that made them.

    `fingerprint` is the sha256 that names these tokens: equal on every machine and in every folder.
    `index` is what corpus.json says, for example how many characters had to be replaced.
    """

    folder: Path
    train: TokenStream
    valid: TokenStream
    fingerprint: str
    index: dict[str, Any] = field(repr=False)

    @cached_property
    def tokenizer(self) -> HFTokenizer:
        names = [name for name in self.index["files"] if name.startswith("tokenizer/")]
        shards.verify(self.folder, self.index, names)
        return load_tokenizer(str(self.folder / "tokenizer"))

    @property
    def vocab_size(self) -> int:
        """Token ids are below this number: a model needs at least so many embeddings."""
        return self.index["vocab_size"]

    def verify(self) -> None:
        """Compare the sha256 of every file. Raises IntegrityError at the first that differs."""
        shards.verify(self.folder, self.index, self.index["files"])


def open_corpus(folder: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """Open what `prepare` wrote. Sizes are checked always, every byte only with `verify`.

    Raises UserError when nothing is there, IntegrityError when it is not what was written.
    """
    folder = Path(folder)
    index, train, valid = shards.open_folder(folder)
    corpus = Corpus(folder, train, valid, index["fingerprint"], index)
    if verify:
        corpus.verify()
    return corpus


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
      leaves out bad records of .jsonl and .parquet, at most 1 %. The index counts both.
    - `max_bytes`: stop after the document that reaches so many bytes of text. Use it with `hub:`.
    - `overwrite`: replace a folder that was prepared from another request.
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
    train, valid = find_sources(sources), find_sources(valid_sources) if valid_sources else []
    request = {
        "sources": [os.fspath(spec) for spec in sources],
        "valid_sources": [os.fspath(spec) for spec in valid_sources or []],
        "files": shards.digest(file_identity(train + valid)),
        "tokenizer": shards.tokenizer_identity(tokenizer_spec),
        "valid_fraction": valid_fraction,
        "seed": seed,
        "max_bytes": max_bytes,
        **asdict(options),
    }
    if shards.reusable(folder, request, overwrite):
        return open_corpus(folder)

    texts = _Texts(train, valid, options, max_bytes, progress)
    survey = texts.survey(valid_fraction, seed)
    split = Split(seed) if valid else choose_split(survey, valid_fraction, seed)
    if tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_spec, train_texts=texts.sample(split, survey))
    report = ReadReport()
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
    ):
        self.train, self.valid, self.options = train, valid, options
        self.max_bytes, self.progress = max_bytes, progress
        held_out = read(valid, options, ReadReport())
        self.held_out_keys = {document_key(piece.text, 0) for piece in held_out if piece.first}
        if valid and not self.held_out_keys:
            raise UserError("no documents in valid_sources: they hold nothing but white space")

    def training(
        self, stage: str, total: int | None, report: ReadReport | None = None
    ) -> Iterator[tuple[Piece, int]]:
        """The training sources' pieces with their bytes, as far as `max_bytes`."""
        done = told = 0
        for piece in read(self.train, self.options, report or ReadReport()):
            if piece.first:
                if self.max_bytes is not None and done >= self.max_bytes:
                    break
                if self.held_out_keys and document_key(piece.text, 0) in self.held_out_keys:
                    what = f"this held-out text is training text too ({piece.where})"
                    raise UserError(f"{what}: remove it from one, or do not name valid_sources")
            size = len(piece.text.encode())
            yield piece, size
            done += size
            if self.progress and done - told >= TELL_EVERY:
                told = done
                self.progress(stage, done, total)
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
            yield Part("valid", piece.text, piece.first)


def _first(pieces: Iterator[tuple[Piece, int]], stop: int) -> Iterator[tuple[Piece, int]]:
    """The pieces up to `stop` bytes."""
    done = 0
    for piece, size in pieces:
        yield piece, size
        done += size
        if done >= stop:
            return
