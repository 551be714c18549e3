"""The convolution's Triton kernels in Triton's interpreter: run by `test_triton_spectral` in a
process that has TRITON_INTERPRET=1 from its start.

The interpreter takes a millisecond an operation, so sizes are the least that cross a chunk (16
tokens at these sizes), a group of rows, a block of channels and a document.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from spectral_window.lab.bench import gpu_spectral
from spectral_window.ops import Modes, spectral_conv, triton_spectral
from tests.contracts import operators
from tests.contracts.measure import block_error, relative
from tests.contracts.operators import draw_modes

TRITON = partial(spectral_conv, method="triton")
REFERENCE = partial(spectral_conv, method="reference")
BARS = operators.BARS


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def equals_the_direct_sum(conv, dtype=torch.float32):
    operators.conv_equals_the_direct_sum(conv, dtype, times=(1, 19))


def carries_its_state(conv):
    modes = draw_modes(3, dtype=torch.float32, slow=True)
    u = torch.randn(1, 52, 3)
    whole, end = conv(u, modes)
    state, parts = None, []
    for part in u.split([1, 18, 33], 1):
        y, state = conv(part, modes, state=state)
        parts.append(y)
    assert block_error(torch.cat(parts, 1), whole) <= 2e-6
    assert relative(state, end) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_state_equal_the_direct_sum(dtype):
    equals_the_direct_sum(TRITON, dtype)


def test_impulse_gives_the_kernel():
    operators.conv_of_an_impulse_is_the_kernel(TRITON)


def test_state_is_carried_from_call_to_call():
    carries_its_state(TRITON)


def test_slow_modes_are_exact_far_away():
    operators.conv_is_exact_far_away(TRITON, time=192)


@pytest.mark.slow
def test_slow_modes_are_exact_farther_away():
    operators.conv_is_exact_far_away(TRITON, time=4096)


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float16, 1.25), (torch.bfloat16, 2.5)],  # the interpreter cuts bfloat16 off: twice
)
def test_16_bit_outputs_are_the_exact_ones_rounded(dtype, factor):
    modes = draw_modes(4, dtype=torch.float32)
    u = torch.randn(1, 40, 4).to(dtype)
    truth, end = REFERENCE(u.double(), modes)
    y, final = TRITON(u, modes)
    assert y.dtype == dtype
    assert relative(y, truth) <= factor * relative(truth.to(dtype), truth)
    assert relative(final, end) <= 1e-10


# two documents and padding, continued from a state and not; a chunk without any token
PACKED = torch.tensor(
    [
        [*range(7, 15), -1, *range(20), *range(5), -1, -1],
        [*[-1] * 18, *range(16), -1, 16],
    ]
)


def leaves_of(modes, *others):
    tensors = (*modes, *others)
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize(
    ("each", "gain", "known", "packed", "dtype"),
    [
        (1, False, False, False, torch.float32),
        (3, True, True, False, torch.float32),
        (1, True, True, True, torch.float32),
        (3, False, True, True, torch.float64),
    ],
)
def test_gradients_equal_the_references(each, gain, known, packed, dtype):
    u = torch.randn(2, 36, 3, dtype=dtype)
    before = torch.randn(2, 3, each, 2, dtype=torch.float64) if known else None
    leaves = leaves_of(draw_modes(3, each, dtype=dtype, gain=gain), u, before)
    gy, gf = torch.randn(2, 36, 3, dtype=dtype), torch.randn(2, 3, each, 2, dtype=torch.float64)
    found = []
    for conv in (TRITON, REFERENCE):
        positions = PACKED if packed else None
        y, final = conv(leaves[3], Modes(*leaves[:3]), state=leaves[4], positions=positions)
        asked = [x for x in leaves if x is not None]
        found.append((y, final, *torch.autograd.grad((y, final), asked, (gy, gf))))
    for mine, truth in zip(*found, strict=True):
        assert mine.dtype == truth.dtype
        assert relative(mine, truth) <= BARS[dtype]


def test_gradients_of_a_sum_alone_need_no_gradient_of_the_state():
    u = torch.randn(1, 20, 3)
    leaves = leaves_of(draw_modes(3, dtype=torch.float32), u)
    mine, truth = (
        torch.autograd.grad(conv(leaves[3], Modes(*leaves[:2]))[0].sum(), (leaves[0], leaves[3]))
        for conv in (TRITON, REFERENCE)
    )
    assert all(relative(a, b) <= 2e-6 for a, b in zip(mine, truth, strict=True))


def test_second_derivatives_are_there():
    u = torch.randn(1, 18, 2, dtype=torch.float64)
    leaves = leaves_of(draw_modes(2), u)

    def penalty(conv):
        y, _ = conv(leaves[3], Modes(*leaves[:2]))
        slope = torch.autograd.grad(y.square().sum(), leaves[3], create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), (leaves[0], leaves[3]))

    for mine, truth in zip(penalty(TRITON), penalty(REFERENCE), strict=True):
        assert relative(mine, truth) <= 1e-11


def test_documents_stay_apart_even_from_a_nan():
    modes = draw_modes(3, dtype=torch.float32, slow=True)
    u = torch.randn(2, 36, 3)
    positions = PACKED.clone()
    positions[0, :8] = torch.arange(8)
    clean, _ = TRITON(u, modes, positions=positions)
    bad = u.clone()
    bad[positions < 0] = torch.nan
    bad[0, 5] = torch.nan  # the first document ends at 8
    leaf = bad.clone().requires_grad_()
    y, final = TRITON(leaf, modes, positions=positions)
    assert torch.equal(y[0, 8:], clean[0, 8:])
    assert torch.equal(y[1], clean[1])
    assert bool((y[positions < 0] == 0).all())
    assert bool(torch.isfinite(final).all())
    grad = torch.ones_like(y)
    grad[positions < 0] = torch.nan
    assert bool(torch.isfinite(torch.autograd.grad(y, leaf, grad)[0]).all())


def test_padding_alone_keeps_the_state():
    modes, before = draw_modes(2, dtype=torch.float32), torch.randn(1, 2, 1, 2).double()
    positions = torch.full((1, 20), -1)
    y, final = TRITON(torch.randn(1, 20, 2), modes, state=before, positions=positions)
    assert torch.equal(final, before)
    assert not y.any()


def test_the_past_does_not_see_the_future():
    modes, u = draw_modes(3, dtype=torch.float32, slow=True), torch.randn(1, 40, 3)
    other = u.clone()
    other[:, 21:] = 1e3
    assert torch.equal(TRITON(u, modes)[0][:, :21], TRITON(other, modes)[0][:, :21])


def test_channels_in_several_blocks_and_strided_inputs():
    modes = draw_modes(130, dtype=torch.float32)
    u = torch.randn(130, 18, 1).transpose(0, 2)
    assert triton_spectral.layout(1, 18, 130, 1, u.dtype).blocks == 2
    leaf = u.detach().requires_grad_()
    truth = REFERENCE(u, modes)[0]
    y, _ = TRITON(leaf, modes)
    assert relative(y, truth) <= 2e-6
    (du,) = torch.autograd.grad(y.sum(), leaf)  # its gradient is one number, expanded
    (exact,) = torch.autograd.grad(REFERENCE(leaf, modes)[0].sum(), leaf)
    assert relative(du, exact) <= 2e-6


def test_a_sign_that_is_put_off_is_seen():
    modes, u = draw_modes(2, dtype=torch.float32), torch.randn(1, 3, 2)
    assert torch.equal(TRITON(torch._neg_view(-u), modes)[0], TRITON(u, modes)[0])


def test_the_commands_for_a_gpu_walk_every_step_on_a_cpu():
    checked = list(gpu_spectral.check(5, "cpu"))
    assert len(checked) >= 10
    assert [row for row in checked if row["good"] is not True] == []
    timed = [*gpu_spectral.bench(5, "cpu"), *gpu_spectral.sweep(5, "cpu")]
    assert [row for row in timed if row["status"] != "ok"] == []
    assert {row["contestant"] for row in timed} >= {"device copy", "triton", "fft as published"}


def test_a_step_that_fails_has_a_row_and_the_next_one_runs(monkeypatch):
    def fail(*inputs, **more):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_spectral, "spectral_conv", fail)
    rows = list(gpu_spectral.check(5, "cpu"))
    assert rows
    assert all(row["good"] is False and "no kernel image" in row["why"] for row in rows)
    assert all("no time left" in row["why"] for row in gpu_spectral.check(0, "cpu"))


def test_registered_operators_pass_opcheck_and_compile_without_a_break():
    leaves = leaves_of(draw_modes(2, 2, dtype=torch.float32, gain=True), torch.randn(1, 3, 2))
    state = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (leaves[3], *leaves[:3], state, None)
    torch.library.opcheck(triton_spectral.scan.registered, inputs)
    plain = [x.detach() for x in inputs[:4]]
    kept = triton_spectral.scan(*inputs)[2].detach()
    torch.library.opcheck(
        triton_spectral.scan_backward.registered, (*plain, None, kept, plain[0], state.detach())
    )

    def loss(u, decay):
        return TRITON(u, Modes(decay, leaves[1].detach(), None))[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(leaves[3], leaves[0]), (leaves[3], leaves[0]))
    eager = torch.autograd.grad(loss(leaves[3], leaves[0]), (leaves[3], leaves[0]))
    assert all(relative(a, b) <= 2e-6 for a, b in zip(mine, eager, strict=True))


# --- deliberate bugs ----------------------------------------------------------------------------


def no_state_between_chunks(call, states, last):
    return torch.zeros_like(states), last


def float32_borders(call, states, last):
    return states.float().double(), last.float().double()


def chunks_one_late(call, states, last):
    return states.roll(1, 1), last


def last_state_of_the_chunk_before(call, states, last):
    return states, states[:, -1].permute(0, 3, 2, 1).contiguous()


@pytest.mark.parametrize(
    "bug",
    [no_state_between_chunks, float32_borders, chunks_one_late, last_state_of_the_chunk_before],
    ids=lambda f: f.__name__,
)
def test_deliberate_bug_is_caught(bug, monkeypatch):
    carried = triton_spectral._Call.carried
    monkeypatch.setattr(
        triton_spectral._Call, "carried", lambda self, *inputs: bug(self, *carried(self, *inputs))
    )
    with pytest.raises(AssertionError):
        equals_the_direct_sum(TRITON)


@pytest.mark.parametrize("forwards", [True, False])
def test_gradients_catch_a_border_that_is_lost(forwards, monkeypatch):
    carried = triton_spectral._Call.carried

    def lost(self, x, first, reverse, dtype):
        states, last = carried(self, x, first, reverse, dtype)
        return (states if reverse == forwards else torch.zeros_like(states)), last

    monkeypatch.setattr(triton_spectral._Call, "carried", lost)
    with pytest.raises(AssertionError):
        test_gradients_equal_the_references(1, False, False, False, torch.float32)
