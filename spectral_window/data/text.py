"""From text to tokens on disk, and back: `prepare` and `open_corpus`.

`prepare` reads the sources (sources.py), selects the held-out text (holdout.py), loads or trains
the tokenizer (tokenizers.py) and writes a folder of tokens (shards.py). Every document in it is
`<|endoftext|>` followed by its tokens. So a model also learns where documents end, and every token
of the stream serves as a label.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from spectral_window.data import shards
from spectral_window.data.blocks import PackedBlocks, ShuffledBlocks, TokenStream
from spectral_window.data.chat import add_chat, conversation_pieces, role_ids, turns
from spectral_window.data.formats import ReadOptions, ReadReport, some
from spectral_window.data.holdout import Split, Survey, choose_split
from spectral_window.data.passes import (
    SampleTask,
    SectionTask,
    Text,
    code_section,
    held_out_keys,
    sample,
    sample_section,
    survey_section,
    write_section,
)
from spectral_window.data.remote import PieceCache, is_url, open_published
from spectral_window.data.sections import Section, hub_sections, sections_of
from spectral_window.data.sources import (
    Reader,
    Source,
    check_skipped,
    file_identity,
    find_sources,
    read,
    without_damaged,
)
from spectral_window.data.tokenizers import HFTokenizer, bpe_size, load_tokenizer, plain_text
from spectral_window.data.workers import Workers
from spectral_window.errors import IntegrityError, UserError

__all__ = ["Corpus", "PackedBlocks", "ShuffledBlocks", "TokenStream", "open_corpus", "prepare"]

SAMPLE = 1 << 26  # bytes of text that train a bpe tokenizer, about, spread over the corpus
LISTED = 10  # sources that the summary lists

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


def open_corpus(folder: str | os.PathLike[str], *, cache: PieceCache | None = None) -> Corpus:
    """Open a prepared folder, after checking every file against its SHA-256.

    Args:
        folder: the folder, or the URL to which `remote.publish` copied one. There every piece is
            checked when it is read.
        cache: for a URL: keeps the pieces that were read; None for one in the user's folder.

    Raises:
        UserError: there is no prepared folder.
        IntegrityError: a file has changed. The tokens raise it later too, if their file changes
            while it is in use.
        NetworkError: the store did not answer; also raised while reading.
    """
    if is_url(folder):
        local, index, train, valid = open_published(os.fspath(folder), cache or PieceCache())
        return Corpus(local, train, valid, index["fingerprint"], index, [])
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
    workers: int | None = None,
) -> Corpus:
    """Tokenize `sources` into a folder, and open it.

    A second call with the same request and unchanged files opens the existing folder. The memory
    does not depend on the size of the text, which is read twice, and once more to train a
    tokenizer.

    Text of more than 16 MiB is prepared in sections (see sections.py) by several processes, and
    the folder is the same with any number of them. What is finished stands beside the folder in
    `.NAME.sections`, until all of it is, so that a call after a kill goes on from there.

    Args:
        sources: files, folders, globs, "stdlib" or "hub:NAME" (see sources.py).
        tokenizer_spec: see `load_tokenizer`; `bpe:N` is trained on about 64 MiB of the training
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
        workers: processes that read and tokenize; None for one a core.

    Raises:
        UserError: bad input, a split without text, or a folder with other content.
        NetworkError: the hub did not answer.
        ResourceError: the disk is full, or a worker was killed. After any error, and after Ctrl-C,
            the folder is as it was.
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

    with Workers(workers) as processes:
        reader = None if chat is None else conversation_pieces
        texts = _Texts(train, valid, options, max_bytes, progress, drop_shared, reader, processes)
        survey = texts.survey(valid_fraction, seed)
        split = Split(seed) if valid else choose_split(survey, valid_fraction, seed)
        if chat is not None and split.cut_after:
            raise UserError(
                f"one conversation ({train[0].name}): give a second one to hold out, or name valid"
            )
        if tokenizer is None:
            given = texts.sample(split, survey)
            if chat is not None:
                given = (content for text in given for _, content in turns(text))
            tokenizer = load_tokenizer(tokenizer_spec, train_texts=given)
        roles = None if chat is None else role_ids(add_chat(tokenizer))
        report = ReadReport(notes=notes, damaged=texts.damaged)
        if texts.undivided:
            codes = texts.codes(split, tokenizer, chat, report, survey)
            shards.write_corpus(folder, codes, tokenizer, request, report, roles)
        else:
            with shards.sections_folder(folder) as (place, waited):
                if not (waited and shards.reusable(folder, request, overwrite)):
                    written = texts.written(split, tokenizer, chat, report, survey, place)
                    shards.write_corpus(folder, written, tokenizer, request, report, roles)
    return open_corpus(folder)


class _Texts:
    """The text of both splits, which is read several times, by several processes if it is large.

    `undivided` is whether it is a single section of each split, so that this process reads it.
    """

    def __init__(
        self,
        train: list[Source],
        valid: list[Source],
        options: ReadOptions,
        max_bytes: int | None,
        progress: Progress | None,
        drop_shared: bool = False,
        reader: Reader | None = None,
        workers: Workers | None = None,
    ):
        self.identity = file_identity(train + valid)
        report = ReadReport()
        if options.skip_bad:
            train, valid = without_damaged(train, report), without_damaged(valid, report)
        self.damaged = report.damaged
        self.all = [*train, *valid]
        self.max_bytes, self.progress, self.drop_shared = max_bytes, progress, drop_shared
        self.workers = workers or Workers(1)
        keys = held_out_keys(read(valid, options, ReadReport(), reader))
        if valid and not len(keys):
            raise UserError("no documents in valid_sources: they hold nothing but white space")
        self.text = Text(options, keys, reader)
        self.remote = any(source.kind == "hub" for source in train)
        self.train = sections_of("train", train, options)
        self.valid = sections_of("valid", valid, options)
        if self.remote:
            self.train = [Section("train", tuple(train))]
        self.pieces: list[int] = []  # of each section of `train`

    @property
    def undivided(self) -> bool:
        return max(len(self.train), len(self.valid)) < 2

    def survey(self, fraction: float, seed: int) -> Survey:
        """Read the text for the first time; finds most faults before anything is written."""
        survey, report, used = Survey(), ReadReport(), []
        work: Any = partial(survey_section, self.text, fraction, seed)
        if len(self.train) == 1:
            stop = SAMPLE if self.remote else None
            work = partial(work, stop=stop, tick=self._ticks("reading", self.max_bytes))
        for section, (told, found) in self._each("reading", self.max_bytes, work, self.train):
            used.append(section)
            self.pieces.append(found.pieces)
            report.add(told)
            survey.follow(found)
        self.train = used  # max_bytes may leave out the last ones
        if self.remote and self.max_bytes is None:
            # so many bytes are of the first shards, which are read one after another
            self.train = hub_sections("train", [*used[0].sources])
        if survey.complete:
            self._check(report)
        if not survey.documents:
            raise UserError("no documents: the sources hold nothing but white space")
        self._ticks("reading", survey.bytes)(survey.bytes)
        return survey

    def sample(self, split: Split, survey: Survey) -> Iterator[str]:
        """Yield about SAMPLE bytes of the training split, spread over the surveyed text: every so
        manyth piece, whatever its size."""
        share = min(1.0, SAMPLE / survey.bytes)
        ticks = self._ticks("tokenizer", survey.bytes)
        counted = len(self.pieces) == len(self.train)
        if len(self.train) == 1 or split.cut_after or not counted:  # a cut makes more pieces
            sources = [source for section in self.train for source in section.sources]
            whole = Section("train", tuple(sources), self.max_bytes)
            stop = None if survey.complete else survey.bytes
            yield from sample(self.text, split, share, whole, stop=stop, tick=ticks)
        else:
            tasks = list(map(SampleTask, self.train, accumulate(self.pieces, initial=0)))
            work = partial(sample_section, self.text, split, share)
            for number, texts in enumerate(self.workers.map(work, tasks), 1):
                yield from texts
                ticks(survey.bytes * number // (len(tasks) + 1))
        ticks(survey.bytes)

    def codes(
        self,
        split: Split,
        tokenizer: HFTokenizer,
        chat: int | None,
        report: ReadReport,
        survey: Survey,
    ) -> Iterator[shards.Coded]:
        """Yield the tokens of all text, read by this process."""
        ticks = self._ticks("tokens", survey.bytes if survey.complete else self.max_bytes)
        for section in [*self.train, *self.valid]:
            yield from code_section(self.text, split, tokenizer, chat, section, report, ticks)
            self._check(report)
        self._ticks("tokens", report.bytes)(report.bytes)
        self._check_unchanged()

    def written(
        self,
        split: Split,
        tokenizer: HFTokenizer,
        chat: int | None,
        report: ReadReport,
        survey: Survey,
        folder: Path,
    ) -> Iterator[shards.Written]:
        """Yield the tokens of all text, written section by section by the workers.

        Sections that an earlier call wrote below `folder` are kept.
        """
        rows = {name: row for name, *row in self.identity}
        text = self.text
        held_out = hashlib.sha256(text.held_out.tobytes()).hexdigest()
        settings = [asdict(text.options), held_out, text.reader is None, split, chat]
        coder = [plain_text(tokenizer).to_str(), tokenizer.eos_token_id]
        made = shards.digest([shards.SCHEMA, settings, coder])

        def task(section: Section) -> SectionTask:
            files = [rows.get(os.path.abspath(source.name)) for source in section.sources]
            return SectionTask(section, folder / shards.digest([made, section, files]))

        work = partial(write_section, text, split, tokenizer, chat)
        total = survey.bytes if survey.complete else self.max_bytes
        for sections in (self.train, self.valid):
            for _, (told, written) in self._each("tokens", total, work, sections, task):
                report.add(told)
                yield written
            self._check(report)
        runs = Counter(
            source.name for part in [*self.train, *self.valid] for source in part.sources
        )
        without = Counter(report.without)  # of a file that is divided, by how many of its runs
        report.without = [name for name, count in without.items() if count == runs[name]]
        self._ticks("tokens", report.bytes)(report.bytes)
        self._check_unchanged()

    def _each(
        self,
        stage: str,
        total: int | None,
        work: Callable[[Any], tuple[ReadReport, Any]],
        sections: list[Section],
        task: Callable[[Section], Any] = lambda section: section,
    ) -> Iterator[tuple[Section, tuple[ReadReport, Any]]]:
        """Yield each section of a split, limited by `max_bytes`, with the result of the work."""
        ticks, done = self._ticks(stage, total), 0
        if len(sections) == 1:
            limited = sections[0]._replace(limit=self.max_bytes)
            yield limited, work(task(limited))
            return
        with closing(self.workers.map(work, map(task, sections))) as results:
            for section in sections:
                left = None if self.max_bytes is None else max(0, self.max_bytes - done)
                if left == 0 and not section.sources[0].before:
                    break  # no document begins any more
                result = next(results)
                if left is not None and section.limit is None and result[0].bytes > left:
                    section = section._replace(limit=left)
                    result = work(task(section))
                done += result[0].bytes
                ticks(done)
                yield section, result

    def _ticks(self, stage: str, total: int | None) -> Callable[[int], None]:
        """Return what tells `progress` how many bytes are done."""
        return lambda done: self.progress(stage, done, total) if self.progress else None

    def _check(self, report: ReadReport) -> None:
        """Raise the error for text of which too much is bad, or is held out too."""
        if (
            self.max_bytes is None or report.bytes < self.max_bytes
        ):  # else it was not read to its end
            check_skipped(report)
        if report.shared and (not self.drop_shared or report.shared == report.documents):
            places = some(report.shared_at, report.shared)
            what = f"held-out text is training text too, documents: {places}"
            todo = "remove them from one, or leave them out of training with drop_shared=true"
            if self.drop_shared:
                todo = "no other document is left to learn from; name other text"
            raise UserError(f"{what}: {todo}")

    def _check_unchanged(self) -> None:
        before = set(map(tuple, self.identity))
        changed = [row[0] for row in file_identity(self.all) if tuple(row) not in before]
        if changed:
            raise UserError(f"changed while it was read ({changed[0]}): prepare the text again")
