"""Which files are read as text or records, which are refused, and which a folder leaves out."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spectral_window.data import formats, kinds, records
from spectral_window.data.formats import ReadOptions, ReadReport
from spectral_window.data.sources import find_sources, read
from spectral_window.data.text import prepare
from spectral_window.errors import UserError
from tests.data.test_sources import compress, documents, refusal, write

TEXTS = ["one", 'two, "quoted"\nand a line', "three\ttabs", "vier é \U0001f680", "  five "]


def as_lines(texts):
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def as_array(texts, **options):
    return json.dumps([{"id": i, "text": t} for i, t in enumerate(texts)], **options).encode()


def as_table(texts, **options):
    file = io.StringIO(newline="")
    writer = csv.writer(file, **options)
    writer.writerow(["id", "text", "url"])
    writer.writerows([i, text, "http://x"] for i, text in enumerate(texts))
    return file.getvalue().encode()


WRITTEN = {
    ".jsonl": as_lines(TEXTS),
    ".ndjson": as_lines(TEXTS),
    ".json": as_lines(TEXTS),
    ".array.json": as_array(TEXTS),
    ".pretty.json": b"\xef\xbb\xbf\n " + as_array(TEXTS, indent=2) + b"\n\n",
    ".csv": as_table(TEXTS, lineterminator="\n"),
    ".dos.csv": b"\xef\xbb\xbf" + as_table(TEXTS),
    ".tsv": as_table(TEXTS, dialect="excel-tab"),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_of_record_is_read_plain_and_compressed(tmp_path, name, compression):
    path = tmp_path / f"x{name}{compression}"
    (compress if compression else write)(path, WRITTEN[name])
    assert documents(path) == TEXTS


@pytest.mark.parametrize("suffix", sorted(kinds._ADVICE))
def test_every_structured_or_binary_suffix_is_refused_with_what_to_do(tmp_path, suffix):
    for name in (f"x{suffix}", f"X{suffix.upper()}", f"x{suffix}.gz", f"x{suffix}.zst"):
        message = refusal(write(tmp_path / name, "plain text"))
        assert f"({tmp_path / name}): " in message
    assert name in refusal(tmp_path)  # a folder of nothing else


def test_what_has_another_suffix_or_none_must_be_text(tmp_path):
    for name in ("README", "x.rst", "x.log", "x.c", "wiki.train.tokens", ".config"):
        assert documents(write(tmp_path / name, "text")) == ["text"]
        assert "NUL" in refusal(write(tmp_path / name, "te\0xt"))
        assert "not UTF-8" in refusal(write(tmp_path / name, b"te\xfft"))


# ---------------------------------------------------------------------------- JSON arrays

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
RECORDS = st.lists(
    st.builds(lambda extra, text: {**extra, "text": text}, st.dictionaries(st.text(), VALUES),
              st.text(min_size=1).filter(str.strip)),
    min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    rows=RECORDS, indent=st.sampled_from([None, 0, 2]), ascii=st.booleans(), size=st.integers(1, 9)
)
@example(rows=[{"text": "\\u00"}], indent=None, ascii=True, size=1)
def test_an_array_is_its_records_wherever_a_block_ends(tmp_path_factory, rows, indent, ascii, size):
    path = tmp_path_factory.getbasetemp() / "property.json"
    write(path, json.dumps(rows, indent=indent, ensure_ascii=ascii).encode(errors="replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", size)
        patch.setattr(records, "BLOCK", size)
        found = documents(path, errors="replace" if ascii else "strict")
    expected = [row["text"] for row in json.loads(path.read_bytes())]
    assert len(found) == len(expected)
    assert ascii or found == expected


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[", "record 1"),
        ('[{"text": "a"}', "record 2"),
        ('[{"text": "a"},]', "record 2"),
        ('[{"text": "a"} {"text": "b"}]', "',' or ']' is missing"),
        ('[{"text": "a"}] x', "text after the array"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "text after the array"),
        ('[{"text": "a", "text": "b"}]', "the same key twice"),
        ('[{"text": nothing}]', "Expecting value"),
        ('[{"text": "a}]', "Unterminated string"),
        ("[" * 100_000, "record 1"),
        ('["a"]', "not an object with a 'text' field ("),
        ("[5]", "not an object"),
        ('[{"body": "a"}]', "no 'text' field, only: body"),
        ('[{"text": null}]', "'text' is null"),
        ('{"text":\n"pretty"}', "a .json must be a record a line, or one array"),
        ('{"data": [{"text": "a"}]}', "no 'text' field, only: data"),
    ],
)
def test_a_bad_array_is_refused_and_named(tmp_path, content, what):
    path = write(tmp_path / "a.json", content)
    message = refusal(path)
    assert "a.json" in message
    assert what in message


def test_an_array_cut_anywhere_is_refused(tmp_path):
    whole = as_array(TEXTS)
    for size in range(1, len(whole)):
        refusal(write(tmp_path / "a.json", whole[:size]))


def test_bad_records_of_an_array_or_table_can_be_skipped_and_are_counted(tmp_path):
    for name, content in (
        ("a.json", as_array(["a"] * 150)[:-1] + b', {"text": 5}]'),
        ("a.csv", as_table(["a"] * 150) + b"150,b\r\n"),
    ):
        report = ReadReport()
        path = write(tmp_path / name, content)
        assert documents(path, skip_bad=True, report=report) == ["a"] * 150
        assert (report.skipped, report.records) == (1, 151)
        assert "bad records of 151 were left out: 1" in report.lines()


@pytest.mark.parametrize("begin", ['[{"text": "', 'text\n"', '[{"text": "a"}, "'])
def test_a_record_too_long_to_hold_is_refused_in_bounded_memory(tmp_path, monkeypatch, begin):
    monkeypatch.setattr(records, "MAX_RECORD", 1 << 20)
    path = tmp_path / ("a.json" if begin[0] == "[" else "a.csv")
    write(path, begin + "a b\n" * (3 << 20) if begin[0] != "[" else begin + "ab" * (6 << 20))
    message, peak = peak_of(lambda: refusal(path))
    assert "a record of more than" in message
    assert peak < 10 << 20


def test_a_table_of_endless_fields_in_one_record_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 1 << 16)
    path = write(tmp_path / "a.csv", "text\n" + '"\n",' * (1 << 16))
    assert "from line 2" in refusal(path)


def test_memory_does_not_grow_with_an_array_or_a_table(tmp_path):
    words = "some words " * 30
    for name, begin, row, end in (
        ("a.json", "[", f'{{"text": "{words}"}},\n', '{"text": "a"}]'),
        ("a.csv", "text,id\n", f'"some ""words"" {words}",5\n', "a,5"),
    ):
        path = write(tmp_path / name, begin + row * (1 << 14) + end)
        count, peak = peak_of(lambda path=path: sum(1 for _ in _pieces(path)))
        assert count == (1 << 14) + 1
        assert peak < 3 << 20 < path.stat().st_size


def peak_of(call):
    """What it returns, and the bytes that it took at most."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _pieces(path):
    return read(find_sources([str(path)]), ReadOptions(), ReadReport())


# ---------------------------------------------------------------------------- tables


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.sampled_from('ab",\t\n é'), min_size=1).filter(str.strip), min_size=1
    ),
    size=st.integers(1, 9),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_a_table_is_its_texts_wherever_a_block_ends(tmp_path_factory, texts, size, suffix):
    path = tmp_path_factory.getbasetemp() / f"property{suffix}"
    dialect = "excel" if suffix == ".csv" else "excel-tab"
    write(path, as_table(texts, dialect=dialect))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", size)
        assert documents(path) == texts


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no 'text' column"),
        ("id,body\n1,a\n", "its columns are id, body"),
        ("text,id,text\na,1,b\n", "2 columns are called 'text'"),
        ("id,text\n1\n", "line 2): repair"),
        ("id,text\n1,a\n2,b,c\n", "3 fields instead of 2"),
        ('id,text\n1,"a\n2,b\n', "bad CSV"),
        ('id,text\n1,"a" b\n', "bad CSV"),
        ("id,text\n1,a\0\n", "a NUL byte"),
        (b"id,text\n1,a\xff\n", "byte 11"),
        ("id,text\n1,a\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_bad_table_is_refused_and_named(tmp_path, content, what):
    message = refusal(write(tmp_path / "a.csv", content))
    assert "a.csv" in message
    assert what in message


def test_a_document_longer_than_the_csv_modules_own_limit_is_read(tmp_path):
    text = "word " * 200_000 + "end"
    assert documents(write(tmp_path / "a.csv", f"text,id\n{text},5\n")) == [text]


def test_parquet_with_two_text_columns_is_one_line(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert "2 columns are called 'text'" in refusal(tmp_path / "a.parquet")


def test_an_empty_compressed_file_is_no_empty_text(tmp_path):
    for name in ("a.txt.gz", "a.jsonl.zst"):
        assert "truncated or corrupt" in refusal(write(tmp_path / name, b""))


def test_compressed_files_with_anything_behind_them_are_refused(tmp_path):
    for suffix in (".gz", ".zst"):
        path = compress(tmp_path / f"a.txt{suffix}", b"text " * 100)
        whole = path.read_bytes()
        for behind in (b"x", b"garbage", whole[:9], whole[:-1]):
            assert "truncated or corrupt" in refusal(write(path, whole + behind))
        assert documents(write(path, whole + whole)) == ["text " * 200]


# ---------------------------------------------------------------------------- what is left out


def test_a_folder_says_what_it_leaves_out(tmp_path):
    folder = tmp_path / "in"
    for name in ("a.txt", "b.json", "c.json.gz", "d.csv", "sub/e.pdf", ".hidden", ".git/x.txt"):
        path = folder / name
        (compress if name.endswith("gz") else write)(path, as_lines([name]))
    write(tmp_path / "elsewhere" / "f.txt", "f")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(folder, folder / "sub" / "loop")
    os.symlink(tmp_path / "elsewhere" / "f.txt", folder / "g.txt")
    os.symlink("nothing", folder / "gone.txt")
    os.mkfifo(folder / "pipe.txt")
    notes: list[str] = []
    found = find_sources([str(folder)], notes)
    assert [os.path.basename(source.name) for source in found] == ["a.txt", "c.json.gz", "g.txt"]
    assert notes == [
        f"left out of {folder}: {line}"
        for line in (
            "files of other kinds, which must be named: 3 (b.json, d.csv, sub/e.pdf)",
            "broken links: 1 (gone.txt)",
            "links to folders: 2 (linked, sub/loop)",
            "pipes or devices: 1 (pipe.txt)",
        )
    ]
    assert (
        "it holds files of other kinds, which must be named: 1 (e.pdf); it holds links"
        in refusal(folder / "sub")
    )


def test_a_glob_and_a_file_named_twice_say_so(tmp_path):
    for name in ("1.txt", "2.txt", "sub/3.txt"):
        write(tmp_path / name, name)
    notes: list[str] = []
    assert len(find_sources([str(tmp_path / "*"), str(tmp_path / "1.txt")], notes)) == 2
    assert notes == [
        f"matched by {tmp_path}/* but no files, left out: 1 ({tmp_path}/sub)",
        f"named more than once, read once: 1 ({tmp_path}/1.txt)",
    ]
    refusal(tmp_path / "*.txt", tmp_path / "*.md")  # one that matches nothing among others
    write(tmp_path / "4.pdf", "x")
    assert ".pdf files are not read" in refusal(tmp_path / "*")


UNREADABLE = """
import os, sys
from spectral_window.data.sources import find_sources, read
from spectral_window.data.formats import ReadOptions, ReadReport
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in sys.argv[1:]:
    try:
        list(read(find_sources([name]), ReadOptions(), ReadReport()))
    except Exception as error:
        print(type(error).__name__, error.exit_code, error)
"""


def test_a_folder_or_file_that_cannot_be_read_is_an_error_and_not_left_out():
    # A folder of its own: pytest's may not be entered by another user.
    top = Path(tempfile.mkdtemp())
    try:
        os.chmod(top, 0o755)
        for part in ("a", "b"):
            write(top / part / "sub" / "text.txt", "text")
            write(top / part / "other.txt", "text")
        os.chmod(top / "a" / "sub", 0o000)
        os.chmod(top / "b" / "other.txt", 0o000)
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE, top / "a", top / "b"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        first, second = done.stdout.splitlines()
        assert first.startswith("UserError 2 cannot read a folder, Permission denied")
        assert f"{top / 'a' / 'sub'}" in first
        assert f"cannot read ({top / 'b' / 'other.txt'}): Permission denied" in second
    finally:
        for path in (top / "a" / "sub", top / "b" / "other.txt"):
            os.chmod(path, 0o755)
        shutil.rmtree(top)


# ---------------------------------------------------------------------------- what is counted


def test_every_source_is_counted_in_each_split_and_told(tmp_path):
    many = write(tmp_path / "many.jsonl", as_lines([f"text {i}" for i in range(40)] + ["", " "]))
    write(tmp_path / "folder" / "a.txt", "one text")
    write(tmp_path / "folder" / "blank.txt", "\n")
    blank = write(tmp_path / "none.md", "  ")
    held = write(tmp_path / "held.json", as_array(["x", "yy"]))
    sources = [str(many), str(tmp_path / "folder"), str(blank)]
    corpus = prepare(sources, "bytes", tmp_path / "t", valid_sources=[str(held)])
    sizes = corpus.sizes()
    rows = {(row["split"], row["source"]): row for row in sizes["sources"]}
    assert [name for _, name in rows] == [*sources, str(held)]
    assert [row["documents"] for row in rows.values()] == [40, 1, 0, 2]
    for split, stream in (("train", corpus.train), ("valid", corpus.valid)):
        counts = {"tokens": len(stream), "documents": len(stream.documents), "bytes": stream.bytes}
        assert sizes[split] == counts
        for kind, total in counts.items():
            assert sum(row[kind] for (s, _), row in rows.items() if s == split) == total
    told = corpus.summary()
    assert told[0].startswith("train: 41 documents, 278 bytes, 319 tokens")
    assert f"  {blank}: 0 documents, 0 bytes, 0 tokens" in told
    assert "valid: 2 documents, 3 bytes, 5 tokens" in told
    assert "records hold nothing but white space: 2" in told
    empty = f"{tmp_path / 'folder' / 'blank.txt'}, {blank}"
    assert f"files hold no document: 2 ({empty})" in told


def test_all_shared_documents_are_counted_some_named_and_they_can_be_dropped(tmp_path):
    train = write(tmp_path / "a.jsonl", as_lines([f"text {i}" for i in range(60)]))
    valid = write(tmp_path / "b.jsonl", as_lines([f"text {i}" for i in range(50, 70)]))
    request = {"sources": [str(train)], "tokenizer_spec": "bytes", "valid_sources": [str(valid)]}
    with pytest.raises(UserError) as caught:
        prepare(**request, folder=tmp_path / "t")
    message = str(caught.value)
    assert "documents: 10 (" in message
    assert f"{train}, line 51, {train}, line 52" in message
    assert "drop_shared=true" in message
    corpus = prepare(**request, folder=tmp_path / "t", drop_shared=True)
    assert (len(corpus.train.documents), len(corpus.valid.documents)) == (50, 20)
    assert corpus.index["documents_shared"] == 10
    assert any("held-out text and were left out: 10" in line for line in corpus.summary())
    assert prepare(**request, folder=tmp_path / "t", drop_shared=True).index == corpus.index
    with pytest.raises(UserError, match="prepared from another request"):
        prepare(**request, folder=tmp_path / "t")
    with pytest.raises(UserError, match="no other document is left"):
        prepare([str(valid)], "bytes", tmp_path / "u", valid_sources=[str(valid)], drop_shared=True)
