"""What a training says before and during its first steps."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from spectral_window.data.text import open_corpus
from spectral_window.hf import SWHForCausalLM
from spectral_window.training import train
from spectral_window.training.plan import describe
from spectral_window.training.progress import FIRST_STEPS, RichProgress, _duration
from spectral_window.training.trainer import model_config
from tests.training.runs import Stopper


def notes_of(recipe, corpus, tmp_path):
    progress = Stopper(-1, None)
    train(recipe, tmp_path / "run", corpus=corpus, progress=progress)
    return progress.notes


def test_the_size_of_the_work_is_said_and_too_little_text_is_a_warning(recipe, corpus, tmp_path):
    notes = notes_of(recipe.replace(steps=2, warmup_steps=0), corpus, tmp_path)
    prepared = open_corpus(corpus)
    text = prepared.sizes()["train"]["tokens"]
    (line,) = [note for note in notes if "to train on" in note]
    assert f"{2 * recipe.tokens_per_step:,} tokens to train on" in line
    assert f"the {text:,} of the text" in line
    assert any("spectral scan" in note and "window tiled" in note for note in notes)
    assert f"in {tmp_path / 'run'}" in notes
    assert not [note for note in notes if "small for this recipe" in note]

    model = SWHForCausalLM(model_config(recipe, prepared.vocab_size))
    most = 4 * text // recipe.tokens_per_step
    for steps in (most, most + recipe.tokens_per_step):
        *_, last = describe(recipe.replace(steps=steps), model, prepared, tmp_path)
        assert last.startswith("warning: ") == (steps > most)
    assert last.endswith(f"or steps={most}")


def test_a_loss_on_a_sample_says_so(recipe, corpus, tmp_path):
    short = recipe.replace(steps=1, warmup_steps=0)
    sampled = notes_of(short.replace(eval_tokens=16), corpus, tmp_path / "sampled")
    whole = notes_of(short.replace(eval_tokens=None), corpus, tmp_path / "whole")
    said = [[n for n in notes if n.startswith("step 1: held-out")] for notes in (sampled, whole)]
    assert "(a sample: 16 tokens)" in said[0][0]
    assert "sample" not in said[1][0]


@pytest.mark.parametrize("first_step", [0, 40])
def test_the_time_left_is_estimated_once_without_the_first_step(first_step):
    now, file = 0.0, io.StringIO()
    progress = RichProgress(Console(file=file, width=100), every=1e9, clock=lambda: now)
    progress.start("tiny (memory)", first_step, 100)
    for step in range(first_step + 1, first_step + 20):
        now += 1000.0 if step == first_step + 1 else 10.0
        progress.step(step, None, None)
    left = 10.0 * (100 - first_step - 1 - FIRST_STEPS)
    assert file.getvalue().count("to go") == 1
    assert f"about {_duration(left)} to go" in file.getvalue()


def test_a_duration_has_the_largest_unit_of_which_there_are_two():
    said = [_duration(seconds) for seconds in (0.4, 119, 120, 7199, 7200, 360_000)]
    assert said == ["0 s", "119 s", "2 min", "120 min", "2 h", "100 h"]
