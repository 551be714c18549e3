"""The Transformer baseline, with and without shifted keys."""

from __future__ import annotations

import torch

from spectral_window.nn.attention import AttentionMixer
from tests.hf.small import error, small_config, small_model, tokens

DIM, HEADS = 16, 4


def mixer(**options) -> AttentionMixer:
    torch.manual_seed(0)
    return AttentionMixer(hidden_size=DIM, num_heads=HEADS, **options).double()


def test_shifted_keys_start_as_the_token_s_own_in_half_of_the_heads_and_as_the_one_before():
    plain, shifted = mixer(), mixer(shifted_keys=True)
    shifted.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    own = torch.nn.functional.linear(x, plain.k_proj.weight)
    key = plain._split(torch.cat((own[..., : DIM // 2], before(own)[..., DIM // 2 :]), -1))
    turned = plain.init_state(1, dtype=x.dtype, device="cpu")
    assert turned.last is None
    _, state = shifted(x)
    assert error(state.key.norm(dim=-1), key.norm(dim=-1)) <= 1e-12  # a rotation keeps lengths
    assert torch.equal(state.key[:, :, : HEADS // 2], plain(x)[1].key[:, :, : HEADS // 2])
    assert torch.equal(state.last, own[:, -1:])


def before(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def test_without_the_option_nothing_is_added_to_the_model_or_its_files():
    plain, shifted = (
        small_config(mixer="attention"),
        small_model(mixer="attention", shifted_keys=True),
    )
    assert "shifted_keys" not in small_config().to_dict()
    names = set(dict(small_model(mixer="attention").named_parameters()))
    more = set(dict(shifted.named_parameters())) - names
    assert more == {f"model.layers.{i}.mixer.shift.shift" for i in range(plain.num_hidden_layers)}


def test_a_shifted_key_does_not_reach_into_another_document():
    layer = mixer(shifted_keys=True)
    x = torch.randn(1, 24, DIM, dtype=torch.float64)
    found, _ = layer(x, torch.tensor([[-1, *range(9), -1, -1, *range(12)]]))
    for begin, end in ((1, 10), (12, 24)):
        alone, _ = layer(x[:, begin:end])
        assert error(found[:, begin:end], alone) <= 1e-12


def test_a_model_with_shifted_keys_generates_what_one_forward_says():
    model, ids = small_model(mixer="attention", shifted_keys=True), tokens(2, 30)
    with torch.no_grad():
        want = model(ids).logits
        first = model(ids[:, :13], use_cache=True)
        got = model(ids[:, 13:], past_key_values=first.past_key_values).logits
    assert error(got, want[:, 13:]) <= 5e-6
