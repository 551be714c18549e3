"""In every layout of rows each document gives the numbers it gives alone (Hypothesis)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_window.hf import SWHConfig, SWHForCausalLM
from tests.hf.small import MIXERS, VOCAB, error, small_config, small_model

PAD, GO_ON, BEGIN = 0, 1, 2


@cache
def _model(mixer: str, window: int, branches: tuple[str, ...]) -> SWHForCausalLM:
    return small_model(mixer=mixer, window=window, branches=branches)


BRANCHES = [("spectral", "window"), ("spectral",), ("window",)]
# the memory reads and stores what the window does
PARTS = [(m, b) for m in MIXERS for b in BRANCHES if m != "memory" or "window" in b]
models = st.builds(
    lambda parts, window: _model(parts[0], window, parts[1]),
    st.sampled_from(PARTS),
    st.sampled_from([1, 2, 3, 5, 8]),
)


@st.composite
def layouts(draw: st.DrawFn) -> list[list[int]]:
    """Rows of PAD, GO_ON and BEGIN, one for every token; runs rather than noise."""
    rows, time = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    kinds = st.sampled_from([PAD, BEGIN, GO_ON, GO_ON])
    runs = st.lists(st.tuples(kinds, st.integers(1, 7)), min_size=1, max_size=8)
    layout = []
    for _ in range(rows):
        row: list[int] = []
        for kind, length in draw(runs):
            row += [kind] + [GO_ON if kind == BEGIN else kind] * (length - 1)
        layout.append((row + [GO_ON] * time)[:time])
    return layout


def _documents(row: list[int]) -> list[list[int]]:
    """The columns of every document of a row."""
    documents: list[list[int]] = []
    for column, kind in enumerate(row):
        if kind == PAD:
            continue
        if kind == BEGIN or not documents:
            documents.append([])
        documents[-1].append(column)
    return documents


@torch.no_grad()
@given(models, layouts(), st.data(), st.integers(0, 2**32))
def test_padded_packed_and_split_documents_are_each_alone(
    model: SWHForCausalLM, layout: list[list[int]], data: Any, seed: int
) -> None:
    rows, time = len(layout), len(layout[0])
    x = torch.randint(0, VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor(layout).ne(PAD).long()
    position_ids = torch.zeros_like(x)
    for row, kinds in enumerate(layout):
        for document in _documents(kinds):
            position_ids[row, document] = torch.arange(len(document))
    cuts = sorted(data.draw(st.sets(st.integers(1, time), max_size=4), label="cuts"))
    logits: list[Tensor] = []
    state = None
    for begin, end in zip([0, *cuts], [*cuts, time], strict=True):
        out = model(
            x[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=position_ids[:, begin:end],
            past_key_values=state,
        )
        state = out.past_key_values
        logits.append(out.logits)
    got = torch.cat(logits, 1)
    assert got.isfinite().all()
    for row, kinds in enumerate(layout):
        for document in _documents(kinds):
            alone = model(x[row : row + 1, document], use_cache=False).logits[0]
            assert error(got[row, document], alone) <= 5e-6


configs = st.builds(
    lambda parts, **fields: small_config(mixer=parts[0], branches=parts[1], **fields),
    st.sampled_from(PARTS),
    hidden_size=st.sampled_from([8, 24, 64]),
    num_attention_heads=st.sampled_from([1, 2, 4]),
    num_hidden_layers=st.integers(1, 3),
    window=st.integers(1, 2**31 - 1),
    intermediate_size=st.none() | st.integers(1, 99),
    mlp=st.sampled_from(["swiglu", "gelu"]),
    rope_theta=st.floats(1, 1e9),
    rms_norm_eps=st.floats(1e-12, 1),
    initializer_range=st.none() | st.floats(0, 10),
    tie_word_embeddings=st.booleans(),
    eos_token_id=st.none() | st.integers(0, VOCAB - 1) | st.lists(st.integers(0, VOCAB - 1)),
)


@given(configs, st.booleans())
def test_a_config_is_the_same_after_json(config: SWHConfig, short: bool) -> None:
    again = SWHConfig(**json.loads(config.to_json_string(use_diff=short)))
    assert again.to_dict() == config.to_dict()
