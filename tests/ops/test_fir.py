"""FIR filters: every method, split and packing against the direct sum of each document."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spectral_window.ops import Taps, fir_conv
from spectral_window.ops.fir import fast_size
from spectral_window.ops.methods import resolve
from tests.contracts.measure import block_error, relative

WHOLE = ["auto", "fft", "shifts", "compiled"]
LENGTHS = [1, 2, 4, 16, 17, 40]  # few taps go by shifts, more than 16 by an FFT


def draw_taps(channels: int, length: int, dtype: torch.dtype = torch.float32) -> Taps:
    return Taps(torch.randn(channels, length, dtype=torch.float64).to(dtype) / length**0.5)


def by_hand(u: torch.Tensor, taps: Taps) -> torch.Tensor:
    """The definition, in loops that share no code with the package."""
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for j in range(min(t + 1, taps.weights.shape[1])):
            y[:, t] += taps.weights[:, j] * u[:, t - j]
    return y


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("method", [*WHOLE, "reference"])
def test_every_method_is_the_sum_over_the_last_inputs(method, length):
    bars = {torch.float32: 2e-6} | ({} if method == "compiled" else {torch.float64: 1e-11})
    for dtype, bar in bars.items():
        for time in (1, 3, length, length + 1, 100):
            taps, u = draw_taps(5, length, dtype), torch.randn(2, time, 5, dtype=dtype)
            y, state = fir_conv(u, taps, method=method)
            truth = by_hand(u.double(), Taps(taps.weights.double()))
            assert y.dtype == dtype
            assert block_error(y, truth) <= bar
            assert state.shape == (2, length - 1, 5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("method", WHOLE)
def test_any_split_gives_the_same_output_and_the_same_state_to_the_bit(method, length):
    taps, u = draw_taps(5, length), torch.randn(3, 90, 5)
    whole, end = fir_conv(u, taps, method=method)
    for sizes in ([1] * 90, [40, 1, 1, 30, 18], [3, 87], [0, 90]):
        state, parts = None, []
        for part in u.split(sizes, 1):
            y, state = fir_conv(part, taps, state=state, method=method)
            parts.append(y)
        assert relative(torch.cat(parts, 1), whole) <= 2e-6
        assert torch.equal(state, end)


@pytest.mark.parametrize("length", [4, 40])
def test_half_precision_is_rounded_once(length):
    for dtype in (torch.bfloat16, torch.float16):
        taps, u = draw_taps(6, length), torch.randn(2, 80, 6).to(dtype)
        truth, _ = fir_conv(u.double(), taps, method="reference")
        y, state = fir_conv(u, taps)
        assert y.dtype == state.dtype == dtype
        assert relative(y, truth) <= 1.25 * relative(truth.to(dtype), truth)
        last, _ = fir_conv(u[:, :1], taps, state=state)
        both, _ = fir_conv(torch.cat((u, u[:, :1]), 1), taps)
        assert relative(last, both[:, -1:]) <= 2 * torch.finfo(dtype).eps


@st.composite
def packed(draw) -> tuple[list[list[tuple[int, int]]], bool]:
    """Rows of (padding before, document length), and whether a state is given."""
    piece = st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 3, 7, 8, 9, 30]))
    rows = draw(st.lists(st.lists(piece, max_size=4), min_size=1, max_size=3))
    return rows, draw(st.booleans())


@settings(max_examples=60)
@given(packed(), st.sampled_from([1, 4, 20]), st.sampled_from([*WHOLE, "reference"]), st.data())
def test_documents_packed_together_are_each_document_alone(case, length, method, data):
    rows, known = case
    time = 1 + max(sum(a + b for a, b in row) for row in rows)
    taps = draw_taps(3, length)
    state = torch.randn(len(rows), length - 1, 3) if known else None
    u = torch.full((len(rows), time, 3), torch.nan)
    positions = torch.full((len(rows), time), -1)
    expected = torch.zeros_like(u)
    ends = torch.zeros(len(rows), length - 1, 3) if state is None else state.clone()
    for b, row in enumerate(rows):
        at = 0
        for i, (gap, size) in enumerate(row):
            at += gap
            goes_on = known and i == 0 and data.draw(st.booleans())
            text = torch.randn(1, size, 3)
            before = state[b : b + 1] if goes_on else None
            alone, end = fir_conv(text, taps, state=before, method="reference")
            u[b, at : at + size], expected[b, at : at + size] = text[0], alone[0]
            positions[b, at : at + size] = torch.arange(size) + (5 if goes_on else 0)
            ends[b] = end[0]
            at += size
    y, final = fir_conv(u, taps, state=state, positions=positions, method=method)
    assert torch.equal(y[positions < 0], torch.zeros_like(y[positions < 0]))
    assert relative(y, expected) <= 2e-6
    assert torch.equal(final, ends)


def test_offsets_say_the_same_as_positions():
    u, taps = torch.randn(2, 10, 3), draw_taps(3, 20)
    positions = torch.tensor([[*range(4), *range(6)], [*range(10)]])
    offsets = torch.tensor([0, 4, 10, 20])
    for a, b in zip(
        fir_conv(u, taps, positions=positions),
        fir_conv(u, taps, cu_seqlens=offsets),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [3, 17])
def test_gradients_are_right_once_and_twice(length):
    u = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, length - 1, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[4, 5, 0, 1, 2, 0, 1], [-1, 9, 10, -1, 0, 1, -1]])

    for at in (None, positions):

        def run(u, weights, state, at=at):
            return fir_conv(u, Taps(weights), state=state, positions=at)

        assert torch.autograd.gradcheck(run, (u, weights, state))
        assert torch.autograd.gradgradcheck(run, (u, weights, state))


@settings(max_examples=40)
@given(packed(), st.sampled_from([1, 4, 20]), st.data())
def test_compiled_gradients_are_those_of_each_document_alone(case, length, data):
    """Of inputs, taps and the inputs before, against the shifts in float64; and once more."""
    rows, known = case
    time = 1 + max(sum(a + b for a, b in row) for row in rows)
    positions = torch.full((len(rows), time), -1)
    for b, row in enumerate(rows):
        at = 0
        for i, (gap, size) in enumerate(row):
            goes_on = known and i == 0 and data.draw(st.booleans())
            positions[b, at + gap : at + gap + size] = torch.arange(size) + (5 if goes_on else 0)
            at += gap + size
    given_state = torch.randn(len(rows), length - 1, 3, requires_grad=data.draw(st.booleans()))
    leaves = [torch.randn(len(rows), time, 3, requires_grad=True)]
    leaves += [torch.randn(3, length, requires_grad=True)]
    leaves += [given_state] if known else []
    at = data.draw(st.sampled_from([positions, None]))
    assume(at is None or bool((at >= 0).any()))
    found = []
    for method, dtype in (("compiled", torch.float32), ("shifts", torch.float64)):
        u, weights, *state = (x.detach().to(dtype).requires_grad_(x.requires_grad) for x in leaves)
        asked = [x for x in (u, weights, *state) if x.requires_grad]
        taps, before = Taps(weights), state[0] if state else None
        y, _ = fir_conv(u, taps, state=before, positions=at, method=method)
        once = torch.autograd.grad(y.square().sum(), asked, retain_graph=True)
        (more,) = torch.autograd.grad(y.square().sum(), [u], create_graph=True)
        twice = torch.autograd.grad(more.square().sum(), asked)
        found.append([y, *once, *twice])
    for mine, true in zip(*found, strict=True):
        assert relative(mine, true.detach()) <= 2e-6


def test_compiled_gradients_have_the_same_bits_on_any_number_of_threads():
    u, taps = torch.randn(2, 200, 5, requires_grad=True), draw_taps(5, 4)
    weights = taps.weights.requires_grad_()
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, _ = fir_conv(u, taps, method="compiled")
        found.append((y, *torch.autograd.grad(y.square().sum(), (u, weights))))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_few_taps_are_compiled_and_many_are_not():
    names = [resolve("fir", "auto", torch.empty(1, 9, 3), torch.empty(3, n)).name for n in (4, 40)]
    assert names == ["compiled", "fft"]


@pytest.mark.parametrize("length", [4, 40])
def test_the_future_does_not_reach_the_past(length):
    taps, u = draw_taps(4, length), torch.randn(2, 60, 4)
    changed = u.clone()
    changed[:, 31:] = 1e6 * torch.randn(2, 29, 4)
    y, other = (fir_conv(x, taps)[0][:, :31] for x in (u, changed))
    if length <= 16:
        assert torch.equal(y, other)
    else:
        assert (y - other).abs().max() <= 4e-6 * 1e6


def test_nothing_is_seen_beyond_the_last_tap():
    taps, u = draw_taps(4, 5), torch.randn(1, 30, 4)
    changed = u.clone()
    changed[:, 10] += 1.0
    y, other = (fir_conv(x, taps)[0] for x in (u, changed))
    differs = (y != other).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


def test_a_nan_stays_in_its_document_or_is_refused():
    u = torch.randn(1, 12, 3)
    u[0, 2] = torch.nan
    positions = torch.tensor([[*range(6), *range(6)]])
    y, _ = fir_conv(u, draw_taps(3, 4), positions=positions)
    assert bool(y[:, 6:].isfinite().all())
    assert bool(y[:, :2].isfinite().all())
    with pytest.raises(ValueError, match="not finite"):
        fir_conv(u, draw_taps(3, 40), positions=positions)


def test_the_state_holds_its_own_memory_alone():
    """A view of the input would keep a whole prompt alive for the length of a session."""
    _, state = fir_conv(torch.randn(1, 1000, 3), draw_taps(3, 5))
    assert state.untyped_storage().nbytes() == 4 * 3 * 4


def test_many_short_documents_cost_what_their_tokens_cost(monkeypatch):
    """One long document beside many short ones: the rows are not all as long as the longest."""
    rows, rfft = [], torch.fft.rfft

    def counted(x, size):
        if x.dim() == 3:  # the inputs, and not the taps
            rows.append((x.shape[0], x.shape[2]))
        return rfft(x, size)

    monkeypatch.setattr(torch.fft, "rfft", counted)
    positions = torch.tensor([[*range(1000), *([0] * 500), *([0, 1, 2] * 100)]])
    y, _ = fir_conv(torch.randn(1, 1800, 2), draw_taps(2, 700), positions=positions)
    assert y.shape == (1, 1800, 2)
    assert sum(a * b for a, b in rows) <= 4 * 1800


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3)])
def test_nothing_in_nothing_out(shape):
    y, state = fir_conv(torch.zeros(shape), draw_taps(3, 20))
    assert y.shape == shape
    assert state.shape == (shape[0], 19, 3)
    given = torch.randn(shape[0], 19, 3)
    assert torch.equal(fir_conv(torch.zeros(shape), draw_taps(3, 20), state=given)[1], given)


def test_padding_alone_is_silent_and_keeps_the_state():
    given, padding = torch.randn(2, 19, 3), torch.full((2, 4), -1)
    y, state = fir_conv(torch.randn(2, 4, 3), draw_taps(3, 20), state=given, positions=padding)
    assert not y.any()
    assert torch.equal(state, given)


def test_meta_tensors_give_meta_tensors():
    taps = Taps(torch.empty(4, 40, device="meta"))
    y, state = fir_conv(torch.empty(2, 9, 4, device="meta"), taps)
    assert y.device.type == state.device.type == "meta"


def test_output_goes_where_it_is_asked_for():
    u, taps = torch.randn(2, 30, 3), draw_taps(3, 20)
    out = torch.empty_like(u)
    assert fir_conv(u, taps, out=out)[0] is out
    assert torch.equal(out, fir_conv(u, taps)[0])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 161, 513, 641, 2047, 2049])
def test_fft_sizes_hold_the_count_and_little_more(count):
    assert count <= fast_size(count) <= max(8, 1.34 * count)


U, F = torch.randn(2, 8, 3), Taps(torch.randn(3, 20))


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "unknown fir method 'scan'", lambda: fir_conv(U, F, method="scan")),
        (
            ValueError,
            "unknown fir method 'chunked'",
            lambda: fir_conv(U, F, method="chunked"),
        ),
        (ValueError, "one token a call", lambda: fir_conv(U, F, method="step")),
        (TypeError, "float32 or float64", lambda: fir_conv(U, Taps(F.weights.bfloat16()))),
        (ValueError, r"expected \[3, L\]", lambda: fir_conv(U, Taps(F.weights.T))),
        (ValueError, r"expected \[3, L\]", lambda: fir_conv(U, Taps(F.weights[:, :0]))),
        (ValueError, r"expected \[3, L\]", lambda: fir_conv(U, Taps(F.weights[:, 0]))),
        (ValueError, "not finite", lambda: fir_conv(U, Taps(F.weights / 0))),
        (ValueError, "same batch", lambda: fir_conv(U, F, state=torch.zeros(1, 19, 3))),
        (ValueError, "same batch", lambda: fir_conv(U, F, state=torch.zeros(2, 20, 3))),
        (
            ValueError,
            "counts 0, 1, 2",
            lambda: fir_conv(U, F, positions=torch.arange(3, 11).expand(2, -1)),
        ),
        (
            ValueError,
            "gradient to record",
            lambda: fir_conv(U, Taps(F.weights.clone().requires_grad_()), out=torch.empty_like(U)),
        ),
    ],
)
def test_what_is_wrong_is_named(error, says, call):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("length", [4, 40])
def test_torch_compile_has_no_graph_break(length):
    taps, u = draw_taps(3, length), torch.randn(2, 30, 3)
    state = torch.randn(2, length - 1, 3)

    def run(u, weights, state):
        return fir_conv(u, Taps(weights), state=state)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for x in (u, u[:, :1]):
        for a, b in zip(compiled(x, *taps, state), run(x, *taps, state), strict=True):
            assert relative(a, b) <= 2e-6


def test_a_state_may_depend_on_the_inputs():
    """The compiled method's gradient went on through the state's own past, and failed there."""
    torch.manual_seed(0)
    u = torch.randn(2, 9, 3, requires_grad=True)
    taps = Taps(torch.randn(3, 4))

    def gradient(method):
        y, _ = fir_conv(u, taps, state=u[:, :3] * 2, method=method)
        return torch.autograd.grad(y.square().sum(), u)[0]

    torch.testing.assert_close(gradient("compiled"), gradient("shifts"))
