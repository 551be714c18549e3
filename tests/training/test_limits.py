"""The folder in use, the disk full, the other precisions: what else can happen to a run."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from spectral_window.cli import main
from spectral_window.errors import IntegrityError, ResourceError, UserError
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.training import checkpoints, train
from spectral_window.training.loading import load
from spectral_window.training.memory import check_memory
from spectral_window.training.parallel import World
from tests.training.children import train_child
from tests.training.runs import Crash, Stopper, assert_same_run, crash, rows, tensors


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------- the final model


@pytest.fixture
def finished(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted, tmp_path / "run")


def test_a_flipped_bit_in_any_file_of_the_final_model_is_refused(finished, text_file, capsys):
    model = finished / "model"
    listed = json.loads((model / "manifest.json").read_text())["files"]
    assert set(listed) | {"manifest.json"} == set(names(model))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(listed)
    for name in listed:
        content = (model / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(flipped) * 3 // 4] ^= 16
        (model / name).write_bytes(flipped)
        with pytest.raises(IntegrityError, match=f"{re.escape(name)} does not match|not JSON"):
            load(finished)
        (model / name).write_bytes(content)
    load(finished)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # the last bit of a weight: as a number it is as good as any
    (model / "model.safetensors").write_bytes(weights)
    assert main(["eval", str(finished), "--data", str(text_file)]) == 3
    said = capsys.readouterr().err
    assert "model.safetensors does not match its SHA-256" in said
    assert "if the change was yours, copy the folder elsewhere without manifest.json" in said


def test_the_model_of_a_run_has_a_card_with_its_numbers_and_files_that_load_it(finished, text_file):
    """Both are sealed by the manifest; without its numbers a card could not be compared."""
    model, result = finished / "model", json.loads((finished / "result.json").read_text())
    listed = json.loads((model / "manifest.json").read_text())["files"]
    stubs = {"configuration_spectral_window.py", "modeling_spectral_window.py"}
    assert stubs | {"README.md"} <= set(listed)
    card = ModelCard.load(model / "README.md")
    told = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert told == {
        "loss": result["eval_loss"],
        "perplexity": result["perplexity"],
        "bits_per_byte": result["bits_per_byte"],
    }
    assert f"{result['parameters']:,} parameters" in card.text
    assert f"| tokens read in training | {result['tokens']:,} |" in card.text
    assert f"`{text_file}`" in card.text
    assert result["command"] in card.text


def test_a_folder_of_save_pretrained_has_no_manifest_and_loads(finished, tmp_path):
    loaded = load(finished)
    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    SWHForCausalLM.from_pretrained(finished / "model")


# ------------------------------------------------------------------------------- the folder


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(recipe, corpus, tmp_path):
    out, refused = tmp_path / "run", []

    def second():
        before = names(out)
        for how in ({"resume": "auto"}, {"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError) as caught:
                train(recipe, out, corpus=corpus, **how)
            refused.append(str(caught.value))
            assert caught.value.exit_code == 2
            assert names(out) == before

    train(recipe, out, corpus=corpus, progress=Stopper(5, second))
    assert sum("another run is using this folder" in line for line in refused) == 3
    assert "not empty" in refused[3]
    assert not (out / ".lock").exists()


def test_the_lock_of_a_killed_run_holds_nobody_up(recipe, corpus, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(5, crash))
    (out / ".lock").write_text("")
    train(recipe, out, corpus=corpus, resume=True)


def test_overwrite_removes_the_run_and_nothing_else(recipe, corpus, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, overwrite=True, progress=Stopper(1, crash))
    assert names(out) == ["config.json", "metrics.jsonl", "notes.txt"]


@pytest.mark.parametrize("bad", [{"data": ("no-such-file.txt",)}, {"num_attention_heads": 3}])
def test_bad_input_leaves_no_folder(recipe, tmp_path, bad):
    with pytest.raises(UserError) as caught:
        train(recipe.replace(**bad), tmp_path / "runs" / "new")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "runs" / "new").exists()


def test_an_output_that_is_a_file_is_refused(recipe, corpus, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(recipe, tmp_path / "run", corpus=corpus)


def test_the_folder_removed_under_a_run_is_one_line_with_exit_code_5(recipe, corpus, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ResourceError, match="restore the folder") as caught:
        train(recipe, out, corpus=corpus, progress=Stopper(1, lambda: shutil.rmtree(out)))
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- disk and memory


@pytest.mark.parametrize(
    ("limit", "hit"),
    [(1000, "config.json"), (5000, "step-8"), (20_000, "step-8"), (60_000, "step-8")],
)
def test_a_full_disk_ends_with_code_5_names_path_and_bytes_and_keeps_the_old_checkpoint(
    processes, recipe, corpus, uninterrupted, tmp_path, limit, hit
):
    """A limit on the size of files stands in for a full disk; each hits another file of a save."""
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(5, crash))
    before = names(out / "checkpoints")
    report = processes.Queue()
    arguments = (recipe.to_dict(), str(out), str(corpus), limit, report)
    child = processes.Process(target=train_child, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 5
    said = report.get()
    where = rf"{out}/\S*{hit}"
    assert re.fullmatch(rf"cannot write: .*\({where}\): .*[\d,]+ bytes are free; .*", said)
    assert "needs about" in said
    assert names(out / "checkpoints") == before
    checkpoints.verify(out / "checkpoints/step-4")
    assert not list(out.rglob(".tmp-*"))
    train(recipe, out, corpus=corpus, resume=True)
    a, b = tensors(uninterrupted, 12), tensors(out, 12)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows(uninterrupted) == rows(out)


def test_a_model_too_large_for_the_memory_is_refused_before_it_is_made(recipe):
    config = SWHConfig(hidden_size=1 << 17, num_hidden_layers=6, num_attention_heads=1 << 10)
    with pytest.raises(ResourceError, match=r"GB to train and .* GB are free") as caught:
        check_memory(recipe, config, "cpu", World())
    assert caught.value.exit_code == 5


# ------------------------------------------------------------------------------- precision


def test_bfloat16_trains_close_to_float32_and_keeps_its_weights_in_float32(
    recipe, corpus, uninterrupted, tmp_path
):
    out = tmp_path / "run"
    result = train(recipe.replace(dtype="bfloat16"), out, corpus=corpus)
    exact = json.loads((uninterrupted / "result.json").read_text())["eval_loss"]
    assert result["eval_loss"] == pytest.approx(exact, rel=0.02)
    assert result["eval_loss"] != exact  # it did run in another precision
    assert {value.dtype for value in load(out).model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_memory_and_not_the_result(
    recipe, corpus, uninterrupted, tmp_path
):
    out = tmp_path / "run"
    train(recipe.replace(gradient_checkpointing=True), out, corpus=corpus)
    a, b = tensors(uninterrupted, 12), tensors(out, 12)
    for name in a:
        if name.startswith("model/"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_a_run_older_than_auto_is_resumed_in_the_precision_it_began_with(recipe, corpus, tmp_path):
    """Recipes said "medium" before they said "auto", which a checkpoint must agree with."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    old = recipe.replace(matmul_precision="medium")
    with pytest.raises(Crash):
        train(old, out, corpus=corpus, progress=Stopper(6, crash))
    note = Stopper(0, crash)
    about = train(recipe, out, corpus=corpus, resume=True, progress=note)["environment"]
    assert about["matmul_precision"] == about["matmul_precision_asked"] == "medium"
    assert any(line.startswith("matmul_precision medium, relative error") for line in note.notes)
    train(old, whole, corpus=corpus)
    assert_same_run(whole, out)
    kept = json.loads((out / "config.json").read_text())["recipe"]["matmul_precision"]
    assert kept == "medium"


def test_a_run_is_not_resumed_in_another_precision_by_name(recipe, corpus, tmp_path):
    with pytest.raises(Crash):
        train(recipe, tmp_path, corpus=corpus, progress=Stopper(6, crash))
    with pytest.raises(IntegrityError, match="matmul_precision was 'auto' and is 'medium'"):
        train(recipe.replace(matmul_precision="medium"), tmp_path, corpus=corpus, resume=True)


def test_the_matrix_precision_is_the_recipes_and_is_put_back(recipe, corpus, tmp_path):
    before, seen = torch.get_float32_matmul_precision(), []
    note = Stopper(1, lambda: seen.append(torch.get_float32_matmul_precision()))
    train(
        recipe.replace(matmul_precision="highest", steps=1, warmup_steps=1),
        tmp_path / "run",
        corpus=corpus,
        progress=note,
    )
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == before
    assert os.path.exists(tmp_path / "run/model/model.safetensors")
