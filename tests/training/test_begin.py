"""How a run begins and goes on: from a model, from no checkpoint, for more steps than it had."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from spectral_window.cli import main
from spectral_window.errors import DivergedError, IntegrityError, UserError
from spectral_window.training import Interrupted, train
from spectral_window.training.initial import Initial
from spectral_window.training.loading import load
from spectral_window.training.recipes import read_overrides
from spectral_window.training.trainer import _differences
from tests.training.runs import Crash, Stopper, assert_same_run, crash, tensors


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# ------------------------------------------------------------------- from a model


@pytest.fixture
def tuning(recipe):
    """Another schedule, and an architecture that must not count."""
    return recipe.replace(steps=4, save_every=2, lr=1e-3, hidden_size=64, window=9, seed=3)


def test_a_run_from_a_model_begins_with_its_weights_tokenizer_and_architecture(
    tuning, uninterrupted, tmp_path
):
    out, source = tmp_path / "run", weights(uninterrupted / "model")
    train(tuning.replace(lr=1e-300, weight_decay=0.0), out, init=uninterrupted)
    assert_equal(weights(out / "model"), source)  # at a rate of nothing nothing moves
    loaded, record = load(out), json.loads((out / "config.json").read_text())
    assert (loaded.model.config.hidden_size, loaded.model.config.window) == (16, 4)
    assert loaded.model.config.training_length == max(16, tuning.sequence_length)
    assert loaded.tokenizer.get_vocab() == load(uninterrupted).tokenizer.get_vocab()
    assert record["init"]["model"] == str(uninterrupted / "model")
    assert record["init"]["sha256"] == Initial.read(uninterrupted).sha256
    assert record["recipe"]["hidden_size"] == 16


def test_a_run_from_a_model_that_crashed_goes_on_with_the_same_bits(
    tuning, uninterrupted, tmp_path
):
    corpus = tmp_path / "tokens"
    train(tuning, tmp_path / "whole", corpus=corpus, init=uninterrupted)
    with pytest.raises(Crash):
        train(
            tuning, tmp_path / "run", corpus=corpus, init=uninterrupted, progress=Stopper(3, crash)
        )
    train(tuning, tmp_path / "run", corpus=corpus, init=uninterrupted, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=4)
    other = train_another(uninterrupted, tmp_path)
    with pytest.raises(IntegrityError, match=r"tokenizer|--init"):
        train(tuning, tmp_path / "run", corpus=corpus, init=other, resume=True)


def train_another(run, tmp_path):
    """A model of the same shape and tokenizer with other weights."""
    folder = tmp_path / "other"
    loaded = load(run)
    with torch.no_grad():
        loaded.model.lm_head.weight.add_(1)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_the_model_that_a_run_began_from_is_compared_on_resume():
    stored = {"recipe": {}, "data": "d", "parameters": 1, "init": "a"}
    for init in ({}, {"init": "b"}):
        wanted = {"recipe": {}, "data": "d", "parameters": 1, **init}
        assert any("--init" in line for line in _differences(stored, wanted))
    assert not _differences(stored, stored)


@pytest.mark.parametrize(
    "override",
    ["hidden_size=32", "window=5", "mixer=attention", "tokenizer=gpt2", "vocab_size=300",
     "match=attention", "parameters=1000", "num_hidden_layers=3", "initializer_range=none"],
)  # fmt: skip
def test_a_knob_that_the_model_contradicts_is_refused_by_name(recipe, uninterrupted, override):
    begin = Initial.read(uninterrupted)
    with pytest.raises(UserError, match=f"^{override.partition('=')[0]}=.*leave"):
        begin.adopt(recipe, read_overrides([override]))
    begin.adopt(recipe, read_overrides(["hidden_size=16", "window=4", "lr=1e-4"]))


@pytest.mark.parametrize("model", ["no-such", "empty"])
def test_no_model_to_begin_from_is_exit_2_and_leaves_no_folder(model, text_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "a" / "run"
    words = ["train", "tiny", "--data", str(text_file), "--out", str(out)]
    assert main([*words, "--init", str(tmp_path / model)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------- without a checkpoint


def test_resuming_a_run_killed_before_its_first_checkpoint_begins(
    recipe, corpus, uninterrupted, tmp_path
):
    """The command said --resume, and --resume said to leave it out."""
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(2, crash))
    assert not list(out.glob("checkpoints/*"))
    with pytest.raises(UserError, match="--resume or --overwrite"):
        train(recipe, out, corpus=corpus)
    train(recipe, out, corpus=corpus, resume=True)
    assert_same_run(uninterrupted, out)


def test_a_lock_is_all_that_a_kill_at_once_leaves_and_resume_begins(recipe, corpus, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").touch()
    short = recipe.replace(steps=2, warmup_steps=1)
    train(short, out, corpus=corpus, resume=True)


def test_resuming_where_the_checkpoints_are_gone_never_replaces_the_finished_model(
    recipe, corpus, uninterrupted, tmp_path
):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    before = (out / "model/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"checkpoints are gone.*--init"):
        train(recipe, out, corpus=corpus, resume=True)
    assert (out / "model/model.safetensors").read_bytes() == before


def test_overwrite_that_cannot_begin_keeps_the_earlier_run(recipe, corpus, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(UserError):
        train(recipe.replace(data=("no-such.txt",)), out, overwrite=True)
    assert load(out).folder == out / "model"


def test_bad_input_leaves_neither_the_folders_above_nor_tokens(recipe, tmp_path):
    # than the text, in rows that fit a memory that others use too
    longer = recipe.replace(sequence_length=1 << 18, batch_size=1, micro_batch_size=1)
    with pytest.raises(UserError):
        train(longer, tmp_path / "a" / "b" / "run")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        train(longer, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


# ------------------------------------------------------------------- more steps


def test_more_steps_at_a_constant_rate_are_the_run_that_asked_for_them_at_once(
    recipe, corpus, tmp_path
):
    constant = recipe.replace(schedule="constant", steps=8, save_every=4)
    train(constant.replace(steps=14), tmp_path / "whole", corpus=corpus)
    train(constant, tmp_path / "run", corpus=corpus)
    stopped = Stopper(10, crash)
    with pytest.raises(Crash):
        train(
            constant.replace(steps=14), tmp_path / "run", corpus=corpus, resume=True,
            progress=stopped,
        )  # fmt: skip
    assert not (tmp_path / "run/result.json").exists()  # it has not ended
    assert not (tmp_path / "run/model").exists()
    result = train(constant.replace(steps=14), tmp_path / "run", corpus=corpus, resume=True)
    assert result["steps"] == 14
    one, two = (tensors(tmp_path / name, 14) for name in ("whole", "run"))
    assert_equal(one, two)
    with pytest.raises(IntegrityError, match="step-14 is past them; use 14 or more"):
        train(constant, tmp_path / "run", corpus=corpus, resume=True)


def test_more_steps_of_a_cosine_are_refused_with_what_to_do(recipe, corpus, uninterrupted):
    with pytest.raises(IntegrityError, match=r"steps was 12 and is 24.*cosine.*--init"):
        train(recipe.replace(steps=24), uninterrupted, corpus=corpus, resume=True)


# ------------------------------------------------------------------- after Ctrl-C


def test_the_command_that_a_signal_tells_goes_on(text_file, tmp_path, uninterrupted):
    """A run's folder is enough: recipe, text, prepared tokens and first model stand in it."""
    import shlex

    from spectral_window.training.recipes import resolve

    out, tokens = tmp_path / "a run", tmp_path / "tokens"
    overrides = ["steps=6", "warmup_steps=1"]
    words = [
        "train",
        "tiny",
        *overrides,
        "--data",
        str(text_file),
        "--overwrite",
        "--out",
        str(out),
    ]
    first = Initial.read(uninterrupted)
    recipe = first.adopt(resolve("tiny", overrides)).replace(data=(str(text_file),))
    with pytest.raises(Interrupted) as caught:
        train(
            recipe, out, overwrite=True, command=shlex.join(["spectral-window", *words]),
            init=first, corpus=tokens,
            progress=Stopper(3, lambda: os.kill(os.getpid(), signal.SIGINT)),
        )  # fmt: skip
    said, _, command = str(caught.value).partition("; go on with: ")
    assert said == "stopped at step 4"
    assert command == shlex.join(["spectral-window", "train", "--resume", str(out)])
    assert main(shlex.split(command)[1:]) == 0
    assert not (out / "data").exists()
    result = json.loads((out / "result.json").read_text())
    assert (result["steps"], shlex.split(result["command"])[1:]) == (6, words)


@pytest.mark.parametrize("what", ["folder", "out"])
def test_resuming_what_is_no_run_or_into_another_folder_is_exit_2(
    what, uninterrupted, tmp_path, capsys
):
    run, more = {"folder": (tmp_path, []), "out": (uninterrupted, ["--out", "x"])}[what]
    assert main(["train", "--resume", str(run), *more]) == 2
    assert ("no run to resume" if what == "folder" else "leave it out") in capsys.readouterr().err


@pytest.mark.parametrize("lr", [1e30, 1e39, 1e308])
def test_a_rate_that_overflows_the_weights_is_exit_4_and_names_it(recipe, corpus, tmp_path, lr):
    """The step itself overflows silently; an operator then refused the weights as bad input."""
    with pytest.raises(DivergedError, match=f"{lr:g}".replace("+", "[+]")) as caught:
        train(recipe.replace(lr=lr, warmup_steps=0), tmp_path / "run", corpus=corpus)
    assert caught.value.exit_code == 4
