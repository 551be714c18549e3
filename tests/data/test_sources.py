"""Sources to documents: files, folders, compression, records, and every error in them."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spectral_window.data import formats, records, sources
from spectral_window.data.formats import ReadOptions, ReadReport, byte_blocks
from spectral_window.data.sources import Piece, find_sources, read
from spectral_window.data.tokenizers import load_tokenizer, plain_text
from spectral_window.errors import IntegrityError, NetworkError, UserError


def documents(*specs, report=None, **options):
    """Every document's whole text."""
    texts: list[str] = []
    for text, first, *_ in read(
        find_sources(map(str, specs)), ReadOptions(**options), report or ReadReport()
    ):
        if first:
            texts.append("")
        texts[-1] += text
    return texts


def refusal(*specs, error=UserError, **options):
    """The message of the one-line error that reading ends with."""
    with pytest.raises(error) as caught:
        documents(*specs, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == {UserError: 2, IntegrityError: 3, NetworkError: 6}[error]
    return str(caught.value)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def compress(path, content):
    with pa.output_stream(
        str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]
    ) as stream:
        stream.write(content)
    return path


# ---------------------------------------------------------------------------- which files


def test_a_folder_is_its_text_files_sorted_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "sub/.hidden.txt", ".git/d.txt", "e.bin", "f.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}) if name.endswith("l") else name)
    assert documents(tmp_path) == ["a.md", "b.txt", "f.jsonl", "sub/c.py"]


def test_a_glob_is_sorted_and_a_file_named_twice_is_read_once(tmp_path, monkeypatch):
    for name in ("2.txt", "1.txt", "deep/3.txt"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    assert documents("*.txt") == ["1.txt", "2.txt"]
    assert documents("**/*.txt", "1.txt", tmp_path) == ["1.txt", "2.txt", "deep/3.txt"]


def test_names_with_spaces_brackets_and_unicode_work(tmp_path, monkeypatch):
    path = write(tmp_path / "a [1] ü.txt", "text")
    assert documents(path) == ["text"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/a [1] ü.txt") == ["text"]


def test_a_named_file_is_read_whatever_its_suffix(tmp_path):
    assert documents(write(tmp_path / "README", "x"), write(tmp_path / "y.rst", "y")) == ["x", "y"]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "missing.txt",
        "*.nothing",
        "/dev/zero",
        "a\0b",
        "https://a.b/c.txt",
        "hub:",
        "hub::x",
        "x" * 5000,
        "[",
        "missing/",
    ],
)
def test_what_is_no_file_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(spec)


def test_a_pipe_is_refused_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")
    assert "no text in the folder" in refusal(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        list(byte_blocks(str(tmp_path / "pipe.txt")))


def test_an_empty_folder_an_unreadable_list_and_an_archive_are_refused(tmp_path):
    assert "no text in the folder" in refusal(tmp_path)
    with pytest.raises(TypeError, match="list of strings"):
        find_sources("stdlib")
    with pytest.raises(UserError, match="no data"):
        find_sources([])
    for name in ("a.tar", "a.tar.gz", "a.zip", "a.tgz"):
        assert "unpack" in refusal(write(tmp_path / name, "x"))


def test_the_standard_library_is_whole_files_without_its_tests():
    found = find_sources(["stdlib"])
    names = [source.name for source in found]
    assert found == find_sources(["stdlib"])
    assert any(name.endswith(os.path.join("json", "decoder.py")) for name in names)
    assert not [
        name for name in names if re.search(r"[\\/](tests?|site-packages|dist-packages)[\\/]", name)
    ]
    texts = documents("stdlib")
    assert 300 < len(texts) <= len(names)
    assert sum(map(len, texts)) > 5_000_000


# ---------------------------------------------------------------------------- plain text


def test_crlf_reads_as_lf_and_nothing_else_changes(tmp_path):
    text = "a\n\nb\r c\t\n é \n"
    assert documents(write(tmp_path / "lf.txt", text)) == [text]
    assert documents(write(tmp_path / "crlf.txt", text.replace("\n", "\r\n"))) == [text]
    assert documents(write(tmp_path / "cr.txt", "a\r")) == ["a\r"]
    assert documents(write(tmp_path / "no_end.txt", "a\nb")) == ["a\nb"]


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab\r\n é\U0001f680", max_size=40), block=st.integers(1, 9))
@example(text="a\r\n", block=2)
def test_where_blocks_end_makes_no_difference(tmp_path_factory, text, block):
    path = write(tmp_path_factory.getbasetemp() / "blocks.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        expected = text.replace("\r\n", "\n")
        assert documents(path) == ([expected] if expected.strip() else [])


def test_a_byte_order_mark_is_dropped(tmp_path):
    assert documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\xef\xbb\xbf")) == ["a\ufeff"]
    assert documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}')) == ["a"]


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"ab\xffcd", 2),
        (b"a" * formats.BLOCK + b"\x80", formats.BLOCK),
        (b"a\r\n" * formats.BLOCK + b"\xe9 ", 3 * formats.BLOCK),
        (b"\xef\xbb\xbfa\xc0", 4),
        (b"ab\xe2\x82", 2),
        (b"ab\xed\xa0\x80", 2),
        (b"abc\0d", 3),
        ("text".encode("utf-16"), 0),
        ("text".encode("utf-16-le"), 1),
        (b"a" * (formats.BLOCK - 1) + "é\0".encode(), formats.BLOCK + 1),
    ],
)
def test_what_is_not_utf8_is_named_with_file_and_byte(tmp_path, content, byte):
    message = refusal(write(tmp_path / "bad.txt", content))
    assert f"bad.txt, byte {byte})" in message


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=40), block=st.integers(1, 9))
@example(content=b"x\xe2\x82", block=1)
@example(content=b"\xff\xff\0x", block=3)
def test_bad_bytes_can_be_replaced_and_are_counted(tmp_path_factory, content, block):
    content = b"x" + content  # no byte order mark
    path = write(tmp_path_factory.getbasetemp() / "bad.txt", content)
    report = ReadReport()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        texts = documents(path, errors="replace", report=report)
    expected = content.decode(errors="replace").replace("\0", "\ufffd").replace("\r\n", "\n")
    assert texts == [expected]
    assert report.replaced == expected.count("\ufffd") - content.decode(errors="ignore").count(
        "\ufffd"
    )


def test_documents_without_a_visible_character_are_left_out(tmp_path):
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "blank.txt", "\n\r\n \t\n")
    write(tmp_path / "text.txt", "\n\n text \n\n")
    assert documents(tmp_path) == ["\n\n text \n\n"]


# ---------------------------------------------------------------------------- pieces

BPE = load_tokenizer("bpe:600", train_texts=[Path(json.__file__).read_text() + "!\x1c " * 9])
WORDS = st.text(st.sampled_from("ab1'!é\u00a0\x1c \n\t "), max_size=120)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(WORDS, max_size=4),
    lengths=st.lists(st.integers(1, 30), min_size=1),
    size=st.integers(2, 20),
)
def test_pieces_are_the_text_and_do_not_depend_on_how_it_arrives(texts, lengths, size):
    arriving = []
    for text in texts:
        start, count = 0, 0
        arriving.append(Piece("", True, "x"))
        while start < len(text):
            length = lengths[count % len(lengths)]
            arriving.append(Piece(text[start : start + length], False, "x"))
            start, count = start + length, count + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", size)
        pieces = list(sources.pieces(arriving))
        assert pieces == list(sources.pieces(Piece(text, True, "x") for text in texts))
    assert all(0 < len(piece.text) <= size for piece in pieces)
    joined: list[str] = []
    for piece in pieces:
        joined += [piece.text] if piece.first else []
        joined[-1] += "" if piece.first else piece.text
    kept = [text for text in texts if text.strip() or len(text) > size]
    assert joined == kept


VISIBLE = st.sampled_from(["a", "ab", "'s", "1", "!", "é"])
SPACE = st.sampled_from([" ", "  ", "    ", "\n", "\n\n  ", "\u00a0 ", "\x1c ", "\t\u3000"])


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.tuples(VISIBLE, SPACE), max_size=40))
@example(words=[("aaaaaaa", "    "), ("b", " ")])
@example(words=[("aaaaa", " "), ("!!", "\x1c "), ("b", " ")])
def test_the_tokens_of_the_pieces_are_the_tokens_of_the_document(words):
    """Cutting inside white space, or before what is white space to Python alone, gives others."""
    text = "".join(word + space for word, space in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 9)
        pieces = [piece.text for piece in sources.pieces([Piece(text, True, "x")])]
    for before, after in itertools.pairwise(pieces):
        if after[0] not in " \n\t":
            assert len(before) == 9  # nothing to cut at
            return
    backend = plain_text(BPE)
    tokens = [i for encoding in backend.encode_batch(pieces) for i in encoding.ids]
    assert tokens == backend.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab\n \t", max_size=80), block=st.integers(1, 9))
@example(text="a\n \n b\n\n\nc\n", block=1)
def test_paragraphs_lie_between_blank_lines(tmp_path_factory, text, block):
    path = write(tmp_path_factory.getbasetemp() / "paragraphs.txt", text)
    parts = re.split(r"\n[ \t]*\n", text)
    expected = [re.sub(r"\A([ \t]*\n)+", "", part) for part in parts]
    expected[-1] = expected[-1].rstrip("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        found = documents(path, txt_documents="paragraph")
    assert found == [part for part in expected if part.strip()]


def test_a_paragraph_longer_than_a_piece_stays_one_document(tmp_path):
    long = "word " * sources.PIECE
    path = write(tmp_path / "a.txt", f"first\n\n{long}x\n \nlast\n")
    assert documents(path, txt_documents="paragraph") == ["first", long + "x", "last"]
    assert documents(path) == [f"first\n\n{long}x\n \nlast\n"]


# ---------------------------------------------------------------------------- compressed files


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_read_also_in_several_frames(tmp_path, suffix):
    text = "".join(f"line {i}\n" for i in range(100_000))
    path = compress(tmp_path / f"a.txt{suffix}", text.encode())
    assert documents(path) == [text]
    write(path, path.read_bytes() * 2)
    assert documents(tmp_path) == [text * 2]
    lines = b"".join(json.dumps({"text": f"t{i}"}).encode() + b"\n" for i in range(1000))
    assert documents(compress(tmp_path / f"b.jsonl{suffix}", lines)) == [
        f"t{i}" for i in range(1000)
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, suffix):
    path = compress(tmp_path / f"a.txt{suffix}", os.urandom(3000).hex().encode())
    whole = path.read_bytes()
    for size in (1, 5, 20, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        assert "truncated or corrupt" in refusal(write(path, whole[:size]))
    assert "truncated or corrupt" in refusal(write(path, b"this is not compressed"))


def test_a_zip_bomb_is_refused_in_constant_memory(tmp_path):
    path = tmp_path / "bomb.txt.zst"
    with pa.output_stream(str(path), compression="zstd") as stream:
        for _ in range(64):
            stream.write(b" " * (1 << 20))
    assert path.stat().st_size < 64 << 10
    tracemalloc.start()
    assert "grows more than 1000 times" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_gzip_written_by_python_is_read(tmp_path):
    assert documents(write(tmp_path / "a.md.gz", gzip.compress(b"text"))) == ["text"]


# ---------------------------------------------------------------------------- JSON lines

GOOD = '{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "a"', "line 3, column 13"),
        ("{'text': 1}", "bad JSON"),
        ('{"text": "a"} x', "bad JSON"),
        ('{"id": 1, "body": "b"}', "no 'text' field, only: id, body"),
        ("{}", "only: none"),
        ('{"text": null}', "'text' is null"),
        ('{"text": 5}', "'text' is 5"),
        ('{"text": {"en": "a"}}', "not a string"),
        ('["text"]', "not an object"),
        ('"text"', "not an object"),
        ('{"text": "a", "text": "b"}', "the same key twice"),
        ("[" * 100_000, "bad JSON"),
        ('{"text": ' + "9" * 5000 + "}", "bad JSON"),
    ],
)
def test_a_bad_json_line_is_named_with_its_number(tmp_path, line, what):
    path = write(tmp_path / "a.jsonl", "\n".join([GOOD, "", line, GOOD]))
    message = refusal(path)
    assert "a.jsonl, line 3" in message
    assert what in message
    report = ReadReport()
    path = write(tmp_path / "a.jsonl", "\n".join([*[GOOD] * 150, line]))
    assert documents(path, skip_bad=True, report=report) == ["good"] * 150
    assert (report.skipped, report.records) == (1, 151)
    write(path, "\n".join([*[GOOD] * 50, line]))
    assert "1 of 51 records are bad" in refusal(path, skip_bad=True, error=IntegrityError)


def test_a_json_line_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD.encode() + b'\n{"text": "\xff"}')
    assert "line 2, byte 10 of the line" in refusal(path)


def test_half_a_surrogate_pair_in_json_is_named_or_replaced(tmp_path):
    path = write(
        tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00 ok"}' + "\n" + r'{"text": "a\ud83db"}'
    )
    assert "lone surrogate \\ud83d" in refusal(path)
    report = ReadReport()
    assert documents(path, errors="replace", report=report) == ["\U0001f600 ok", "a\ufffdb"]
    assert report.replaced == 1


def test_json_text_keeps_its_line_ends_and_crlf_files_are_fine(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n')
    assert documents(path) == ["a\r\nb", "c"]


def test_a_json_line_too_long_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 1 << 20)
    path = write(tmp_path / "a.jsonl", GOOD + '\n{"text": "' + "a" * (8 << 20) + '"}')
    tracemalloc.start()
    assert "more than 1 MiB" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


# ---------------------------------------------------------------------------- Parquet and the hub


def parquet(path, rows=200, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or {"id": range(rows), "text": [f"text {i}" for i in range(rows)]}
    pa.parquet.write_table(
        pa.table({k: v if isinstance(v, pa.Array) else list(v) for k, v in columns.items()}), path
    )
    return path


def test_parquet_is_read_row_by_row(tmp_path):
    assert documents(parquet(tmp_path / "a.parquet")) == [f"text {i}" for i in range(200)]
    large = pa.array(["x", "y"], pa.large_string())
    assert documents(parquet(tmp_path / "b.parquet", text=large)) == ["x", "y"]


def test_parquet_faults_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    assert "its columns are id, body" in refusal(parquet(path, id=[1], body=["b"]))
    assert "column 'text' is int64" in refusal(parquet(path, text=[1]))
    assert "row 2): " in refusal(parquet(path, text=["a", None]))
    whole = parquet(path).read_bytes()
    for content in (b"", b"text", whole[:-1], whole[: len(whole) // 2], whole[8:]):
        assert "not a readable Parquet file" in refusal(write(path, content))
    damaged = bytearray(parquet(path, text=[os.urandom(40).hex() for _ in range(500)]).read_bytes())
    damaged[100:140] = b"\xff" * 40
    assert "not a readable Parquet file" in refusal(write(path, bytes(damaged)))
    assert "unpack" in refusal(write(tmp_path / "a.parquet.gz", b"x"))


def test_bad_parquet_rows_can_be_skipped(tmp_path):
    report = ReadReport()
    path = parquet(tmp_path / "a.parquet", text=["a"] * 199 + [None])
    assert documents(path, skip_bad=True, report=report) == ["a"] * 199
    assert report.skipped == 1


def fineweb(folder, rows=60):
    """Two Parquet files with the columns of HuggingFaceFW/fineweb-edu."""
    for part in range(2):
        count = range(part * rows // 2, (part + 1) * rows // 2)
        columns = {"text": [f"text {i}" for i in count], "id": [f"<urn:uuid:{i}>" for i in count]}
        columns |= {name: [name] * len(count) for name in ("dump", "url", "file_path", "language")}
        columns |= {"language_score": [0.9] * len(count), "token_count": list(count)}
        columns |= {"score": [3.5] * len(count), "int_score": [4] * len(count)}
        parquet(folder / f"{part:03}_00000.parquet", **columns)
    return folder


def test_the_hub_path_reads_local_parquet_by_the_real_loader(tmp_path):
    spec = f"hub:{fineweb(tmp_path)}"
    assert documents(spec) == [f"text {i}" for i in range(60)]
    assert documents(f"{spec}:default:train") == [f"text {i}" for i in range(60)]
    assert "BuilderConfig 'other' not found" in refusal(f"{spec}:other")
    assert "Bad split: test" in refusal(f"{spec}:default:test")
    assert "data file" in refusal(f"hub:{tmp_path}/missing")
    for path in tmp_path.iterdir():
        parquet(path, id=[1], body=["b"])
    assert "its columns are id, body" in refusal(spec)


def test_without_the_datasets_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'spectral-window[hub]'" in refusal(
        "hub:HuggingFaceFW/fineweb-edu:sample-10BT"
    )


def test_without_a_network_the_hub_is_a_network_error_at_once():
    code = (
        "from spectral_window.data.sources import *; from spectral_window.data.formats import *\n"
        "found = find_sources(['hub:HuggingFaceFW/fineweb-edu:sample-10BT'])\n"
        "try: list(read(found, ReadOptions(), ReadReport()))\n"
        "except Exception as error: print(type(error).__name__, error.exit_code, error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.startswith(
        "NetworkError 6 the hub did not answer (hub:HuggingFaceFW/fineweb-edu:sample-10BT)"
    ), done.stderr


def test_reading_a_hub_data_set_stops_early_without_a_hang(tmp_path):
    code = (
        "import sys; from itertools import islice; from spectral_window.data.sources import *\n"
        "from spectral_window.data.formats import *\n"
        "print(len(list(islice(read(find_sources(sys.argv[1:]), ReadOptions(), ReadReport()), 5))))"
    )
    spec = f"hub:{fineweb(tmp_path)}"
    done = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


# ---------------------------------------------------------------------------- memory


def peak_while_reading(path, **options):
    sources_ = find_sources([str(path)])
    tracemalloc.start()
    size = sum(len(piece.text) for piece in read(sources_, ReadOptions(**options), ReadReport()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size, peak


@pytest.mark.parametrize("option", ["file", "paragraph"])
@pytest.mark.parametrize("unit", ["a", "word ", "\n", "line\n", "a paragraph\n\n"])
def test_memory_does_not_grow_with_the_file(tmp_path, unit, option):
    path = tmp_path / "a.txt"
    with open(path, "w") as file:
        for _ in range(6):
            file.write(unit * ((1 << 20) // len(unit)))
    _, peak = peak_while_reading(path, txt_documents=option)
    assert peak < 4 << 20


@pytest.mark.slow
@pytest.mark.parametrize("option", ["file", "paragraph"])
def test_one_line_of_a_gigabyte_is_read_in_constant_memory(tmp_path, option):
    path = tmp_path / "a.txt"
    with open(path, "w") as file:
        for _ in range(1000):
            file.write("a" * 1_000_000)
    size, peak = peak_while_reading(path, txt_documents=option)
    assert size == 10**9
    assert peak < 8 << 20


def test_options_are_checked():
    for options in ({"errors": "ignore"}, {"txt_documents": "line"}, {"skip_bad": "maybe"}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is .*: choose"):
            ReadOptions(**options)
