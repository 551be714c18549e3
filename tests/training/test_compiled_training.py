"""`compile=true` changes how a step is computed, and not what."""

from __future__ import annotations

import shutil

import pytest

from spectral_window.training import train
from tests.training.runs import rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
@pytest.mark.parametrize("mixer", ["spectral_window", "memory"])
def test_compiled_layers_and_loss_train_as_usual(recipe, corpus, tmp_path, mixer):
    recipe = recipe.replace(mixer=mixer, steps=4, warmup_steps=1, log_every=1)
    usual = train(recipe, tmp_path / "usual", corpus=corpus)
    compiled = train(recipe.replace(compile=True), tmp_path / "compiled", corpus=corpus)
    assert compiled["eval_loss"] == pytest.approx(usual["eval_loss"], rel=1e-5)
    losses = [
        [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
        for name in ("usual", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_may_be_resumed_with_and_without_compiling(recipe, corpus, uninterrupted):
    """It is no part of what is learned, like the device."""
    result = train(recipe.replace(compile=True), uninterrupted, corpus=corpus, resume=True)
    assert result["steps"] == recipe.steps
