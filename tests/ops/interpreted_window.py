"""The Triton kernels of window attention in Triton's interpreter: every promise of the operator, on
toy sizes that still cross tiles, chunks and documents.

Collected by `test_triton_window` in a process of its own; run alone as
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_window.py`.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from spectral_window.errors import UserError
from spectral_window.lab.bench.gpu_roofline import count
from spectral_window.ops import (
    WindowState,
    reference,
    rotate,
    triton_window_stream,
    window_attention,
)
from spectral_window.ops.triton_window import _find_stream, last_two_chunks
from spectral_window.ops.triton_window_stream import (
    Tiles,
    find_turns,
    stream_attention,
    stream_attention_backward,
)
from tests.contracts import operators
from tests.contracts.measure import relative, rms
from tests.contracts.operators import ATTENTION_CONTRACT, draw_qkv

# numpy tells of the NaN and infinities that some tests put in
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
THETA = 1e4
ATTEND = partial(window_attention, method="triton")


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16, so that toy sizes cross many of them."""
    cut = {"attend": (32, 16), "attend_queries": (16, 32), "attend_keys": (32, 16)}
    monkeypatch.setattr(triton_window_stream, "tiles", lambda kernel, *_: Tiles(*cut[kernel], 4, 1))


def near(mine: torch.Tensor, truth: torch.Tensor, bar: float = 2e-6) -> bool:
    mine, truth = mine.detach().double(), truth.detach().double()
    return rms(mine - truth) <= bar * max(rms(truth), 1e-2)


@pytest.mark.parametrize("promise", ATTENTION_CONTRACT, ids=lambda f: f.__name__)
def test_window_attention_keeps(promise):
    promise(ATTEND)


def window_plus_one(q, k, v, *, window, state=None):
    return ATTEND(q, k, v, window=window + 1, state=state)


def state_not_carried(q, k, v, *, window, state=None):
    return ATTEND(q, k, v, window=window)


def bfloat16_state(q, k, v, *, window, state=None):
    out, state = ATTEND(q, k, v, window=window, state=state)
    return out, state._replace(key=state.key.bfloat16().float())


@pytest.mark.parametrize(
    ("bug", "caught_by"),
    [
        (window_plus_one, operators.attention_sees_exactly_its_window),
        (state_not_carried, operators.attention_carries_its_state),
        (bfloat16_state, operators.attention_carries_its_state),
    ],
    ids=lambda f: f.__name__,
)
def test_deliberate_bug_is_caught(bug, caught_by):
    with pytest.raises(AssertionError):
        caught_by(bug)


def run(method, dtype, qkv, window, given, ring=None, begin=None, positions=None, theta=THETA):
    """(out, key, value, position, gradients of q, k, v and of the ring)"""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (*qkv, *(ring or ()))]
    state = None if ring is None else WindowState(*inputs[3:], begin)
    out, after = window_attention(
        *inputs[:3],
        window=window,
        rope_theta=theta,
        state=state,
        positions=positions,
        method=method,
    )
    outputs = (out, *after[:2])
    gradients = torch.autograd.grad(outputs, inputs, [x.to(dtype) for x in given])
    return *(x.detach() for x in outputs), after.position, *gradients


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("window", "time"), [(1, 37), (7, 100), (16, 64), (40, 130)])
def test_outputs_states_and_gradients_across_tiles(window, time):
    qkv = draw_qkv(1, time, 2, 6, 5)
    given = [torch.randn(1, time, 2, 5), torch.randn(1, 2 * window, 2, 6)]
    given.append(torch.randn(1, 2 * window, 2, 5))
    mine = run("triton", torch.float32, qkv, window, given)
    truth = run("reference", torch.float64, qkv, window, given)
    for got, exact in zip(mine, truth, strict=True):
        assert near(got, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (18, 80)])
def test_half_precision_in_views_of_one_projection(dtype, key_dim, value_dim):
    window, time, sizes = 20, 70, [2 * key_dim] * 2 + [2 * value_dim]
    parts = torch.randn(1, time, sum(sizes) + 7)[..., 3:-4].to(dtype).split(sizes, -1)
    qkv = [x.unflatten(-1, (2, -1)) for x in parts]
    given = [torch.randn(1, time, 2, value_dim, dtype=dtype)]
    given += [torch.zeros(1, 2 * window, 2, size, dtype=dtype) for size in (key_dim, value_dim)]
    mine = run("triton", dtype, qkv, window, given)
    truth = run("reference", torch.float64, qkv, window, given)
    rounding = relative(truth[0].to(dtype), truth[0])
    assert relative(mine[0], truth[0]) <= 2.5 * rounding  # weights and turned rows are rounded too
    for got, exact in zip(mine[4:], truth[4:], strict=True):
        assert relative(got, exact) <= 4 * rounding


def layouts(time: int, begins: list[int]) -> dict[str, torch.Tensor | None]:
    """positions of two rows, of which the first goes on and the second begins a document."""
    go_on, fresh = torch.arange(time) + begins[0], torch.arange(time)
    packed = torch.cat((go_on[: time // 3], fresh[: time - time // 3]))
    padded = torch.full((time,), -1)
    padded[5:20], padded[31:40] = go_on[:15], go_on[15:24]
    padded[45:70] = fresh[:25]
    return {
        "plain": None,
        "packed": torch.stack((packed, fresh)),
        "padded": torch.stack((padded, torch.full((time,), -1))),
    }


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
@pytest.mark.parametrize("remembered", [0, 13, 37])
def test_documents_padding_and_states(layout, remembered):
    window, time = 12, 75
    qkv = draw_qkv(2, time, 1, 6, 5)
    _, before = window_attention(*draw_qkv(2, remembered, 1, 6, 5), window=window, method="chunked")
    positions = layouts(time, before.position.tolist())[layout]
    given = [torch.randn(2, time, 1, 5), *(torch.randn_like(x) for x in before[:2])]
    call = (qkv, window, given, before[:2], before.position, positions)
    mine, truth = run("triton", torch.float32, *call), run("chunked", torch.float64, *call)
    live = (before.value != 0).any(-1).any(-1)  # a dead slot's gradient means nothing
    for index, (got, exact) in enumerate(zip(mine, truth, strict=True)):
        if index >= len(mine) - 2:
            got, exact = got[live], exact[live]
        assert near(got, exact), index
    assert torch.equal(mine[3], truth[3])


@pytest.mark.usefixtures("small")
def test_a_ring_of_another_method_is_carried_on_bit_by_bit():
    q, k, v = draw_qkv(2, 45, 1, 6, 5)
    attend = partial(window_attention, window=6, rope_theta=THETA)
    _, end = attend(q, k, v, method="chunked")
    for cut in (1, 17, 44):
        _, state = attend(q[:, :cut], k[:, :cut], v[:, :cut], method="triton")
        _, state = attend(q[:, cut:], k[:, cut:], v[:, cut:], state=state, method="triton")
        assert all(torch.equal(a, b) for a, b in zip(state, end, strict=True))


@pytest.mark.usefixtures("small")
def test_angles_are_exact_a_million_positions_on():
    window, time, first = 8, 40, 1_000_003
    qkv = draw_qkv(1, time, 1, 16, 5)
    ring = [torch.randn(1, 2 * window, 1, size) for size in (16, 5)]
    begin = torch.tensor([first])
    options = {"window": window, "rope_theta": THETA}
    out, after = window_attention(*qkv, state=WindowState(*ring, begin), method="triton", **options)
    state = WindowState(*(x.double() for x in ring), begin)
    exact, end = window_attention(
        *(x.double() for x in qkv), state=state, method="reference", **options
    )
    assert near(out, exact)
    assert near(after.key, end.key)
    # and in the kernels' own table, whose far places only a long row reaches
    tables = find_turns(qkv[0], THETA, 16, 8 + 3, 8, 500_000)
    place = torch.tensor([*range(8), 0, 500_000, 1_000_000])
    angle = place[:, None].double() * THETA ** -(torch.arange(0, 16, 2).double() / 16)
    assert torch.allclose(tables[0].double(), angle.cos(), rtol=0, atol=1e-7)
    assert torch.allclose(tables[1].double(), angle.sin(), rtol=0, atol=1e-7)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_query_does_not_see_reaches_neither_it_nor_a_gradient(bad):
    """With positions; without them a NaN may spread within its tile, as in plain chunks."""
    window, time, edge = 8, 40, 21
    clean = draw_qkv(1, time, 1, 4, 4)
    positions = torch.cat((torch.arange(edge), torch.arange(time - edge)))[None]
    attend = partial(ATTEND, window=window, positions=positions)
    truth, _ = attend(*clean)
    at, document = positions[0], torch.arange(time) >= edge
    for place, which in itertools.product((3, 17, 25), range(3)):
        inputs = [x.clone() for x in clean]
        inputs[which][:, place] = bad
        for x in inputs:
            x.requires_grad_()
        out, _ = attend(*inputs)
        seen = reference.visible(at[:, None], at, window) & (document[:, None] == document)
        reached = torch.arange(time) == place if which == 0 else seen[:, place]
        assert torch.equal(out[:, ~reached], truth[:, ~reached])
        assert not out[:, reached].isfinite().all()
        gradients = torch.autograd.grad(out[:, reached].sum(), inputs)
        lost_keys = seen[reached].any(0)
        for gradient, lost in zip(gradients, (reached, lost_keys, lost_keys), strict=True):
            assert gradient[:, ~lost].isfinite().all()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", [1e6, torch.nan])
def test_the_future_never_reaches_the_past(how):
    window, time, edge = 8, 70, 37
    qkv = draw_qkv(1, time, 1, 4, 4)
    out, _ = ATTEND(*qkv, window=window, rope_theta=THETA)
    spoiled = [torch.cat((x[:, :edge], x[:, edge:] * how), 1) for x in qkv]
    other, _ = ATTEND(*spoiled, window=window, rope_theta=THETA)
    safe = edge if how == 1e6 else edge // 32 * 32
    assert torch.equal(other[:, :safe], out[:, :safe])


@pytest.mark.usefixtures("small")
def test_every_element_of_every_buffer_is_written(monkeypatch):
    """torch.empty filled with NaN: what a kernel leaves out would show."""
    window, time = 12, 75
    qkv = draw_qkv(2, time, 1, 6, 5)
    ring = [torch.randn(2, 2 * window, 1, size) for size in (6, 5)]
    begin = torch.tensor([30, 0])
    given = [torch.randn(2, time, 1, 5), *(torch.randn_like(x) for x in ring)]
    cases = [(qkv, window, given)]
    cases.append((qkv, window, given, ring, begin, layouts(time, [30, 0])["padded"]))
    clean = [run("triton", torch.float32, *case) for case in cases]
    new, like = torch.Tensor.new_empty, torch.empty_like

    def spoiled(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **b: spoiled(new(*a, **b)))
    monkeypatch.setattr(torch, "empty_like", lambda x: spoiled(like(x)))
    for case, truth in zip(cases, clean, strict=True):
        for got, exact in zip(run("triton", torch.float32, *case), truth, strict=True):
            assert torch.equal(got, exact)


@pytest.mark.parametrize("wanted", [{"q"}, {"v"}, {"q", "k", "v"}])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_any_subset_of_inputs_and_again(wanted, packed):
    q, k, v = draw_qkv(1, 30, 1, 4, 3)
    positions = None
    if packed:
        positions = torch.cat((torch.arange(11), torch.tensor([-1]), torch.arange(18)))[None]

    def twice(dtype, method):
        inputs = [
            x.detach().to(dtype).requires_grad_(name in wanted)
            for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        leaves = [x for x in inputs if x.requires_grad]
        out, _ = window_attention(
            *inputs, window=8, rope_theta=THETA, positions=positions, method=method
        )
        first = torch.autograd.grad((out**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        return *first, *second

    pairs = zip(twice(torch.float32, "triton"), twice(torch.float64, "chunked"), strict=True)
    assert all(near(mine, exact, 4e-6) for mine, exact in pairs)


@pytest.mark.parametrize("documents", [False, True])
def test_registered_operators_pass_opcheck(documents):
    q, k, v = (x.requires_grad_() for x in draw_qkv(1, 6, 1, 6, 5))
    check = torch.library.opcheck
    table = (None, None)
    if documents:
        stream = _find_stream(torch.arange(6)[None], 4, 0)
        table = (stream.low.int(), stream.order.int())
    call = (q, k, v, 4, THETA, *table)
    check(stream_attention.registered, call)
    check(last_two_chunks.registered, (k, v, 4, THETA))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    out, lse = stream_attention(*plain)
    check(stream_attention_backward.registered, (*plain, out, lse, torch.randn_like(out)))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kernel", ["attend", "attend_queries", "attend_keys"])
def test_the_roofline_counts_what_the_kernels_load_and_store(kernel, monkeypatch):
    window, time, key, value = 12, 75, 16, 32
    q, k, v = draw_qkv(1, time, 1, key, value)
    moved = {"load": 0, "store": 0, "dot": 0}
    builder = InterpreterBuilder

    def counted(name, method, size):
        def method_and_count(self, *inputs):
            if counted.on:
                moved[name] += size(*inputs)
            return method(self, *inputs)

        monkeypatch.setattr(builder, method.__name__, method_and_count)

    counted.on = False
    launch = triton_window_stream._Call.launch

    def launch_counted(self, name, *inputs):
        counted.on = name == kernel
        launch(self, name, *inputs)
        counted.on = False

    monkeypatch.setattr(triton_window_stream._Call, "launch", launch_counted)
    load, store, dot = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
    )
    counted("load", load, lambda at, mask, *_: elements(at, mask))
    counted("store", store, lambda at, value, mask, *_: elements(at, mask))
    monkeypatch.setattr(
        builder,
        "create_dot",
        lambda self, a, b, *rest: (
            moved.__setitem__("dot", moved["dot"] + counted.on * 2 * a.data.size * b.data.shape[1]),
            dot(self, a, b, *rest),
        )[1],
    )
    gradients = [torch.randn(1, time, 1, value)]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = ATTEND(*leaves, window=window, rope_theta=THETA)
    torch.autograd.grad(out, leaves, gradients)
    cut = triton_window_stream.tiles(kernel)
    counts = count(kernel, time, window, key, value, 4, cut.own, cut.met)
    assert moved["load"] == counts.loads + counts.turns
    assert moved["store"] == counts.stores
    assert moved["dot"] == counts.flops


def elements(at, mask) -> int:
    """Bytes that a masked load or store touches."""
    return int(mask.data.sum()) * at.dtype.element_ty.primitive_bitwidth // 8


def test_positions_that_do_not_count_on_are_refused_where_the_host_can_see_them():
    q, k, v = draw_qkv(1, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="row 0, column 1"):
        ATTEND(q, k, v, window=2, positions=torch.tensor([[0, 5, 6]]))


def test_float64_is_refused_by_name():
    q, k, v = draw_qkv(1, 3, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(UserError, match="'triton'"):
        ATTEND(q, k, v, window=2)


def test_a_row_alone_and_in_a_batch_is_the_same_bit_by_bit():
    qkv = draw_qkv(3, 20, 1, 4, 4)
    out, _ = ATTEND(*qkv, window=6, rope_theta=THETA)
    alone, _ = ATTEND(*(x[1:2] for x in qkv), window=6, rope_theta=THETA)
    assert torch.equal(alone, out[1:2])


def test_rotation_is_that_of_the_paper():
    """Against turning first and attending without RoPE."""
    q, k, v = draw_qkv(1, 40, 1, 10, 4)
    at = torch.arange(40)
    out, _ = ATTEND(q, k, v, window=6, rope_theta=100.0)
    turned = (rotate(x.double(), at, 100.0) for x in (q, k))
    assert near(out, reference.window(*turned, v.double(), 6))
