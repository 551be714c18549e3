"""What others put in our mixer's place: equally large, causal, started as their library starts
them, trained by the same command, and refused where they could not be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectral_window.cli import main
from spectral_window.errors import UserError
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.hf.model import count_parameters, match_parameters
from spectral_window.lab import doctor
from spectral_window.lab.baselines import mixers
from spectral_window.lab.baselines.mixers import BASELINES
from spectral_window.lab.experiments import lm, memory, probes
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.experiments.trainings import Text, Training
from spectral_window.nn.mixers import MIXERS
from spectral_window.training.trainer import model_config
from tests.processes import python

SHAPE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def small(mixer: str, **fields: object) -> SWHForCausalLM:
    torch.manual_seed(0)
    paper = SWHConfig(**SHAPE, intermediate_size=400, window=8)
    config = SWHConfig(**SHAPE, window=8, mixer=mixer, **fields)
    return SWHForCausalLM(match_parameters(config, count_parameters(paper)))


@pytest.mark.parametrize("mixer", BASELINES)
def test_a_baseline_is_as_large_learns_in_every_parameter_and_sees_no_later_token(mixer):
    model = small(mixer)
    paper = count_parameters(SWHConfig(**SHAPE, intermediate_size=400, window=8))
    assert model.count_parameters() == pytest.approx(paper, rel=0.01)
    ids = torch.randint(40, (2, 70))
    positions = torch.arange(70)[None].expand(2, -1)
    model(ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        ids[:, 40:] = 1
        after = model(ids, use_cache=False).logits
    assert (before - after)[:, :40].abs().max() <= 1e-6
    assert (before - after)[:, 40:].abs().max() > 1e-3


def test_what_a_library_starts_in_its_own_way_starts_so():
    started = {name: small(name).model.layers[1].mixer for name in BASELINES}
    assert started["mamba2"].inner.A_log.exp().tolist() == pytest.approx([1, 2, 3, 4])
    decay = torch.exp(-torch.nn.functional.softplus(started["rg_lru"].inner.rg_lru.recurrent_param))
    assert ((decay > 0.89) & (decay < 1)).all()
    assert started["gated_deltanet"].inner.dt_bias.tolist() == [1.0] * 4
    assert started["kimi_delta"].inner.forget_gate.A_log.exp().ge(1).all()
    keys = started["conv_attention"].k_conv.weights
    assert keys[:16].tolist() == [[1, 0, 0, 0]] * 16
    assert keys[16:].tolist() == [[0, 1, 0, 0]] * 16


@pytest.mark.parametrize("mixer", BASELINES)
def test_a_baseline_refuses_what_it_would_compute_wrongly(mixer):
    model, ids = small(mixer).eval(), torch.randint(40, (2, 12))
    packed = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    for given in ({"position_ids": packed}, {"attention_mask": torch.tensor([[0] + [1] * 11] * 2)}):
        with pytest.raises(UserError, match=f"mixer '{mixer}'.*whole rows of one document"):
            model(ids, use_cache=False, **given)
    with pytest.raises(UserError, match="whole rows of one document"):
        model.generate(ids, max_new_tokens=3)


VARIANTS = {
    "fixed lag": {"memory_key": "before"},
    "window's key": {"memory_key": "window"},
    "own query": {"memory_query": True},
    "own value": {"memory_value": True},
    "no read gate": {"read_gate": False},
    "decay": {"memory_decay": True},
    "additive": {"delta_rule": False},
}


def test_a_variant_of_the_memory_with_nothing_changed_is_the_memory():
    memory, variant = small("memory"), small("memory_variant")
    variant.load_state_dict(memory.state_dict())
    ids = torch.randint(40, (2, 70))
    with torch.no_grad():
        want, got = (model(ids, use_cache=False).logits for model in (memory, variant))
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


def test_each_option_of_a_variant_changes_what_it_says():
    def variant(**option: object) -> SWHForCausalLM:
        config = SWHConfig(**SHAPE, mixer="memory_variant", window=8, **option)
        return SWHForCausalLM(config)

    ids, whole = torch.randint(40, (2, 70)), variant()
    with torch.no_grad():
        base = whole(ids, use_cache=False).logits
    for name, option in VARIANTS.items():
        model = variant(**option)
        model.load_state_dict(whole.state_dict(), strict=False)
        with torch.no_grad():
            changed = model(ids, use_cache=False).logits
        # the key of the token before is what the learned weights start at
        assert ((changed - base).abs().max().item() > 1e-4) == (name != "fixed lag"), name
        model(ids, labels=ids, use_cache=False).loss.backward()
        unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        expected = {"fixed lag": "lag", "window's key": "lag", "no read gate": "read_bias"}
        assert all(n.endswith(expected[name]) for n in unused) if name in expected else not unused


def test_a_variant_has_the_memory_in_the_layers_that_are_named():
    papers = SWHForCausalLM(SWHConfig(**SHAPE, mixer="spectral_window", window=8))
    ids = torch.randint(40, (2, 70))
    for option, has in {"every": {0, 1}, "first": {0}, "others": {1}}.items():
        config = SWHConfig(**SHAPE, mixer="memory_variant", window=8, memory_in=option)
        model = SWHForCausalLM(config)
        layers = {n for n, layer in enumerate(model.model.layers) if hasattr(layer.mixer, "memory")}
        assert layers == has
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        for number in {0, 1} - has:
            bare = model.model.layers[number].mixer
            same = papers.model.layers[number].mixer
            same.load_state_dict(bare.state_dict())
            assert [name for name, _ in bare.operators()] == [name for name, _ in same.operators()]
            assert bare.flops_per_token(512) == same.flops_per_token(512)
            x = torch.randn(2, 20, SHAPE["hidden_size"])
            with torch.no_grad():
                assert torch.equal(bare(x)[0], same(x)[0])


def test_a_probe_knows_baselines_also_at_lengths_that_others_read_in_segments():
    shape = {k: v for k, v in SHAPE.items() if k != "vocab_size"} | {"window": 8}
    tests = (Exam("recall", 32, 4), Exam("recall", 1100, 2))
    row = probes.run(Probe("recall", shape | {"mixer": "short_conv"}, tests, steps=2))
    assert [test["length"] for test in row["tests"]] == [32, 1100]


def test_a_training_of_a_baseline_is_a_command_that_can_be_typed(tmp_path: Path):
    (tmp_path / "text.txt").write_text("One text to read again and again. " * 400)
    text = Text((str(tmp_path / "text.txt"),), (), tmp_path / "tokens")
    overrides = {"mixer": "gated_deltanet", "steps": 2, "warmup_steps": 1}
    training = Training("tiny", overrides, "run", text)
    text.prepare(training.resolved())
    job = training.job(tmp_path)
    assert python(*job.command()[1:]).wait() == 0
    row = training.read(tmp_path)
    assert row is not None
    assert row["eval_loss"] > 0
    command = json.loads((tmp_path / "run" / "config.json").read_text())["command"]
    words = command.split()
    assert words[:5] == ["spectral-window", "--plugin", mixers.__name__, "train", "tiny"]


def test_commands_that_results_record_still_find_the_baselines(capsys):
    results = Path(__file__).parents[2] / "results" / "memory" / "lm-short.json"
    commands = [row["command"].split() for row in json.loads(results.read_text())["rows"]]
    named = {words[words.index("--plugin") + 1] for words in commands if "--plugin" in words}
    assert named
    for name in named:
        assert main(["--plugin", name, "info", "tiny"]) == 0


def test_the_memory_is_compared_with_all_of_them_at_equal_size():
    for size in ("short", "small"):
        shape = dict(lm.SIZES[size].overrides)
        counts = set()
        for overrides in memory.PLAN.variants.values():
            recipe = Training("paper-lm-small", shape | overrides).resolved()
            counts.add(count_parameters(model_config(recipe, 4096)))
        assert max(counts) <= 1.001 * min(counts), size
    assert len(memory.PLAN.variants) == 7 + len(memory.CONVOLVED) + len(BASELINES)


def test_the_doctor_measures_a_mixer_whose_maps_have_other_names():
    mixer = MIXERS["short_conv"](hidden_size=16, num_heads=2)
    assert doctor._saved_bytes(mixer, 64) > 0
