"""The state at which a span starts, from the spans before it, is the operator's own after them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.ops import Modes, Taps, delta_memory, fir_conv, spectral_conv, window_attention
from spectral_window.ops.documents import Documents
from spectral_window.ops.spans import (
    bounds,
    delta_map,
    last_inputs,
    oscillators,
    read_from,
    read_spans,
    ring,
    state_before,
)
from tests.hf.small import error

BATCH, HEADS, SIZE = 3, 2, 4
DIM = HEADS * SIZE


def drawn_positions(time: int, seed: int) -> torch.Tensor:
    """Positions of packed documents and padding anywhere; one row is a single document."""
    draw = torch.Generator().manual_seed(seed)
    positions = torch.full((BATCH, time), -1)
    for row in range(BATCH):
        position = 0
        for t in range(time):
            chance = torch.rand(2, generator=draw)
            if row and chance[0] < 0.15:
                continue  # padding
            position = 0 if row and chance[1] < 0.1 else position
            positions[row, t], position = position, position + 1
    return positions


CASES = [(parts, time, seed) for seed, (parts, time) in enumerate(
    [(1, 5), (2, 2), (2, 9), (2, 40), (3, 3), (3, 16), (3, 50), (4, 4), (4, 31), (4, 64), (5, 37)]
)]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-spans-{case[1]}-tokens")
def row(request):
    """Positions, spans, and for each span its columns and documents."""
    parts, time, seed = request.param
    torch.manual_seed(seed)
    positions = drawn_positions(time, seed)
    cuts = bounds(time, parts)
    here = [Documents(positions[:, cut], checked=True) for cut in cuts]
    return positions, read_spans(positions, cuts), cuts, here


def befores(row, share_of):
    """The state at which each span starts, by the shares of all spans."""
    _, spans, cuts, here = row
    shares = [share_of(cut, documents) for cut, documents in zip(cuts, here, strict=True)]
    return [
        state_before(share, [one.own for one in shares[:rank]], spans)
        for rank, share in enumerate(shares)
    ]


def test_spans_cover_a_row_and_differ_by_at_most_one():
    for time in range(1, 30):
        for parts in range(1, min(time, 6) + 1):
            cuts = bounds(time, parts)
            sizes = [cut.stop - cut.start for cut in cuts]
            assert [t for cut in cuts for t in range(time)[cut]] == list(range(time))
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1
    with pytest.raises(UserError, match="rows of 2 tokens over 3 processes"):
        bounds(2, 3)


@pytest.mark.parametrize("modes", [1, 3])
def test_convolution(row, modes):
    positions, _, cuts, _ = row
    u = torch.randn(*positions.shape, DIM)
    kernel = Modes(torch.rand(DIM, modes) * 0.2, torch.randn(DIM, modes), torch.randn(DIM, modes))
    states = befores(row, lambda cut, here: oscillators(u[:, cut], kernel, here))
    for state, cut in zip(states[1:], cuts[1:], strict=True):
        _, expected = spectral_conv(
            u[:, : cut.start], kernel, positions=positions[:, : cut.start].contiguous()
        )
        assert state.dtype == torch.float64
        assert error(state, expected) < 1e-10


@pytest.mark.parametrize("taps", [1, 4, 33])
def test_filters(row, taps):
    positions, _, cuts, _ = row
    u, weights = torch.randn(*positions.shape, DIM), Taps(torch.randn(DIM, taps))
    states = befores(row, lambda cut, here: last_inputs(u[:, cut], taps - 1, here))
    for state, cut in zip(states[1:], cuts[1:], strict=True):
        _, expected = fir_conv(
            u[:, : cut.start], weights, positions=positions[:, : cut.start].contiguous()
        )
        assert torch.equal(state, expected)


@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("theta", [None, 100.0])
def test_window(row, window, theta):
    positions, spans, cuts, _ = row
    q, k, v = torch.randn(3, *positions.shape, HEADS, SIZE).double()
    keys, values = (
        befores(row, lambda cut, here, x=x: last_inputs(x[:, cut], 2 * window, here))
        for x in (k, v)
    )
    for rank, cut in enumerate(cuts[1:], 1):
        state = ring(keys[rank], values[rank], spans[rank - 1].position, window, theta)
        before = slice(0, cut.start)
        options = {"window": window, "rope_theta": theta}
        _, expected = window_attention(
            q[:, before], k[:, before], v[:, before], **options,
            positions=positions[:, before].contiguous(),
        )  # fmt: skip
        assert torch.equal(state.position, expected.position)
        assert torch.allclose(state.key, expected.key, rtol=0, atol=1e-12)
        assert torch.equal(state.value, expected.value)


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_memory(row, forgets, dtype, bound):
    positions, _, cuts, here = row
    shape = (*positions.shape, HEADS)
    q, k, v = torch.nn.functional.normalize(torch.randn(3, *shape, SIZE, dtype=dtype), dim=-1)
    beta = torch.rand(shape, dtype=dtype)
    decay = 0.1 * torch.rand(shape, dtype=dtype) if forgets else None

    def cut_out(cut):
        forget = None if decay is None else decay[:, cut]
        return (q[:, cut], k[:, cut], v[:, cut], beta[:, cut]), forget

    def map_of(cut, documents):
        inputs, forget = cut_out(cut)
        return delta_map(*inputs, decay=forget, documents=documents)

    states = befores(row, lambda cut, documents: map_of(cut, documents).share)
    out, _ = delta_memory(q, k, v, beta, decay=decay, positions=positions)
    for state, cut, documents in zip(states, cuts, here, strict=True):
        if cut.start:
            inputs, forget = cut_out(slice(0, cut.start))
            _, expected = delta_memory(
                *inputs, decay=forget, positions=positions[:, : cut.start].contiguous()
            )
            assert error(state, expected) < bound
        read = read_from(map_of(cut, documents), state, documents)
        assert error(read, out[:, cut]) < bound


def test_no_value_that_is_not_finite_crosses_into_another_document():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, -1, 3]])
    cuts = bounds(8, 2)
    spans = read_spans(positions, cuts)
    here = [Documents(positions[:, cut], checked=True) for cut in cuts]
    x = torch.randn(1, 8, HEADS, SIZE)
    x[:, 1] = torch.nan
    keys = torch.nn.functional.normalize(torch.randn(1, 8, HEADS, SIZE), dim=-1)
    beta = torch.rand(1, 8, HEADS)
    kernel = Modes(torch.rand(DIM), torch.rand(DIM))
    share_of = {
        "convolution": lambda cut, documents: oscillators(
            x[:, cut].flatten(2), kernel, documents
        ),
        "inputs": lambda cut, documents: last_inputs(x[:, cut], 6, documents),
        "memory": lambda cut, documents: delta_map(
            keys[:, cut], keys[:, cut], x[:, cut], beta[:, cut], documents=documents
        ).share,
    }  # fmt: skip
    for name, make in share_of.items():
        share = make(cuts[0], here[0])
        assert not share.own.isnan().any(), name  # the second document starts in the first span
        spoilt = torch.full_like(share.empty, torch.nan)
        assert not share.after(spoilt, share.own, spans[0]).isnan().any(), name
    # a state that is not finite reaches the tokens that go on, and no other
    fresh = Documents(torch.tensor([[4, -1, 0, 1]]), checked=True)
    last = slice(4, 8)
    read_map = partial(delta_map, keys[:, last], keys[:, last], keys[:, last], beta[:, last])
    spoilt = torch.full((1, HEADS, SIZE, SIZE), torch.nan)
    read = read_from(read_map(documents=fresh), spoilt, fresh)
    assert read[:, 0].isnan().all()
    assert read[:, 1:].isfinite().all()
