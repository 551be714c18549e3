"""The prepared text of a run: verified, watched while it trains, and written down."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from spectral_window.cli import main
from spectral_window.data import sections, shards
from spectral_window.data.remote import PieceCache, publish
from spectral_window.data.text import prepare
from spectral_window.errors import IntegrityError, UserError
from spectral_window.training import train
from tests.training.runs import Stopper


@pytest.mark.parametrize(
    ("name", "skip_bad"),
    [("train.tokens", False), ("train.documents", True), ("valid.tokens", False)],
)
def test_tokens_cut_during_training_are_named_and_end_with_3(tmp_path, recipe, name, skip_bad):
    """They used to be mapped: the process ended by a signal. `skip_bad` is for sources; of prepared
    text nothing can be left out."""
    out, asked = tmp_path / "run", recipe.replace(skip_bad=skip_bad)
    cut = Stopper(5, lambda: os.truncate(out / "data" / name, 8))
    with pytest.raises(IntegrityError, match=name) as caught:
        train(asked, out, progress=cut)
    assert caught.value.exit_code == 3
    assert (out / "checkpoints" / "step-4").is_dir()
    with pytest.raises(IntegrityError, match=name):
        train(asked, out, resume=True)


def test_a_run_says_and_records_what_its_text_is_and_eval_holds_it_to_that(
    tmp_path, recipe, text_file, capsys
):
    run = tmp_path / "run"
    heard = Stopper(-1, None)
    train(recipe.replace(steps=2, warmup_steps=1), run, progress=heard)
    written = json.loads((run / "config.json").read_text())["data"]
    for split in ("train", "valid"):
        counts = {kind: written[split][kind] for kind in ("documents", "bytes", "tokens")}
        assert {"split": split, "source": str(text_file), **counts} in written["sources"]
        line = f"{split}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
        assert heard.notes.count(line) == 1

    path = run / "data" / "valid.tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    assert main(["eval", str(run)]) == 3
    assert "valid.tokens" in capsys.readouterr().err
    shutil.rmtree(run / "data")
    prepare([str(text_file)], "bytes", run / "data", valid_fraction=0.5, seed=1)
    assert main(["eval", str(run)]) == 3
    assert "not the text of the run (data fingerprint" in capsys.readouterr().err


def test_what_valid_shares_with_data_can_be_left_out_by_the_command(tmp_path, text_file, capsys):
    lines = text_file.read_text().splitlines(keepends=True)
    (tmp_path / "valid.jsonl").write_text("".join(lines[-2:]))
    words = ["train", "tiny", "steps=1", "warmup_steps=1", "tokenizer=bytes", "hidden_size=16"]
    words += ["num_attention_heads=2", "--data", str(text_file), "--out", str(tmp_path / "run")]
    words += ["--valid", str(tmp_path / "valid.jsonl")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "documents: 2 (" in said
    assert "drop_shared=true" in said
    assert main([*words, "drop_shared=true"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "train: 10 documents" in said
    assert "are held-out text and were left out: 2" in said


def test_a_run_on_an_object_store_has_the_bits_of_one_on_the_disk(tmp_path, recipe, text_file):
    short = recipe.replace(steps=3, warmup_steps=1)
    train(short, tmp_path / "disk", corpus=tmp_path / "tokens")
    publish(tmp_path / "tokens", "memory://runs/tokens", piece=4096)
    cache = PieceCache(tmp_path / "cache", 4 * 4096)
    train(short, tmp_path / "store", corpus="memory://runs/tokens", cache=cache)
    for name in ("result.json", "config.json"):
        disk, store = (json.loads((tmp_path / run / name).read_text()) for run in ("disk", "store"))
        same = {"data", "loss", "eval_loss", "parameters"} & disk.keys()
        assert {key: disk[key] for key in same} == {key: store[key] for key in same}
    assert store["tokens"] == "memory://runs/tokens"
    weights = [tmp_path / run / "model" / "model.safetensors" for run in ("disk", "store")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(UserError, match="a cache without a URL"):
        train(short, tmp_path / "other", corpus=tmp_path / "tokens", cache=cache)


def test_a_stopped_preparation_goes_on_when_the_command_is_typed_again(
    tmp_path, recipe, text_file, monkeypatch
):
    """The claim on a run's folder removes what a run made that never began."""
    monkeypatch.setattr(sections, "SECTION", text_file.stat().st_size // 4)
    out, written = tmp_path / "runs" / "mine", []
    real = shards.write_section

    def write(folder, *others):
        written.append(folder)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(folder, *others)

    monkeypatch.setattr(shards, "write_section", write)
    short = recipe.replace(steps=1, warmup_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(short, out, workers=1)
    assert [path.name for path in out.iterdir()] == [".data.sections"]
    train(short, out, workers=1)
    assert written[2] == written[3]
    assert len(written) == len(set(written)) + 1
    assert not (out / ".data.sections").exists()
