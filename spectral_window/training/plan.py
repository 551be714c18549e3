"""What a training is about to do, in the few lines that are shown before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectral_window.data.text import Corpus
from spectral_window.ops import resolve
from spectral_window.training.recipes import Recipe
from spectral_window.training.sharded import whole_mixer

# Up to so many passes over a text a model learns from it nearly as much as from new text
# (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
MOST_PASSES = 4


def describe(recipe: Recipe, model: Any, corpus: Corpus, folder: Path) -> list[str]:
    """The size of the work, how it is computed here, and where; and a warning if the text is too
    small. model: an `SWHForCausalLM` on the device that it trains on."""
    text = corpus.sizes()["train"]["tokens"]
    planned = recipe.steps * recipe.tokens_per_step
    passes = planned / text
    methods = ", ".join(f"{op} {name}" for op, name in methods_in_use(recipe, model).items())
    lines = [
        f"{model.count_parameters():,} parameters, {planned:,} tokens to train on: "
        f"{passes:.2g} passes over the {text:,} of the text",
        f"on {model.device}: {methods or 'plain torch'}",
        f"in {folder}",
    ]
    if passes > MOST_PASSES:
        enough = max(1, MOST_PASSES * text // recipe.tokens_per_step)
        lines.append(
            f"warning: the text is small for this recipe, and is read {passes:.0f} times; after "
            f"{MOST_PASSES} a model learns little more from it: give more --data, or steps={enough}"
        )
    return lines


def methods_in_use(recipe: Recipe, model: Any) -> dict[str, str]:
    """The method of each operator of a layer in a training step here."""
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    size = (1, recipe.sequence_length, model.config.hidden_size)
    x = torch.empty(size, dtype=dtype, device=model.device, requires_grad=True)
    mixer = whole_mixer(model)
    return {op: resolve(op, mixer.method(op), x, *others).name for op, others in mixer.operators()}
