"""From text to tokens on disk, and back: `prepare` and `open_corpus`.

`prepare` reads the sources (sources.py), selects the held-out text (holdout.py), loads or trains
the tokenizer (tokenizers.py) and writes a folder of tokens (shards.py). Every document in it is
`<|endoftext|>` followed by its tokens. So a model also learns where documents end, and every token
of the stream serves as a label.
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
from spectral_window.data.chat import (
    add_chat,
    code_conversations,
    conversation_pieces,
    role_ids,
    turns,
)
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
    Reader,
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
LISTED = 10  # sources that the summary lists
PROGRESS_EVERY = 1 << 20  # bytes of text between two calls of `progress`

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared folder: the `train` and `valid` streams, and their `tokenizer`.

    Attributes:
        folder: the folder.
        train: the tokens to train on.
        valid: the held-out tokens.
        fingerprint: a SHA-256 that identifies these tokens, on every machine and in every folder.
        index: the content of corpus.json, for example how many characters were replaced.
        notes: messages for the user.
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
        """The number of embeddings that a model needs: all token ids are below it."""
        return self.index["vocab_size"]

    def sizes(self) -> dict[str, Any]:
        """Return documents, bytes of text and tokens of each split, and of each source in it."""
        splits = {name: dict(self.index["splits"][name]) for name in shards.SPLITS}
        return {**splits, "sources": self.index.get("sources", [])}

    def summary(self) -> list[str]:
        """Return `sizes()` and the notes as lines of text."""
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
    """Open a prepared folder, after checking every file against its SHA-256.

    Raises:
        UserError: there is no prepared folder.
        IntegrityError: a file has changed. The tokens raise it later too, if their file changes
            while it is in use.
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
    chat: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize `sources` into a folder, and open it.

    A second call with the same request and unchanged files opens the existing folder. The memory
    does not depend on the size of the text, which is read twice, and once more to train a
    tokenizer.

    Args:
        sources: files, folders, globs, "stdlib" or "hub:NAME" (see sources.py).
        tokenizer_spec: see `load_tokenizer`; `bpe:N` is trained on at most 64 MiB of the training
            split.
        folder: the destination.
        valid_fraction: the fraction to hold out, above 0 and below 1.
        valid_sources: the held-out text, instead of a fraction.
        seed: changes which documents are held out, and nothing else.
        txt_documents: "file", or "paragraph" if .txt files hold many texts between blank lines.
        errors: "strict", or "replace" to read U+FFFD for bytes that are not UTF-8.
        skip_bad: leave out bad records, at most 1 %, and whole files that are damaged or gone.
        drop_shared: leave out training documents that are in `valid_sources` too; without it they
            are an error. The index counts all that is replaced or left out.
        max_bytes: stop after the document that reaches this many bytes of text, for `hub:`.
        chat: the sources hold conversations (see chat.py), which become documents for rows of this
            many tokens; the tokenizer gets the tokens of conversations that it lacks.
        overwrite: replace a folder that was prepared by another request, or is damaged.
        progress: called as `progress(stage, done, total)` in bytes of text; the stages are
            "reading", "tokenizer" (for bpe) and "tokens"; total is None while unknown.

    Raises:
        UserError: bad input, a split without text, or a folder with other content.
        NetworkError: the hub did not answer.
        ResourceError: the disk is full. After any error, and after Ctrl-C, the folder is as it was.
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
        # folders older than these stay the same
        **({"drop_shared": True} if drop_shared else {}),
        **({} if chat is None else {"chat": chat}),
    }
    if shards.reusable(folder, request, overwrite):
        try:
            return open_corpus(folder)
        except IntegrityError:
            if not overwrite:
                raise

    reader = None if chat is None else conversation_pieces
    texts = _Texts(train, valid, options, max_bytes, progress, drop_shared, reader)
    survey = texts.survey(valid_fraction, seed)
    split = Split(seed) if valid else choose_split(survey, valid_fraction, seed)
    if chat is not None and split.cut_after:
        raise UserError(
            f"one conversation ({train[0].name}): give a second one to hold out, or name valid"
        )
    if tokenizer is None:
        sample = texts.sample(split, survey)
        if chat is not None:
            sample = (content for text in sample for _, content in turns(text))
        tokenizer = load_tokenizer(tokenizer_spec, train_texts=sample)
    report = ReadReport(notes=notes, damaged=texts.damaged)
    parts = texts.parts(split, survey, report)
    if chat is None:
        codes, roles = shards.code_texts(parts, tokenizer), None
    else:
        add_chat(tokenizer)
        codes, roles = code_conversations(parts, tokenizer, chat, report), role_ids(tokenizer)
    shards.write_corpus(folder, codes, tokenizer, request, report, roles)
    return open_corpus(folder)


class _Texts:
    """The text of both splits; it can be read several times."""

    def __init__(
        self,
        train: list[Source],
        valid: list[Source],
        options: ReadOptions,
        max_bytes: int | None,
        progress: Progress | None,
        drop_shared: bool = False,
        reader: Reader | None = None,
    ):
        self.identity = file_identity(train + valid)
        report = ReadReport()
        if options.skip_bad:
            train, valid = without_damaged(train, report), without_damaged(valid, report)
        self.damaged = report.damaged
        self.train, self.valid, self.options = train, valid, options
        self.max_bytes, self.progress, self.drop_shared = max_bytes, progress, drop_shared
        self.reader = reader
        held_out = read(valid, options, ReadReport(), reader)
        self.held_out_keys = {document_key(piece.text, 0) for piece in held_out if piece.first}
        if valid and not self.held_out_keys:
            raise UserError("no documents in valid_sources: they hold nothing but white space")

    def training(
        self, stage: str, total: int | None, report: ReadReport | None = None
    ) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces of the training sources with their bytes, up to `max_bytes`."""
        done = reported = documents = 0
        shared: list[str] = []  # places of documents that are held-out text
        include = True
        report = report or ReadReport()
        for piece in read(self.train, self.options, report, self.reader):
            if piece.first:
                if self.max_bytes is not None and done >= self.max_bytes:
                    break
                documents += 1
                include = document_key(piece.text, 0) not in self.held_out_keys
                if not include:
                    report.shared += 1
                    shared += [piece.where][: SHOWN - len(shared)]
            if not include:
                continue
            size = len(piece.text.encode())
            yield piece, size
            done += size
            if self.progress and done - reported >= PROGRESS_EVERY:
                reported = done
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
        """Read the text for the first time; finds most faults before anything is written."""
        remote = any(source.kind == "hub" for source in self.train)
        pieces = self.training("reading", self.max_bytes)
        return take_survey(pieces, fraction, seed, stop=SAMPLE if remote else None)

    def sample(self, split: Split, survey: Survey) -> Iterator[str]:
        """Yield at most SAMPLE bytes of the training split, spread over the surveyed text."""
        share = min(1.0, SAMPLE / survey.bytes)
        pieces = self.training("tokenizer", survey.bytes)
        if not survey.complete:
            pieces = _first(pieces, survey.bytes)
        for i, part in enumerate(split.assign(pieces)):
            if part.split == "train" and int((i + 1) * share) > int(i * share):
                yield part.text

    def parts(self, split: Split, survey: Survey, report: ReadReport) -> Iterator[Part]:
        """Yield all text in pieces, each with its split."""
        total = survey.bytes if survey.complete else self.max_bytes
        yield from split.assign(self.training("tokens", total, report))
        for piece in read(self.valid, self.options, report, self.reader):
            yield Part("valid", piece.text, piece.first, piece.spec)
        before = set(map(tuple, self.identity))
        now = file_identity([*self.train, *self.valid])
        changed = [row[0] for row in now if tuple(row) not in before]
        if changed:
            raise UserError(f"changed while it was read ({changed[0]}): prepare the text again")


def _first(pieces: Iterator[tuple[Piece, int]], stop: int) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces up to `stop` bytes."""
    done = 0
    for piece, size in pieces:
        yield piece, size
        done += size
        if done >= stop:
            return
