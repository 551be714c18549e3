"""The delta-rule memory: each method, split and packing against the recurrence per document."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_window.ops import delta_memory as memory_op
from spectral_window.ops import reference
from tests.contracts import methods, operators
from tests.contracts.measure import block_error, relative
from tests.contracts.operators import draw_memory

CHUNK = 64
CHUNKED = partial(memory_op, method="chunked")
DIRECT = partial(memory_op, method="reference")
WHOLE = methods.here("delta")


def stepwise(*tensors, decay=None, state=None, positions=None):
    """One token at a time, as in decoding."""
    parts = [tensors[2][:, :0]]
    for t in range(tensors[0].shape[1]):
        q, k, v, beta, less, at = (
            None if x is None else x[:, t : t + 1] for x in (*tensors, decay, positions)
        )
        out, state = memory_op(q, k, v, beta, decay=less, state=state, positions=at, method="step")
        parts.append(out)
    return torch.cat(parts, 1), state


def run(method, *tensors, **options):
    return (
        stepwise(*tensors, **options)
        if method.startswith("step")
        else memory_op(*tensors, **options, method=method)
    )


@pytest.mark.parametrize("memory", [CHUNKED, stepwise], ids=["chunked", "step"])
def test_memory_meets_the_float64_bar(memory):
    operators.memory_equals_the_recurrence(memory, torch.float64)


def test_memory_by_float32_products_keeps(monkeypatch):
    # what other devices run; on a CPU it is not chosen, and would otherwise never be tried
    module = sys.modules["spectral_window.ops.delta_memory"]  # the package's name is the function
    monkeypatch.setattr(module, "EXACT", ())
    operators.memory_equals_the_recurrence(CHUNKED, bar=3e-6)
    operators.memory_recalls_what_was_written_last(CHUNKED)
    operators.memory_carries_its_state(CHUNKED)


@pytest.mark.parametrize("agree", [0.0, 3.0, 1e4])
def test_keys_that_agree_are_no_harder(agree):
    """Where all keys are equal a chunk's system is a full triangle of ones: powers of it would
    overflow, substitution does not."""
    *given, _ = draw_memory(2, 300, 1, 32, 32, agree=agree)
    given[3] = torch.ones_like(given[3])
    truth, _ = DIRECT(*given)
    out, _ = CHUNKED(*given)
    assert block_error(out.flatten(2), truth.flatten(2)) <= 2e-6


# --- deliberate bugs: a contract that none of these breaks would be no contract -----------------


def no_delta_term(q, k, v, beta, *, decay=None, state=None):
    """Linear attention: what was there is not replaced."""
    S = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[3]) if state is None else state
    parts = []
    for t in range(q.shape[1]):
        if decay is not None:
            S = S * torch.exp(-decay[:, t, :, None, None])
        S = S + (beta[:, t, :, None] * k[:, t])[..., None] * v[:, t, :, None]
        parts.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(parts, 1), S


def beta_forgotten(q, k, v, beta, **options):
    return CHUNKED(q, k, v, torch.ones_like(beta), **options)


def state_not_carried(q, k, v, beta, *, decay=None, state=None):
    return CHUNKED(q, k, v, beta, decay=decay)


def bf16_state(q, k, v, beta, **options):
    out, state = CHUNKED(q, k, v, beta, **options)
    return out, state.bfloat16().float()


def decay_forgotten(q, k, v, beta, *, decay=None, state=None):
    return CHUNKED(q, k, v, beta, state=state)


def reads_before_it_writes(q, k, v, beta, **options):
    late = torch.cat((q[:, 1:], q[:, -1:]), 1)
    out, state = CHUNKED(late, k, v, beta, **options)
    return torch.cat((torch.zeros_like(out[:, :1]), out[:, :-1]), 1), state


@pytest.mark.parametrize(
    ("bug", "caught_by"),
    [
        (no_delta_term, operators.memory_equals_the_recurrence),
        (no_delta_term, operators.memory_recalls_what_was_written_last),
        (beta_forgotten, operators.memory_equals_the_recurrence),
        (state_not_carried, operators.memory_equals_the_recurrence),
        (state_not_carried, operators.memory_recalls_what_was_written_last),
        (state_not_carried, operators.memory_carries_its_state),
        (bf16_state, operators.memory_equals_the_recurrence),
        (bf16_state, operators.memory_carries_its_state),
        (decay_forgotten, operators.memory_equals_the_recurrence),
        (reads_before_it_writes, operators.memory_equals_the_recurrence),
    ],
    ids=lambda f: f.__name__,
)
def test_deliberate_memory_bug_is_caught(bug, caught_by):
    with pytest.raises(AssertionError):
        caught_by(bug)


# --- documents and padding ----------------------------------------------------------------------


@st.composite
def packed(draw):
    """Rows of (padding before, document length), and whether a state is given."""
    piece = st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 7, 63, 64, 65, 130]))
    rows = draw(st.lists(st.lists(piece, max_size=3), min_size=1, max_size=3))
    return rows, draw(st.booleans())


@settings(max_examples=25)
@given(packed(), st.sampled_from(WHOLE), st.booleans(), st.data())
def test_documents_packed_together_are_each_document_alone(case, method, forget, data):
    """Also: padding takes no part, a row of padding alone keeps its state, and a NaN stays where it
    is."""
    rows, known = case
    time = 1 + max(sum(a + b for a, b in row) for row in rows)
    *room, less = (torch.full_like(x, torch.nan) for x in draw_memory(len(rows), time))
    state = torch.randn(len(rows), 2, 6, 5) if known else None
    expected, positions = torch.zeros(len(rows), time, 2, 5), torch.full((len(rows), time), -1)
    ends = torch.zeros(len(rows), 2, 6, 5) if state is None else state.clone()
    for b, row in enumerate(rows):
        at = 0
        for i, (gap, size) in enumerate(row):
            at += gap
            goes_on = known and i == 0 and data.draw(st.booleans())
            *text, decay = draw_memory(1, size)
            alone, end = DIRECT(
                *text,
                decay=decay if forget else None,
                state=state[b : b + 1] if goes_on else None,
            )
            for place, x in zip((*room, less), (*text, decay), strict=True):
                place[b, at : at + size] = x[0]
            expected[b, at : at + size], ends[b] = alone[0], end[0]
            positions[b, at : at + size] = torch.arange(size) + (5 if goes_on else 0)
            at += size
    out, final = run(
        method, *room, decay=less if forget else None, state=state, positions=positions
    )
    assert torch.equal(out[positions < 0], torch.zeros_like(out[positions < 0]))
    assert relative(out, expected) <= 2e-6
    assert relative(final, ends) <= 2e-6


@pytest.mark.parametrize("method", WHOLE)
def test_rows_of_padding_alone_give_zeros_and_keep_their_state(method):
    *given, _ = (torch.full_like(x, torch.nan, requires_grad=True) for x in draw_memory(2, 3))
    state = torch.randn(2, 2, 6, 5)
    out, end = run(method, *given, state=state, positions=torch.full((2, 3), -1))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(end, state)


@pytest.mark.parametrize("how", [1.0, 1e3, torch.nan])
def test_a_changed_document_leaves_the_others_untouched(how):
    *given, decay = draw_memory(2, 150)
    cuts = torch.tensor([0, 20, 85, 150, 233, 300])
    out, _ = CHUNKED(*given, decay=decay, cu_seqlens=cuts)
    others = [x.clone() for x in given]
    for x in others:
        x[0, 20:85] = torch.randn_like(x[0, 20:85]) * how
    changed, _ = CHUNKED(*others, decay=decay, cu_seqlens=cuts)
    outside = torch.ones(2, 150, dtype=torch.bool)
    outside[0, 20:85] = False
    assert torch.equal(out[outside], changed[outside])


def test_offsets_say_the_same_as_positions():
    *given, _ = draw_memory(2, 10)
    positions = torch.tensor([[*range(4), *range(6)], [*range(10)]])
    for a, b in zip(
        memory_op(*given, positions=positions),
        memory_op(*given, cu_seqlens=torch.tensor([0, 4, 10, 20])),
        strict=True,
    ):
        assert torch.equal(a, b)


# --- causality ----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 63, 64, 65, 140]),
    st.sampled_from(WHOLE),
    st.sampled_from([1.0, 1e6, torch.inf, torch.nan]),
    st.data(),
)
def test_the_future_never_reaches_the_past(time, method, how, data):
    """To the bit; what is not finite, or soon is not, reaches the beginning of its chunk."""
    *given, _ = draw_memory(2, time)
    t = data.draw(st.integers(0, time - 1))
    others = [x.clone() for x in given]
    for x in others:
        x[:, t:] = torch.randn_like(x[:, t:]) * how
    out, _ = run(method, *given)
    changed, _ = run(method, *others)
    safe = t // CHUNK * CHUNK if method in ("chunked", "compiled") and how != 1.0 else t
    assert torch.equal(changed[:, :safe], out[:, :safe])


@pytest.mark.parametrize("method", WHOLE)
def test_no_gradient_flows_from_the_past_to_the_future(method):
    for t in (0, 63, 64, 100):
        leaves = [x.requires_grad_() for x in draw_memory(1, 130)]
        out, _ = run(method, *leaves[:4], decay=leaves[4])
        for gradient in torch.autograd.grad(out[:, t].sum(), leaves):
            assert not gradient[:, t + 1 :].any()


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, torch.tensor([[*range(7, 67), -1, *range(70)]])])
def test_gradients_of_all_inputs_agree_with_the_reference(positions):
    time = 131
    names = ("q", "k", "v", "beta", "decay", "state")
    drawn = [*draw_memory(1, time), torch.randn(1, 2, 6, 5)]
    weight, last = torch.randn(1, time, 2, 5), torch.randn(1, 2, 6, 5)
    found = {}
    for method in WHOLE:
        leaves = [x.clone().requires_grad_() for x in drawn]
        *given, decay, state = leaves
        out, end = run(method, *given, decay=decay, state=state, positions=positions)
        goal = (out * weight).sum() + (end * last).sum()
        found[method] = torch.autograd.grad(goal, leaves)
    for method in ("chunked", "step"):
        for name, mine, truth in zip(names, found[method], found["reference"], strict=True):
            assert relative(mine, truth) <= 4e-6, (method, name)


@pytest.mark.parametrize("method", ["chunked", "step"])
def test_first_and_second_derivatives_are_those_of_finite_differences(method, monkeypatch):
    import spectral_window.ops.chunked_delta as chunks

    monkeypatch.setattr(chunks, "CHUNK", 2)
    time = 1 if method == "step" else 5
    drawn = [*draw_memory(1, time, 1, 2, 2, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in (*drawn, torch.randn(1, 1, 2, 2, dtype=torch.float64))]
    for positions in (None, torch.tensor([[7, 8, 0, -1, 1][:time]])):

        def call(*x, at=positions):
            return memory_op(*x[:4], decay=x[4], state=x[5], positions=at, method=method)

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_no_state_is_kept_for_a_token():
    """What the backward pass needs grows by one state for 64 tokens, not for each."""
    size, time = 96, 512
    *given, _ = draw_memory(1, time, 1, size, size)
    leaves = [x.requires_grad_() for x in given]
    kept: dict[int, int] = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        CHUNKED(*leaves)
    assert sum(kept.values()) < 0.25 * time * size * size * 8


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    *given, _ = (x.to(dtype) for x in draw_memory(2, 150))
    truth, end = reference.delta(*(x.double() for x in given[:3]), given[3].double()[..., None])
    for method in ("chunked", "step"):
        out, state = run(method, *given)
        assert out.dtype == dtype
        assert state.dtype == torch.float32
        assert relative(out, truth) <= 1.25 * relative(truth.to(dtype), truth)
        assert relative(state, end) <= 2e-6


def test_neither_autocast_nor_the_precision_of_products_matters_on_a_cpu():
    *given, decay = draw_memory(2, 150, 1, 32, 32)
    leaves = [x.requires_grad_() for x in given]

    def results():
        out, state = memory_op(*leaves, decay=decay)
        step, _ = memory_op(*(x[:, :1] for x in leaves), state=state)
        return out, state, step, *torch.autograd.grad(out.sum() + step.sum(), leaves)

    plain = results()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = results()
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def stays_exact_over(steps: int) -> None:
    """The state in float32 is rounded at every step; the delta rule forgets the roundings."""
    *given, _ = draw_memory(1, 4096, 1, 8, 8)
    exact = [x.double() for x in given]
    state = truth = None
    worst = 0.0
    with torch.no_grad():
        for t in range(steps):
            at = slice(t % 4096, t % 4096 + 1)
            out, state = memory_op(*(x[:, at] for x in given), state=state)
            right, truth = memory_op(*(x[:, at] for x in exact), state=truth)
            if t % 64 == 63:
                worst = max(worst, relative(state, truth))
    assert state.nbytes == 8 * 8 * 4
    assert worst <= 2e-6
    assert relative(out, right) <= 2e-6


def test_thousands_of_steps_stay_exact():
    stays_exact_over(4096)


@pytest.mark.slow
def test_a_million_steps_stay_exact():
    stays_exact_over(1_000_000)


# --- compilers, shapes, errors ------------------------------------------------------------------


@pytest.mark.parametrize("time", [1, 70])
def test_torch_compile_has_no_graph_break(time):
    *given, decay = draw_memory(2, time)
    leaves = [x.requires_grad_() for x in (*given, decay)]
    traced = torch.compile(memory_op, fullgraph=True, backend="eager")
    found = []
    for op in (memory_op, traced):
        out, state = op(*leaves[:4], decay=leaves[4])
        found.append((out, state, *torch.autograd.grad(out.sum() + state.sum(), leaves)))
    for mine, truth in zip(*found, strict=True):
        assert relative(mine, truth) <= 2e-6


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_gives_nothing_and_keeps_the_state(shape):
    *given, decay = draw_memory(*shape)
    state = torch.randn(shape[0], 2, 6, 5)
    out, end = memory_op(*given, decay=decay, state=state)
    assert out.shape == (*shape, 2, 5)
    assert torch.equal(end, state)
    assert memory_op(*given)[1].shape == state.shape


@pytest.mark.parametrize(
    ("says", "error", "change"),
    [
        ("did you mean 'chunked'", ValueError, {"method": "chunkd"}),
        ("one token a call", ValueError, {"method": "step"}),
        (r"expected \[B, T, H, K\]", ValueError, {"k": torch.zeros(2, 5, 2, 7)}),
        ("one floating dtype", TypeError, {"v": torch.zeros(2, 5, 2, 5, dtype=torch.float64)}),
        ("beta has shape", ValueError, {"beta": torch.zeros(2, 5)}),
        ("decay is torch.int64", TypeError, {"decay": torch.zeros(2, 5, 2, dtype=torch.int64)}),
        ("as returned by a call", ValueError, {"state": torch.zeros(1, 2, 6, 5)}),
        ("as returned by a call", ValueError, {"state": torch.zeros(2, 2, 6, 5).bfloat16()}),
        ("expected", ValueError, {"positions": torch.zeros(2, 4, dtype=torch.int64)}),
        ("row 1, column 0", ValueError, {"positions": torch.tensor([[*range(5)], [*range(1, 6)]])}),
        ("meta", ValueError, {"beta": torch.zeros(2, 5, 2, device="meta")}),
    ],
)
def test_bad_arguments_are_named(says, error, change):
    given = dict(zip(("q", "k", "v", "beta", "decay"), draw_memory(2, 5), strict=True))
    with pytest.raises(error, match=says):
        memory_op(**(given | change))
