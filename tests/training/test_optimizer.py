"""Which parameters decay, and the learning rate's curve."""

from __future__ import annotations

import math

import pytest

from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.nn.kernels import Kernel
from spectral_window.training.optimizer import learning_rate_factor, parameter_groups

SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixer", ["spectral_window", "attention"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(mixer, tied):
    model = SWHForCausalLM(SWHConfig(**SHAPE, mixer=mixer, tie_word_embeddings=tied))
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in (decayed, spared)]
    assert sorted(groups[0] + groups[1]) == sorted(names.values())
    assert all(p.dim() >= 2 for p in decayed["params"])
    dynamics = {
        id(p) for part in model.modules() if isinstance(part, Kernel) for p in part.parameters()
    }
    assert bool(dynamics) == (mixer == "spectral_window")
    assert dynamics <= {id(p) for p in spared["params"]}
    for name in groups[1]:
        assert any(word in name for word in ("norm", "bias", "kernel", "gain", "fusion")), name
    assert "model.embed_tokens.weight" in groups[0]


def test_a_frozen_parameter_is_in_no_group():
    model = SWHForCausalLM(SWHConfig(**SHAPE))
    model.lm_head.weight.requires_grad_(False)
    held = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert id(model.lm_head.weight) not in held


def test_the_rate_warms_up_in_a_line_and_falls_in_a_cosine_to_its_floor(recipe):
    factor = learning_rate_factor(recipe.replace(steps=100, warmup_steps=10, lr_min_ratio=0.1))
    assert [factor(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(100) == pytest.approx(0.1)
    assert all(factor(step) > factor(step + 1) for step in range(10, 99))
    constant = learning_rate_factor(recipe.replace(schedule="constant", warmup_steps=0))
    assert {constant(step) for step in range(12)} == {1.0}
    assert math.isfinite(learning_rate_factor(recipe.replace(warmup_steps=12))(12))
