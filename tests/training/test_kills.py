"""A run killed at any moment, as often as one likes, ends with the same bits."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from spectral_window.training import checkpoints, train
from tests.training.children import train_child
from tests.training.runs import rows, tensors


@pytest.mark.parametrize("kills", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_run_still_ends_with_the_same_bits(
    processes, recipe, corpus, uninterrupted, tmp_path, kills
):
    """It saves after every step, so that most kills land inside a save."""
    busy, left, run = recipe.replace(save_every=1, keep_checkpoints=2), kills, 0
    moments = random.Random(0)
    while left:
        out, ended = tmp_path / f"run-{run}", False
        while left and not ended:
            arguments = (busy.to_dict(), str(out), str(corpus))
            child = processes.Process(target=train_child, args=arguments)
            child.start()
            child.join(moments.uniform(0.02, 1.2))
            ended = not child.is_alive()
            child.kill()
            child.join()
            assert child.exitcode in (0, -9)
            left -= child.exitcode == -9
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(busy, out, corpus=corpus, resume="auto")
        a, b = tensors(uninterrupted, 12), tensors(out, 12)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert rows(uninterrupted) == rows(out)
        assert not list(out.rglob(".tmp-*"))
        checkpoints.verify(out / "checkpoints/step-12")
        run += 1
