"""Text to tokens: `prepare` against `datasets.map` with the same tokenizer.

    prepare              a file of JSON lines to a folder that training reads: read twice (what is
                         held out is decided first), tokenized, written, hashed and verified
    datasets             load_dataset, then map(batched=True): parsed to Arrow, tokenized, written
    datasets, map alone  without the parsing: of a data set that is loaded already

Each with 1 and 2 processes, and every process with one thread of the tokenizer. The text is the
source of Python's standard library, a document a record, with GPT-2's vocabulary. First the ids of
all documents are compared.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectral_window.data.formats import ReadOptions, ReadReport
from spectral_window.data.sources import find_sources, read
from spectral_window.data.text import Corpus, prepare
from spectral_window.data.tokenizers import HFTokenizer, load_tokenizer, plain_text
from spectral_window.errors import UserError
from spectral_window.files import scratch_folder
from spectral_window.lab.bench.timing import Call, Timing, reason

PREPARE, DATASETS, MAP = "prepare", "datasets", "datasets, map alone"
PROCESSES = (1, 2)
BYTES, QUICK_BYTES = 34_000_000, 200_000  # more than two sections of `prepare`
ROWS_AT_ONCE = 1000  # of `map`: its default


def bench_data(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by number of processes: the time for the text, tokens and megabytes a second and core.

    Tokens have no dtype: it is not looked at.
    """
    rows: list[dict[str, Any]] = []
    with scratch_folder() as folder, _one_thread_each():
        path = folder / "text.jsonl"
        size = _write_text(path, QUICK_BYTES if quick else BYTES)
        calls = _Calls(path, folder)
        for processes in PROCESSES:
            timing = Timing(seconds=0.0, fewest=1 if quick else 3, longest=600.0)
            try:
                tokens, same = calls.compare(processes)
                wrong = {} if same else dict.fromkeys((DATASETS, MAP), "wrong: other ids")
            except ImportError as error:
                tokens = calls.ours(processes)
                wrong = dict.fromkeys((DATASETS, MAP), reason(error))
            timing.out = wrong
            made: dict[str, Call] = {
                PREPARE: partial(calls.ours, processes),
                DATASETS: partial(calls.theirs, processes),
                MAP: partial(calls.map_alone, processes),
            }
            for row in timing.run(made, processes=processes):
                if row["status"] == "ok":
                    seconds = row["milliseconds"] / 1000
                    row["tokens_per_s"] = float(f"{tokens / seconds:.4g}")
                    row["MB_per_s_per_core"] = float(f"{size / 1e6 / seconds / processes:.4g}")
                rows.append(row)
    return rows


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep the tokenizer of this process, and of those it starts, to one thread."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _write_text(path: Path, size: int) -> int:
    """Write about `size` bytes of text as JSON lines; return how many they are."""
    pieces = read(find_sources(["stdlib"]), ReadOptions(), ReadReport())
    texts, done = [], 0
    for piece in pieces:
        texts.append(piece.text)
        done += len(piece.text.encode())
        if done >= size:
            break
    done = 0
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(cycle(texts)):
            text = f"# {number}\n{text}"  # no two documents are equal
            file.write(json.dumps({"text": text}) + "\n")
            done += len(text.encode())
            if done >= size:
                return done
    raise UserError("the standard library of this Python has no text: use another Python")


class _Calls:
    """What is timed, on one file."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.tokenizer: HFTokenizer = load_tokenizer("gpt2")
        self.count = 0
        self.loaded: Any = None

    def ours(self, processes: int) -> int:
        """Prepare the text; return its tokens, without the mark of each document."""
        corpus = self._prepared(processes)
        return sum(len(s) - len(s.documents) for s in (corpus.train, corpus.valid))

    def theirs(self, processes: int) -> Any:
        return self._mapped(self._load(), processes)

    def map_alone(self, processes: int) -> Any:
        if self.loaded is None:
            self.loaded = self._load()
        return self._mapped(self.loaded, processes)

    def compare(self, processes: int) -> tuple[int, bool]:
        """Return the number of tokens, and whether all documents have the same in both."""
        corpus = self._prepared(processes)
        ours: Counter[bytes] = Counter()
        for stream in (corpus.train, corpus.valid):
            ends = [*stream.documents.tolist()[1:], len(stream)]
            for start, end in zip(stream.documents.tolist(), ends, strict=True):
                ours[stream.tokens[start + 1 : end].astype("<u2").tobytes()] += 1
        theirs: Counter[bytes] = Counter()
        tokens = 0
        for row in self.theirs(processes):
            ids = np.asarray(row["ids"], dtype="<u2")
            theirs[ids.tobytes()] += 1
            tokens += len(ids)
        return tokens, ours == theirs

    def _prepared(self, processes: int) -> Corpus:
        folder = self._fresh()
        return prepare([str(self.path)], "gpt2", folder, workers=processes)

    def _load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        with _forking():
            return datasets.load_dataset(
                "json",
                data_files=str(self.path),
                split="train",
                cache_dir=str(self._fresh()),
            )

    def _mapped(self, loaded: Any, processes: int) -> Any:
        with _forking():
            return loaded.map(
                partial(_tokenize, tokenizer=self.tokenizer),
                batched=True,
                batch_size=ROWS_AT_ONCE,
                num_proc=None if processes == 1 else processes,
                remove_columns=["text"],
                load_from_cache_file=False,
                cache_file_name=str(self._fresh()) + ".arrow",
            )

    def _fresh(self) -> Path:
        self.count += 1
        return self.folder / f"made-{self.count}"


def _tokenize(rows: dict[str, Any], tokenizer: HFTokenizer) -> dict[str, Any]:
    backend = plain_text(tokenizer)
    return {
        "ids": [
            encoding.ids
            for encoding in backend.encode_batch_fast(rows["text"], add_special_tokens=False)
        ]
    }


@contextmanager
def _forking() -> Iterator[None]:
    """Let `datasets` fork a process that has threads, which newer Pythons warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
