"""Text in sections: the same folder as read whole, by any number of processes."""

from __future__ import annotations

import functools
import gzip
import json
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_window.data import formats, holdout, records, sections, shards, sources, text
from spectral_window.data.formats import ReadOptions, ReadReport
from spectral_window.data.holdout import Survey, choose_split
from spectral_window.data.sections import Section, sections_of
from spectral_window.data.sources import Piece, find_sources, read_runs
from spectral_window.data.text import prepare
from spectral_window.errors import UserError
from tests.processes import python

TEXT = st.text(st.sampled_from("ab\n \té\u00a0\r"), max_size=300)
WORDS = [f"w{i * i % 977:x}" for i in range(977)]


def prose(i, words):
    return " ".join(np.roll(WORDS, i * 31)[:words].tolist())


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with a file of every kind that is divided, and of some that are not."""
    folder = tmp_path_factory.mktemp("library")
    jsonl(folder / "a.jsonl", [prose(i, i % 90 + 1) for i in range(400)])
    (folder / "b.md").write_bytes("\r\n".join(prose(i, 40) for i in range(400)).encode())
    (folder / "c.txt").write_bytes("\n \r\n".join(prose(i, 20) for i in range(600)).encode())
    table = pyarrow.table({"text": [prose(i, 60) for i in range(500, 900)], "id": range(400)})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=30)
    (folder / "e.json.gz").write_bytes(gzip.compress(json.dumps([{"text": "zipped"}]).encode()))
    (folder / "empty.txt").write_bytes(b" \n" * 20_000)
    return folder


def content(folder):
    """Every byte of a prepared folder, by file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------------------- borders


@settings(max_examples=300, deadline=None)
@given(
    text=TEXT,
    kind=st.sampled_from(["md", "txt", "jsonl"]),
    every=st.integers(1, 60),
    piece=st.integers(2, 12),
    block=st.integers(1, 40),
)
def test_the_runs_of_a_file_hold_the_pieces_of_the_file(
    tmp_path_factory, text, kind, every, piece, block
):
    """The last piece of a run used to swallow the one before it where both just fit."""
    path = tmp_path_factory.getbasetemp() / f"runs.{kind}"
    if kind == "jsonl":
        text = "".join(json.dumps({"text": line}) + "\n" * (i % 3) for i, line in enumerate(text))
    path.write_bytes(text.encode())
    options = ReadOptions(txt_documents="paragraph")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", piece)
        patch.setattr(formats, "BLOCK", 10_000)
        found = find_sources([str(path)])

        def pieces(runs):
            try:
                return list(read_runs(runs, options, ReadReport()))
            except UserError as fault:
                return str(fault)

        whole = pieces(found)
        patch.setattr(sections, "SECTION", every)
        patch.setattr(formats, "BLOCK", block if kind != "txt" else 10_000)
        try:
            runs = [run for each in sections_of("train", found, options) for run in each.sources]
        except UserError as fault:
            assert [str(fault)] == [whole]  # noqa: PT017 (no error is expected, but it may be one)
            return
        if kind != "txt":
            assert pieces(runs) == whole
        else:  # where a long paragraph is passed on before its end depends on the blocks
            assert "".join(p.text for p in pieces(runs)) == "".join(p.text for p in whole)


def test_large_files_are_divided_and_small_ones_put_together(library, monkeypatch):
    monkeypatch.setattr(sections, "SECTION", 30_000)
    found = sections_of("train", find_sources([str(library)]), ReadOptions())
    names = [str(section).replace(f"{library}/", "") for section in found]
    assert len(found) > 5
    assert names[0].startswith("a.jsonl, bytes 0 to 30,0")
    assert any(name.startswith("d.parquet, row groups ") for name in names)
    monkeypatch.undo()
    assert len(sections_of("train", find_sources([str(library)]), ReadOptions())) == 1


@given(
    keys=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    threshold=st.integers(0, 7),
    few=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 24), max_size=4),
)
def test_surveys_of_sections_choose_the_split_of_the_whole_and_keep_no_more_than_they_need(
    keys, threshold, few, cuts
):
    """With a list of its first documents from each section, memory grew with the sections."""
    documents = [
        [(key, first, 3 * i + key) for first in (True, False)] for i, key in enumerate(keys)
    ]
    pieces = [piece for document in documents for piece in document]

    def survey(pieces):
        found = Survey()
        for key, first, size in pieces:
            found.add(Piece("", first, ""), size, key, threshold)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "FEW", few)
        whole, parts = survey(pieces), Survey()
        borders = [0, *sorted(min(cut, len(pieces)) for cut in cuts), len(pieces)]
        for begin, end in pairwise(borders):
            parts.follow(survey(pieces[begin:end]))
        assert parts == whole
        assert not (whole.divided and whole.few)
        chosen = choose_split(whole, 0.3, 0)
    below = sum(key < threshold for key in keys)
    assert (chosen.threshold > 0) == (0 < below < len(keys))


# ---------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["."], {}),
        (["."], {"tokenizer_spec": "bpe:400"}),
        (["."], {"txt_documents": "paragraph", "valid_fraction": 0.3}),
        (["."], {"max_bytes": 200_000, "tokenizer_spec": "bpe:400"}),
        (["."], {"errors": "replace", "max_bytes": 330_000}),
        (["b.md"], {"tokenizer_spec": "bpe:300", "valid_fraction": 0.4}),  # one document, cut
        (["b.md", "a.jsonl"], {"max_bytes": 50_000}),  # which is reached inside a document
        (["a.jsonl", "b.md"], {"valid_sources": ["d.parquet", "c.txt"]}),
        (["a.jsonl", "d.parquet"], {"valid_sources": ["shared.jsonl"], "drop_shared": True}),
        (["bad.jsonl"], {"skip_bad": True}),
        (["chat.jsonl"], {"chat": 16, "valid_fraction": 0.3}),
    ],
)
def test_sections_of_any_size_give_the_same_folder(library, tmp_path, monkeypatch, names, options):
    jsonl(library / "shared.jsonl", [prose(5, 6), prose(600, 60), "new", prose(601, 60)])
    lines = (library / "a.jsonl").read_text().splitlines(keepends=True)
    (library / "bad.jsonl").write_text("".join([*lines[:150], "{}\n", *lines[150:], "\n"]))
    with open(library / "chat.jsonl", "w") as file:
        for i in range(300):
            roles = ["user", "assistant"] * (i % 3 + 1)
            turns = [{"role": role, "content": prose(i, i % 19 + 1)} for role in roles]
            file.write(json.dumps({"messages": turns}) + "\n")
    if names == ["."]:
        for name in ("shared", "bad", "chat"):
            (library / f"{name}.jsonl").unlink()
    found = [str(library / name) for name in names]
    options = {"tokenizer_spec": "bytes"} | options
    if "valid_sources" in options:
        options["valid_sources"] = [str(library / name) for name in options["valid_sources"]]
    monkeypatch.setattr(sources, "PIECE", 1 << 10)
    prepare(found, folder=tmp_path / "whole", **options)
    wanted = content(tmp_path / "whole")
    written = []
    real = shards.write_section
    monkeypatch.setattr(shards, "write_section", lambda *a: (written.append(a), real(*a))[1])
    monkeypatch.setattr(sections, "SECTION", 11_000)
    prepare(found, folder=tmp_path / "sections", workers=1, **options)
    assert content(tmp_path / "sections") == wanted
    assert len(written) > 2
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from spectral_window.data import sections
from spectral_window.data.text import prepare
sections.SECTION = 6_000
def kill(stage, done, total):
    if stage == "tokens" and done >= 30_000:
        os.kill(os.getpid(), signal.SIGKILL)
prepare([sys.argv[1]], "bpe:300", sys.argv[2], progress=kill, workers=2)
"""


def test_sections_that_two_processes_wrote_outlive_a_kill_and_are_those_of_one(
    library, tmp_path, monkeypatch
):
    monkeypatch.setattr(sections, "SECTION", 6_000)
    killed = python("-c", KILLED, library / "a.jsonl", tmp_path / "t")
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "t").exists()
    kept = [path.parent for path in (tmp_path / ".t.sections").glob("[!.]*/section.json")]
    assert len(kept) >= 3  # one that was being renamed does not count
    damaged = kept.pop()
    tokens = damaged / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"x")
    written, stages = [], []
    real = shards.write_section
    monkeypatch.setattr(
        shards, "write_section", lambda folder, *a: (written.append(folder), real(folder, *a))[1]
    )
    again = {"workers": 1, "progress": lambda *call: stages.append(call)}
    prepare([str(library / "a.jsonl")], "bpe:300", tmp_path / "t", **again)
    assert damaged in written  # and no other of those that were finished: the tokenizer is the same
    assert not set(written) & set(kept)
    done = [done for stage, done, _ in stages if stage == "tokens"]
    assert done == sorted(done)
    assert len(done) > 3
    monkeypatch.undo()
    prepare([str(library / "a.jsonl")], "bpe:300", tmp_path / "whole")
    assert content(tmp_path / "t") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_short_texts_are_tokenized_few_at_a_time():
    """A million of one character each went into one batch, with an encoding of kilobytes each."""
    parts = [holdout.Part("train", str(i % 10), True) for i in range(10_000)]
    groups = list(shards.batches(parts))
    assert [part for group in groups for part in group] == parts
    assert max(map(len, groups)) < 5000


MEASURE = """
import os, sys
from pathlib import Path
import psutil
from spectral_window.data.text import prepare
peaks = {}
def look(*_):
    for pid in (os.getpid(), *(child.pid for child in psutil.Process().children())):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        peaks[pid] = next(int(line.split()[1]) >> 10 for line in lines if line[:6] == "VmHWM:")
source, tokenizer, folder, workers = sys.argv[1:]
prepare([source], tokenizer, folder, workers=int(workers), progress=look)
look()
print(peaks.pop(os.getpid()), max(peaks.values(), default=0))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of another process is in /proc")
@pytest.mark.parametrize(
    ("tokenizer", "words", "workers", "more"),
    [("gpt2", 900, 2, 200), ("gpt2", 900, 1, 200), ("bytes", 6, 2, 100)],
)
def test_memory_is_constant_in_the_size_of_the_text_in_every_process(
    tmp_path, tokenizer, words, workers, more
):
    """Peak MiB of this process and of the largest worker, for `more` MB of text against 40 MB, of
    long and of short documents. It is VmHWM, which a process has from its own start: ru_maxrss is
    inherited from whoever started it, and was that of the tests that wrote the text.
    """
    rng, peaks = np.random.default_rng(0), []
    for size in (40, more):
        path, left = tmp_path / f"{size}.jsonl", size * 1_000_000
        with open(path, "w") as file:  # no two documents are equal
            while left > 0:
                texts = map(" ".join, rng.choice(WORDS, (90_000 // words, words)))
                left -= file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, path, tokenizer, tmp_path / f"t{size}", str(workers)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(list(map(int, done.stdout.split())))
    assert [peak > 0 for peak in peaks[0]] == [True, workers > 1]  # else nothing is compared
    assert all(large - small < 64 for small, large in zip(*peaks, strict=True)), peaks


def test_ranks_and_workers_together_read_a_data_set_exactly_once_in_order(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(50)]
    for part, begin in enumerate((0, 7, 20, 21, 40)):
        table = pyarrow.table({"text": texts[begin : [7, 20, 21, 40, 50][part]]})
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
    spec = f"hub:{tmp_path}"
    count = records.hub_shards(spec)
    assert count == 5
    monkeypatch.setattr(sections, "hub_shards", lambda _: count)  # it is asked 400 times

    @functools.cache
    def rows(extent):
        return [row.text for row in records.hub_rows(spec, extent)]

    for world in range(1, 9):
        for workers in range(5):
            each = max(1, workers)
            read = []
            for rank in range(world):
                for worker in range(each):
                    read += rows(sections.hub_share(spec, rank * each + worker, world * each))
            assert read == texts, (world, workers)
    with pytest.raises(UserError, match="part 2 of 2"):
        sections.hub_share(spec, 2, 2)


def test_a_data_set_is_prepared_by_shards_into_the_same_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for part in range(3):
        table = pyarrow.table({"text": [prose(100 * part + i, 20) for i in range(60)]})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{part}.parquet")
    spec = f"hub:{tmp_path / 'data'}"
    prepare([spec], "bpe:300", tmp_path / "shards", valid_fraction=0.2, workers=1)
    monkeypatch.setattr(text, "hub_sections", lambda split, given: [Section(split, tuple(given))])
    prepare([spec], "bpe:300", tmp_path / "whole", valid_fraction=0.2)
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
