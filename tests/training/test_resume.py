"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectral_window.errors import DivergedError, IntegrityError, UserError
from spectral_window.training import Interrupted, checkpoints, train

SAME = ("step", "tokens", "loss", "lr", "grad_norm", "eval_loss", "bits_per_byte")


class Stopper:
    """A Progress that does something at a step."""

    def __init__(self, at: int, action) -> None:
        self.at, self.action, self.notes = at, action, []

    def prepare(self, stage, done, total): ...
    def start(self, title, first_step, steps): ...
    def stop(self): ...

    def step(self, step, loss, tokens_per_second):
        if step == self.at:
            self.action()

    def note(self, text):
        self.notes.append(text)


class Crash(Exception):
    pass


def crash():
    raise Crash


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model", "optimizer", "rng"):
        loaded = load_file(folder / "checkpoints" / f"step-{step}" / f"{name}.safetensors")
        found |= {f"{name}/{key}": value for key, value in loaded.items()}
    return found


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in SAME if key in row} for row in lines if "event" not in row]


def assert_same_run(one: Path, two: Path, step: int = 12) -> None:
    a, b = tensors(one, step), tensors(two, step)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    counters = [
        json.loads((d / f"checkpoints/step-{step}/training.json").read_text()) for d in (one, two)
    ]
    for found in counters:
        found["counters"].pop("seconds")
    assert counters[0] == counters[1]
    assert rows(one) == rows(two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Filled by the first test that needs it: the folder of an uninterrupted run."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def uninterrupted(whole, recipe, corpus) -> Path:
    if not whole.exists():
        train(recipe, whole, corpus=corpus)
    return whole


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


def test_a_second_signal_stops_at_once(recipe, corpus, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        train(recipe, tmp_path / "run", corpus=corpus, progress=Stopper(2, twice))
    assert caught.value.checkpoint is None
    assert not (tmp_path / "run/checkpoints").exists()


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
    other = tmp_path / "tokens"
    before = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(IntegrityError, match=message) as caught:
        train(
            recipe.replace(**change),
            uninterrupted,
            corpus=other if "seed" in change else corpus,
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


CHILD = """
import sys, warnings
from pathlib import Path
from spectral_window.training.recipes import Recipe
from spectral_window.training import train
import json, torch
torch.set_num_threads(1)
recipe = Recipe.from_dict(json.loads(sys.argv[1]))
print("ready", flush=True)
warnings.simplefilter("ignore")
train(recipe, sys.argv[2], corpus=sys.argv[3], resume="auto")
"""


def test_killed_again_and_again_at_random_moments_the_run_still_ends_with_the_same_bits(
    recipe, corpus, uninterrupted, tmp_path
):
    """Saves after every step, so that many kills land inside a save."""
    busy, out = recipe.replace(save_every=1), tmp_path / "run"
    arguments = [sys.executable, "-c", CHILD, json.dumps(busy.to_dict()), str(out), str(corpus)]
    kills = 0
    for attempt in range(12):
        child = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        delay = 0.9 + int(hashlib.sha256(bytes([attempt])).hexdigest()[:4], 16) / 65536 * 0.6
        try:
            child.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            child.kill()
            kills += 1
        child.wait()
        child.stdout.close()
        if child.returncode == 0:
            break
        if kills == 5:
            break
    assert kills >= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(busy, out, corpus=corpus, resume="auto")
    a, b = tensors(uninterrupted, 12), tensors(out, 12)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows(uninterrupted) == rows(out)
    assert not list((out / "checkpoints").glob(".tmp-*"))


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
