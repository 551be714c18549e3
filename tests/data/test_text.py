"""`prepare` and `open_corpus`: tokens, hold-out, full disks, kills, damage."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_window.data import shards
from spectral_window.data import text as text_module
from spectral_window.data.blocks import PackedBlocks
from spectral_window.data.formats import ReadOptions
from spectral_window.data.holdout import choose_split, paragraph_near
from spectral_window.data.sources import find_sources
from spectral_window.data.text import open_corpus, prepare
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import IntegrityError, ResourceError, UserError


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return str(path)


def texts_of(stream, tokenizer):
    """The documents of a stream, decoded."""
    tokens = np.split(np.asarray(stream.tokens), stream.documents[1:])
    assert all(ids[0] == tokenizer.eos_token_id for ids in tokens)
    assert all(tokenizer.eos_token_id not in ids[1:] for ids in tokens)
    return [tokenizer.decode(ids[1:]) for ids in tokens]


def split_texts(corpus):
    return texts_of(corpus.train, corpus.tokenizer), texts_of(corpus.valid, corpus.tokenizer)


@pytest.fixture(scope="module")
def words():
    """200 documents of different text."""
    return [
        f"Document {i}: " + " ".join(f"w{i * j % 97}" for j in range(i % 40)) for i in range(200)
    ]


def refused(*args, error=UserError, **options):
    with pytest.raises(error) as caught:
        prepare(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- tokens


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30).filter(str.strip), min_size=2, max_size=12, unique=True),
    batch=st.integers(1, 60),
)
def test_the_concatenated_tokens_are_the_documents_in_order(tmp_path_factory, texts, batch):
    folder = tmp_path_factory.mktemp("property")
    source = jsonl(folder / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module.shards, "BATCH", batch)
        corpus = prepare([source], "bytes", folder / "tokens")
    sides = {"train": [], "valid": []}
    held_out = set(texts_of(corpus.valid, corpus.tokenizer))
    for text in texts:
        sides["valid" if text in held_out else "train"].append(text)
    for name, stream in (("train", corpus.train), ("valid", corpus.valid)):
        expected, starts = [], []
        for text in sides[name]:
            starts.append(len(expected))
            expected += [256, *text.encode()]
        assert stream.tokens.tolist() == expected
        assert stream.documents.tolist() == starts
        assert stream.bytes == len(expected) - len(starts)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spec", "dtype"), [("bytes", "uint16"), ("bpe:300", "uint16"), ("gpt2", "uint16")]
)
def test_every_tokenizer_gives_back_the_text(tmp_path, words, spec, dtype):
    corpus = prepare([jsonl(tmp_path / "a.jsonl", words)], spec, tmp_path / "tokens")
    train, valid = split_texts(corpus)
    assert sorted(train + valid) == sorted(words)
    assert corpus.train.tokens.dtype == dtype
    assert max(corpus.train.tokens) < corpus.vocab_size == len(corpus.tokenizer)
    assert corpus.train.bytes == sum(len(text.encode()) for text in train)


def test_a_vocabulary_above_65536_gets_wider_tokens(tmp_path, words):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"x{i}": i for i in range(70_000)} | {"w1": 70_000, "<|endoftext|>": 70_001}
    backend = Tokenizer(models.WordLevel(vocabulary, "x0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("x9 $A", special_tokens=[("x9", 9)])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tokenizer")
    source = jsonl(tmp_path / "a.jsonl", words)
    corpus = prepare([source], str(tmp_path / "tokenizer"), tmp_path / "tokens")
    assert corpus.train.tokens.dtype == np.uint32
    assert {0, 70_000, 70_001} == set(corpus.train.tokens.tolist())
    assert corpus.vocab_size == 70_002


def test_a_document_longer_than_a_piece_has_the_tokens_of_the_whole(tmp_path):
    text = "".join(f"Line {i} of a long file.\n" for i in range(20_000))
    assert len(text) > 5 * 65536
    sources = [write(tmp_path / "a.md", text)]
    corpus = prepare(sources, "gpt2", tmp_path / "t", valid_sources=[write(tmp_path / "b.md", "b")])
    whole = load_tokenizer("gpt2")(text)["input_ids"]
    assert corpus.train.tokens[1:].tolist() == whole
    assert corpus.train.documents.tolist() == [0]


def test_crlf_and_lf_give_the_same_tokens(tmp_path):
    text = "one\n\ntwo\n" * 500
    lf = prepare([write(tmp_path / "lf.txt", text)], "bpe:280", tmp_path / "1")
    crlf = prepare(
        [write(tmp_path / "crlf.txt", text.replace("\n", "\r\n"))], "bpe:280", tmp_path / "2"
    )
    assert lf.fingerprint == crlf.fingerprint


@pytest.mark.parametrize("named", [True, False])
def test_the_default_tokenizer_learns_from_the_training_split_only(tmp_path, named):
    """Each document repeats a word of its own; the words of held-out documents stay unknown."""
    words = ["".join(chr(97 + i * j % 26) for j in range(1, 7)) for i in range(26)]
    path, other = (
        jsonl(tmp_path / f"{name}.jsonl", [f"x {word}" * 50 for word in part])
        for name, part in (("a", words[:20]), ("b", words[20:]))
    )
    options = {"valid_sources": [other]} if named else {"valid_fraction": 0.2}
    corpus = prepare([path], "bpe:400", tmp_path / "tokens", **options)
    train, valid = split_texts(corpus)
    assert len(train) > 10
    assert len(valid) > 1
    vocabulary = corpus.tokenizer.get_vocab()
    assert all("Ġ" + text[2:8] in str(vocabulary) for text in train)
    assert not any("Ġ" + text[2:8] in str(vocabulary) for text in valid)


def test_a_huge_text_trains_the_tokenizer_on_a_spread_sample(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", [f"{i:03} " * 75 for i in range(400)])
    monkeypatch.setattr(text_module, "SAMPLE", 1 << 14)
    texts = text_module._Texts(find_sources([source]), [], ReadOptions(), None, None)
    survey = texts.survey(0.02, seed=0)
    sample = [text[:3] for text in texts.sample(choose_split(survey, 0.02, 0), survey)]
    assert 50 <= len(sample) <= (1 << 14) / 300
    for digit in "0123":
        assert 12 <= sum(text[0] == digit for text in sample) <= 14


# ---------------------------------------------------------------------------- held-out text


def test_documents_are_held_out_whole_and_equal_ones_together(tmp_path, words):
    sources = [jsonl(tmp_path / "a.jsonl", words * 2), jsonl(tmp_path / "b.jsonl", words[::-1])]
    train, valid = split_texts(prepare(sources, "bytes", tmp_path / "tokens", valid_fraction=0.2))
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(words * 3)
    assert 0.1 < len(valid) / len(words * 3) < 0.3


def test_more_documents_move_no_other_and_the_seed_does(tmp_path, words):
    def valid(texts, **options):
        path = jsonl(tmp_path / "a.jsonl", texts)
        corpus = prepare(
            [path], "bytes", tmp_path / "t", overwrite=True, valid_fraction=0.1, **options
        )
        return set(split_texts(corpus)[1])

    assert valid(words[:100]) == valid(words) & set(words[:100])
    assert valid(words[::-1]) == valid(words)
    assert valid(words, seed=1) != valid(words)


def test_of_a_few_documents_the_one_of_the_wanted_size_is_held_out(tmp_path):
    texts = {"a.txt": "a" * 500, "b.txt": "b" * 60, "c.txt": "c" * 3, "d.txt": "d" * 437}
    for name, text in texts.items():
        write(tmp_path / "in" / name, text)
    for fraction, name in ((0.02, "c.txt"), (0.05, "b.txt")):
        corpus = prepare([str(tmp_path / "in")], "bytes", tmp_path / name, valid_fraction=fraction)
        assert split_texts(corpus)[1] == [texts[name]]


@pytest.mark.parametrize("copies", [1, 3])
def test_one_file_is_cut_at_a_paragraph_near_its_end(tmp_path, copies):
    text = "".join(f"Paragraph {i} says something.\nAnd more.\n\n" for i in range(5000))
    sources = [write(tmp_path / f"{i}.txt", text) for i in range(copies)]
    train, valid = split_texts(prepare(sources, "bytes", tmp_path / "tokens", valid_fraction=0.1))
    assert len(train) == len(valid) == copies
    assert train[0] + valid[0] == text
    assert valid[0].startswith("Paragraph 4")
    assert abs(len(valid[0]) / len(text) - 0.1) < 0.01


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab\n ", min_size=2, max_size=40), at=st.integers(0, 50))
def test_a_cut_is_at_the_nearest_paragraph_that_leaves_text_on_both_sides(text, at):
    cut = paragraph_near(text, at)
    assert 0 < cut < len(text)
    at = min(max(at, 1), len(text) - 1)

    def good(mark):
        places = [text.rfind(mark, 0, at), text.find(mark, at)]
        ends = [place + len(mark) for place in places if place >= 0]
        return [end for end in ends if text[:end].strip() and text[end:].strip()]

    for mark in ("\n\n", "\n", " "):
        if good(mark):
            assert abs(cut - at) == min(abs(end - at) for end in good(mark))
            return
    assert cut == at


def test_named_held_out_text_is_used_whole_and_must_not_be_training_text(tmp_path, words):
    train, valid = (
        jsonl(tmp_path / name, part)
        for name, part in (("a.jsonl", words[:150]), ("b.jsonl", words[150:]))
    )
    assert split_texts(prepare([train], "bytes", tmp_path / "t", valid_sources=[valid])) == (
        words[:150],
        words[150:],
    )
    both = jsonl(tmp_path / "c.jsonl", words[100:])
    for sources in ([train], [valid]):
        message = refused(sources, "bytes", tmp_path / "x", valid_sources=[both])
        assert "held-out text is training text too, documents: 50 (" in message
        assert "jsonl, line" in message
    blank = write(tmp_path / "blank.txt", "\n")
    assert "no documents in valid_sources" in refused(
        [train], "bytes", tmp_path / "x", valid_sources=[blank]
    )
    assert not (tmp_path / "x").exists()


def test_paragraphs_can_be_the_documents(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n".join(f"paragraph {i}" for i in range(300)) + "\n")
    train, valid = split_texts(prepare([path], "bytes", tmp_path / "t", txt_documents="paragraph"))
    assert sorted(train + valid) == sorted(f"paragraph {i}" for i in range(300))
    assert 0 < len(valid) < 30


# ---------------------------------------------------------------------------- the hub


def test_a_hub_data_set_is_read_as_far_as_max_bytes(tmp_path, monkeypatch):
    texts = [f"text {i} " * 20 for i in range(400)]
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pyarrow.table(
            {"text": texts[part * 200 :][:200], "id": [str(i) for i in range(200)]}
        )
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{part}.parquet")
    spec = f"hub:{tmp_path / 'data'}"
    train, valid = split_texts(prepare([spec], "bytes", tmp_path / "all", valid_fraction=0.1))
    assert sorted(train + valid) == sorted(texts)
    monkeypatch.setattr(text_module, "SAMPLE", 4000)  # the survey stops; the split does not change
    again = prepare([spec], "bytes", tmp_path / "early", valid_fraction=0.1)
    assert split_texts(again) == (train, valid)
    some = prepare([spec], "bpe:300", tmp_path / "some", valid_fraction=0.1, max_bytes=20_000)
    train, valid = split_texts(some)
    assert sorted(train + valid) == sorted(texts[: len(train + valid)])
    assert 20_000 <= some.train.bytes + some.valid.bytes < 20_200


# ---------------------------------------------------------------------------- the folder


def test_the_same_request_is_answered_from_the_folder(tmp_path, words):
    path = jsonl(tmp_path / "a.jsonl", words)
    stages = []
    first = prepare([path], "bpe:300", tmp_path / "t", progress=lambda *call: stages.append(call))
    assert [stage for stage, _, _ in stages] == ["reading", "tokenizer", "tokens"]
    assert {done for _, done, _ in stages} == {sum(map(len, words))}
    before = os.stat(tmp_path / "t" / "train.tokens").st_mtime_ns
    again = prepare([path], "bpe:300", tmp_path / "t", progress=lambda *call: stages.append(call))
    assert len(stages) == 3
    assert os.stat(tmp_path / "t" / "train.tokens").st_mtime_ns == before
    elsewhere = prepare([path], "bpe:300", tmp_path / "deep" / "er")
    assert first.fingerprint == again.fingerprint == elsewhere.fingerprint
    assert open_corpus(tmp_path / "t").train.tokens.tolist() == first.train.tokens.tolist()


def test_another_request_or_a_changed_file_is_refused_or_replaces(tmp_path, words):
    path = jsonl(tmp_path / "a.jsonl", words)
    old = prepare([path], "bytes", tmp_path / "t")
    message = refused([path], "bpe:300", tmp_path / "t", seed=3)
    assert "differs: tokenizer, seed" in message
    jsonl(tmp_path / "a.jsonl", [*words, "new"])
    assert "differs: files" in refused([path], "bytes", tmp_path / "t")
    assert open_corpus(tmp_path / "t").fingerprint == old.fingerprint
    new = prepare([path], "bytes", tmp_path / "t", overwrite=True)
    assert new.fingerprint != old.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "t"]


def test_a_folder_with_something_else_is_never_touched(tmp_path, words):
    path = jsonl(tmp_path / "a.jsonl", words)
    write(tmp_path / "thesis" / "chapter.txt", "mine")
    for overwrite in (False, True):
        assert "something else" in refused(
            [path], "bytes", tmp_path / "thesis", overwrite=overwrite
        )
        assert "not a folder" in refused([path], "bytes", path, overwrite=overwrite)
    assert os.listdir(tmp_path / "thesis") == ["chapter.txt"]
    (tmp_path / "empty").mkdir()
    assert prepare([path], "bytes", tmp_path / "empty").train.bytes


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({}, '{"text": "a"}\n{"text": nothing}\n'),
        ({}, "\n\n"),
        ({"valid_fraction": 0.0}, '{"text": "a"}\n'),
        ({"valid_fraction": 1.0}, '{"text": "a"}\n'),
        ({"valid_fraction": float("nan")}, '{"text": "a"}\n'),
        ({"max_bytes": 0}, '{"text": "a"}\n'),
        ({"errors": "ignore"}, '{"text": "a"}\n'),
        ({"tokenizer_spec": "bpe:1"}, '{"text": "a"}\n'),
        ({"tokenizer_spec": "nothing"}, '{"text": "a"}\n'),
        ({}, '{"text": "a"}\n'),  # one character cannot be on both sides
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, options, content):
    path = write(tmp_path / "a.jsonl", content)
    request = {
        "sources": [path],
        "tokenizer_spec": "bytes",
        "folder": tmp_path / "x" / "t",
    } | options
    with pytest.raises(UserError) as caught:
        prepare(**request)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "x" / "t").exists()
    assert not list(tmp_path.glob("**/.*"))


def test_ctrl_c_at_any_stage_leaves_the_folder_as_it_was(tmp_path, words):
    path = jsonl(tmp_path / "a.jsonl", words)
    old = prepare([path], "bytes", tmp_path / "t")
    for stage in ("reading", "tokenizer", "tokens"):

        def interrupt(now, done, total, stage=stage):
            if now == stage:
                raise KeyboardInterrupt

        for folder, overwrite in (("t", True), ("new", False)):
            with pytest.raises(KeyboardInterrupt):
                prepare(
                    [path], "bpe:300", tmp_path / folder, overwrite=overwrite, progress=interrupt
                )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "t"]
    assert open_corpus(tmp_path / "t").fingerprint == old.fingerprint


KILLED = """
import os, signal, sys
from spectral_window.data.text import prepare
def kill(stage, done, total):
    if stage == "tokens":
        os.kill(os.getpid(), signal.SIGKILL)
prepare([sys.argv[1]], "bytes", sys.argv[2], progress=kill)
"""


def test_what_a_killed_process_leaves_is_no_corpus_and_is_removed_by_the_next(tmp_path, words):
    path = jsonl(tmp_path / "a.jsonl", words)
    done = subprocess.run([sys.executable, "-c", KILLED, path, tmp_path / "t"])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "t").exists()
    assert len(list(tmp_path.glob(".tmp-t-*"))) == 1
    (tmp_path / f".tmp-t-{os.getppid()}").mkdir()  # of a process that still works: stays
    prepare([path], "bytes", tmp_path / "t")
    assert [path.name for path in tmp_path.glob(".tmp-*")] == [f".tmp-t-{os.getppid()}"]


def limited(path, folder, size):
    """prepare() in this process, whose files may have `size` bytes at most: like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return refused([path], "bytes", folder, error=ResourceError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 100, 10_000, 20_000])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, words, size):
    path = jsonl(tmp_path / "a.jsonl", words)
    message = limited(path, tmp_path / "t", size)
    assert "cannot write: " in message
    assert "bytes are free" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


# ---------------------------------------------------------------------------- reading back


@pytest.fixture
def prepared(tmp_path, words):
    prepare([jsonl(tmp_path / "a.jsonl", words)], "bytes", tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize(
    "name", ["train.tokens", "valid.tokens", "train.documents", "valid.documents"]
)
def test_every_damage_to_the_tokens_is_found(prepared, name):
    path = prepared / name
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:-2], whole + b"\0\0", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            IntegrityError, match=f"{len(content)} bytes instead of {len(whole)}.*{name}"
        ):
            open_corpus(prepared)
    for place in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError, match=rf"sha256\) \(.*{name}"):
            open_corpus(prepared)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"No such file.*{name}"):
        open_corpus(prepared)


def test_a_changed_tokenizer_is_found_when_it_is_used(prepared):
    path = prepared / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":97', '"a":98').replace('"a": 97', '"a": 98'))
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        open_corpus(prepared).tokenizer  # noqa: B018


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("format", "other", "the mark 'spectral-window tokens' is missing"),
        ("schema", 2, "schema 2, this version reads 1"),
        ("dtype", "float32", "not an index"),
        ("dtype", "uint32", "tokens"),
        ("vocab_size", 70_000, "uint16 cannot hold 70000 ids"),
        ("vocab_size", None, "not an index"),
        ("separator", 257, "not an index"),
        ("separator", -1, "not an index"),
        ("splits", {}, "not an index"),
        ("splits", {"train": {"documents": True, "bytes": 1, "tokens": 1}}, "not an index"),
        ("files", [], "not an index"),
        ("files", {}, "not an index"),
        ("files", {"../../etc/passwd": {"size": 1}}, "not an index"),
        ("fingerprint", None, "its files are not those of its fingerprint"),
        ("fingerprint", "0" * 64, "its files are not those of its fingerprint"),
    ],
)
def test_an_index_with_wrong_values_is_refused_also_when_it_is_signed(prepared, key, value, what):
    path = prepared / "corpus.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {key: value}, indent=1))
    with pytest.raises(IntegrityError, match=r"corpus\.json"):
        open_corpus(prepared)
    del index["sha256"]
    path.write_text(shards.signed_text(index | {key: value}))
    with pytest.raises(IntegrityError, match=what):
        open_corpus(prepared)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"{}"])
def test_a_broken_index_is_refused(prepared, content):
    (prepared / "corpus.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"corpus\.json"):
        open_corpus(prepared)


def test_nothing_prepared_is_a_user_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing", write(tmp_path / "file", "x")):
        with pytest.raises(UserError, match="no prepared text"):
            open_corpus(folder)


def test_forgiven_faults_are_counted_in_the_index(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 3 + b"\n\nmore text here\n\nand here")
    corpus = prepare([str(tmp_path / "a.txt")], "bytes", tmp_path / "t", errors="replace")
    assert corpus.index["characters_replaced"] == 3
    path = write(tmp_path / "b.jsonl", '{"text": "a"}\n{"text": "b"}\n' * 60 + "{}\n")
    assert prepare([path], "bytes", tmp_path / "u", skip_bad=True).index["records_skipped"] == 1


# ---------------------------------------------------------------------------- real text


def test_the_standard_library_trains_a_tokenizer_and_fills_blocks(tmp_path):
    corpus = prepare(["stdlib"], "bpe:512", tmp_path / "t", max_bytes=2_000_000)
    assert corpus.train.bytes + corpus.valid.bytes >= 2_000_000
    assert len(corpus.train.documents) > 50
    blocks = PackedBlocks(corpus.train, 256)
    text = corpus.tokenizer.decode(blocks[0]["input_ids"], skip_special_tokens=True)
    with open(
        os.path.join(os.path.dirname(os.__file__), "__future__.py"), encoding="utf-8"
    ) as file:
        assert file.read().startswith(text)


MEASURE = """
import sys
from spectral_window.data.text import prepare
from spectral_window.training.machine import peak_memory
prepare([sys.argv[1]], sys.argv[2], sys.argv[3])
print(peak_memory("cpu") >> 20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "kind"), [("bytes", "txt"), ("bpe:4096", "txt"), ("gpt2", "jsonl")]
)
def test_memory_is_constant_in_the_size_of_the_text(tmp_path, spec, kind):
    """Peak MiB for 60 MB of text against 6 MB."""
    words = np.random.default_rng(0).integers(0, 5000, 40_000)
    peaks = []
    for size in (6, 60):
        path = tmp_path / f"{size}.{kind}"
        with open(path, "w") as file:
            for i in range(size * 10):
                text = " ".join(f"{word:x}" for word in np.roll(words, i * 7)[:25_000])[:100_000]
                file.write(text + "\n\n" if kind == "txt" else json.dumps({"text": text}) + "\n")
        command = [sys.executable, "-c", MEASURE, path, spec, tmp_path / f"tokens{size}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 64, peaks
