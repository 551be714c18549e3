"""Packed blocks, their labels and positions, and the order of an epoch."""

from __future__ import annotations

import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from spectral_window.data.arrays import FileArray, SortedFileArray
from spectral_window.data.blocks import PackedBlocks, Permutation, ShuffledBlocks, TokenStream
from spectral_window.errors import UserError

END = 0


def stream_of(documents):
    """Documents of token ids > 0, each behind one END."""
    starts = np.cumsum([0, *[len(document) + 1 for document in documents[:-1]]])
    tokens = np.array([token for document in documents for token in (END, *document)], dtype="<u2")
    return TokenStream(tokens, starts.astype("<i8"), sum(map(len, documents)))


DOCUMENTS = st.lists(st.lists(st.integers(1, 65535), max_size=12), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 20))
@example(documents=[[1, 2, 3]], length=3)  # the labels end exactly with the stream
@example(documents=[[], [], []], length=2)
def test_blocks_are_the_stream_and_every_token_is_a_label_once(documents, length):
    stream = stream_of(documents)
    if len(stream) < 2:
        return
    blocks = PackedBlocks(stream, length, allow_short=True)
    items = [blocks[i] for i in range(len(blocks))]
    for item in items:
        assert {key: value.dtype for key, value in item.items()} == dict.fromkeys(
            ("input_ids", "shift_labels", "position_ids"), torch.int64
        )
        assert {value.shape for value in item.values()} == {(length,)}
    tokens = stream.tokens.tolist()
    inputs, labels, positions = (
        torch.cat([item[key] for item in items]).tolist()
        for key in ("input_ids", "shift_labels", "position_ids")
    )
    assert inputs[: len(tokens)] == tokens[: len(inputs)]
    assert [label for label in labels if label != -100] == tokens[1:]
    assert labels[: len(tokens) - 1] == tokens[1:]  # -100 only past the end
    for i, position in enumerate(positions[: len(tokens)]):
        begins = i % length == 0 or tokens[i] == END
        assert position == (0 if begins else positions[i - 1] + 1)


@pytest.mark.parametrize(
    ("tokens", "length", "blocks"), [(5, 4, 1), (6, 4, 2), (9, 4, 2), (10, 4, 3)]
)
def test_a_block_needs_its_labels_too(tokens, length, blocks):
    stream = stream_of([list(range(1, tokens))])
    assert len(stream) == tokens
    assert len(PackedBlocks(stream, length)) == blocks
    with pytest.raises(UserError, match=f"{tokens} tokens are too few for a block of {tokens}"):
        PackedBlocks(stream, tokens)
    assert len(PackedBlocks(stream, tokens, allow_short=True)) == 1
    with pytest.raises(IndexError):
        PackedBlocks(stream, length)[blocks]


def test_too_little_for_any_block_and_bad_lengths_are_refused():
    for length in (0, -1, 2.0, True, "4"):
        with pytest.raises(UserError, match="block length"):
            PackedBlocks(stream_of([[1, 2, 3]]), length)
    with pytest.raises(UserError, match="1 tokens are too few"):
        PackedBlocks(stream_of([[]]), 4, allow_short=True)


def test_a_stream_in_files_travels_to_workers_by_name(tmp_path):
    np.arange(100_000, dtype="<u4").tofile(tmp_path / "tokens")
    np.array([0, 7], dtype="<i8").tofile(tmp_path / "documents")
    stream = TokenStream(
        FileArray(tmp_path / "tokens", "<u4"), SortedFileArray(tmp_path / "documents", "<i8"), 5
    )
    pickled = pickle.dumps(PackedBlocks(stream, 10))
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert torch.equal(again[9_000]["input_ids"], torch.arange(90_000, 90_010))
    assert again.stream.documents.tolist() == [0, 7]
    memory = stream_of([[1, 2], [3]])
    assert pickle.loads(pickle.dumps(memory)).tokens.tolist() == [0, 1, 2, 0, 3]


# ---------------------------------------------------------------------------- the order


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 400), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@example(count=1, seed=0, epoch=0)
@example(count=256, seed=0, epoch=0)
@example(count=257, seed=0, epoch=0)
def test_every_epoch_is_a_permutation(count, seed, epoch):
    order = Permutation(count, seed, epoch)
    assert sorted(order[i] for i in range(count)) == list(range(count))


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 60),
    world=st.integers(1, 8),
    start=st.integers(0, 150),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
)
def test_the_ranks_together_see_everything_once_and_resume_anywhere(
    count, world, start, epochs, seed, shuffle
):
    def order(**options):
        sampler = ShuffledBlocks(count, seed=seed, epochs=epochs, shuffle=shuffle, **options)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        return indices

    whole = order()
    for epoch in range(epochs):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))
    rest = whole[start:]
    assert order(start=start) == rest
    ranks = [order(start=start, rank=rank, world=world) for rank in range(world)]
    assert [len(part) for part in ranks] == [len(rest[rank::world]) for rank in range(world)]
    for rank, part in enumerate(ranks):
        assert part == rest[rank::world]


def test_a_change_of_world_size_keeps_the_stream():
    """Two ranks for 40 samples, then one rank, then three: together still the one order."""
    seen = [None] * 100
    for start, stop, world in ((0, 40, 2), (40, 64, 1), (64, 100, 3)):
        for rank in range(world):
            sampler = ShuffledBlocks(30, seed=5, epochs=None, start=start, rank=rank, world=world)
            steps = len(range(start + rank, stop, world))
            seen[start + rank : stop : world] = list(islice(sampler, steps))
    assert seen == list(islice(ShuffledBlocks(30, seed=5, epochs=None), 100))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads, 3.12+
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a small machine
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_any_number_of_workers_gives_the_same_batches(workers):
    stream = stream_of([list(range(1, 700))])
    blocks = PackedBlocks(stream, 8)
    sampler = ShuffledBlocks(len(blocks), seed=3, start=11)
    context = "fork" if workers else None
    loader = DataLoader(
        blocks, 4, sampler=sampler, num_workers=workers, multiprocessing_context=context
    )
    batches = [batch["input_ids"] for batch in loader]
    expected = torch.stack(
        [blocks[i]["input_ids"] for i in ShuffledBlocks(len(blocks), seed=3)][11:]
    )
    assert torch.equal(torch.cat(batches), expected)


def test_seeds_and_epochs_give_unrelated_orders():
    def order(seed, epoch):
        permutation = Permutation(1000, seed, epoch)
        return np.array([permutation[i] for i in range(1000)])

    orders = [order(0, 0), order(1, 0), order(0, 1), order(1, 1), np.arange(1000)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # a random pair agrees in one place
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
            assert abs(np.corrcoef(one[1:], other[:-1])[0, 1]) < 0.15


def test_small_orders_are_close_to_uniform():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        order = Permutation(5, seed, 0)
        for place in range(5):
            counts[place, order[place]] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 0.05


def test_the_order_is_fixed_for_ever():
    """Resuming an old run with a new version must see the same samples."""
    assert list(ShuffledBlocks(10, seed=42)) == [6, 3, 0, 1, 4, 8, 2, 7, 5, 9]
    trillion = ShuffledBlocks(10**12, seed=1, epochs=None)
    assert list(islice(trillion, 3)) == [734766076825, 427079591145, 93116817558]


def test_an_endless_order_has_no_length_and_bad_arguments_are_refused():
    with pytest.raises(TypeError):
        len(ShuffledBlocks(3, epochs=None))
    assert list(ShuffledBlocks(3, epochs=0)) == []
    assert list(ShuffledBlocks(3, start=99)) == []
    for options in (
        {"rank": 2, "world": 2},
        {"world": 0},
        {"rank": -1},
        {"start": -1},
        {"epochs": -1},
    ):
        with pytest.raises(UserError):
            ShuffledBlocks(3, **options)
    with pytest.raises(UserError):
        ShuffledBlocks(0)
