"""Every method keeps the operators' contract, and every deliberate bug breaks it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from spectral_window.ops import (
    METHODS,
    Modes,
    WindowState,
    chunked_spectral,
    chunked_window,
    spectral_conv,
    window_attention,
)
from tests.contracts import methods, operators
from tests.contracts.measure import block_error, relative
from tests.contracts.operators import ATTENTION_CONTRACT, CONV_CONTRACT

CHUNKED = partial(spectral_conv, method="chunked")
SCAN = partial(spectral_conv, method="scan")
ATTEND = partial(window_attention, method="chunked", rope_theta=None)


@pytest.mark.parametrize(("op", "method", "promise"), methods.cases())
def test_every_method_in_the_table_keeps(op, method, promise):
    methods.keep(op, method, promise)


def test_every_operator_with_several_methods_has_a_contract():
    pointwise = {
        "rms_norm",
        "swiglu",
        "unit",
        "gated_add",
    }  # in test_pointwise: no state, no documents
    several = {op for op, table in METHODS.items() if len(table) > 1}
    assert several - pointwise == set(methods.CONTRACTS)


@pytest.mark.parametrize("method", ["chunked", "scan", "fft", "reference"])
def test_convolution_meets_the_float64_bar(method):
    conv = partial(spectral_conv, method=method)
    operators.conv_equals_the_direct_sum(conv, torch.float64, times=(1, 2, 31, 33, 64))


@pytest.mark.slow
@pytest.mark.parametrize("conv", [CHUNKED, SCAN], ids=["chunked", "scan"])
def test_convolution_is_exact_at_a_million(conv):
    operators.conv_is_exact_far_away(conv, time=1_048_576)


@pytest.fixture
def on_gpu(monkeypatch):
    """`chunked` computes on a CPU as on other devices."""
    monkeypatch.setattr(chunked_spectral, "EXACT", ())


@pytest.fixture
def without_float64(on_gpu, monkeypatch):
    """... and as on one without float64 (Apple's MPS)."""
    monkeypatch.setattr(chunked_spectral, "exact_dtype", lambda device: torch.float32)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("promise", CONV_CONTRACT, ids=lambda f: f.__name__)
def test_chunked_in_float32_keeps(promise):
    promise(CHUNKED)


@pytest.mark.parametrize("device", ["on_gpu", "without_float64"])
def test_chunked_in_float32_is_exact_where_a_slow_oscillation_crosses_zero(device, request):
    """There re and im of the state cancel; with documents, and gradients."""
    frequency, u = torch.linspace(0.0, 0.01, 8), torch.randn(1, 16_384, 8) + 0.3
    positions = torch.arange(16_384)
    positions[10_000:] -= 10_000

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (u, torch.zeros(8), frequency)]
        y, state = CHUNKED(leaves[0], Modes(*leaves[1:]), positions=positions[None])
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        return y, state, *torch.autograd.grad((y * weights).sum(), leaves)

    truth = run(torch.float64)
    request.getfixturevalue(device)
    mine = run(torch.float32)
    assert block_error(mine[0], truth[0]) <= 2e-6
    assert relative(mine[1], truth[1]) <= (1e-10 if device == "on_gpu" else 2e-7)
    assert mine[1].dtype == (torch.float64 if device == "on_gpu" else torch.float32)
    assert all(relative(x, exact) <= 2e-6 for x, exact in zip(mine[2:], truth[2:], strict=True))


@pytest.mark.parametrize("method", ["chunked", "step", "reference"])
def test_window_attention_meets_the_float64_bar(method):
    operators.attention_equals_dense_softmax(methods.by_method("window", method), torch.float64)


@pytest.mark.parametrize("promise", ATTENTION_CONTRACT, ids=lambda f: f.__name__)
def test_window_attention_by_the_fused_kernel_keeps(promise, monkeypatch):
    # what other devices run; on a CPU it is not chosen, and would otherwise never be tried
    monkeypatch.setattr(chunked_window, "_by_products", chunked_window._by_fused_kernel)
    promise(ATTEND)


# --- deliberate bugs: a contract that none of these breaks would be no contract -----------------


def zero_output(u, modes, state=None):
    y, state = CHUNKED(u, modes, state=state)
    return torch.zeros_like(y), state


def kernel_off_by_one(u, modes, state=None):
    late = torch.cat((torch.zeros_like(u[:, :1]), u[:, :-1]), 1)
    return CHUNKED(late, modes, state=state)


def no_crop(u, modes, state=None):
    y, state = CHUNKED(torch.cat((u, torch.zeros_like(u)), 1), modes, state=state)
    return y, state


def no_zero_padding(u, modes, state=None):
    from spectral_window.ops.modes import kernel

    time = u.shape[1]
    _, final = CHUNKED(u, modes, state=state)
    K = kernel(modes.validated(u.shape[2]), time)
    x = torch.fft.rfft(u.double().transpose(1, 2), time) * torch.fft.rfft(K, time)
    return torch.fft.irfft(x, time).transpose(1, 2).to(u.dtype), final


def state_not_carried(u, modes, state=None):
    return CHUNKED(u, modes)


def bf16_state(u, modes, state=None):
    y, state = CHUNKED(u, modes, state=state)
    return y, state.bfloat16().double()


def bf16_decay(u, modes, state=None):
    rounded = Modes(modes.decay.bfloat16().to(modes.decay.dtype), modes.frequency, modes.gain)
    return CHUNKED(u, rounded, state=state)


def fp32_angle(u, modes, state=None):
    """The kernel built as the paper's code does, with its angle in float32."""
    _, final = CHUNKED(u, modes, state=state)
    modes = modes.validated(u.shape[2])
    t = torch.arange(u.shape[1], dtype=torch.float32)
    K = torch.exp(-modes.decay[..., None] * t) * torch.cos(modes.frequency[..., None] * t)
    K = (K if modes.gain is None else K * modes.gain[..., None]).sum(1).double()
    size = 2 * u.shape[1]
    x = torch.fft.rfft(u.double().transpose(1, 2), size) * torch.fft.rfft(K, size)
    y = torch.fft.irfft(x, size)[..., : u.shape[1]].transpose(1, 2)
    return y.to(u.dtype), final


@pytest.mark.parametrize(
    ("bug", "caught_by"),
    [
        (zero_output, operators.conv_equals_the_direct_sum),
        (zero_output, operators.conv_of_an_impulse_is_the_kernel),
        (kernel_off_by_one, operators.conv_equals_the_direct_sum),
        (kernel_off_by_one, operators.conv_of_an_impulse_is_the_kernel),
        (no_crop, operators.conv_equals_the_direct_sum),
        (no_crop, operators.conv_is_exact_far_away),
        (no_zero_padding, operators.conv_equals_the_direct_sum),
        (state_not_carried, operators.conv_carries_its_state),
        (bf16_state, operators.conv_carries_its_state),
        (bf16_decay, operators.conv_equals_the_direct_sum),
        (bf16_decay, operators.conv_is_exact_far_away),
        (fp32_angle, operators.conv_is_exact_far_away),
    ],
    ids=lambda f: f.__name__,
)
def test_deliberate_convolution_bug_is_caught(bug, caught_by):
    with pytest.raises(AssertionError):
        caught_by(bug)


def window_plus_one(q, k, v, *, window, state=None):
    return ATTEND(q, k, v, window=window + 1, state=state)


def window_state_not_carried(q, k, v, *, window, state=None):
    return ATTEND(q, k, v, window=window)


def window_without_previous_chunk(q, k, v, *, window, state=None):
    if state is not None:
        state = WindowState(state.key * 0, state.value * 0, state.position)
    return ATTEND(q, k, v, window=window, state=state)


def zero_attention(q, k, v, *, window, state=None):
    out, state = ATTEND(q, k, v, window=window, state=state)
    return out * 0, state


@pytest.mark.parametrize(
    ("bug", "caught_by"),
    [
        (zero_attention, operators.attention_equals_dense_softmax),
        (window_plus_one, operators.attention_sees_exactly_its_window),
        (window_plus_one, operators.attention_equals_dense_softmax),
        (window_state_not_carried, operators.attention_carries_its_state),
        (window_without_previous_chunk, operators.attention_carries_its_state),
    ],
    ids=lambda f: f.__name__,
)
def test_deliberate_attention_bug_is_caught(bug, caught_by):
    with pytest.raises(AssertionError):
        caught_by(bug)
