"""AdamW: which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spectral_window.nn.layers import no_weight_decay
from spectral_window.training.recipes import Recipe


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices and embeddings decay; dynamics, gains, norms and biases do
    not."""
    spared = no_weight_decay(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in spared], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        fused=True,
    )


def learning_rate_factor(recipe: Recipe) -> Callable[[int], float]:
    """Step (counted from 0) -> multiple of `lr`: linear warm-up, then a cosine down to
    `lr_min_ratio`, or constant."""
    warmup, steps, lowest = recipe.warmup_steps, recipe.steps, recipe.lr_min_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
