"""Two processes under torchrun learn what one does, each from its own half of every batch."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from spectral_window.cli.errors import explain
from spectral_window.data.blocks import ShuffledBlocks
from spectral_window.data.formats import UnreadableFile
from spectral_window.data.text import open_corpus
from spectral_window.errors import IntegrityError, ResourceError, SpectralWindowError, UserError
from spectral_window.training import checkpoints, train
from spectral_window.training.loop import accumulation
from spectral_window.training.parallel import World
from tests.processes import THREADS
from tests.training.runs import rows

ROOT = Path(__file__).parent.parent.parent


def torchrun(recipe, out, corpus, seen, stop=0):
    words = [json.dumps(recipe.to_dict()), str(out), str(corpus), str(stop), str(seen)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.training.ranks", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, [json.loads(Path(f"{seen}-{rank}.json").read_text()) for rank in (0, 1)]


def close(ours, theirs):
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine:
            assert mine[key] == pytest.approx(other[key], rel=1e-4), (mine, key)


def test_two_processes_equal_one_stop_together_and_resume_as_two_or_one(
    recipe, corpus, uninterrupted, tmp_path
):
    out, alone = tmp_path / "run", tmp_path / "alone"
    blocks = -(-(len(open_corpus(corpus).train) - 1) // recipe.sequence_length)
    order = ShuffledBlocks(blocks, seed=recipe.seed, epochs=None)
    expected = [index for index, _ in zip(order, range(12 * recipe.batch_size), strict=False)]

    # One of the two is asked to stop at step 5: both end after the same step, with a checkpoint.
    said, seen = torchrun(recipe, out, corpus, tmp_path / "first", stop=5)
    last, _ = checkpoints.newest(out / "checkpoints")
    step = checkpoints.step_of(last)
    assert step in (5, 6)
    assert said.count(f"stopped at step {step}; go on with --resume") == 2
    close(rows(out), [row for row in rows(uninterrupted) if row["step"] <= step])
    # Each saw its own half of each batch (a loader may have fetched a batch ahead).
    half = step * recipe.batch_size // 2
    for rank in (0, 1):
        assert seen[rank][:half] == expected[rank::2][:half]

    shutil.copytree(out, alone)
    said, seen = torchrun(recipe, out, corpus, tmp_path / "second")
    for rank in (0, 1):
        assert seen[rank] == expected[rank::2][half:]
    close(rows(out), rows(uninterrupted))
    mine, one = (json.loads((run / "result.json").read_text()) for run in (out, uninterrupted))
    assert mine["environment"]["processes"] == 2
    assert mine["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert mine["eval_tokens"] == one["eval_tokens"]  # also where blocks do not divide by two

    with pytest.warns(UserWarning, match="2 processes saved step-. and 1 resume it"):
        train(recipe, alone, corpus=corpus, resume=True)
    close(rows(alone), rows(uninterrupted))


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(recipe):
    assert accumulation(recipe, World(0, 2)) == 1
    with pytest.raises(UserError, match="times 3 processes"):
        accumulation(recipe, World(0, 3))


def test_half_of_torchruns_environment_is_refused(monkeypatch, recipe, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"MASTER_ADDR is not set.*torchrun"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (UserError("said"), UserError, 2),
        (UnreadableFile("said"), UnreadableFile, 2),
        (IntegrityError("said"), IntegrityError, 3),
        (ResourceError("said"), ResourceError, 5),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, 5),
        (MemoryError("said"), ResourceError, 5),
        (ValueError("said"), SpectralWindowError, 1),
        (KeyError("said"), SpectralWindowError, 1),
    ],
)
def test_what_fails_in_the_first_process_fails_alike_in_the_others(error, kind, code, monkeypatch):
    def fail():
        raise error

    box = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, src: box.append([*objects]))
    with pytest.raises(type(error)):
        World(0, 2).first(fail)
    sent = pickle.loads(pickle.dumps(box[0]))

    def receive(objects, src):
        objects[:] = sent

    monkeypatch.setattr(dist, "broadcast_object_list", receive)
    with pytest.raises(kind) as caught:
        World(1, 2).first(fail)
    assert type(caught.value) is kind
    assert caught.value.exit_code == code
    assert explain(error)[1] == code
