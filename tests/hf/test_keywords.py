"""Unknown keywords are errors; those of collators, trainers and adapters are obeyed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.utils.generic import TransformersKwargs

from spectral_window.hf import SWHForCausalLM, SWHForSequenceClassification, SWHModel
from spectral_window.hf.keywords import ACCEPTED
from tests.hf.small import error, small_config, small_model, tokens

ids = tokens(1, 20)
CUTS = (0, 7, 8, 20)  # three documents


def _seq_idx(batch: int = 1) -> Tensor:
    number = torch.arange(3).repeat_interleave(torch.tensor(CUTS).diff())
    return number[None].expand(batch, -1)


def _alone(model: SWHForCausalLM, x: Tensor) -> Tensor:
    parts = [model(x[:, a:b]).logits for a, b in pairwise(CUTS)]
    return torch.cat(parts, 1)


HEADS: dict[str, Callable[[], Any]] = {
    "base": lambda: SWHModel(small_config()),
    "language model": lambda: small_model(),
    "classifier": lambda: SWHForSequenceClassification(small_config()),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("atention_mask", "did you mean 'attention_mask'"),
        ("past_key_value", "did you mean 'past_key_values'"),
        ("cache_params", "past_key_values"),
        ("document_id", "did you mean 'document_ids'"),
        ("sequence_idx", "did you mean 'seq_idx'"),
        ("temperature", "choose one of"),
    ],
)
def test_an_unknown_keyword_is_refused_and_names_the_nearest(
    head: str, wrong: str, hint: str
) -> None:
    for value in (ids, None):
        with pytest.raises(ValueError, match=f"unknown argument '{wrong}': .*{hint}") as caught:
            HEADS[head]()(ids, **{wrong: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", ["language model", "classifier"])
def test_misspelt_labels_are_refused(head: str) -> None:
    with pytest.raises(ValueError, match="unknown argument 'lables': did you mean 'labels'"):
        HEADS[head]()(ids, lables=ids)


def test_every_keyword_transformers_declares_is_known() -> None:
    """A new version that sends more must be looked at, not swallowed."""
    signature = {"position_ids", "num_items_in_batch"}
    assert set(TransformersKwargs.__annotations__) <= ACCEPTED | signature


@pytest.mark.parametrize("head", HEADS)
def test_what_asks_for_nothing_else_changes_nothing(head: str) -> None:
    model = HEADS[head]().eval()
    says: dict[str, Any] = {
        "output_attentions": False,
        "output_hidden_states": False,
        "output_router_logits": None,
        "is_causal": True,
        "token_type_ids": torch.zeros_like(ids),
        "cache_position": torch.arange(20),
        "seq_idx": None,
        "cu_seq_lens_q": None,
        "max_length_q": None,
        "return_dict": True,
    }
    assert torch.equal(model(ids, **says)[0], model(ids)[0])


@torch.no_grad()
@pytest.mark.parametrize("position_ids", [False, True])
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_a_flattened_batch_is_each_document_alone(
    position_ids: bool, bounds: bool, seq_idx: bool, model: SWHForCausalLM
) -> None:
    if not (position_ids or bounds or seq_idx):
        return
    collate = DataCollatorWithFlattening(
        return_position_ids=position_ids, return_flash_attn_kwargs=bounds, return_seq_idx=seq_idx
    )
    batch = collate([{"input_ids": ids[0, a:b].tolist()} for a, b in pairwise(CUTS)])
    assert error(model(**batch).logits, _alone(model, ids)) <= 5e-6


@torch.no_grad()
def test_documents_of_each_row_and_padding_between_them(model: SWHForCausalLM) -> None:
    x = tokens(2, 20)
    want = _alone(model, x)
    for name in ("seq_idx", "document_ids"):
        for number in (_seq_idx(), _seq_idx(2), 7 - _seq_idx(2).int()):
            assert error(model(x, **{name: number}).logits, want) <= 5e-6
    holes = torch.full((2, 26), -1)
    text = torch.tensor([i not in (0, 4, 9, 10, 11, 25) for i in range(26)])
    holes[:, text] = _seq_idx(2)
    padded = torch.zeros(2, 26, dtype=torch.int64)
    padded[:, text] = x
    assert error(model(padded, seq_idx=holes).logits[:, text], want) <= 5e-6
    mask = text.long().expand(2, -1)
    filled = holes.cummax(1).values.clamp(min=0)  # the mask alone says where the holes are
    got = model(padded, attention_mask=mask, document_ids=filled)
    assert error(got.logits[:, text], want) <= 5e-6


@torch.no_grad()
def test_bounds_over_several_rows(model: SWHForCausalLM) -> None:
    x = tokens(2, 20)
    bounds = torch.tensor([*CUTS[:-1], *(20 + cut for cut in CUTS)], dtype=torch.int32)
    got = model(x, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=99).logits
    assert error(got, _alone(model, x)) <= 5e-6
    assert torch.equal(model(x, cu_seqlens=bounds).logits, got)


@torch.no_grad()
def test_a_continued_document_of_a_packed_row_is_the_last_one(model: SWHForCausalLM) -> None:
    cache = model(ids, seq_idx=_seq_idx()).past_key_values
    more = tokens(1, 5, seed=3)
    whole = model(torch.cat([ids[:, CUTS[2] :], more], 1)).logits[:, -5:]
    assert error(model(more, past_key_values=cache).logits, whole) <= 5e-6


bounds = torch.tensor(CUTS)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"seq_idx": _seq_idx(), "position_ids": torch.arange(20)[None]}, r"contradict .*\[0, 7\]"),
        (
            {"seq_idx": 0 * _seq_idx(), "position_ids": torch.arange(20)[None] % 10},
            r"contradict .*\[0, 10\]",
        ),
        ({"seq_idx": _seq_idx(), "cu_seq_lens_q": torch.tensor([0, 3, 20])}, "different tokens"),
        ({"seq_idx": _seq_idx(), "document_ids": 0 * _seq_idx()}, "different tokens"),
        ({"cu_seq_lens_q": bounds, "cu_seq_lens_k": torch.tensor([0, 20])}, "different tokens"),
        ({"seq_idx": _seq_idx() % 2}, "comes back to an earlier document"),
        ({"seq_idx": _seq_idx().float()}, "torch.float32"),
        ({"seq_idx": _seq_idx()[:, :3]}, r"shape \[1, 3\] .* expected \[1, 20\]"),
        ({"document_ids": [[0] * 20]}, "is a list"),
        ({"cu_seq_lens_q": bounds[1:]}, "rise from 0 to 20"),
        ({"cu_seq_lens_q": bounds[:-1]}, "rise from 0 to 20"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 8, 20])}, "rise from 0 to 20"),
        ({"cu_seq_lens_q": bounds.float()}, "torch.float32"),
        ({"cu_seq_lens_q": bounds[None]}, r"expected \[documents \+ 1\]"),
        ({"cu_seq_lens_q": bounds, "max_length_q": 11}, "has 12 tokens"),
        ({"max_length_k": 20}, "without cu_seq_lens_q"),
        ({"output_attentions": True}, "no attention weights are made"),
        ({"output_router_logits": True}, "no experts"),
        ({"is_causal": False}, "every layer is causal"),
        ({"token_type_ids": torch.ones_like(ids)}, "one type of token"),
        ({"cache_position": torch.arange(20) + 1}, "the new tokens are at 0 to 19"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"logits_to_keep": True}, "logits_to_keep is True"),
        ({"logits_to_keep": 1.5}, "logits_to_keep is 1.5"),
        ({"logits_to_keep": torch.tensor([0.5])}, "logits_to_keep are torch.float32"),
        ({"attention_mask": torch.full((1, 20), 0.5)}, "other numbers than 0 and 1"),
        ({"attention_mask": torch.zeros(1, 20) - torch.inf}, "other numbers than 0 and 1"),
    ],
)
def test_what_contradicts_or_cannot_be_done_is_refused_in_one_line(
    says: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_model()(ids, **says)
    assert "\n" not in str(caught.value)


def test_bounds_that_join_two_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="from one row into the next"):
        small_model()(tokens(2, 10), cu_seq_lens_q=torch.tensor(CUTS))


def test_documents_beside_a_cache_are_refused(model: SWHForCausalLM) -> None:
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="seq_idx beside a cache of 20 tokens"):
        model(ids, seq_idx=_seq_idx(), past_key_values=cache)


def test_attention_weights_asked_for_by_the_config_are_refused() -> None:
    config = small_config(output_attentions=True)
    with pytest.raises(ValueError, match="no attention weights are made"):
        SWHForCausalLM(config)(ids)


def test_a_config_without_return_dict_gives_tuples(model: SWHForCausalLM) -> None:
    want = model(ids).logits
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], want)
    assert isinstance(model(ids), tuple)
    assert torch.equal(model(ids, return_dict=True).logits, want)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64],
)
def test_ids_and_labels_of_any_integer_type_are_right(dtype: torch.dtype) -> None:
    model = small_model()
    got, want = model(ids.to(dtype), labels=ids.to(dtype)), model(ids, labels=ids)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_a_mask_of_ones_and_zeros_may_be_floats(model: SWHForCausalLM) -> None:
    mask = torch.ones(1, 20)
    assert torch.equal(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[:, :3] = 0
    want = model(ids, attention_mask=mask.long()).logits
    assert torch.equal(model(ids, attention_mask=mask).logits, want)
