"""Bad inputs are refused in one line before any work; good ones become positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_window.hf import SWHForCausalLM
from spectral_window.hf.inputs import next_start, resolve_documents
from tests.hf.small import small_model, tokens

ids = tokens(2, 6)
ones = torch.ones(2, 6, dtype=torch.long)


def _at(x: Tensor, value: int) -> Tensor:
    x = x.clone()
    x[1, 3] = value
    return x


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"input_ids": _at(ids, 61)}, r"input_ids\[1, 3\] is 61 .* use 0 to 60"),
        ({"input_ids": _at(ids, -1)}, r"input_ids\[1, 3\] is -1"),
        ({"input_ids": _at(ids, 2**40)}, r"input_ids\[1, 3\] is 1099511627776"),
        ({"input_ids": ids.float()}, r"input_ids are torch.float32"),
        ({"input_ids": ids[0]}, r"input_ids have shape \[6\]"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, "either input_ids or inputs_embeds"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 31)},
            r"expected \[batch, time, 32\]",
        ),
        ({"labels": _at(ids, 61)}, r"labels\[1, 3\] is 61"),
        ({"labels": _at(ids, -5)}, r"labels\[1, 3\] is -5"),
        ({"labels": ids[:, :5]}, r"labels have shape \[2, 5\] .* expected \[2, 6\]"),
        ({"shift_labels": ids.float()}, "shift_labels are torch.float32"),
        ({"attention_mask": ones.to(torch.complex64)}, "attention_mask is torch.complex64"),
        ({"attention_mask": ones.tolist()}, "attention_mask is list"),
        ({"attention_mask": ones[:, :5]}, r"shape \[2, 5\] .* expected \[2, 6\]"),
        ({"attention_mask": ones[:1]}, r"shape \[1, 6\] .* expected \[2, 6\]"),
        ({"attention_mask": ones[:, None, None]}, r"shape \[2, 1, 1, 6\]"),
        ({"attention_mask": ones[:, None]}, r"shape \[2, 1, 6\]"),
        ({"attention_mask": 2 * ones}, "other numbers than 0 and 1"),
        ({"position_ids": ones.float()}, "position_ids are torch.float32"),
        ({"position_ids": ones[:, :5]}, r"position_ids have shape \[2, 5\]"),
        ({"position_ids": ones[0]}, r"position_ids have shape \[6\]"),
        ({"position_ids": torch.arange(6)[None] + 1}, r"position_ids\[0, 0\] is 1 .* expected 0"),
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6]])}, r"\[0, 3\] is 4 .* expected 3"),
        ({"cu_seqlens": torch.tensor([0, 3, 12])}, "from one row into the next"),
        ({"past_key_values": ((ids, ids),)}, r"past_key_values is a tuple"),
    ],
)
def test_a_bad_input_is_refused_in_one_line(says: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_model()(**{"input_ids": ids, **says})
    assert "\n" not in str(caught.value)


def test_int32_tokens_are_fine(model: SWHForCausalLM) -> None:
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_a_mask_of_the_new_tokens_alone_does_not_fit_a_cache(model: SWHForCausalLM) -> None:
    cache = model(ids).past_key_values
    with pytest.raises(
        ValueError, match=r"expected \[2, 12\] \(6 already in the cache and 6 new\)"
    ):
        model(ids, attention_mask=ones, past_key_values=cache)


def _resolve(mask: Any = None, position_ids: Any = None, past: int = 0, start: Any = None) -> Any:
    given = [None if t is None else torch.tensor(t) for t in (mask, position_ids, start)]
    rows, time = next((len(t), len(t[0])) for t in (position_ids, mask) if t is not None)
    x = torch.empty(rows, time - (past if position_ids is None else 0), 1)
    found = resolve_documents(given[0], given[1], tokens=x, past=past, start=given[2])
    following = next_start(found, given[2], past, x.shape[1])
    positions = None if found is None else found.positions
    return [None if t is None else t.tolist() for t in (positions, following)]


def test_positions_of_left_padding_interior_padding_and_packing() -> None:
    assert _resolve([[0, 0, 1, 1]]) == [[[-1, -1, 0, 1]], [2]]
    assert _resolve([[1, 0, 1, 0]]) == [[[0, -1, 1, -1]], [2]]
    assert _resolve([[0, 0, 0, 0]]) == [[[-1, -1, -1, -1]], [0]]
    assert _resolve(position_ids=[[0, 1, 0, 1]]) == [[[0, 1, 0, 1]], [2]]
    assert _resolve([[0, 1, 1, 1]], [[7, 0, 1, 0]]) == [[[-1, 0, 1, 0]], [1]]


def test_positions_after_a_cache() -> None:
    # all new tokens are text: they simply go on, wherever that is
    assert _resolve([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], past=4, start=[2, 4]) == [None, [3, 5]]
    assert _resolve([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[2], [4]], past=4, start=[2, 4])[0] is None
    assert _resolve([[1, 1, 1, 1, 1]], past=4) == [None, None]
    # padding among the new tokens, and a new document
    assert _resolve([[1, 1, 0, 1, 1]], past=2) == [[[-1, 2, 3]], [4]]
    assert _resolve(position_ids=[[0, 1]], past=4) == [[[0, 1]], [2]]


def test_beside_a_mask_with_zeros_position_ids_only_tell_where_documents_begin() -> None:
    assert _resolve([[0, 0, 1, 1]], [[0, 1, 2, 3]]) == [[[-1, -1, 0, 1]], [2]]
    assert _resolve([[0, 0, 1, 1]], [[1, 1, 0, 1]]) == [[[-1, -1, 0, 1]], [2]]
    assert _resolve([[1, 0, 1, 0, 1, 1]], [[0, 1, 2, 3, 0, 1]]) == [[[0, -1, 1, -1, 0, 1]], [2]]
    # a token that generate() masked because it is the pad token, its position counted all the same
    assert _resolve([[1, 0, 1, 1]], [[9, 10]], past=2, start=[1]) == [None, [3]]


def test_positions_that_contradict_the_cache_are_refused() -> None:
    with pytest.raises(ValueError, match=r"position_ids\[0, 0\] is 4 .* expected 2"):
        _resolve(position_ids=[[4, 5]], past=4, start=[2])
