"""Packed and padded rows are analysed once per forward pass, without waiting for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_window.hf import SWHForCausalLM
from spectral_window.nn.mixers import set_methods
from spectral_window.ops import METHODS, documents
from tests.hf.small import error, small_config, small_model, tokens

VARIANTS: list[dict[str, Any]] = [
    {"mixer": "spectral_window"},
    {"mixer": "attention"},
    {"mixer": "memory"},
    {"kernel": "free_form"},
    {"kernel": "multi_mode", "fusion": "gated"},
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
PACKED = torch.tensor([[*range(11), *range(19)], [*range(25), *range(5)]])
PADDED = torch.tensor([[0] * 5 + [1] * 25, [1] * 20 + [0] * 3 + [1] * 7])


def by_plain_torch(model: SWHForCausalLM) -> SWHForCausalLM:
    """The model computed as where there are no kernels of our own."""
    names = {"spectral": "chunked", "fir": "shifts", "window": "chunked", "delta": "chunked"}
    set_methods(model, **{op: name for op, name in names.items() if op in METHODS})
    return model


@every_variant
@pytest.mark.parametrize("plain", [False, True], ids=["here", "plain torch"])
def test_rows_are_read_once_for_all_layers(
    variant: dict[str, Any], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(num_hidden_layers=4, **variant).train()
    if plain:
        by_plain_torch(model)
    read, calls = documents.read_tokens, []
    monkeypatch.setattr(documents, "read_tokens", lambda p: calls.append(p.shape) or read(p))
    ids = tokens(2, 30)
    for options in ({"position_ids": PACKED}, {"attention_mask": PADDED}):
        calls.clear()
        model(ids, labels=ids, **options).loss.backward()
        assert len(calls) <= 1, calls


@every_variant
def test_a_packed_step_of_training_waits_for_no_device(variant: dict[str, Any]) -> None:
    """On the meta device no value can be read: reading one raises."""
    with torch.device("meta"):
        model = SWHForCausalLM(small_config(num_hidden_layers=2, **variant)).train()
    ids = tokens(2, 30).to("meta")
    for options in (
        {"position_ids": PACKED},
        {"attention_mask": PADDED},
        {"seq_idx": torch.tensor([[0] * 11 + [1] * 19, [0] * 25 + [1] * 5], dtype=torch.int32)},
        {},
    ):
        out = model(ids, labels=ids, use_cache=False, **options)
        out.loss.backward()
        assert out.logits.shape == (2, 30, model.config.vocab_size)
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("forbidden", ["nonzero", "_local_scalar_dense", "unique"])
def test_the_guard_would_see_a_layer_that_looks(forbidden: str) -> None:
    looks = {
        "nonzero": lambda x: x.nonzero(),
        "_local_scalar_dense": lambda x: x.sum().item(),
        "unique": lambda x: x.unique(),
    }
    with pytest.raises((RuntimeError, NotImplementedError)):
        looks[forbidden](torch.ones(3, device="meta"))


@every_variant
@pytest.mark.parametrize("options", [{"position_ids": PACKED}, {"attention_mask": PADDED}],
                         ids=["packed", "padded"])  # fmt: skip
def test_packed_and_padded_rows_compile_to_one_graph(
    variant: dict[str, Any], options: dict[str, Tensor]
) -> None:
    torch.compiler.reset()
    model, ids = small_model(**variant), tokens(2, 30)
    run = torch.compile(
        lambda ids, **rows: model(ids, use_cache=False, **rows).logits,
        fullgraph=True,
        backend="aot_eager",
        dynamic=False,
    )
    with torch.no_grad():
        got, want = run(ids, **options), model(ids, use_cache=False, **options).logits
    text = PADDED.bool() if "attention_mask" in options else torch.ones_like(PADDED).bool()
    assert error(got[text], want[text]) <= 5e-6


def test_documents_follow_a_layer_to_its_device_by_accelerates_hand() -> None:
    """A model spread over devices has its layers' inputs moved; the CPU's copy stays known."""
    from accelerate.utils import send_to_device

    given = documents.Documents(PACKED.clone(), checked=True)
    there = send_to_device(given, "meta")
    assert there.positions.device.type == "meta"
    assert there.checked
    assert torch.equal(there.tokens.position, given.tokens.position)
    assert send_to_device(given, "cpu") is given
