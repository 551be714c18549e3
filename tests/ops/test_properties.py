"""Properties of the operators (Hypothesis): sizes at edges, layouts, dtypes, documents, methods."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spectral_window.ops import Modes, spectral_conv, window_attention
from spectral_window.ops.documents import positions_from_cu_seqlens
from spectral_window.ops.modes import kernel
from tests.contracts.measure import relative, rms
from tests.contracts.operators import draw_modes

BAR = 2e-6
CONV_METHODS = ["reference", "fft", "chunked", "scan"]
LINEAR = st.sampled_from(["scan", "chunked"])
WINDOW_METHODS = ["reference", "chunked", "tiled"]
FAST_WINDOW = st.sampled_from(["chunked", "tiled"])
CHUNK = 32  # of the chunked convolution: what a NaN may reach inside


def near(a: torch.Tensor, b: torch.Tensor, bar: float = BAR) -> bool:
    """Equal within `bar` of the scale; rms is floored, for parts that happen to be all small."""
    return (
        rms(a.double() - b.double()) <= bar * max(rms(b), 1e-2) if b.numel() else a.shape == b.shape
    )


def weave(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.stack((x, x + 1), -1)[..., 0]
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def sizes(draw, *, batch=(0, 5), empty: bool = True):
    """(B, T, W): T in 0 ... 4W + 1, weighted to the edges of chunks."""
    window = draw(st.one_of(st.sampled_from([1, 2, 8]), st.integers(1, 40)))
    edges = [0, 1, window - 1, window, window + 1, 2 * window, 4 * window + 1, CHUNK, CHUNK + 1]
    time = draw(
        st.one_of(
            st.sampled_from([e for e in edges if e <= 4 * window + 1]),
            st.integers(0, 4 * window + 1),
        )
    )
    rows = draw(st.integers(*batch))
    if not empty:
        rows, time = max(rows, 1), max(time, 1)
    return rows, time, window


@st.composite
def conv_case(draw, **options):
    rows, time, _ = draw(sizes(**options))
    channels = draw(st.sampled_from([1, 2, 3, 16, 63, 64]))
    each = draw(st.integers(1, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    modes = draw_modes(
        channels, each, dtype=dtype, gain=draw(st.booleans()), slow=draw(st.booleans())
    )
    u = torch.randn(rows, time, channels, dtype=dtype)
    return weave(
        u, draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    ), modes


@st.composite
def window_case(draw, **options):
    rows, time, window = draw(sizes(**options))
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    q, k, v = (weave(torch.randn(rows, time, heads, size, dtype=dtype), layout) for _ in range(3))
    return q, k, v, window


def run_conv(u, modes, method, **options):
    """`method` "step" feeds one token at a time."""
    if method != "step":
        return spectral_conv(u, modes, method=method, **options)
    state, parts = options.pop("state", None), [u[:, :0]]
    positions = options.pop("positions", None)
    for t in range(u.shape[1]):
        at = None if positions is None else positions[:, t : t + 1]
        y, state = spectral_conv(u[:, t : t + 1], modes, state=state, positions=at)
        parts.append(y)
    return torch.cat(parts, 1), state


def suited(case, method):
    """The case in a dtype that the method takes."""
    *qkv, window = case
    return (*(x.float() if method == "tiled" else x for x in qkv), window)


def run_window(q, k, v, window, method, **options):
    if method != "step":
        return window_attention(q, k, v, window=window, rope_theta=100.0, method=method, **options)
    state, parts = options.pop("state", None), [v[:, :0]]
    positions = options.pop("positions", None)
    for t in range(q.shape[1]):
        cut = slice(t, t + 1)
        at = None if positions is None else positions[:, cut]
        y, state = window_attention(
            q[:, cut],
            k[:, cut],
            v[:, cut],
            window=window,
            rope_theta=100.0,
            state=state,
            positions=at,
        )
        parts.append(y)
    return torch.cat(parts, 1), state


def spoil(x: torch.Tensor, begin: int, how: float | str) -> torch.Tensor:
    """x with everything from time `begin` on replaced."""
    x = x.clone()
    x[:, begin:] = torch.randn_like(x[:, begin:]) * how if how in (1.0, 1e6) else how
    return x


# P1 ---------------------------------------------------------------------------------------------


@given(
    conv_case(batch=(1, 3), empty=False),
    st.sampled_from([*CONV_METHODS, "step"]),
    st.data(),
)
def test_the_future_never_reaches_the_past_of_the_convolution(case, method, data):
    u, modes = case
    t = data.draw(st.integers(0, u.shape[1] - 1))
    how = data.draw(
        st.sampled_from([1.0, 1e6] if method == "fft" else [1.0, 1e6, torch.inf, torch.nan])
    )
    y, _ = run_conv(u, modes, method)
    other, _ = run_conv(spoil(u, t, how), modes, method)
    if method == "fft":
        scale = max(rms(other), rms(y))
        assert rms(other[:, :t] - y[:, :t]) <= 4e-6 * scale
    else:
        assert torch.equal(other[:, :t], y[:, :t])


@given(
    window_case(batch=(1, 3), empty=False),
    st.sampled_from(["reference", "chunked", "tiled", "step"]),
    st.data(),
)
def test_the_future_never_reaches_the_past_of_attention(case, method, data):
    q, k, v, window = suited(case, method)
    t = data.draw(st.integers(0, q.shape[1] - 1))
    how = data.draw(st.sampled_from([1.0, 1e6, torch.inf, torch.nan]))
    y, _ = run_window(q, k, v, window, method)
    other, _ = run_window(*(spoil(x, t, how) for x in (q, k, v)), window, method)
    assert torch.equal(other[:, :t], y[:, :t])


def test_fft_refuses_what_it_would_spread():
    u = torch.randn(1, 8, 2)
    u[0, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        spectral_conv(u, draw_modes(2), method="fft")


# P2 ---------------------------------------------------------------------------------------------


@given(conv_case(batch=(1, 2), empty=False), st.sampled_from(CONV_METHODS), st.data())
def test_no_gradient_flows_from_the_past_to_the_future_of_the_convolution(case, method, data):
    u, modes = case
    t = data.draw(st.integers(0, u.shape[1] - 1))
    u = u.detach().clone().requires_grad_()
    y, _ = run_conv(u, modes, method)
    (gradient,) = torch.autograd.grad(y[:, t].sum(), u)
    future = gradient[:, t + 1 :].abs().max() if t + 1 < u.shape[1] else torch.zeros(())
    assert future <= (1e-6 * gradient.abs().max() if method == "fft" else 0)


@given(window_case(batch=(1, 2), empty=False), st.sampled_from(WINDOW_METHODS), st.data())
def test_no_gradient_flows_from_the_past_to_the_future_of_attention(case, method, data):
    *qkv, window = suited(case, method)
    t = data.draw(st.integers(0, qkv[0].shape[1] - 1))
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    y, _ = run_window(*leaves, window, method)
    for gradient in torch.autograd.grad(y[:, t].sum(), leaves):
        assert not gradient[:, t + 1 :].any()


# P3, P4 -----------------------------------------------------------------------------------------


@given(conv_case(), st.sampled_from([*CONV_METHODS, "step"]), st.data())
def test_the_convolution_of_a_prefix_is_the_prefix(case, method, data):
    u, modes = case
    t = data.draw(st.integers(0, u.shape[1]))
    whole, _ = run_conv(u, modes, method)
    part, _ = run_conv(u[:, :t], modes, method)
    if method == "fft":
        assert rms(part - whole[:, :t]) <= 4e-6 * max(rms(whole), 1e-2)
    elif method == "step":
        assert torch.equal(part, whole[:, :t])
    else:
        assert near(part, whole[:, :t])


@given(window_case(), st.sampled_from([*WINDOW_METHODS, "step"]), st.data())
def test_the_attention_of_a_prefix_is_the_prefix(case, method, data):
    q, k, v, window = suited(case, method)
    t = data.draw(st.integers(0, q.shape[1]))
    whole, _ = run_window(q, k, v, window, method)
    part, _ = run_window(q[:, :t], k[:, :t], v[:, :t], window, method)
    if method == "tiled":
        assert torch.equal(part, whole[:, :t])
    assert near(part, whole[:, :t])


def cuts(data, time: int) -> list[int]:
    points = data.draw(st.lists(st.integers(0, time), max_size=4).map(sorted))
    return [b - a for a, b in zip([0, *points], [*points, time], strict=True)]


@given(conv_case(), st.sampled_from(CONV_METHODS), st.data())
def test_any_split_of_the_convolution_equals_one_call(case, method, data):
    u, modes = case
    whole, end = run_conv(u, modes, method)
    state, parts = None, []
    for part in u.split(cuts(data, u.shape[1]), 1):
        y, state = spectral_conv(
            part, modes, state=state, method=data.draw(st.sampled_from([method, "auto"]))
        )
        parts.append(y)
    assert relative(state, end) <= 1e-10
    bar = 4e-6 if method == "fft" else BAR
    assert near(torch.cat(parts, 1), whole, bar)


@given(window_case(), st.sampled_from(WINDOW_METHODS), st.data())
def test_any_split_of_attention_equals_one_call(case, method, data):
    q, k, v, window = suited(case, method)
    whole, end = run_window(q, k, v, window, method)
    state, parts = None, []
    pieces = cuts(data, q.shape[1])
    for part in zip(*(x.split(pieces, 1) for x in (q, k, v)), strict=True):
        how = data.draw(st.sampled_from([method, "auto"]))
        y, state = run_window(*part, window, how, state=state)
        parts.append(y)
    assert near(torch.cat(parts, 1), whole)
    assert torch.equal(state.position, end.position)
    assert near(state.key, end.key)
    assert near(state.value, end.value)


# P5 ---------------------------------------------------------------------------------------------


def draw_documents(data, rows: int, time: int) -> torch.Tensor:
    """cu_seqlens over the rows * time tokens, with empty documents and any cut."""
    total = rows * time
    points = data.draw(st.lists(st.integers(0, total), max_size=6))
    return torch.tensor(sorted([0, *points, total]))


def pieces_of(cu: torch.Tensor, rows: int, time: int) -> list[tuple[int, int, int]]:
    """(row, begin, end) of every document; a row always begins one."""
    points = sorted({*cu.tolist(), *range(0, rows * time + 1, max(time, 1))})
    return [(a // time, a % time, a % time + b - a) for a, b in itertools.pairwise(points)]


@given(conv_case(batch=(1, 3), empty=False), st.sampled_from([*CONV_METHODS, "step"]), st.data())
def test_packed_documents_convolve_as_each_alone(case, method, data):
    u, modes = case
    rows, time = u.shape[:2]
    cu = draw_documents(data, rows, time)
    positions = positions_from_cu_seqlens(cu, rows, time)
    y, state = run_conv(u, modes, method, positions=positions)
    for row, a, b in pieces_of(cu, rows, time):
        alone, end = run_conv(u[row : row + 1, a:b], modes, method)
        assert near(y[row : row + 1, a:b], alone, 4e-6 if method == "fft" else BAR)
        if b == time:
            assert relative(state[row : row + 1], end) <= 1e-10


@given(
    window_case(batch=(1, 3), empty=False), st.sampled_from([*WINDOW_METHODS, "step"]), st.data()
)
def test_packed_documents_attend_as_each_alone(case, method, data):
    q, k, v, window = suited(case, method)
    rows, time = q.shape[:2]
    cu = draw_documents(data, rows, time)
    positions = positions_from_cu_seqlens(cu, rows, time)
    y, state = run_window(q, k, v, window, method, positions=positions)
    for row, a, b in pieces_of(cu, rows, time):
        alone, end = run_window(*(x[row : row + 1, a:b] for x in (q, k, v)), window, method)
        assert near(y[row : row + 1, a:b], alone)
        if b == time:
            assert torch.equal(state.position[row : row + 1], end.position)
            assert near(state.key[row : row + 1], end.key)


@given(conv_case(batch=(1, 3), empty=False), st.sampled_from([1.0, 1e6, torch.nan]), st.data())
def test_a_changed_document_leaves_the_others_of_the_convolution_untouched(case, how, data):
    u, modes = case
    method = data.draw(LINEAR)
    rows, time = u.shape[:2]
    cu = draw_documents(data, rows, time)
    row, a, b = data.draw(st.sampled_from(pieces_of(cu, rows, time)))
    other = u.clone()
    other[row, a:b] = torch.randn_like(other[row, a:b]) * how
    y, _ = spectral_conv(u, modes, cu_seqlens=cu, method=method)
    changed, _ = spectral_conv(other, modes, cu_seqlens=cu, method=method)
    outside = torch.ones(rows, time, dtype=torch.bool)
    outside[row, a:b] = False
    assert torch.equal(y[outside], changed[outside])


@given(window_case(batch=(1, 3), empty=False), st.sampled_from([1.0, 1e6, torch.nan]), st.data())
def test_a_changed_document_leaves_the_others_of_attention_untouched(case, how, data):
    method = data.draw(FAST_WINDOW)
    *qkv, window = suited(case, method)
    rows, time = qkv[0].shape[:2]
    cu = draw_documents(data, rows, time)
    row, a, b = data.draw(st.sampled_from(pieces_of(cu, rows, time)))
    others = [x.clone() for x in qkv]
    for x in others:
        x[row, a:b] = torch.randn_like(x[row, a:b]) * how
    y, _ = window_attention(*qkv, window=window, cu_seqlens=cu, method=method)
    changed, _ = window_attention(*others, window=window, cu_seqlens=cu, method=method)
    outside = torch.ones(rows, time, dtype=torch.bool)
    outside[row, a:b] = False
    assert torch.equal(y[outside], changed[outside])


# P6 ---------------------------------------------------------------------------------------------


@given(conv_case(batch=(1, 2), empty=False), st.sampled_from(CONV_METHODS), st.integers(0, 50))
def test_the_convolution_does_not_depend_on_absolute_time(case, method, shift):
    u, modes = case
    later = torch.cat((u.new_zeros(u.shape[0], shift, u.shape[2]), u), 1)
    y, _ = run_conv(u, modes, method)
    moved, _ = run_conv(later, modes, method)
    assert near(moved[:, shift:], y, 4e-6 if method == "fft" else BAR)


@given(window_case(batch=(1, 2), empty=False), st.sampled_from(WINDOW_METHODS), st.integers(1, 3))
def test_attention_depends_on_time_only_through_the_chunk_grid(case, method, chunks):
    q, k, v, window = suited(case, method)
    before = [
        torch.randn(x.shape[0], chunks * window, *x.shape[2:], dtype=x.dtype) for x in (q, k, v)
    ]
    moved, _ = run_window(
        *(torch.cat((b, x), 1) for b, x in zip(before, (q, k, v), strict=True)), window, method
    )
    alone, _ = run_window(q, k, v, window, method)
    # past the first chunk nothing before is seen, and RoPE knows only differences
    assert near(
        moved[:, (chunks + 1) * window :],
        alone[:, window:],
        1e-5 if q.dtype == torch.float32 else 1e-11,
    )


# P7, P8 at the level of the operators -----------------------------------------------------------


@given(conv_case(batch=(1, 3), empty=False), window_case(batch=(1, 3), empty=False), st.data())
def test_padding_takes_no_part(conv, attention, data):
    how = data.draw(FAST_WINDOW)
    attention = suited(attention, how)
    for which in ("conv", "attention"):
        tensors = conv[:1] if which == "conv" else attention[:3]
        rows, time = tensors[0].shape[:2]
        extra = data.draw(st.integers(0, 3 * attention[3]))
        # where each row's tokens go: any places among time + extra, in order
        places = torch.stack(
            [torch.randperm(time + extra)[:time].sort().values for _ in range(rows)]
        )
        positions = torch.full((rows, time + extra), -1).scatter(
            1, places, torch.arange(time).expand(rows, -1)
        )

        def padded(x, at=places, more=extra):
            room = torch.full(
                (x.shape[0], x.shape[1] + more, *x.shape[2:]), torch.nan, dtype=x.dtype
            )
            for row in range(x.shape[0]):
                room[row, at[row]] = x[row]
            return room

        def tokens(y, at=places):
            return torch.stack([y[row, at[row]] for row in range(y.shape[0])])

        if which == "conv":
            modes, method = conv[1], data.draw(LINEAR)
            y, state = spectral_conv(padded(tensors[0]), modes, positions=positions, method=method)
            truth, end = spectral_conv(tensors[0], modes, method=method)
            assert relative(state, end) <= 1e-10
        else:
            y, state = window_attention(
                *map(padded, tensors), window=attention[3], positions=positions, method=how
            )
            truth, end = window_attention(*tensors, window=attention[3], method=how)
            assert torch.equal(state.position, end.position)
            assert torch.equal(state.key, end.key)
        assert near(tokens(y), truth)
        assert not y[positions < 0].any()


@pytest.mark.parametrize("method", ["scan", "chunked", "step"])
def test_rows_of_padding_alone_give_zeros_and_keep_their_state(method):
    u = torch.full((2, 1 if method == "step" else 5, 3), torch.nan, requires_grad=True)
    positions = torch.full(u.shape[:2], -1)
    state = torch.randn(2, 3, 1, 2, dtype=torch.float64)
    y, end = spectral_conv(u, draw_modes(3), state=state, positions=positions, method=method)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(u.grad, torch.zeros_like(u))
    assert torch.equal(end, state)
    q = torch.full((*u.shape[:2], 1, 2), torch.nan)
    _, ring = window_attention(*[torch.randn(2, 7, 1, 2)] * 3, window=3)
    out, after = window_attention(q, q, q, window=3, state=ring, positions=positions)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(a, b) for a, b in zip(ring, after, strict=True))


@given(conv_case(batch=(2, 4), empty=False), st.data())
def test_a_row_is_the_same_in_any_batch_of_the_convolution(case, data):
    u, modes = case
    method = data.draw(LINEAR)
    order = data.draw(st.permutations(range(u.shape[0])))
    y, state = spectral_conv(u, modes, method=method)
    shuffled, states = spectral_conv(u[order], modes, method=method)
    assert near(shuffled, y[order], 1e-7)
    assert relative(states, state[order]) <= 1e-12
    spoiled = u.clone()
    spoiled[order[0]] = torch.nan
    z, _ = spectral_conv(spoiled, modes, method=method)
    assert torch.equal(z[order[1:]], y[order[1:]])


@given(window_case(batch=(2, 4), empty=False), st.data())
def test_a_row_is_the_same_in_any_batch_of_attention(case, data):
    method = data.draw(FAST_WINDOW)
    *qkv, window = suited(case, method)
    order = data.draw(st.permutations(range(qkv[0].shape[0])))
    y, _ = window_attention(*qkv, window=window, method=method)
    shuffled, _ = window_attention(*(x[order] for x in qkv), window=window, method=method)
    if method == "tiled":
        assert torch.equal(shuffled, y[order])
    assert near(shuffled, y[order], 1e-7)
    spoiled = [x.clone() for x in qkv]
    for x in spoiled:
        x[order[0]] = torch.nan
    z, _ = window_attention(*spoiled, window=window, method=method)
    assert torch.equal(z[order[1:]], y[order[1:]])


# P9 ---------------------------------------------------------------------------------------------


@given(
    conv_case(batch=(1, 3), empty=False),
    st.sampled_from(CONV_METHODS),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
def test_the_convolution_is_linear(case, method, a, b):
    u, modes = case
    other = torch.randn_like(u)
    both, _ = run_conv(a * u + b * other, modes, method)
    first, _ = run_conv(u, modes, method)
    second, _ = run_conv(other, modes, method)
    scale = max(rms(first), rms(second), 1e-2) * (abs(a) + abs(b) + 1e-6)
    assert rms(both - (a * first + b * second)) <= 4e-6 * scale


@given(conv_case(batch=(1, 2), empty=False), st.sampled_from([*CONV_METHODS, "step"]))
def test_an_impulse_gives_the_kernel(case, method):
    u, modes = case
    impulse = torch.zeros_like(u)
    impulse[:, 0] = 1
    y, _ = run_conv(impulse, modes, method)
    assert near(y, kernel(modes.validated(u.shape[2]), u.shape[1]).T.expand_as(y))


@given(conv_case(batch=(1, 2), empty=False), st.sampled_from([*CONV_METHODS, "step"]))
def test_the_sign_of_a_frequency_does_not_matter(case, method):
    u, modes = case
    y, _ = run_conv(u, modes, method)
    mirrored, _ = run_conv(u, Modes(modes.decay, -modes.frequency, modes.gain), method)
    assert near(mirrored, y)


# gradients of any subset -----------------------------------------------------------------------


@given(
    conv_case(batch=(1, 2), empty=False),
    st.sets(st.sampled_from(["u", "decay", "frequency", "state"]), min_size=1),
)
def test_gradients_reach_any_subset_of_inputs(case, wanted):
    u, modes = case
    assume(u.shape[1] > 1)
    state = torch.randn(u.shape[0], u.shape[2], modes.decay.shape[1], 2, dtype=torch.float64)
    leaves = {"u": u, "decay": modes.decay, "frequency": modes.frequency, "state": state}
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in leaves.items()}
    found = {}
    for method in ("scan", "chunked", "reference"):
        y, end = spectral_conv(
            leaves["u"],
            Modes(leaves["decay"], leaves["frequency"], modes.gain),
            state=leaves["state"],
            method=method,
        )
        names = sorted(wanted)
        found[method] = torch.autograd.grad(y.sum() + end.sum(), [leaves[n] for n in names])
    for method in ("scan", "chunked"):
        for mine, truth in zip(found[method], found["reference"], strict=True):
            assert near(mine, truth, 4e-6)
