"""What each process of the torchrun tests does: `python ranks.py RECIPE OUT CORPUS STOP SEEN`."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from spectral_window.data.blocks import PackedBlocks
from spectral_window.training import Interrupted, train
from spectral_window.training.recipes import Recipe
from tests.processes import THREADS
from tests.training.runs import Stopper

if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    # accelerate and torch warn of things to come in calls that are not ours.
    warnings.simplefilter("ignore")
    recipe, out, corpus, stop, seen_file = sys.argv[1:]
    rank, seen, get = int(os.environ["RANK"]), [], PackedBlocks.__getitem__

    def ask() -> None:
        if rank == 1:  # one process alone is asked to stop
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(self, index):
        if self.stream.name.startswith("train of "):
            seen.append(index)
        return get(self, index)

    PackedBlocks.__getitem__ = noted  # type: ignore[method-assign]
    try:
        train(
            Recipe.from_dict(json.loads(recipe)),
            out,
            corpus=corpus,
            resume="auto",
            progress=Stopper(int(stop), ask),
        )
    except Interrupted as stopped:
        print(f"rank {rank}: {stopped}", file=sys.stderr)
    Path(f"{seen_file}-{rank}.json").write_text(json.dumps(seen))
