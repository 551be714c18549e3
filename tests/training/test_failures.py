"""Processes that die, hang or lose one another: the others say so, and a restart loses nothing."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectral_window.data.blocks import ShuffledBlocks
from spectral_window.data.text import open_corpus
from spectral_window.files import hash_file
from spectral_window.training import checkpoints, folder, parallel
from tests.processes import kill_tree, python, wait_until
from tests.training.mortal import Misfortune, be_rank
from tests.training.runs import rows

ROOT = Path(__file__).parent.parent.parent
STEPS = 12
LAST = f"checkpoints/step-{STEPS}"
ACTS = 20  # on the disk, in every save
EXCHANGES = 8  # of states, of a shared row in a step: 2 micro-batches, 2 layers, there and back


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

    def agent(self, *more: str, within: Sequence[str] = (), log: str = "log", **options):
        """torchrun's agent with its workers (`agent.py`)."""
        options = {"run_id": self.folder.name, "max_restarts": len(self.plan)} | options
        words = [json.dumps(options), self.folder, *self.words(*more)]
        with (self.folder / log).open("a") as said:
            return python(
                *("-m", "tests.training.agent", *words),
                within=within,
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
        shared = self.recipe.context_parallel == 2  # each process has a part of every sample
        for rank in (0, 1):
            lines = (self.folder / f"samples-{rank}").read_text().splitlines()
            for step, indices in map(json.loads, lines):
                whole = samples[(step - 1) * batch : step * batch]
                assert indices == (whole if shared else whole[rank::2]), (rank, step)
            assert {json.loads(line)[0] for line in lines} == set(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def unharmed_runs(tmp_path_factory) -> Path:
    """Where the first test that needs one puts a run of two processes that met no misfortune."""
    return tmp_path_factory.mktemp("unharmed")


@pytest.fixture
def unharmed(unharmed_runs, processes, recipe):
    """Makes the finished run of two processes with some settings that met no misfortune."""

    def run(**settings: Any) -> Path:
        place = unharmed_runs / ("-".join(map(str, settings.values())) or "copies")
        if not place.exists():
            both = Fated(place, recipe, **settings).by_hand(processes)
            for each in both:
                each.join()
            assert [each.exitcode for each in both] == [0, 0]
        return place / "run"

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


PLANS: dict[str, tuple[dict[str, Any], list[Misfortune]]] = {
    "copies": (
        {},
        [
            Misfortune("meet", rank=1),
            Misfortune("prepare", rank=0),
            Misfortune("save", rank=0, step=4, act=ACTS // 2),
            Misfortune("update", rank=1, step=7),
            Misfortune("finish", rank=0),
        ],
    ),
    "parts of weights": (
        {"shard": "full"},
        [Misfortune("part", rank=1), Misfortune("update", rank=0, step=7)],
    ),
    "parts of weights and rows": (
        {"shard": "full", "context_parallel": 2},
        [
            Misfortune("exchange", rank=1, step=2),
            Misfortune("part", rank=0),
            Misfortune("update", rank=1, step=7),
            Misfortune("exchange", rank=0, step=9, act=EXCHANGES),
        ],
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_killed_in_any_phase_a_run_loses_no_sample_and_repeats_none(
    recipe, unharmed, uninterrupted, tmp_path, kind
):
    """Also before there is a checkpoint, within a save, and after the last step. torchrun's store
    keeps what the dead have written there."""
    settings, plan = PLANS[kind]
    fated = Fated(tmp_path / "run", recipe, plan, **settings)
    agent = fated.agent(nproc_per_node=2, min_nodes=1, max_nodes=1, rdzv_endpoint="localhost:0")
    assert agent.wait() == 0, (fated.folder / "log").read_text()
    fated.assert_nothing_lost(unharmed(**settings))
    for ours, alone in zip(rows(fated.out), rows(uninterrupted), strict=True):
        assert ours == pytest.approx(alone, rel=2e-6)  # the order of sums differs


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
    """The timeout is ten minutes. Here the first process holds the store, so its end ends that."""
    fated = Fated(tmp_path / "run", recipe, [Misfortune("update", rank=0, step=5)])
    first, second = fated.by_hand(processes)
    second.join()
    first.join()
    assert (first.exitcode, second.exitcode) == (-9, 6)
    assert "error: rank 1 lost " in fated.said(1)


@pytest.mark.parametrize("act", [1, EXCHANGES], ids=["states", "gradients of states"])
def test_a_process_that_is_killed_in_an_exchange_of_states_is_named(
    processes, recipe, tmp_path, act
):
    """Such an exchange is within the forward or the backward pass, at no moment of the loop's."""
    plan = [Misfortune("exchange", rank=1, step=5, act=act)]
    fated = Fated(tmp_path / "run", recipe, plan, context_parallel=2)
    first, second = fated.by_hand(processes)
    first.join()
    second.join()
    assert fated.met == 1
    assert (first.exitcode, second.exitcode) == (6, -9)
    assert "error: rank 0 lost rank 1 of 2 at step 5: " in fated.said(0)


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


# ------------------------------------------------------------------------- machines (slow, root)


def ip(*words: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
    return done.returncode == 0


@pytest.fixture
def machines():
    """Two network namespaces that a cable joins: (name, address) of each, and the cable's end."""
    names = [f"sw{os.getpid()}-{side}" for side in "ab"]
    if not ip("netns", "add", names[0], check=False):
        pytest.skip("network namespaces need Linux and root")
    ip("netns", "add", names[1])
    ends = [f"v{os.getpid()}{side}" for side in "ab"]
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    addresses = ["10.77.0.1", "10.77.0.2"]
    for name, end, address in zip(names, ends, addresses, strict=True):
        ip("link", "set", end, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield list(zip(names, addresses, ends, strict=True))
    for name in names:
        ip("netns", "del", name)


def cut(cluster: Cluster) -> None:
    cluster.cut()


def lose_one(cluster: Cluster) -> None:
    cluster.lose([1])


def lose_both(cluster: Cluster) -> None:
    """Also the machine that keeps torchrun's store."""
    cluster.lose([0, 1])


class Cluster:
    """Two machines, each with torchrun's agent and one process of the run, and what starts agents
    again that gave up, as a scheduler does."""

    def __init__(self, fated: Fated, machines, least: int = 2) -> None:
        self.fated, self.machines, self.least = fated, machines, least
        self.gave_up = 0  # how often an agent ended with an error of its own
        self.agents = {0: self.start(0), 1: self.start(1)}

    def start(self, index: int):
        name, address, end = self.machines[index]
        # There is no name server, of which torch asks the name of each address.
        names = [f"GLOO_SOCKET_IFNAME={end}", "RES_OPTIONS=timeout:1 attempts:1"]
        within = ["ip", "netns", "exec", name, "env", *names]
        return self.fated.agent(
            within=within,
            log=f"log-{index}",
            nproc_per_node=1,
            min_nodes=self.least,
            max_nodes=2,
            local_addr=address,
            rdzv_endpoint=f"{self.machines[0][1]}:29400",
            rdzv_configs={
                "is_host": index == 0,
                "keep_alive_interval": 3,
                "keep_alive_max_attempt": 4,
            },
        )

    def said(self) -> list[str]:
        return [(self.fated.folder / f"log-{index}").read_text() for index in (0, 1)]

    def lost(self) -> int:
        """How often a process has said that it lost another."""
        return sum(log.count(" lost ") for log in self.said())

    def cut(self) -> None:
        """Cut the cable until a process has noticed."""
        name, _, end = self.machines[1]
        before = self.lost()
        ip("-n", name, "link", "set", end, "down")
        self.grant()
        wait_until(lambda: self.lost() > before or self.ended(), self.agents[0])
        ip("-n", name, "link", "set", end, "up")

    def lose(self, indices: Sequence[int], again: bool = True) -> None:
        """Kill all processes of machines, and start their agents again."""
        for index in indices:
            agent = self.agents.pop(index)
            kill_tree(agent)
            agent.wait()
        self.grant()
        for index in indices if again else ():
            self.agents[index] = self.start(index)

    def asked(self) -> int | None:
        """The misfortune that a process waits for, if one does."""
        for path in self.fated.folder.glob("asked-*"):
            index = int(path.name.removeprefix("asked-"))
            if not (self.fated.folder / f"granted-{index}").exists():
                return index
        return None

    def grant(self) -> None:
        if (index := self.asked()) is not None:
            (self.fated.folder / f"granted-{index}").touch()

    def ended(self) -> list[int]:
        """The exit codes of the agents that have ended."""
        codes = [agent.poll() for agent in self.agents.values()]
        return [code for code in codes if code is not None]

    def run(self, acts) -> None:
        """Until all agents have ended well; acts: what happens where a process asks, by its index.

        torchrun's own meeting can fail: an agent that is started again while the others give up a
        meeting waits there for one who has left."""
        while True:
            wait_until(lambda: self.ended() or self.asked() is not None, self.agents[0])
            if (index := self.asked()) is not None:
                acts[index](self)
            elif any(self.ended()) or any(agent.wait() for agent in self.agents.values()):
                self.gave_up += 1
                assert self.gave_up <= len(self.fated.plan), "\n".join(self.said())
                self.lose(list(self.agents))
            else:
                return


def misfortunes(moments: random.Random, count: int) -> tuple[list[Misfortune], dict]:
    """A plan of `count` in the order in which they can happen, and what is done for those that
    ask. Most kill one process; a few cut the cable, or kill a machine or both."""
    early = ("start", "meet", "prepare", "model")
    phases = (*early, "step", "step", "update", "update", "evaluate", "save", "save")
    plan, acts = [], {}
    for index, step in enumerate(sorted(moments.randrange(1, STEPS) for _ in range(count))):
        if index % 5 == 2:
            phase, rank = moments.choice(("step", "update")), moments.randrange(2)
            plan.append(Misfortune(phase, rank, step, "ask"))
            acts[index] = moments.choice((cut, lose_one, lose_one, lose_both))
            continue
        phase = moments.choice(phases)
        rank = 0 if phase in ("prepare", "save") else moments.randrange(2)
        act = moments.randrange(1, ACTS + 1) if phase == "save" else 1
        plan.append(Misfortune(phase, rank, 0 if phase in early else step, act=act))
    return plan, acts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fifty_misfortunes_of_two_machines_lose_no_sample_and_repeat_none(
    machines, recipe, unharmed, tmp_path, seed
):
    """Ten in each of five runs."""
    plan, acts = misfortunes(random.Random(seed), 10)
    fated = Fated(tmp_path / "run", recipe, plan, collective_timeout=5)
    Cluster(fated, machines).run(acts)
    fated.assert_nothing_lost(unharmed())


@pytest.mark.slow
def test_one_of_two_machines_goes_on_alone(machines, recipe, unharmed, tmp_path):
    fated = Fated(tmp_path / "run", recipe, [Misfortune("step", rank=1, step=7, how="ask")])
    cluster = Cluster(fated, machines, least=1)
    cluster.run({0: lambda cluster: cluster.lose([1], again=False)})
    log = (fated.folder / "log-0").read_text()
    assert "2 processes saved step-6 and 1 resume it" in log
    ours, theirs = rows(fated.out), rows(unharmed())
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
