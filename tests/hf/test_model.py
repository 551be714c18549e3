"""The model's numbers: padding, packing, batches, dtypes, loss, initialisation, compilation."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from spectral_window.hf import SWHConfig, SWHForCausalLM, SWHModel
from spectral_window.nn.layers import RMSNorm
from tests.hf.small import MIXERS, VOCAB, error, small_config, small_model, tokens


@pytest.fixture(scope="module")
def deep() -> SWHForCausalLM:
    """Twelve narrow layers, where small errors add up."""
    return small_model(num_hidden_layers=12, initializer_range=0.1)


# ---- what tokens a logit may depend on


@torch.no_grad()
def test_prefill_then_decode_gives_the_logits_of_one_forward(deep: SWHForCausalLM) -> None:
    x = tokens(2, 40)
    whole = deep(x, use_cache=False).logits
    out = deep(x[:, :23])
    logits = [out.logits]
    for t in range(23, 40):
        out = deep(x[:, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    assert error(torch.cat(logits, 1), whole) <= 5e-6


def _padded(x: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Row 0 whole; row 1 its first 13 tokens, and padding elsewhere. Returns ids and mask."""
    time = x.shape[1]
    columns = {
        "left": torch.arange(time) >= time - 13,
        "right": torch.arange(time) < 13,
        "interior": (torch.arange(time) < 4)
        | ((torch.arange(time) >= 10) & (torch.arange(time) < 19)),
    }[where]
    ids = x.clone()
    ids[1] = VOCAB - 1
    ids[1, columns] = x[1, :13]
    mask = torch.ones_like(x)
    mask[1] = columns.long()
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("where", ["left", "right", "interior"])
@pytest.mark.parametrize("depth", ["small", "deep"])
def test_padding_anywhere_changes_nothing(
    where: str, depth: str, model: SWHForCausalLM, deep: SWHForCausalLM
) -> None:
    model = deep if depth == "deep" else model
    x = tokens(2, 24)
    ids, mask = _padded(x, where)
    got = model(ids, attention_mask=mask).logits
    assert error(got[0], model(x[:1]).logits[0]) <= 5e-6
    assert error(got[1, mask[1] == 1], model(x[1:, :13]).logits[0]) <= 5e-6
    # HF's own position_ids for such a row, with pads at 0 or 1, say the same
    for pad in (0, 1):
        ids_of = (mask.cumsum(1) - 1).masked_fill(mask == 0, pad)
        assert torch.equal(model(ids, attention_mask=mask.bool(), position_ids=ids_of).logits, got)


@torch.no_grad()
def test_packed_documents_are_each_alone(model: SWHForCausalLM) -> None:
    x = tokens(2, 30)
    cuts = [[0, 7, 8, 30], [0, 16, 30, 30]]
    position_ids = torch.zeros_like(x)
    for row, (a, b, c, d) in enumerate(cuts):
        position_ids[row] = torch.cat(
            [torch.arange(b - a), torch.arange(c - b), torch.arange(d - c)]
        )
    got = model(x, position_ids=position_ids).logits
    for row, bounds in enumerate(cuts):
        for begin, end in pairwise(bounds):
            if begin < end:
                alone = model(x[row : row + 1, begin:end]).logits[0]
                assert error(got[row, begin:end], alone) <= 5e-6


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(deep: SWHForCausalLM) -> None:
    x = tokens(5, 33)
    together = deep(x).logits
    for row in range(5):
        alone = deep(x[row : row + 1]).logits[0]
        scale = alone.pow(2).mean().sqrt()
        assert float((together[row] - alone).abs().max() / scale) <= 1e-5


@torch.no_grad()
def test_positions_that_say_nothing_take_the_fast_path_bitwise(model: SWHForCausalLM) -> None:
    x = tokens(2, 17)
    plain = model(x).logits
    for says in (
        {"attention_mask": torch.ones(2, 17, dtype=torch.long)},
        {"attention_mask": torch.ones(2, 17, dtype=torch.bool)},
        {"position_ids": torch.arange(17)[None]},
        {"attention_mask": torch.ones_like(x), "position_ids": torch.arange(17).expand(2, 17)},
    ):
        assert torch.equal(model(x, **says).logits, plain)


@torch.no_grad()
def test_a_row_of_padding_alone_is_finite_and_leaves_the_others(model: SWHForCausalLM) -> None:
    x = tokens(2, 11)
    mask = torch.tensor([[1] * 11, [0] * 11])
    out = model(x, attention_mask=mask)
    assert out.logits.isfinite().all()
    assert error(out.logits[0], model(x[:1]).logits[0]) <= 5e-6
    # and it can begin later, from the same cache
    more = model(
        x,
        attention_mask=torch.cat([mask, torch.ones_like(mask)], 1),
        past_key_values=out.past_key_values,
    )
    assert error(more.logits[1], model(x[1:]).logits[0]) <= 5e-6


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (3, 0), (1, 1)])
def test_empty_inputs_give_empty_outputs(model: SWHForCausalLM, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no label is scored
        out = model(x, attention_mask=torch.ones_like(x), labels=x)
    assert out.logits.shape == (*shape, VOCAB)
    assert out.loss.item() == 0
    out.loss.backward()
    again = model(tokens(shape[0], 2), past_key_values=out.past_key_values)
    assert again.past_key_values.get_seq_length() == shape[1] + 2


# ---- loss


def test_the_loss_is_the_mean_over_next_tokens_and_shifted_labels_say_the_same() -> None:
    model, x = small_model(), tokens(3, 12)
    labels = x.clone()
    labels[0, 5:] = -100
    out = model(x, labels=labels)
    want = nn.functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    )
    assert torch.allclose(out.loss, want, rtol=1e-6)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    assert torch.equal(model(x, shift_labels=shifted).loss, out.loss)
    count = int((shifted != -100).sum())
    doubled = model(x, labels=labels, num_items_in_batch=torch.tensor(2 * count)).loss
    assert torch.allclose(2 * doubled, out.loss)


def test_labels_that_score_nothing_give_zero_and_no_gradient_never_nan() -> None:
    model, x = small_model(), tokens(2, 6)
    nothing = torch.full_like(x, -100)
    for says in (
        {"labels": nothing},
        {"shift_labels": nothing},
        {"labels": nothing, "num_items_in_batch": 0},
    ):
        model.zero_grad()
        with pytest.warns(UserWarning, match="no token is scored"):
            loss = model(x, **says).loss
        assert loss.item() == 0
        loss.backward()
        assert all(p.grad.abs().sum().item() == 0 for p in model.parameters() if p.grad is not None)


def test_logits_to_keep_are_the_last_ones() -> None:
    model, x = small_model(), tokens(2, 9)
    whole = model(x).logits
    assert error(model(x, logits_to_keep=3).logits, whole[:, -3:]) < 1e-6
    assert error(model(x, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]]) < 1e-6
    with pytest.raises(ValueError, match="the loss needs all logits"):
        model(x, labels=x, logits_to_keep=1)


def test_embeddings_may_be_given_and_hidden_states_asked_for(model: SWHForCausalLM) -> None:
    x = tokens(2, 9)
    out = model(inputs_embeds=model.get_input_embeddings()(x), output_hidden_states=True)
    assert torch.equal(out.logits, model(x).logits)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(x))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert isinstance(model(x, return_dict=False), tuple)


# ---- weights


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_is_the_same_model_bitwise(
    tied: bool, model: SWHForCausalLM, tmp_path: Any
) -> None:
    model = small_model(mixer=model.config.mixer, tie_word_embeddings=tied)
    x = tokens(2, 13)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is SWHForCausalLM
    assert torch.equal(again(x).logits, model(x).logits)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SWHModel
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)


def test_there_are_no_buffers_that_loading_could_leave_as_garbage() -> None:
    assert list(small_model().buffers()) == []


def _fp32_names(model: nn.Module) -> set[str]:
    return {
        name.split("mixer.")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32
    }


def test_half_precision_leaves_decay_and_frequency_in_fp32(tmp_path: Any) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    dynamics = {"kernel.decay", "kernel.frequency"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    built = AutoModelForCausalLM.from_config(small_config(), dtype=torch.bfloat16)
    cast = small_model().to(torch.bfloat16)
    half = small_model().half()
    for other in (loaded, built, cast, half):
        assert _fp32_names(other) == dynamics
    for name, p in model.named_parameters():
        if "kernel" in name:
            assert torch.equal(loaded.get_parameter(name), p)
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert _fp32_names(again) == dynamics
    assert again(tokens(1, 9)).logits.dtype == torch.bfloat16


BF16_BAR = 0.03  # relative rms of the logits; measured 0.013


@torch.no_grad()
def test_rounding_the_dynamics_to_bf16_would_be_seen(deep: SWHForCausalLM) -> None:
    """Deliberate bug: after a few hundred tokens a rounded frequency is out of phase (0.2)."""
    x = tokens(1, 512)
    slow, dynamics = copy.deepcopy(deep), {}
    for name, p in slow.named_parameters():
        if "kernel" in name:
            p.mul_(1e-3 if "decay" in name else 1)
            dynamics[name] = p.clone()
    want = slow(x).logits
    half = copy.deepcopy(slow).to(torch.bfloat16)
    assert error(half(x).logits, want) <= BF16_BAR
    for name, p in dynamics.items():
        half.get_parameter(name).copy_(p.bfloat16())
    assert error(half(x).logits, want) > BF16_BAR


@pytest.mark.parametrize("loaded", [False, True])
def test_weights_begin_as_the_paper_says(loaded: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = small_config(hidden_size=64, num_attention_heads=4, initializer_range=0.02)
    model = SWHForCausalLM(config)
    if loaded:  # every weight missing: initialised on the path of from_pretrained, through meta
        from safetensors.torch import save_file

        config.save_pretrained(tmp_path)
        save_file({"model.norm.weight": torch.full((64,), 3.0)}, tmp_path / "model.safetensors")
        model = SWHForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(model.model.norm.weight, torch.full((64,), 3.0))
    for name, part in model.named_modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            assert 0.018 < float(part.weight.detach().std()) < 0.022, name
        if isinstance(part, RMSNorm) and name != "model.norm":
            assert torch.equal(part.weight, torch.ones(64))
    first = model.model.layers[0].mixer
    assert first.conv_proj.bias.abs().sum().item() == 0
    both = torch.cat(
        [
            torch.cat([layer.mixer.kernel.decay, layer.mixer.kernel.frequency])
            for layer in model.model.layers
        ]
    )
    assert abs(float(both.detach().mean())) < 0.2
    assert 0.85 < float(both.detach().std()) < 1.15


def test_pytorchs_own_initialisation_on_request() -> None:
    torch.manual_seed(0)
    model = SWHForCausalLM(small_config(hidden_size=64, initializer_range=None))
    assert 0.95 < float(model.model.embed_tokens.weight.detach().std()) < 1.05
    weight = model.model.layers[0].mixer.conv_proj.weight.detach()
    assert float(weight.abs().max()) <= 64**-0.5
    assert 0.5 < float(weight.std()) * 64**0.5 * 3**0.5 < 1.5


def test_a_missing_kernel_is_drawn_anew_and_the_rest_is_kept(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = small_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mixer.kernel.decay"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = SWHForCausalLM.from_pretrained(tmp_path)
    fresh, old = (m.model.layers[1].mixer.kernel for m in (again, model))
    assert fresh.decay.isfinite().all()
    assert not torch.equal(fresh.decay, old.decay)
    assert torch.equal(fresh.frequency, old.frequency)
    assert torch.equal(
        again.model.layers[0].mixer.kernel.decay, model.model.layers[0].mixer.kernel.decay
    )


def test_embeddings_can_be_resized() -> None:
    model = small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)


# ---- cost


def test_a_model_counts_itself() -> None:
    model, tied = small_model(), small_model(tie_word_embeddings=True)
    table = VOCAB * 32
    assert model.count_parameters() == sum(p.numel() for p in model.parameters())
    assert model.count_parameters() - tied.count_parameters() == table
    assert model.count_parameters(embeddings=False) == model.count_parameters() - 2 * table
    assert tied.count_parameters(embeddings=False) == model.count_parameters(embeddings=False)
    assert model.model.count_parameters(embeddings=False) == model.count_parameters(
        embeddings=False
    )


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 7, 23])
def test_state_bytes_are_the_bytes_of_the_cache(model: SWHForCausalLM, time: int) -> None:
    cache = model(tokens(3, time)).past_key_values

    def size(state: Any) -> int:
        if state is None:
            return 0
        if isinstance(state, Tensor):
            return state.numel() * state.itemsize
        return sum(size(part) for part in state)

    assert sum(size(layer.state) for layer in cache.layers) == model.state_bytes(time, batch_size=3)


def test_only_attention_pays_more_for_longer_contexts() -> None:
    swh, full, memory = (small_model(mixer=mixer) for mixer in MIXERS)
    assert memory.state_bytes(10) == memory.state_bytes(10**6)
    assert memory.flops_per_token(10**6) < 1.01 * memory.flops_per_token(10**3)
    assert swh.state_bytes(10) == swh.state_bytes(10**6)
    assert full.state_bytes(2000) == 2 * full.state_bytes(1000)
    assert swh.flops_per_token(10**6) < 1.01 * swh.flops_per_token(10**3)
    assert full.flops_per_token(10**6) > 100 * full.flops_per_token(10**3)
    mlp_and_head = 2 * (2 * 3 * 32 * 85 + VOCAB * 32)
    mixers = sum(layer.mixer.flops_per_token(100) for layer in swh.model.layers)
    assert swh.flops_per_token(100) == mlp_and_head + mixers


# ---- training aids and compilation


def _grads(model: SWHForCausalLM, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, labels=x, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    model: SWHForCausalLM, reentrant: bool
) -> None:
    x = tokens(2, 17)
    model.train()
    want = _grads(model, x)
    assert len(want) == len(list(model.parameters()))
    # the newer name in newer transformers
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.model.layers[0].gradient_checkpointing
    got = _grads(model, x)
    for name, grad in want.items():
        assert error(got[name], grad) < 1e-6, name


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(deep: SWHForCausalLM) -> None:
    x = tokens(2, 33)
    with torch.autocast("cpu", torch.bfloat16):
        got = deep(x).logits
    assert error(got, deep(x).logits) < BF16_BAR


@pytest.mark.parametrize("mixer", MIXERS)
def test_torch_compile_has_no_graph_break_and_equals_eager(mixer: str) -> None:
    torch._dynamo.reset()
    model, x = small_model(mixer=mixer, num_hidden_layers=1), tokens(2, 19)
    # two layers and a new cache: whether there is a break needs no code generation
    deeper = small_model(mixer=mixer)
    traced = torch.compile(deeper, fullgraph=True, backend="eager")
    assert error(traced(x).logits, deeper(x).logits) <= 2e-6

    want = model(x, labels=x, use_cache=False)
    want_grad = _grads(model, x)
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(x, labels=x, use_cache=False)
    assert error(got.logits, want.logits) <= 2e-6
    assert torch.allclose(got.loss, want.loss, rtol=2e-6)
    got.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert error(p.grad, want_grad[name]) < 2e-5, name


@pytest.mark.parametrize("mixer", MIXERS)
def test_torch_compile_decodes_in_one_graph_for_all_later_tokens(mixer: str) -> None:
    torch._dynamo.reset()
    model, x = small_model(mixer=mixer, num_hidden_layers=1), tokens(2, 24)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        cache = model(x[:, :12]).past_key_values
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        logits = [compiled(x[:, t : t + 1], past_key_values=cache).logits for t in range(12, 24)]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert graphs <= 2  # one, and one more when dynamo learns that the length changes
        assert error(torch.cat(logits, 1), model(x).logits[:, 12:]) <= 5e-6


def test_a_config_of_another_class_is_refused() -> None:
    from transformers import LlamaConfig

    with pytest.raises(TypeError, match=r"LlamaConfig .* pass an SWHConfig"):
        SWHForCausalLM(LlamaConfig())  # type: ignore[arg-type]
    assert isinstance(SWHForCausalLM(small_config()).config, SWHConfig)
