"""The window in compiled code against float64 products: sizes at the edges, states, documents,
gradients, and NaN in every place that must not be read."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("numba")

from spectral_window.ops import WindowState, reference, rotate, window_attention
from spectral_window.ops.compiled.window import window_attention as operator
from spectral_window.ops.compiled.window import window_attention_backward
from tests.contracts.measure import relative, rms
from tests.contracts.operators import draw_qkv

THETA = 1e4


def near(mine: torch.Tensor, truth: torch.Tensor, bar: float = 2e-6) -> bool:
    mine, truth = mine.detach().double(), truth.detach().double()
    return rms(mine - truth) <= bar * max(rms(truth), 1e-2)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 300])
def test_every_length_at_the_edges_of_chunks_and_segments(window):
    for time in sorted({1, window - 1, window, window + 1, 63, 256, 257, 1000} - {0}):
        q, k, v = draw_qkv(1, time, 2, 6, 5)
        out, _ = window_attention(q, k, v, window=window, rope_theta=THETA, method="tiled")
        at = torch.arange(time)
        q, k = rotate(q.double(), at, THETA), rotate(k.double(), at, THETA)
        assert near(out, reference.window(q, k, v.double(), window))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(2, 2), (6, 1), (64, 64), (80, 128), (128, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_head_size_in_views_of_one_projection(key_dim, value_dim, dtype):
    heads, window, time = 3, 8, 70
    sizes = [heads * key_dim] * 2 + [heads * value_dim]
    parts = torch.randn(2, time, sum(sizes) + 7)[..., 3:-4].to(dtype).split(sizes, -1)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in parts)
    out, state = window_attention(q, k, v, window=window, rope_theta=THETA, method="tiled")
    exact, end = window_attention(
        q.double(), k.double(), v.double(), window=window, rope_theta=THETA, method="reference"
    )
    if dtype == torch.bfloat16:
        assert relative(out, exact) <= 1.25 * relative(exact.bfloat16(), exact)
        assert torch.equal(state.value, end.value.bfloat16())
    else:
        assert near(out, exact)
        assert near(state.key, end.key)
        assert torch.equal(state.value, end.value.float())


def layouts(time: int, begins: list[int]) -> dict[str, torch.Tensor | None]:
    """positions of two rows, of which the first goes on and the second begins a document."""
    go_on = torch.arange(time) + begins[0]
    fresh = torch.arange(time)
    packed = torch.cat((go_on[: time // 3], fresh[: time - time // 3]))
    padded = torch.full((time,), -1)
    padded[5:20], padded[31:50] = go_on[:15], go_on[15:34]
    padded[60:90] = fresh[:30]
    return {
        "plain": None,
        "packed": torch.stack((packed, fresh)),
        "padded": torch.stack((padded, torch.full((time,), -1))),
    }


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
@pytest.mark.parametrize("remembered", [0, 13, 24, 37])
def test_outputs_states_and_gradients_with_states_and_documents(layout, remembered):
    window, time = 12, 300
    leaves = {"q": 0, "k": 1, "v": 2}
    qkv = draw_qkv(2, time, 2, 6, 5)
    _, before = window_attention(*draw_qkv(2, remembered, 2, 6, 5), window=window)
    positions = layouts(time, before.position.tolist())[layout]
    given = [torch.randn(2, time, 2, 5), *(torch.randn_like(x) for x in before[:2])]

    def run(dtype, method):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (*qkv, *before[:2])]
        state = WindowState(*inputs[3:], before.position)
        out, after = window_attention(
            *inputs[:3],
            window=window,
            rope_theta=THETA,
            state=state,
            positions=positions,
            method=method,
        )
        outputs = (out, *after[:2])
        gradients = torch.autograd.grad(outputs, inputs, [x.to(dtype) for x in given])
        return *outputs, after.position, *gradients[: len(leaves)], *gradients[3:]

    mine, truth = run(torch.float32, "tiled"), run(torch.float64, "chunked")
    live = (before.value != 0).any(-1).any(-1)  # a dead slot's gradient means nothing
    for index, (got, exact) in enumerate(zip(mine, truth, strict=True)):
        if index >= len(mine) - 2:
            got, exact = got[live], exact[live]
        assert near(got, exact)


@pytest.mark.parametrize("wanted", [{"q"}, {"k"}, {"v"}, {"q", "v"}, {"q", "k", "v"}])
def test_gradients_reach_any_subset_of_inputs_and_again(wanted):
    q, k, v = draw_qkv(1, 40, 2, 4, 3)

    def twice(dtype, method):
        inputs = [
            x.detach().to(dtype).requires_grad_(name in wanted)
            for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        leaves = [x for x in inputs if x.requires_grad]
        out, _ = window_attention(*inputs, window=8, rope_theta=THETA, method=method)
        first = torch.autograd.grad((out**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        return *first, *second

    pairs = zip(twice(torch.float32, "tiled"), twice(torch.float64, "chunked"), strict=True)
    assert all(near(mine, exact, 4e-6) for mine, exact in pairs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_query_does_not_see_reaches_neither_it_nor_a_gradient(bad):
    window, time = 8, 40
    clean = draw_qkv(1, time, 1, 4, 4)
    truth, _ = window_attention(*clean, window=window, method="tiled")
    for place, which in itertools.product((0, 9, 17, 39), range(3)):
        inputs = [x.clone() for x in clean]
        inputs[which][:, place] = bad
        for x in inputs:
            x.requires_grad_()
        out, _ = window_attention(*inputs, window=window, method="tiled")
        at = torch.arange(time)
        reached = at == place if which == 0 else reference.visible(at, torch.tensor(place), window)
        assert torch.equal(out[:, ~reached], truth[:, ~reached])
        assert not out[:, reached].isfinite().all()
        chosen = int(at[~reached][-1])
        gradients = torch.autograd.grad(out[:, chosen].sum(), inputs)
        seen = reference.visible(at[reached][:, None], at, window).any(0)  # by a query that is lost
        for gradient, lost in zip(gradients, (reached, seen, seen), strict=True):
            assert gradient[:, ~lost].isfinite().all()


def test_a_step_is_the_same_with_and_without_gradients_for_rows_anywhere():
    q, k, v = draw_qkv(3, 1, 2, 6, 5)
    _, state = window_attention(*draw_qkv(3, 30, 2, 6, 5), window=4, rope_theta=THETA)
    state = state._replace(position=torch.tensor([30, 30, 30]))
    for positions in (None, torch.tensor([[30], [0], [-1]])):
        kept = [x.clone() for x in state]

        def run(learns, positions=positions):
            query = q.clone().requires_grad_(learns)
            return window_attention(
                query, k, v, window=4, rope_theta=THETA, state=state, positions=positions
            )

        (out, after), (truth, end) = run(False), run(True)
        assert near(out, truth)
        for mine, exact in zip(after, end, strict=True):
            assert near(mine, exact)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_decoding_continues_a_prompt_with_the_same_bits_in_the_ring():
    q, k, v = draw_qkv(2, 90, 2, 16, 16)
    whole, end = window_attention(q, k, v, window=8, rope_theta=THETA)
    _, state = window_attention(q[:, :50], k[:, :50], v[:, :50], window=8, rope_theta=THETA)
    for t in range(50, 90):
        cut = slice(t, t + 1)
        out, state = window_attention(
            q[:, cut], k[:, cut], v[:, cut], window=8, rope_theta=THETA, state=state
        )
        assert near(out, whole[:, cut])
    assert all(torch.equal(a, b) for a, b in zip(state, end, strict=True))


def test_transformations_of_torch_func_go_by_plain_torch():
    q, k, v = draw_qkv(3, 20, 1, 4, 4)
    attend = partial(window_attention, window=4, rope_theta=THETA)
    mapped = torch.func.vmap(lambda *x: attend(*(y[None] for y in x))[0][0])(q, k, v)
    assert near(mapped, attend(q, k, v)[0])
    _, tangent = torch.func.jvp(lambda x: attend(x, k, v)[0], (q,), (torch.ones_like(q),))
    query = q.clone().requires_grad_()
    out, _ = attend(query, k, v)
    assert near(tangent.sum(), torch.autograd.grad(out.sum(), query)[0].sum(), 1e-5)


@pytest.mark.parametrize("theta", [None, THETA])
@pytest.mark.parametrize("remembered", [False, True])
def test_registered_operators_pass_opcheck(theta, remembered):
    q, k, v = (x.requires_grad_() for x in draw_qkv(2, 20, 2, 6, 5))
    ring, begin = (None, None), None
    if remembered:
        _, state = window_attention(*draw_qkv(2, 9, 2, 6, 5), window=4)
        ring, begin = [x.requires_grad_() for x in state[:2]], state.position
    call = (q, k, v, 4, theta, *ring, begin, None, False)
    torch.library.opcheck(operator, call)
    given = torch.randn(2, 20, 2, 5), torch.randn(2, 8, 2, 6), torch.randn(2, 8, 2, 5)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    torch.library.opcheck(window_attention_backward, (*plain[:-1], *given))
