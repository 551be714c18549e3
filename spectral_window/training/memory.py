"""Whether a training fits into memory, before anything large is allocated."""

from __future__ import annotations

import psutil
import torch

from spectral_window.errors import ResourceError
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import count_parameters
from spectral_window.training.parallel import World
from spectral_window.training.recipes import Recipe
from spectral_window.training.sharded import pieces


def check_memory(recipe: Recipe, config: SWHConfig, device: str, world: World) -> None:
    """ResourceError where a training of `config` as `recipe` says cannot fit the free memory.

    This is a lower bound: what fails never fits, what passes may still be too large. It counts

    - 16 bytes per parameter that a process holds: the weight, its gradient, Adam's two moments;
    - 8 bytes per logit of a micro-batch, in float32: itself and its gradient; 4 in an evaluation;
    - activations for the backward pass, per token and layer at least 4 rows of channels and 2 of
      the MLP (with gradient checkpointing 1 row of channels);
    - 24 bytes per token of the batch: id, label and position.
    """
    parameters, vocabulary = count_parameters(config), config.vocab_size
    tokens = recipe.micro_batch_size * recipe.sequence_length // world.context
    kept = config.hidden_size
    if not recipe.gradient_checkpointing:
        kept = 4 * config.hidden_size + 2 * (config.intermediate_size or 0)
    kept *= (2 if recipe.dtype == "bfloat16" else 4) * config.num_hidden_layers
    evaluated = 4 * recipe.eval_batch_size * recipe.sequence_length * vocabulary
    batch = 24 * recipe.batch_size // world.data_size * recipe.sequence_length
    work = max(tokens * (kept + 8 * vocabulary), evaluated) + batch
    held = 16 * parameters // pieces(recipe.shard, world)
    needed = held + work
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"it takes at least {needed / 1e9:,.1f} GB to train and {free / 1e9:,.1f} GB are free "
            f"({device}): {held / 1e9:,.1f} GB for {parameters:,} parameters, "
            f"{work / 1e9:,.1f} GB for batch_size={recipe.batch_size:,}, micro_batch_size="
            f"{recipe.micro_batch_size:,}, sequence_length={recipe.sequence_length:,}; use a "
            "smaller model, batch or length"
        )
