"""`context_parallel=P`: processes that share sequences train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectral_window.errors import UserError
from spectral_window.training import train
from spectral_window.training.loop import accumulation
from spectral_window.training.parallel import World
from spectral_window.training.recipes import Recipe
from tests.training.test_sharded import LOSSES, assert_close, job, launch

# sequences that divide neither by two nor by three, several documents in some
CHANGES = {"sequence_length": 35, "micro_batch_size": 2, "schedule": "constant"}
CHANGES |= {"mixer": "memory", "short_convolution": True}


def test_four_processes_in_pairs_have_the_losses_of_one(
    tmp_path: Path, recipe: Recipe, corpus: Path
) -> None:
    """Of two pairs, each takes half of every batch; holding all of the model, and a part each."""
    recipe = recipe.replace(**CHANGES)
    train(recipe, tmp_path / "alone", corpus=corpus)
    pairs = {"whole": {"context_parallel": 2}, "parts": {"context_parallel": 2, "shard": "full"}}
    jobs = [job(tmp_path, corpus, recipe, name, changes=each) for name, each in pairs.items()]
    launch(tmp_path, jobs, 4)
    for name in pairs:
        assert_close(tmp_path / name, tmp_path / "alone", *LOSSES)


@pytest.mark.slow
def test_three_processes_share_every_sequence_and_recompute(
    tmp_path: Path, recipe: Recipe, corpus: Path
) -> None:
    recipe = recipe.replace(**CHANGES)
    train(recipe, tmp_path / "alone", corpus=corpus)
    changes = {"context_parallel": 3, "gradient_checkpointing": True}
    launch(tmp_path, [job(tmp_path, corpus, recipe, "three", changes=changes)], 3)
    assert_close(tmp_path / "three", tmp_path / "alone", *LOSSES)


def test_processes_that_share_sequences_take_one_part_of_a_batch(recipe: Recipe) -> None:
    worlds = [World(rank, 6, context=2) for rank in range(6)]
    assert [world.data_rank for world in worlds] == [0, 0, 1, 1, 2, 2]
    assert {world.data_size for world in worlds} == {3}
    assert accumulation(recipe, World(0, 4, context=2)) == 1
    assert accumulation(recipe, World(0, 4, context=4)) == 2
    with pytest.raises(UserError, match=r"times 6 processes / context_parallel=2"):
        accumulation(recipe, worlds[0])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"context_parallel": 17}, r"must not exceed sequence_length \(16\)"),
        ({"context_parallel": 2, "compile": True}, "compile=True .*: leave it out"),
        ({"context_parallel": 2, "mixer": "attention"}, "Transformer models cannot be shared"),
        ({"context_parallel": 0}, "context_parallel"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe: Recipe, changes, match) -> None:
    with pytest.raises(UserError, match=match):
        recipe.replace(**changes)


def test_a_number_of_processes_that_does_not_divide_is_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="divide the number of processes, which is 1; start them"):
        train(recipe.replace(context_parallel=2), tmp_path / "run")
    with pytest.raises(UserError, match="which is 3"):
        World(0, 3, context=2)


def test_runs_that_are_not_shared_are_named_as_before(recipe: Recipe) -> None:
    assert "context_parallel" not in recipe.traces()
    assert recipe.replace(context_parallel=2).traces()["context_parallel"] == 2
