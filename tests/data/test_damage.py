"""Prepared text and its sources, damaged at every place: an error, never other data."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_window.data import arrays, shards
from spectral_window.data.arrays import FileArray, SortedFileArray
from spectral_window.data.blocks import PackedBlocks
from spectral_window.data.text import open_corpus, prepare
from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import hash_file

TOKENS = [f"{split}.{kind}" for split in ("train", "valid") for kind in ("tokens", "documents")]
FILES = [
    *TOKENS,
    "corpus.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    texts = [f"text {i} " * (i % 5 + 1) for i in range(30)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare([str(folder / "a.jsonl")], "bytes", folder / "t", valid_fraction=0.2)
    return folder / "t"


@pytest.fixture
def prepared(written, tmp_path):
    shutil.copytree(written, tmp_path / "t")
    return tmp_path / "t"


def refusal(folder):
    with pytest.raises(IntegrityError) as caught:
        open_corpus(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value)


def write_index(folder, signed=True, **changes):
    index = json.loads((folder / "corpus.json").read_text())
    del index["sha256"]
    index |= changes
    text = shards.signed_text(index) if signed else json.dumps(index, indent=1)
    (folder / "corpus.json").write_text(text)
    return index


# ---------------------------------------------------------------------------- when it is opened


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_and_no_other_length_is_opened(prepared, name):
    path = prepared / name
    whole = path.read_bytes()
    step = max(1, len(whole) // 300)
    with open(path, "r+b", buffering=0) as file:
        for place in range(0, len(whole), step):
            bit = 1 << (place // step % 8)
            os.pwrite(file.fileno(), bytes([whole[place] ^ bit]), place)
            assert name in refusal(prepared) or "corpus.json" in refusal(prepared)
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    open_corpus(prepared)
    for size in np.linspace(0, len(whole) - 1, 64).astype(int):
        path.write_bytes(whole[:size])
        assert name in refusal(prepared)
    path.write_bytes(whole + b"\n")
    assert name in refusal(prepared)
    path.unlink()
    if name == "corpus.json":
        with pytest.raises(UserError, match="no prepared text"):
            open_corpus(prepared)
    else:
        assert name in refusal(prepared)


def test_files_of_another_folder_or_in_each_others_place_are_refused(prepared):
    a, b = prepared / "train.documents", prepared / "valid.documents"
    a.rename(prepared / "x")
    b.rename(a)
    (prepared / "x").rename(b)
    assert "train.documents" in refusal(prepared)


def test_what_is_signed_again_must_make_sense(prepared):
    """Whoever can write the files can sign them; the numbers must still be tokens and places."""
    signed = (prepared / "corpus.json").read_text()
    for name, numbers, what in (
        ("train.tokens", np.array([300], "<u2"), "token 300 of a vocabulary of 257"),
        ("train.documents", np.array([1 << 40], "<i8"), "no places where documents begin"),
        ("train.documents", np.array([-1], "<i8"), "no places where documents begin"),
        ("train.documents", np.array([0], "<i8"), "no places where documents begin"),
    ):
        whole = (prepared / name).read_bytes()
        (prepared / name).write_bytes(whole[: -numbers.nbytes] + numbers.tobytes())
        index = json.loads(signed)
        index["files"][name]["sha256"] = hash_file(prepared / name)
        hashes = [index["files"][file]["sha256"] for file in shards.CONTENT]
        fingerprint = shards.digest([index["dtype"], hashes])
        write_index(prepared, files=index["files"], fingerprint=fingerprint)
        assert what in refusal(prepared)
        (prepared / name).write_bytes(whole)


def test_a_file_that_nothing_lists_is_not_loaded_with_the_tokenizer(prepared):
    (prepared / "tokenizer" / ".DS_Store").write_text("x")
    open_corpus(prepared).tokenizer  # noqa: B018
    (prepared / "tokenizer" / "added_tokens.json").write_text('{"a": 3}')
    assert "added_tokens.json" in refusal(prepared)


def test_what_an_older_version_prepared_is_opened_and_checked_by_its_fingerprint(prepared):
    index = json.loads((prepared / "corpus.json").read_text())
    known = {key: index[key] for key in shards.FIRST_KEYS}
    (prepared / "corpus.json").write_text(json.dumps(known, indent=1))
    corpus = open_corpus(prepared)
    assert "older version" in corpus.notes[0]
    assert "older version" in corpus.summary()[-1]
    for entry in known["files"].values():
        entry.pop("sha256")
    (prepared / "corpus.json").write_text(json.dumps(known, indent=1))
    assert open_corpus(prepared).fingerprint == corpus.fingerprint
    data = bytearray((prepared / "valid.tokens").read_bytes())
    data[6] ^= 1
    (prepared / "valid.tokens").write_bytes(data)
    assert "not those of its fingerprint" in refusal(prepared)


def test_damaged_text_is_prepared_again_where_it_may_be_overwritten(prepared, written):
    source = str(written.parent / "a.jsonl")
    whole = (prepared / "train.tokens").read_bytes()
    (prepared / "train.tokens").write_bytes(bytes(len(whole)))
    for options in ({}, {"skip_bad": False}):
        with pytest.raises(IntegrityError, match=r"train\.tokens"):
            prepare([source], "bytes", prepared, valid_fraction=0.2, **options)
    prepare([source], "bytes", prepared, valid_fraction=0.2, overwrite=True)
    assert (prepared / "train.tokens").read_bytes() == whole


# ---------------------------------------------------------------------------- while it is in use


@pytest.mark.parametrize("name", ["train.tokens", "train.documents"])
@pytest.mark.parametrize("how", ["cut", "emptied", "overwritten", "grown"])
def test_a_file_that_changes_in_use_is_named_and_no_signal(prepared, name, how):
    blocks = PackedBlocks(open_corpus(prepared).train, 8)
    before = blocks[3]
    path = prepared / name
    size = path.stat().st_size
    with open(path, "r+b", buffering=0) as file:
        if how in ("cut", "emptied"):
            file.truncate(size // 16 * 8 if how == "cut" else 0)
        else:
            file.seek(0 if how == "overwritten" else size)
            file.write(b"\1" * 8)
    with pytest.raises(IntegrityError, match=name):
        blocks[3]
    assert before["input_ids"].numel() == 8


def test_a_file_that_is_touched_moved_or_removed_is_read_on(prepared):
    blocks = PackedBlocks(open_corpus(prepared).train, 8)
    before = blocks[3]
    path = prepared / "train.tokens"
    os.utime(path, (1, 1))
    shutil.copy(path, prepared / "copy")
    os.replace(prepared / "copy", path)
    travelled = pickle.dumps(blocks)
    assert (pickle.loads(travelled)[3]["input_ids"] == before["input_ids"]).all()
    path.write_bytes(bytes(path.stat().st_size))  # of the copy: the file that is open is another
    with pytest.raises(IntegrityError, match=r"train\.tokens"):
        pickle.loads(travelled)[3]
    path.unlink()
    with pytest.raises(IntegrityError, match=r"No such file.*train\.tokens"):
        pickle.loads(travelled)
    assert (blocks[3]["input_ids"] == before["input_ids"]).all()


@settings(max_examples=100, deadline=None)
@given(
    numbers=st.sets(st.integers(0, 3000), min_size=1, max_size=60).map(sorted),
    start=st.none() | st.integers(-70, 70),
    stop=st.none() | st.integers(-70, 70),
    step=st.sampled_from([None, 1, 2, -1]),
    values=st.lists(st.integers(-5, 3005), max_size=4),
)
def test_a_file_of_numbers_is_their_array(tmp_path_factory, numbers, start, stop, step, values):
    path = tmp_path_factory.getbasetemp() / "numbers"
    expected = np.array(numbers, "<i8")
    expected.tofile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "STRIDE", 7)
        patch.setattr(arrays, "CHUNK", 24)
        found = SortedFileArray(path, "<i8")
        assert found.rising
        assert found.largest == expected.max()
        assert found.searchsorted(values).tolist() == expected.searchsorted(values).tolist()
        assert found[start:stop:step].tolist() == expected[start:stop:step].tolist()
        assert found[-1] == expected[-1]
        assert np.asarray(found).tolist() == list(found) == numbers
        np.array([*numbers, numbers[-1]], "<i8").tofile(path)
        assert not SortedFileArray(path, "<i8").rising
    with pytest.raises(IndexError):
        found[len(numbers)]
    path.write_bytes(b"123")
    with pytest.raises(IntegrityError, match="no whole number"):
        FileArray(path, "<i8")


# ---------------------------------------------------------------------------- sources


def shard(folder, number, kind):
    """A file of 40 documents that fill more than a block."""
    texts = [f"shard {number} text {i} " + os.urandom(2000).hex() for i in range(40)]
    path = folder / f"{number}{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == ".parquet":
        pa.parquet.write_table(pa.table({"text": texts}), path)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    else:
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines)
    return path


@pytest.mark.parametrize("kind", [".parquet", ".jsonl.gz", ".json.zst"])
@pytest.mark.parametrize("damage", ["corrupt", "cut", "emptied"])
def test_every_damaged_shard_stops_or_is_left_out_whole_and_named(tmp_path, kind, damage):
    paths = [shard(tmp_path, number, kind) for number in range(3)]
    for number, path in enumerate(paths):
        whole = path.read_bytes()
        # zstd without a checksum notices only what breaks its frame
        at = 4 if kind == ".json.zst" else len(whole) // 2
        path.write_bytes(
            {
                "corrupt": whole[:at] + b"\xff" * 64 + whole[at + 64 :],
                "cut": whole[:-10],
                "emptied": b"",
            }[damage]
        )
        with pytest.raises(UserError, match=rf"{number}{kind}\b.*\)") as caught:
            prepare([str(tmp_path)], "bytes", tmp_path / "t")
        assert caught.value.exit_code == 2
        assert not (tmp_path / "t").exists()
        corpus = prepare([str(tmp_path)], "bytes", tmp_path / f"t{number}", skip_bad=True)
        assert "damaged files were left out: 1" in " ".join(corpus.summary())
        assert str(path) in " ".join(corpus.summary())
        counts = corpus.sizes()
        assert counts["train"]["documents"] + counts["valid"]["documents"] == 80
        path.write_bytes(whole)


def test_a_shard_that_vanishes_or_changes_while_it_is_read_stops(tmp_path):
    paths = [shard(tmp_path, number, ".jsonl.gz") for number in range(3)]

    def act(stage, what):
        def progress(now, done, total):
            if now == stage:
                what()

        return progress

    for path in paths:
        whole, other = path.read_bytes(), gzip.compress(b'{"text": "a"}')
        for stage, what, message in (
            ("reading", path.unlink, "cannot read"),
            ("tokens", partial(path.write_bytes, other), "changed while it was read"),
        ):
            with pytest.raises(UserError, match=f"{message} .*{path.name}"):
                prepare([str(tmp_path)], "bytes", tmp_path / "t", progress=act(stage, what))
            path.write_bytes(whole)
    assert not (tmp_path / "t").exists()
