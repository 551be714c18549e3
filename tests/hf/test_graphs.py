"""A model recorded as a graph: padding, packed documents, lengths known at run time only."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from tests.hf.small import error, small_model, tokens


class Logits(torch.nn.Module):
    """A model as a function of tensors alone, by the name of the second."""

    def __init__(self, model: torch.nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids: Tensor, told: Tensor) -> Tensor:
        return self.model(ids, **{self.name: told}, use_cache=False).logits


def padded(time: int) -> Tensor:
    mask = torch.ones(2, time, dtype=torch.int64)
    mask[1, : time // 3] = 0
    return mask


def packed(time: int) -> Tensor:
    cuts = (time // 2, time // 3)
    return torch.stack([torch.cat((torch.arange(c), torch.arange(time - c))) for c in cuts])


TOLD = {"attention_mask": padded, "position_ids": packed}


@pytest.mark.parametrize("name", TOLD)
def test_torch_compile_takes_padding_and_packing_in_one_graph(name):
    model = Logits(small_model(), name)
    compiled = torch.compile(model, fullgraph=True)
    ids, told = tokens(2, 41), TOLD[name](41)
    with torch.no_grad():
        assert error(compiled(ids, told), model(ids, told)) <= 2e-6


@pytest.mark.parametrize("name", TOLD)
def test_an_exported_model_takes_any_length_and_needs_no_library_of_ours(name):
    model = Logits(small_model(), name)
    time = Dim("time", min=3)
    with torch.no_grad():
        program = export(
            model,
            (tokens(2, 41), TOLD[name](41)),
            dynamic_shapes=({1: time}, {1: time}),
            # that chunks of W fill whole tiles holds for any length; the exporter need not prove it
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        assert not [n for n in program.graph.nodes if "spectral_window" in str(n.target)]
        for length in (41, 7, 150):
            ids, told = tokens(2, length), TOLD[name](length)
            assert error(program.module()(ids, told), model(ids, told)) <= 2e-6


def test_a_traced_model_gives_the_same_numbers():
    model = Logits(small_model(), "attention_mask")
    ids, told = tokens(2, 41), padded(41)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a trace fixes
        traced = torch.jit.trace(model, (ids, told))
        assert error(traced(ids, told), model(ids, told)) <= 2e-6
