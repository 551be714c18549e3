"""Training: a recipe and a folder in, a trained model and an honest record of the run out.

    from spectral_window.training.recipes import resolve
    from spectral_window.training import train

    result = train(resolve("tiny"), "runs/tiny")

`trainer.py` runs it, `loop.py` is transformers' Trainer with our rules, `checkpoints.py` makes
saving safe against a kill, `state.py` says what a checkpoint holds, `parallel.py` is the little
that several processes need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_window.training.interrupt import Interrupted
    from spectral_window.training.trainer import train

__all__ = ["Interrupted", "train"]


def __getattr__(
    name: str,
) -> Any:  # transformers' Trainer takes seconds to import: wait until it is asked for
    if name == "train":
        from spectral_window.training.trainer import train

        return train
    if name == "Interrupted":
        from spectral_window.training.interrupt import Interrupted

        return Interrupted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
