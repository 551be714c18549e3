"""A process of a training that dies, stops or asks for a cut link at named moments.

    python -m tests.training.mortal FOLDER train RECIPE.yaml --out RUN ...

FOLDER/plan.json lists misfortunes, which happen one after the other, each once, over all restarts:
the first process that reaches the moment of the next one meets it. FOLDER/samples-RANK gets a line
for each step that this process computes: the step, and the samples of its part of the batch.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectral_window.cli import main
from spectral_window.data.blocks import PackedBlocks
from spectral_window.ops.context_parallel import ContextParallel
from spectral_window.training import checkpoints, sharded, trainer
from spectral_window.training.loop import Loop
from spectral_window.training.rollcall import RollCall
from tests.processes import THREADS, wait_for_file
from tests.training.children import ACTS

PHASES = {
    "start": "before it meets the others",
    "meet": "among the others, before a collective",
    "prepare": "before the text is prepared, or opened",
    "model": "before the model is built, or the checkpoint loaded",
    "step": "at the step's first collective",
    "exchange": "before the step's act-th exchange of states or of their gradients",
    "update": "after the gradients were exchanged",
    "evaluate": "before an evaluation",
    "save": "in a save, before its at-th act on the disk",
    "part": "before it writes its part of the first checkpoint (shard=full)",
    "finish": "before the model and the result are written",
}


class Misfortune(NamedTuple):
    """What happens to process `rank` when it is first at `step` or later in `phase`.

    how: a signal's name, "raise", or "ask": to put FOLDER/asked-INDEX there, and wait for
    FOLDER/granted-INDEX.
    """

    phase: str
    rank: int = 0
    step: int = 0
    how: str = "SIGKILL"
    act: int = 1


class Fate:
    """The plan in `folder`, as far as it has come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ.get("RANK", "0"))
        self.plan = [Misfortune(*each) for each in json.loads((folder / "plan.json").read_text())]

    def at(self, phase: str, step: int = 0, act: int = 1) -> None:
        index = len(list(self.folder.glob("met-*")))
        if index == len(self.plan):
            return
        next_one = self.plan[index]
        if (next_one.phase, next_one.rank, next_one.act) != (phase, self.rank, act):
            return
        if step < next_one.step:
            return
        (self.folder / f"met-{index}").write_text(f"{phase} {step}")
        if next_one.how == "raise":
            raise OSError(28, "No space left on device")
        if next_one.how == "ask":
            (self.folder / f"asked-{index}").touch()
            wait_for_file(self.folder / f"granted-{index}")
        else:
            os.kill(os.getpid(), signal.Signals[next_one.how])


def before(owner: Any, name: str, act: Any) -> None:
    """Call `act` with the arguments of each call of `owner.name`, before it."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def suffer(fate: Fate) -> None:
    """Let `fate` be asked at all moments of a training, and note its samples."""
    seen: list[int] = []
    acts = [0]  # of the save that is going on; 0 outside
    exchanges = [0, 0]  # the step, and how many it had so far

    def note(blocks: PackedBlocks, index: int) -> None:
        if blocks.stream.name.startswith("train of "):
            seen.append(index)

    def step(loop: Loop, batches: Any) -> None:
        with (fate.folder / f"samples-{fate.rank}").open("a") as file:
            file.write(json.dumps([loop.step + 1, seen]) + "\n")
        seen.clear()
        exchanges[:] = loop.step + 1, 0
        fate.at("step", loop.step + 1)

    def exchange(*_: Any) -> None:
        exchanges[1] += 1
        fate.at("exchange", *exchanges)

    def on_disk(*args: Any, **kwargs: Any) -> None:
        if acts[0]:
            fate.at("save", steps[0], acts[0])
            acts[0] += 1

    steps, save = [0], checkpoints.save

    def saving(root: Path, number: int, *args: Any, **kwargs: Any) -> Path:
        steps[0], acts[0] = number, 1
        try:
            return save(root, number, *args, **kwargs)
        finally:
            acts[0] = 0

    before(PackedBlocks, "__getitem__", note)
    before(RollCall, "meet", lambda *_: fate.at("meet"))
    before(trainer, "corpus_of", lambda *_: fate.at("prepare"))
    before(Loop, "__init__", lambda *_, **__: fate.at("model"))
    before(Loop, "_agree", step)
    before(ContextParallel, "swap", exchange)
    before(Loop, "_clip", lambda loop, _: fate.at("update", loop.step + 1))
    before(Loop, "_evaluate", lambda loop: fate.at("evaluate", loop.step))
    before(sharded, "_write", lambda *_: fate.at("part"))
    before(trainer._Run, "_finish", lambda *_: fate.at("finish"))
    for owner, name in ACTS:
        before(owner, name, on_disk)
    checkpoints.save = saving


def run(folder: str, *words: str) -> None:
    """Be the process: `words` are the command line. It ends with the command's exit code."""
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # accelerate and torch warn of things to come
    fate = Fate(Path(folder))
    suffer(fate)
    fate.at("start")
    sys.exit(main(words))


def be_rank(rank: int, port: int, folder: str, *words: str) -> None:
    """Be process `rank` of two that meet at `port`, without torchrun; what it says is in
    FOLDER/said-RANK."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    here |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    with Path(folder, f"said-{rank}").open("w", buffering=1) as said:
        sys.stdout = sys.stderr = said
        run(folder, *words)


if __name__ == "__main__":
    run(*sys.argv[1:])
