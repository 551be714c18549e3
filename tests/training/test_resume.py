"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from spectral_window.errors import DivergedError, IntegrityError, UserError
from spectral_window.training import Interrupted, checkpoints, interrupt, train, trainer
from tests.training.runs import Crash, Stopper, assert_same_run, crash


@pytest.mark.parametrize("at", [3, 4, 5, 9, 12])
def test_a_crash_after_any_step_and_a_resume_change_no_bit_and_no_metric(
    recipe, corpus, uninterrupted, tmp_path, at
):
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(at, crash))
    result = train(recipe, out, corpus=corpus, resume="auto")
    assert_same_run(uninterrupted, out)
    whole_result = json.loads((uninterrupted / "result.json").read_text())
    assert result["eval_loss"] == whole_result["eval_loss"]
    assert result == json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_where_it_stands_even_between_two_log_lines(
    recipe, corpus, uninterrupted, tmp_path, signum, code
):
    out = tmp_path / "run"
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        train(recipe, out, corpus=corpus, progress=Stopper(5, lambda: os.kill(os.getpid(), signum)))
    assert caught.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert caught.value.checkpoint in [out / "checkpoints/step-5", out / "checkpoints/step-6"]
    checkpoints.verify(caught.value.checkpoint)
    assert not (out / "result.json").exists()
    train(recipe, out, corpus=corpus, resume=True)
    assert_same_run(uninterrupted, out)


def test_a_second_signal_a_while_later_stops_at_once(recipe, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "SAME_REQUEST_SECONDS", -1.0)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        train(recipe, tmp_path / "run", corpus=corpus, progress=Stopper(2, twice))
    assert caught.value.checkpoint is None
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_signal_in_the_very_last_step_stops_before_the_final_evaluation(
    recipe, corpus, uninterrupted, tmp_path
):
    out = tmp_path / "run"
    ask = Stopper(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        train(recipe, out, corpus=corpus, progress=ask)
    assert caught.value.checkpoint == out / "checkpoints/step-12"
    assert not (out / "result.json").exists()
    result = train(recipe, out, corpus=corpus, resume=True)
    assert_same_run(uninterrupted, out)
    whole_result = json.loads((uninterrupted / "result.json").read_text())
    assert result["eval_loss"] == whole_result["eval_loss"]


def test_resuming_a_finished_run_changes_nothing(recipe, corpus, uninterrupted):
    stamp = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.json*")}
    assert train(recipe, uninterrupted, corpus=corpus, resume=True) == json.loads(
        (uninterrupted / "result.json").read_text()
    )
    assert stamp == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.json*")}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    recipe, corpus, uninterrupted, tmp_path
):
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(10, crash))
    damaged = out / "checkpoints/step-8/optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="step-8 is refused: optimizer.safetensors does not match"):
        train(recipe, out, corpus=corpus, resume=True)
    assert_same_run(uninterrupted, out)


def test_when_every_checkpoint_is_damaged_resume_refuses_instead_of_starting_anew(
    recipe, corpus, tmp_path
):
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(5, crash))
    (out / "checkpoints/step-4/manifest.json").unlink()
    for resume in (True, "auto"):
        with (
            pytest.warns(UserWarning, match="not finished"),
            pytest.raises(IntegrityError, match="no checkpoint is whole"),
        ):
            train(recipe, out, corpus=corpus, resume=resume)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, r"lr was 0.003 and is 0.001"),
        ({"hidden_size": 32}, "hidden_size was 16 and is 32"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ],
)
def test_resuming_with_another_recipe_is_refused_and_says_what_differs(
    recipe, corpus, uninterrupted, tmp_path, change, message
):
    before = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(IntegrityError, match=message) as caught:
        train(
            recipe.replace(**change),
            uninterrupted,
            corpus=corpus,
            resume=True,
        )
    assert caught.value.exit_code == 3
    assert (uninterrupted / "config.json").read_bytes() == before


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_resuming_with_other_text_is_refused(recipe, tmp_path, text_file, place):
    out, text = tmp_path / "run", tmp_path / "text.jsonl"
    text.write_text(text_file.read_text())
    mine = recipe.replace(data=(str(text),))
    with pytest.raises(Crash):
        train(
            mine,
            out,
            corpus=None if place == "inside" else tmp_path / "tokens",
            progress=Stopper(5, crash),
        )
    text.write_text(text_file.read_text() + json.dumps({"text": "one more document\n" * 9}) + "\n")
    with pytest.raises(IntegrityError, match="text") as caught:
        train(mine, out, corpus=None if place == "inside" else tmp_path / "other", resume=True)
    assert caught.value.exit_code == 3


def test_what_only_changes_the_record_may_differ_on_resume(recipe, corpus, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Crash):
        train(recipe, out, corpus=corpus, progress=Stopper(5, crash))
    train(
        recipe.replace(eval_every=3, save_every=6, keep_checkpoints=3, log_every=1),
        out,
        corpus=corpus,
        resume=True,
    )


def test_runs_of_another_seed_read_the_same_text(recipe, corpus, uninterrupted, tmp_path):
    """Seeds are compared on the same held-out text, so they share the prepared tokens."""
    other = train(recipe.replace(seed=recipe.seed + 1), tmp_path / "other", corpus=corpus)
    whole = json.loads((uninterrupted / "result.json").read_text())
    assert other["eval_tokens"] == whole["eval_tokens"]
    assert other["eval_loss"] != whole["eval_loss"]
    with pytest.raises(UserError, match="differs: seed"):
        train(recipe.replace(split_seed=5), tmp_path / "split", corpus=corpus)


def test_a_checkpoint_older_than_a_knob_had_the_knobs_default(recipe):
    want = {"recipe": recipe.to_dict(), "data": "d", "parameters": 1}
    old = {key: value for key, value in recipe.to_dict().items() if key != "split_seed"}
    stored = {"recipe": old, "data": "d", "parameters": 1}
    assert trainer._differences(stored, want) == []
    changed = recipe.replace(split_seed=5).to_dict()
    said = trainer._differences(stored, {**want, "recipe": changed})
    assert said == ["split_seed was 0 and is 5"]


@pytest.mark.parametrize("exists", [False, True])
def test_resume_without_a_checkpoint_is_a_usage_error_and_leaves_no_folder(
    recipe, corpus, tmp_path, exists
):
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    with pytest.raises(UserError, match="no checkpoint to resume") as caught:
        train(recipe, out, corpus=corpus, resume=True)
    assert caught.value.exit_code == 2
    assert out.exists() == exists
    if exists:
        assert not list(out.iterdir())


def test_a_non_finite_loss_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(
    recipe, corpus, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"step \d+.*lower lr") as caught:
        train(
            recipe.replace(lr=1e30, warmup_steps=6, clip=0.0, weight_decay=0.0, save_every=1),
            out,
            corpus=corpus,
        )
    assert caught.value.exit_code == 4
    for folder in (out / "checkpoints").glob("step-*"):
        checkpoints.verify(folder)
        assert all(
            torch.isfinite(value).all()
            for value in load_file(folder / "model.safetensors").values()
        )
    assert not (out / "result.json").exists()
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "diverged"
