"""The plan on paper: what it counts is what the model has, keeps and computes, and a plan does what
plans must."""

from __future__ import annotations

import json

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.cli import main
from spectral_window.errors import ResourceError, UserError
from spectral_window.hf.model import SWHLayer
from spectral_window.lab import scaling
from spectral_window.lab.bench import gpu_roofline
from spectral_window.lab.bench.roofline import layer_products
from spectral_window.lab.scaling import Layout, estimate, fit, model
from spectral_window.nn.mixers import map_state
from spectral_window.ops import lagged_units
from spectral_window.ops.methods import HAS_TRITON

MILLION = 1 << 20
every_model = pytest.mark.parametrize("name", scaling.MODELS)


def test_the_transformer_has_as_many_parameters_as_swh_with_memory():
    for size in scaling.SIZES:
        own, transformer = (model(n, size).parameters for n in ("SWH with memory", "Transformer"))
        assert transformer == pytest.approx(own, rel=1e-3)


@every_model
def test_parameters_are_those_of_the_real_model_and_training_holds_16_bytes_of_each(name):
    counted = model(name, "tiny")
    real = SWHForCausalLM(counted.config)
    assert counted.parameters == sum(p.numel() for p in real.parameters())
    optimizer = torch.optim.AdamW(real.parameters())
    tokens = torch.randint(100, (1, 40))
    real(tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    moments = [x for each in optimizer.state.values() for x in each.values() if x.dim()]
    held = {
        "weights": sum(p.nbytes for p in real.parameters()),
        "gradients": sum(p.grad.nbytes for p in real.parameters()),
        "moments": sum(x.nbytes for x in moments),
    }
    paper = estimate(counted, Layout(), 64).memory
    assert {what: paper[what] for what in held} == held


@every_model
def test_bytes_of_a_state_are_those_of_the_real_cache(name):
    counted = model(name, "tiny")
    real = torch.nn.Module.to(SWHForCausalLM(counted.config), torch.bfloat16)
    with torch.no_grad():
        cache = real(torch.randint(100, (1, 100)), use_cache=True).past_key_values
    sizes = []
    for layer in cache.layers:
        map_state(layer.state, lambda x: sizes.append(x.nbytes) or x)
    assert counted.state_bytes(100) == sum(sizes)


@every_model
def test_operations_of_products_are_those_that_torch_counts(name):
    """Forward and backward, exactly. The rest is the operators', of which torch's counter knows
    nothing: their mixers count them, attention by the pairs of a query and an earlier key."""
    counted, tokens = model(name, "tiny"), 1024
    real = SWHForCausalLM(counted.config)
    ids = torch.randint(100, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        real(ids, labels=ids, use_cache=False).loss.backward()
    totals = counter.get_flop_counts()["Global"]
    products = sum(n for what, n in totals.items() if str(what) in ("aten.mm", "aten.addmm"))
    maps = [part.weight for part in real.modules() if isinstance(part, torch.nn.Linear)]
    assert products == 3 * 2 * tokens * sum(weight.numel() for weight in maps)
    near, far = (counted.flops(n) - products / tokens for n in (tokens, 64 * tokens))
    if name == "Transformer":
        width, layers = counted.config.hidden_size, counted.config.num_hidden_layers
        assert near == 3 * layers * 2 * width * (tokens + 1)
        assert far == 3 * layers * 2 * width * (64 * tokens + 1)
    else:
        assert 0 < near < 0.3 * products / tokens
        assert far == pytest.approx(near, rel=0.1)  # the first chunk sees fewer keys


@every_model
def test_what_a_layer_keeps_is_what_autograd_saves(name, monkeypatch):
    """In float32, where every row has 4 bytes, and the copies that autocast makes are not counted:
    on a GPU there is one for several maps. There the memory's keys are kept before they are
    normalised too, which the one pass on a CPU computes again."""
    monkeypatch.setattr(lagged_units, "_compiled", lambda *_: False)
    config = SWHConfig(**model(name, "tiny").config.recorded() | {"num_attention_heads": 16})
    layer = SWHLayer(config)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def saved(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def record(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        x = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
        with saved_tensors_hooks(record, lambda x: x):
            y, _ = layer(x)
        assert y.requires_grad
        return sum(sizes.values())

    between, inside, wide = scaling.KEPT[config.mixer]
    counted = (between + inside) * config.hidden_size + wide * config.intermediate_size
    measured = (saved(1024) - saved(512)) / 512 / 4
    assert counted == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("size", scaling.SIZES)
@pytest.mark.parametrize("name", ["SWH", "SWH with memory"])
def test_what_a_layer_moves_is_what_the_roofline_counts(name, size):
    config, rows = model(name, size).config, 4 * 4096
    works = gpu_roofline.layer(config, 4, 4096)
    weights = 3 * 2 * sum(k * n for k, n in layer_products(config))
    moved = (sum(work.read + work.written for work in works) - weights) / rows / 2
    narrow, wide = scaling.MOVED[config.mixer]
    assert narrow * config.hidden_size + wide * config.intermediate_size == pytest.approx(
        moved, rel=0.03
    )


@pytest.mark.parametrize("name", ["SWH", "SWH with memory"])
def test_a_span_hands_over_its_state_and_the_memorys_matrix(name):
    counted = model(name, "1.3b")
    (layer, *_), layers = counted.network.model.layers, counted.config.num_hidden_layers
    state = counted.state_bytes(MILLION) / layers - 8  # the position is known to all
    memory = getattr(layer.mixer, "memory_heads", None)
    size = counted.config.hidden_size
    matrix = 4 * size * size // memory if memory else 0
    assert scaling.span_bytes(counted.config) == state + matrix


def test_a_row_costs_the_same_exchange_at_any_length_and_a_transformers_grows_with_it():
    layout = Layout(context=8)
    for name, times in (("SWH", 1), ("SWH with memory", 1), ("Transformer", 16)):
        short, long = (
            estimate(model(name, "7b"), layout, n, rows=1).traffic["context"]
            for n in (MILLION, 16 * MILLION)
        )
        assert long == times * short


def test_gathering_and_reducing_of_weights_are_counted_by_hand():
    """4 GPUs hold a quarter each: 3 quarters arrive, in 2 bytes twice and in 4 bytes once."""
    counted = model("SWH", "tiny")
    found = estimate(counted, Layout(shards=4), 64)
    assert found.traffic["weights"] == 2 * 2 * 0.75 * counted.parameters
    assert found.traffic["gradients"] == 4 * 0.75 * counted.parameters
    assert found.traffic["replicas"] == found.traffic["context"] == 0
    assert not any(estimate(counted, Layout(), 64).traffic.values())
    # 2 machines with a copy each: every GPU reduces an eighth with one other, there and back
    hybrid = estimate(counted, Layout(replicas=2, shards=8), 64)
    assert hybrid.traffic["replicas"] == 2 * 4 * counted.parameters / 8 / 2


def test_a_collective_over_machines_is_as_slow_as_their_ports():
    received, ports = 63e9, 8 * scaling.INFINIBAND
    assert scaling._wire(received, 8) == received / scaling.NVLINK
    # of 64e9 bytes in all, a machine of 8 lacks 7/8, which its 8 ports carry
    assert scaling._wire(received, 64) == pytest.approx(max(received / 450e9, 56e9 / ports))


def test_more_gpus_need_no_more_memory_each_and_bring_no_less_speed():
    for name in scaling.MODELS:
        found = [fit(model(name, "1.3b"), n, 8192) for n in (8, 64, 512)]
        speeds = [each.tokens_per_second for each in found]
        assert speeds == sorted(speeds)
        memory = [each.memory["weights"] for each in found]
        assert memory == sorted(memory, reverse=True)
        assert all(each.layout.gpus == n for each, n in zip(found, (8, 64, 512), strict=True))


def test_the_least_context_parallelism_that_fits_is_taken():
    counted = model("SWH with memory", "7b")
    found = fit(counted, 64, MILLION)
    assert found.fits
    assert found.layout.context > 1
    half = Layout(1, 2 * found.layout.shards, found.layout.context // 2)
    assert not estimate(counted, half, MILLION, keep=False).fits


def test_what_does_not_fit_names_what_is_missing_and_what_to_do():
    with pytest.raises(ResourceError, match=r"do not fit 1 GPUs .*GB on each.*use more GPUs"):
        fit(model("SWH", "7b"), 1, 8192)
    with pytest.raises(UserError, match=r"unknown size '1\.3B': did you mean '1\.3b'"):
        model("SWH", "1.3B")
    with pytest.raises(UserError, match="use whole numbers above 0"):
        estimate(model("SWH", "tiny"), Layout(), 0)


def test_the_command_shows_every_row_and_draws(tmp_path, capsys):
    words = ["scaling", "--size", "125m", "--gpus", "1", "--context", "8192"]
    assert main([*words, "--context", "16777216", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["context"], row["fits"]) for row in rows] == [(8192, True)] * 3 + [
        (1 << 24, False)
    ] * 3
    assert main([*words, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "models" in shown
    assert "one step, counted; 40% of" in shown
    assert (tmp_path / "context.png").stat().st_size > 10_000
