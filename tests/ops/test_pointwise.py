"""RMSNorm, SwiGLU's gate, vectors of length 1 and gated sums in compiled code equal the exact
formulas, forward and backward."""

from __future__ import annotations

import pytest
import torch

from spectral_window.ops.compiled import pointwise
from spectral_window.ops.pointwise import gated_add, rms_norm, swiglu, unit
from tests.contracts.measure import relative

SIZES = [1, 3, 16, 17, 60, 768]
EPS, SHORTEST = 1e-6, 1e-4


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def exact_gate(gate, up):
    return gate * torch.sigmoid(gate) * up


def cases(size, dtype):
    """(operator, its exact form, inputs)"""
    shape = (2, 37, size)
    x, gate, up = (torch.randn(shape).mul(3).to(dtype) for _ in range(3))
    weight = torch.randn(size).to(dtype)
    return [
        (lambda x, w: rms_norm(x, w, EPS), exact_norm, (x, weight)),
        (swiglu, exact_gate, (gate, up)),
    ]


def exact_unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=SHORTEST)


def exact_sum(base, x, gate, scale):
    return base + (gate[..., None] * x).flatten(-2) * scale


def head_cases(size, dtype):
    """The same for vectors of heads; what is float32 whatever the dtype stays so."""
    x, added = torch.randn(2, 37, 3, size).mul(3).to(dtype), torch.randn(2, 37, 3, size)
    x[0, 1] *= 1e-6  # too short
    base, gate = torch.randn(2, 37, 3 * size).to(dtype), torch.rand(2, 37, 3)
    return [
        (lambda x: unit(x, SHORTEST), exact_unit, (x,)),
        (gated_add, exact_sum, (base, added, gate, torch.randn(3 * size))),
    ]


def with_gradients(operator, inputs, grad):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("size", SIZES)
def test_float32_equals_the_exact_formula_with_its_gradients(size, threads):
    for operator, exact, inputs in cases(size, torch.float32):
        grad = torch.randn(inputs[0].shape)
        found = with_gradients(operator, inputs, grad)
        truth = with_gradients(exact, [x.double() for x in inputs], grad.double())
        for ours, theirs in zip(found, truth, strict=True):
            # a norm over one channel is its sign: its gradient is the difference of equal numbers
            small = size == 1 and ours.shape == found[1].shape and exact is exact_norm
            assert small or relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("size", [2, 16, 17, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_heads_equal_the_exact_formula_with_their_gradients(size, dtype, threads):
    for operator, exact, inputs in head_cases(size, dtype):
        found = with_gradients(operator, inputs, grad := torch.randn(inputs[0].shape))
        truth = with_gradients(
            exact, [x.double() for x in inputs], grad.to(found[0].dtype).double()
        )
        for ours, theirs in zip(found, truth, strict=True):
            half = ours.dtype == torch.bfloat16
            bar = 1.25 * relative(theirs.bfloat16(), theirs) if half else 1e-6
            assert relative(ours, theirs) <= bar


def test_what_scales_all_tokens_has_one_gradient_on_any_number_of_threads():
    (_, _, inputs) = head_cases(16, torch.float32)[1]
    base, x, gate, scale = inputs
    grad, found = torch.randn(base.shape), []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(pointwise.gated_add_backward(grad, x, gate, scale))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_gated_sum_of_other_shapes_or_whole_numbers_is_refused():
    base, x, gate, scale = head_cases(4, torch.float32)[1][2]
    for wrong in ((base[None], x, gate, scale), (base, x, gate[..., :2], scale)):
        with pytest.raises(ValueError, match=r"gated_add\): expected \[\.\.\., H N\]"):
            gated_add(*wrong)
    with pytest.raises(TypeError, match="floating"):
        gated_add(base, x, gate.int(), scale)
    with pytest.raises(TypeError, match="floating"):
        unit(torch.ones(3, dtype=torch.int64), SHORTEST)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_rounded_once(size, threads):
    for operator, exact, inputs in cases(size, torch.bfloat16):
        with torch.no_grad():
            truth = exact(*(x.double() for x in inputs))
            bar = 1.25 * relative(truth.bfloat16(), truth)
            assert relative(operator(*inputs), truth) <= max(bar, 1e-3)


def test_gradients_in_bfloat16_are_near_the_exact_ones():
    for operator, exact, inputs in cases(768, torch.bfloat16):
        grad = torch.randn(inputs[0].shape).bfloat16()
        found = with_gradients(operator, inputs, grad)
        truth = with_gradients(exact, [x.double() for x in inputs], grad.double())
        for ours, theirs in zip(found, truth, strict=True):
            assert relative(ours, theirs) <= 1.25 * relative(theirs.bfloat16(), theirs)


def test_a_second_derivative_is_pytorchs():
    for operator, exact, inputs in [*cases(16, torch.float32), *head_cases(16, torch.float32)]:
        seconds = []
        for function, dtype in ((operator, torch.float32), (exact, torch.float64)):
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            y = function(*leaves)
            first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
            seconds.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
        for ours, theirs in zip(*seconds, strict=True):
            assert relative(ours, theirs) < 1e-5


def test_a_row_has_the_same_bits_in_any_batch():
    for operator, _, (first, second) in cases(60, torch.float32):
        whole = operator(first, second)
        alone = second[1:, 5:6] if second.dim() == 3 else second
        assert torch.equal(operator(first[1:, 5:6], alone), whole[1:, 5:6])


def test_nan_and_infinity_stay_in_their_row():
    for operator, _, (first, second) in cases(60, torch.float32):
        clean = operator(first, second)
        for bad in (float("nan"), float("inf")):
            dirty = first.clone()
            dirty[0, 3, 7] = bad
            y = operator(dirty, second)
            assert not y[0, 3].isfinite().all()
            y[0, 3] = clean[0, 3]
            assert torch.equal(y, clean)


def test_large_gates_saturate():
    gate = torch.tensor([[-1e4, -200.0, -88.0, 88.0, 200.0, 1e4]])
    y = swiglu(gate, torch.ones_like(gate))
    assert y[0, :3].abs().max() < 1e-30
    assert torch.equal(y[0, 3:], gate[0, 3:])


def test_inputs_that_are_not_contiguous_and_outputs_full_of_nan(monkeypatch):
    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    x, up, weight = torch.randn(60, 37).T, torch.randn(60, 37).T, torch.randn(120)[::2]
    expected = exact_norm(x.double(), weight.double()), exact_gate(x.double(), up.double())
    empty = torch.empty_like
    monkeypatch.setattr(pointwise.torch, "empty_like", poisoned)
    assert relative(rms_norm(x, weight, EPS), expected[0]) < 1e-6
    assert relative(swiglu(x, up), expected[1]) < 1e-6


def test_float64_and_empty_inputs_take_pytorchs_operations():
    x, weight = torch.randn(3, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    assert relative(rms_norm(x, weight, EPS), exact_norm(x, weight)) < 1e-14
    assert rms_norm(torch.empty(0, 16), torch.ones(16), EPS).shape == (0, 16)
    assert swiglu(torch.empty(2, 0, 16), torch.empty(2, 0, 16)).shape == (2, 0, 16)
