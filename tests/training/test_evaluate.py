"""Held-out loss: every token weighs the same, and bits per byte count the text's own bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spectral_window.data.blocks import TokenStream
from spectral_window.errors import DivergedError, UserError
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.training.evaluate import evaluate, spread

VOCABULARY, LENGTH = 50, 8


@pytest.fixture(scope="module")
def model():
    config = SWHConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        window=3,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    return SWHForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stream():
    """61 tokens, so the last block of 8 is short; three documents; 200 bytes of text."""
    drawn = np.random.default_rng(0).integers(1, VOCABULARY, 61).astype(np.uint16)
    starts = np.array([0, 13, 40])
    drawn[starts] = 0
    return TokenStream(drawn, starts, 200)


def direct(model, stream, blocks):
    """Nats of each token of the given blocks, one block at a time, in float64."""
    nats = []
    for block in blocks:
        tokens = torch.tensor(stream.tokens[block * LENGTH : (block + 1) * LENGTH + 1].astype(int))
        positions, place = [], 0
        for index in range(len(tokens) - 1):
            place = 0 if block * LENGTH + index in stream.documents else place
            positions.append(place)
            place += 1
        with torch.no_grad():
            logits = model(tokens[None, :-1], position_ids=torch.tensor([positions])).logits[0]
        chosen = torch.log_softmax(logits.double(), -1).gather(1, tokens[1:, None])
        nats += (-chosen[:, 0]).tolist()
    return nats


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_loss_is_the_mean_over_all_tokens_whatever_the_batch(model, stream, batch):
    nats = direct(model, stream, range(8))
    scores = evaluate(model, stream, length=LENGTH, batch=batch)
    assert scores["tokens"] == len(nats) == 60
    assert scores["loss"] == pytest.approx(sum(nats) / 60, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bytes"] == 200
    assert scores["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 200, rel=1e-6)


def test_max_tokens_takes_whole_blocks_evenly_and_bytes_in_proportion(model, stream):
    scores = evaluate(model, stream, length=LENGTH, max_tokens=24)
    nats = direct(model, stream, [0, 2, 5])
    assert scores["tokens"] == 24
    assert scores["loss"] == pytest.approx(sum(nats) / 24, rel=1e-6)
    assert scores["bytes"] == round(200 * 24 / 60)
    whole = evaluate(model, stream, length=LENGTH)
    assert evaluate(model, stream, length=LENGTH, max_tokens=10**9) == whole


def test_spread_is_even_rising_and_never_more_than_there_are():
    assert spread(8, 3) == [0, 2, 5]
    assert spread(3, 8) == [0, 1, 2]
    for count in range(1, 40):
        for wanted in range(1, count + 1):
            chosen = spread(count, wanted)
            assert len(set(chosen)) == wanted
            assert chosen == sorted(chosen)
            assert chosen[-1] < count


class Rank:
    """One of `size` processes, without the others: its sums are handed out."""

    def __init__(self, rank, size):
        self.rank, self.size, self.sums = rank, size, ()

    def sum(self, *values, device="cpu"):
        self.sums = values
        return list(values)


def test_the_shares_of_the_processes_add_up_to_the_whole(model, stream):
    whole = evaluate(model, stream, length=LENGTH)
    ranks = [Rank(rank, 3) for rank in range(3)]  # 8 blocks do not divide by 3
    for rank in ranks:
        evaluate(model, stream, length=LENGTH, world=rank)
    nats, tokens = (sum(values) for values in zip(*(rank.sums for rank in ranks), strict=True))
    assert tokens == whole["tokens"]
    assert nats / tokens == pytest.approx(whole["loss"], rel=1e-6)


def test_it_moves_neither_the_mode_nor_the_random_state(model, stream):
    state = torch.get_rng_state()
    model.train()
    try:
        evaluate(model, stream, length=LENGTH)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_text_shorter_than_a_block_is_measured(model):
    short = TokenStream(np.array([0, 3, 4], dtype=np.uint16), np.array([0]), 5)
    assert evaluate(model, short, length=100)["tokens"] == 2
    alone = TokenStream(np.array([0], dtype=np.uint16), np.array([0]), 0)
    with pytest.raises(UserError, match="too few"):
        evaluate(model, alone, length=100)
    with pytest.raises(UserError, match="max_tokens"):
        evaluate(model, short, length=100, max_tokens=0)


def test_a_model_that_is_not_finite_is_said_to_be_so(model, stream):
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 3] = float("nan")
        try:
            with pytest.raises(DivergedError, match="not finite"):
                evaluate(model, stream, length=LENGTH)
        finally:
            weight.copy_(kept)
