"""The capacity suite: states as large as its rows say, equal sizes, a table and a picture."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.cache_utils import DynamicCache

from spectral_window.cli import main
from spectral_window.hf.model import SWHForCausalLM, count_parameters
from spectral_window.lab.baselines.mixers import BASELINES
from spectral_window.lab.experiments import capacity, recall
from spectral_window.nn.mixers import MIXERS

TRIALS = capacity.trials()


def test_every_trial_has_its_own_key_and_every_model_all_numbers_of_pairs():
    assert len({t.run.key for t in TRIALS}) == len({t.name for t in TRIALS}) == len(TRIALS)
    for model in capacity.MODELS:
        pairs = {
            t.labels["pairs"]
            for t in TRIALS
            if (t.labels["model"], t.labels["width"]) == (model, capacity.WIDTH)
        }
        assert pairs == set(capacity.PAIRS)


def test_models_of_one_width_are_equally_large():
    for width in {t.labels["width"] for t in TRIALS}:
        of = [count_parameters(t.run.config()) for t in TRIALS if t.labels["width"] == width]
        assert max(of) <= 1.01 * min(of)


def test_a_memory_of_more_heads_holds_less():
    of = {
        t.labels["heads"]: t.labels["state_bytes"]
        for t in TRIALS
        if (t.labels["model"], t.labels["width"]) == (recall.CONVOLVED, capacity.WIDTH)
    }
    assert of[1] > of[2] > of[4]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_holds_what_its_library_caches(name):
    """The library's convolutions cache one token more than the next one needs."""
    mixer = MIXERS[name](hidden_size=32, num_heads=2)
    few, many = (mixer.state_bytes(context) // 4 for context in (8, 16))
    assert many - few == (8 * 2 * 32 if name == "conv_attention" else 0)
    x = torch.randn(1, 8, 32)
    if name == "rg_lru":
        mixer.inner(x, torch.arange(8)[None], None, use_cache=True)
        held = [mixer.inner.conv1d_state, mixer.inner.rg_lru.recurrent_states]
        assert sum(part.numel() for part in held) == few
    elif name != "conv_attention":
        cache = DynamicCache(config=mixer.inner_config)
        where = "past_key_values" if name == "short_conv" else "cache_params"
        mixer.inner(x, **{where: cache})
        (layer,) = cache.layers
        convolved, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        memory = 0 if recurrent is None else recurrent.numel()
        assert convolved[..., 1:].numel() + memory == few


def test_the_quick_version_runs_to_its_end_with_table_and_picture(tmp_path, capsys):
    assert main(["reproduce", "capacity", "--quick", "--work", str(tmp_path)]) == 0
    assert "quick version" in capsys.readouterr().err
    results = tmp_path / "results"
    found = json.loads((results / "capacity.json").read_text())
    assert found["quick"]
    assert [row["model"] for row in found["rows"]] == list(capacity.MODELS[:2])
    for row in found["rows"]:
        probe = next(t for t in capacity.trials(quick=True) if t.labels["model"] == row["model"])
        model = SWHForCausalLM(probe.run.config())
        assert row["state_bytes"] == model.state_bytes(capacity.LENGTH)
    assert (results / "capacity.md").read_text().count("\n") == 2 + len(found["rows"])
    assert (results / "capacity.png").read_bytes().startswith(b"\x89PNG")
