"""Training: a recipe and a folder in, a trained model and an honest record of the run out.

from spectral_window.training import train
from spectral_window.training.recipes import resolve

result = train(resolve("tiny"), "runs/tiny")

recipes.py      every setting of a run with its range, and the named recipes
trainer.py      train(): from a recipe to a finished run folder
folder.py       whether that folder may be used, and by this run alone
text.py         its text, prepared or found
initial.py      a model to begin from, instead of random weights
machine.py      the device and what is recorded about it; memory.py: whether the run fits
loop.py         the training loop, on accelerate; optimizer.py: parameter groups and learning rate
parallel.py     the little that several processes need
interrupt.py    Ctrl-C and SIGTERM
checkpoints.py  saving that survives a kill; state.py: what a checkpoint holds;
                manifest.py: how damage is noticed
evaluate.py     loss on held-out text;  metrics.py, progress.py: what is told on the way
loading.py      from a path to a model that can be trusted
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_window.training.interrupt import Interrupted
    from spectral_window.training.trainer import train

__all__ = ["Interrupted", "train"]


def __getattr__(name: str) -> Any:
    """Import `train` when it is first used: transformers takes seconds to import."""
    if name == "train":
        from spectral_window.training.trainer import train

        return train
    if name == "Interrupted":
        from spectral_window.training.interrupt import Interrupted

        return Interrupted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
