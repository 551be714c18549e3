"""Linear maps row by row equal the exact product, and step aside wherever they cannot serve."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_window.nn.layers import project
from spectral_window.ops import resolve
from spectral_window.ops.compiled import linear
from spectral_window.ops.linear import linear_maps
from tests.contracts.measure import relative

pytest.importorskip("numba")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 60, 63, 768])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (4,), (9,)])
@torch.no_grad()
def test_rows_equal_the_exact_product_in_float32(size, shape, threads):
    x = torch.randn(*shape, size)
    weights = [torch.randn(rows, size) for rows in (1, 2, 3, 61)]
    biases = [None, torch.randn(2), None, torch.randn(61)]
    assert resolve("linear", "rows", x)[0] == "rows"
    found = linear_maps(x, weights, biases, method="rows")
    for y, w, b in zip(found, weights, biases, strict=True):
        exact = x.double() @ w.double().T + (0 if b is None else b.double())
        assert y.shape == exact.shape
        # a sum of 768 in the four lanes of a processor without AVX errs by 7e-7 of one number
        assert relative(y, exact) < 2e-6


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size", [2, 16, 60, 64, 66, 768])
@torch.no_grad()
def test_rows_in_bfloat16_are_rounded_once(size, native, threads, monkeypatch):
    # where the processor has no products of its own, both are the same way
    monkeypatch.setattr(linear, "NATIVE", native and linear.NATIVE)
    x = torch.randn(2, size).bfloat16()
    w, b = torch.randn(300, size).bfloat16(), torch.randn(300).bfloat16()
    (y,) = linear_maps(x, [w], [b], method="rows")
    exact = x.double() @ w.double().T + b.double()
    assert relative(y, exact) <= 1.25 * relative(exact.bfloat16(), exact)


@torch.no_grad()
def test_a_vector_gives_the_same_bits_in_any_batch_and_beside_any_matrices():
    x, w = torch.randn(4, 60), torch.randn(33, 60)
    (alone,) = linear_maps(x[2:3], [w], [None], method="rows")
    both = linear_maps(x, [torch.randn(5, 60), w], [None, None], method="rows")
    assert torch.equal(both[1][2:3], alone)


@torch.no_grad()
def test_nan_and_infinity_stay_in_their_vector():
    x, w = torch.randn(3, 60), torch.randn(33, 60)
    clean = linear_maps(x, [w], [None])[0]
    x[1, 7] = float("nan")
    x[2, 7] = float("inf")
    y = linear_maps(x, [w], [None])[0]
    assert torch.equal(y[0], clean[0])
    assert y[1].isnan().all()
    assert y[2].isinf().all()


@torch.no_grad()
def test_inputs_that_are_not_contiguous_are_read_right():
    x, w = torch.randn(60, 3).T, torch.randn(60, 33).T
    assert relative(linear_maps(x, [w], [None])[0], x.double() @ w.double().T) < 5e-7
    assert relative(linear_maps(x, [w.contiguous()], [None])[0], x.double() @ w.double().T) < 5e-7


def test_gradients_autocast_and_many_vectors_take_the_matrix_product():
    x = torch.randn(1, 60)
    assert resolve("linear", "auto", x)[0] == "matmul"
    with torch.no_grad():
        assert resolve("linear", "auto", x)[0] == "rows"
        assert resolve("linear", "auto", torch.randn(5, 60))[0] == "matmul"
        assert resolve("linear", "auto", x.double())[0] == "matmul"
        assert resolve("linear", "auto", torch.randn(1, 61).bfloat16())[0] == "matmul"
        assert resolve("linear", "auto", torch.randn(0, 60))[0] == "matmul"
        with torch.autocast("cpu", torch.bfloat16):
            assert resolve("linear", "auto", x)[0] == "matmul"
    layer = nn.Linear(60, 7)
    project(x.requires_grad_(), layer)[0].sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


@torch.no_grad()
def test_layers_that_are_more_than_a_matrix_are_called():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, plain, twice, hooked = torch.randn(1, 8), nn.Linear(8, 3), Twice(8, 3), nn.Linear(8, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    found = project(x, plain, twice, hooked)
    for y, layer in zip(found, (plain, twice, hooked), strict=True):
        assert torch.allclose(y, layer(x), atol=1e-6)
    for layer in (plain, twice, hooked):
        assert torch.allclose(project(x, layer)[0], layer(x), atol=1e-6)


@torch.no_grad()
def test_sizes_that_do_not_fit_are_refused_as_torch_refuses_them():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear_maps(torch.randn(1, 8), [torch.randn(3, 9)], [None])
    with pytest.raises(RuntimeError, match="dtype"):
        linear_maps(torch.randn(1, 8), [torch.randn(3, 8).bfloat16()], [None])
