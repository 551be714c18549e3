"""Processes that die, hang or lose one another: the others say so, and a restart loses nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from spectral_window.data.blocks import ShuffledBlocks
from spectral_window.data.text import open_corpus
from spectral_window.files import hash_file
from spectral_window.training import checkpoints, folder, parallel
from tests.processes import python
from tests.training.mortal import Misfortune, be_rank
from tests.training.runs import rows

ROOT = Path(__file__).parent.parent.parent
STEPS = 12
LAST = f"checkpoints/step-{STEPS}"
ACTS = 20  # on the disk, in every save


def tensors(run: Path) -> dict[str, str]:
    """The hash of each file of tensors that a finished run has: weights, moments, random states."""
    files = [path for part in (LAST, "model") for path in (run / part).glob("*.safetensors")]
    assert len(files) >= 4
    return {str(path.relative_to(run)): hash_file(path) for path in files}


class Fated:
    """A run of two processes in `folder`, with a plan of what happens to them."""

    def __init__(self, folder: Path, recipe, plan: Sequence[Misfortune] = (), **settings) -> None:
        folder.mkdir()
        self.folder, self.out, self.plan = folder, folder / "run", plan
        self.recipe = recipe.replace(save_every=2, collective_timeout=600).replace(**settings)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe.to_dict()))
        (folder / "plan.json").write_text(json.dumps(plan))

    def words(self, *more: str) -> list[str]:
        return ["train", str(self.folder / "recipe.yaml"), "--out", str(self.out), *more]

    @property
    def met(self) -> int:
        """Misfortunes so far."""
        return len(list(self.folder.glob("met-*")))

    def by_hand(self, processes, *more: str, others: dict | None = None) -> list:
        """Two started processes, without torchrun. others: of rank 1, another recipe's settings."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for rank in (0, 1):
            words = self.words(*more, *(others or {}).get(rank, ()))
            arguments = (rank, port, str(self.folder), *words)
            started.append(processes.Process(target=be_rank, args=arguments))
            started[-1].start()
        return started

    def said(self, rank: int) -> str:
        return (self.folder / f"said-{rank}").read_text()

    def agent(self, *more: str, **options):
        """torchrun's agent with its workers (`agent.py`)."""
        options = {"run_id": self.folder.name, "max_restarts": len(self.plan)} | options
        words = [json.dumps(options), self.folder, *self.words(*more)]
        with (self.folder / "log").open("a") as said:
            return python(
                *("-m", "tests.training.agent", *words),
                cwd=ROOT,
                stdout=said,
                stderr=said,
            )

    def assert_nothing_lost(self, reference: Path) -> None:
        """Every misfortune happened, and the run is the one that met none, bit for bit; each sample
        was computed in its step, also in steps that were computed again."""
        assert self.met == len(self.plan)
        assert tensors(self.out) == tensors(reference)
        assert rows(self.out) == rows(reference)
        checkpoints.verify(self.out / LAST)
        assert not list(self.out.rglob(".tmp-*"))
        stream = open_corpus(self.out / "data").train
        blocks = -(-(len(stream) - 1) // self.recipe.sequence_length)
        batch = self.recipe.batch_size
        order = ShuffledBlocks(blocks, seed=self.recipe.seed, epochs=None)
        samples = [index for index, _ in zip(order, range(STEPS * batch), strict=False)]
        for rank in (0, 1):
            lines = (self.folder / f"samples-{rank}").read_text().splitlines()
            for step, indices in map(json.loads, lines):
                assert indices == samples[(step - 1) * batch : step * batch][rank::2], (rank, step)
            assert {json.loads(line)[0] for line in lines} == set(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def unharmed_runs(tmp_path_factory) -> Path:
    """Where the first test that needs one puts a run of two processes that met no misfortune."""
    return tmp_path_factory.mktemp("unharmed")


@pytest.fixture
def unharmed(unharmed_runs, processes, recipe):
    """The finished run that met no misfortune, by the setting `shard`."""

    def run(shard: str = "none") -> Path:
        if not (unharmed_runs / shard).exists():
            both = Fated(unharmed_runs / shard, recipe, shard=shard).by_hand(processes)
            for each in both:
                each.join()
            assert [each.exitcode for each in both] == [0, 0]
        return unharmed_runs / shard / "run"

    return run


# ------------------------------------------------------------------------------ torchrun restarts


def test_torchrun_starts_a_killed_run_again_and_it_goes_on(recipe, unharmed, tmp_path):
    """The command of the user's, which has no --resume: it was refused by its own run folder. Nor
    is --overwrite repeated."""
    fated = Fated(tmp_path / "run", recipe, [Misfortune("step", rank=1, step=5)])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "-m", "tests.training.mortal", str(fated.folder)),
            *fated.words("--overwrite"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from step-4" in done.stderr
    fated.assert_nothing_lost(unharmed())


PLANS = {
    "none": [
        Misfortune("meet", rank=1),
        Misfortune("prepare", rank=0),
        Misfortune("save", rank=0, step=4, act=ACTS // 2),
        Misfortune("update", rank=1, step=7),
        Misfortune("finish", rank=0),
    ],
    "full": [Misfortune("part", rank=1), Misfortune("update", rank=0, step=7)],
}


@pytest.mark.parametrize("shard", PLANS)
def test_killed_in_any_phase_a_run_loses_no_sample_and_repeats_none(
    recipe, unharmed, tmp_path, shard
):
    """Also before there is a checkpoint, within a save, and after the last step. torchrun's store
    keeps what the dead have written there."""
    fated = Fated(tmp_path / "run", recipe, PLANS[shard], shard=shard)
    agent = fated.agent(nproc_per_node=2, min_nodes=1, max_nodes=1, rdzv_endpoint="localhost:0")
    assert agent.wait() == 0, (fated.folder / "log").read_text()
    fated.assert_nothing_lost(unharmed(shard))


# --------------------------------------------------------------------------- what the others say


def test_a_process_that_hangs_is_named_with_its_step_after_the_timeout(processes, recipe, tmp_path):
    plan = [Misfortune("update", rank=1, step=5, how="SIGSTOP")]
    fated = Fated(tmp_path / "run", recipe, plan, collective_timeout=15)
    first, second = fated.by_hand(processes)
    first.join()
    second.kill()
    second.join()
    assert first.exitcode == 6, fated.said(0)
    assert "error: rank 0 lost rank 1 of 2 at step 6: " in fated.said(0)
    assert "collective_timeout (it is 15 s)" in fated.said(0)
    assert checkpoints.newest(fated.out / "checkpoints")[0].name == "step-4"


def test_a_process_that_is_killed_is_named_by_the_other_at_once(processes, recipe, tmp_path):
    """The timeout is ten minutes."""
    fated = Fated(tmp_path / "run", recipe, [Misfortune("update", rank=0, step=5)])
    first, second = fated.by_hand(processes)
    second.join()
    first.join()
    assert (first.exitcode, second.exitcode) == (-9, 6)
    assert "error: rank 1 lost " in fated.said(1)


def test_the_error_that_ends_one_process_ends_the_others_too(processes, recipe, tmp_path):
    fated = Fated(tmp_path / "run", recipe, [Misfortune("step", rank=1, step=3, how="raise")])
    both = fated.by_hand(processes)
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [5, 5]
    assert "error: rank 1 of 2 ended at step 3: OSError in process 1: [Errno" in fated.said(0)


def test_processes_that_were_started_differently_are_all_refused(processes, recipe, tmp_path):
    """Their gradients would be averaged as if they belonged together."""
    fated = Fated(tmp_path / "run", recipe)
    both = fated.by_hand(processes, others={1: ["lr=0.5"]})
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [2, 2]
    for rank in (0, 1):
        said = "rank 1 was started with other settings than rank 0 (lr is 0.003 and 0.5)"
        assert said in fated.said(rank)
    assert not fated.out.exists()


# ------------------------------------------------------------------------------ whose run it is


@pytest.fixture
def restarted(monkeypatch):
    """The environment of a process that torchrun has started a second time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restart_goes_on_with_its_own_run_and_no_older_one(restarted, tmp_path):
    """An older run in the folder was refused, or is to be overwritten, before the restart."""
    assert folder.is_restarted(tmp_path)  # killed before it wrote anything
    (tmp_path / "checkpoints").mkdir()
    assert not folder.is_restarted(tmp_path)
    for launch, ours in (("this", True), ("other", False), (None, False)):
        (tmp_path / "config.json").write_text(json.dumps({"launch": launch}))
        assert folder.is_restarted(tmp_path) == ours


@pytest.mark.parametrize("damage", ["{", "[]", "3", "{}"])
def test_a_damaged_config_is_nobodys_run(restarted, tmp_path, damage):
    (tmp_path / "config.json").write_text(damage)
    assert not folder.is_restarted(tmp_path)


def test_a_launch_without_an_id_is_known_by_its_folder_of_logs(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/none_a1/attempt_2/0/error.json")
    assert parallel.launch() == "/logs/none_a1"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.devnull)
    assert parallel.launch() is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert parallel.launch() is None
