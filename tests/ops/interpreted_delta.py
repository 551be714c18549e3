"""The Triton kernels of the delta-rule memory in Triton's interpreter: every promise of the
operator, on toy sizes that still cross chunks, tiles of the state and documents.

Collected by `test_triton_delta` in a process of its own; run alone as
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_delta.py`.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.ops import delta_memory, triton_delta
from spectral_window.ops.documents import Documents
from tests.contracts import operators
from tests.contracts.measure import relative, rms
from tests.contracts.operators import MEMORY_CONTRACT, draw_memory

# numpy tells of the NaN and infinities that some tests put in
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
REMEMBER = partial(delta_memory, method="triton")
NAMES = ("q", "k", "v", "beta", "decay", "state")


@pytest.fixture
def small(monkeypatch):
    """Chunks of 16 and the smallest tiles, so that toy sizes cross many of them."""
    monkeypatch.setattr(triton_delta, "CHUNK", 16)
    monkeypatch.setattr(triton_delta, "tiles", lambda *_: triton_delta.Tiles(16, 16, 4, 1))


def draw(batch, time, heads, key_dim, value_dim, agree=0.0):
    """All inputs, and gradients of the output and of the final state."""
    inputs = draw_memory(batch, time, heads, key_dim, value_dim, agree=agree)
    inputs.append(torch.randn(batch, heads, key_dim, value_dim))
    return inputs, (torch.randn(batch, time, heads, value_dim), torch.randn_like(inputs[-1]))


def differentiated(method, inputs, given, positions=None, dtype=torch.float32):
    """(out, final state, the gradients of the inputs that are not None); the state and the gates
    are never in 16 bits."""
    exact = torch.promote_types(dtype, torch.float32)
    kinds = [dtype] * 3 + [exact] * 3
    leaves = [
        None if x is None else x.detach().to(kind).requires_grad_()
        for x, kind in zip(inputs, kinds, strict=True)
    ]
    *tensors, decay, state = leaves
    outputs = delta_memory(*tensors, decay=decay, state=state, positions=positions, method=method)
    asked = [x for x in leaves if x is not None]
    weights = [x.to(y.dtype) for x, y in zip(given, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, asked, weights)
    return *(x.detach() for x in outputs), *gradients


def worst(mine, truth):
    return max(relative(x, y) for x, y in zip(mine, truth, strict=True))


def documents(time):
    """Two rows: one goes on, ends, and begins again inside a chunk; one with padding before,
    inside and behind."""
    first, gap = time // 3, 5
    packed = torch.cat((torch.arange(first) + 7, torch.arange(3), torch.arange(time - first - 3)))
    padded = torch.full((time,), -1)
    padded[gap:first] = torch.arange(first - gap) + 2
    padded[first + gap : 2 * first] = torch.arange(first - gap) + first - gap + 2
    padded[2 * first + gap : -gap] = torch.arange(time - 2 * first - 2 * gap)
    return torch.stack((packed, padded))


@pytest.mark.parametrize("promise", MEMORY_CONTRACT, ids=lambda f: f.__name__)
def test_delta_memory_keeps(promise):
    if promise is operators.memory_equals_the_recurrence:
        promise(REMEMBER, times=(1, 64, 130))  # the interpreter takes its time
    else:
        promise(REMEMBER)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("shape", "forget", "packed"),
    [
        ((1, 1, 2, 6, 5), True, False),
        ((1, 15, 1, 16, 16), False, False),
        ((1, 17, 1, 16, 1), True, False),
        ((1, 64, 1, 1, 7), False, False),
        ((1, 50, 2, 20, 33), True, False),
        ((2, 55, 1, 20, 16), False, True),
        ((2, 60, 1, 6, 18), True, True),
    ],
)
def test_outputs_states_and_gradients_meet_the_bar(shape, forget, packed):
    inputs, given = draw(*shape)
    if not forget:
        inputs[4] = None
    positions = documents(shape[1]) if packed else None
    mine = differentiated("triton", inputs, given, positions)
    truth = differentiated("reference", inputs, given, positions, torch.float64)
    assert worst(mine, truth) <= 2e-6


@pytest.mark.parametrize("chunk", [32, 64])
def test_systems_of_every_size_are_solved(chunk, monkeypatch):
    monkeypatch.setattr(triton_delta, "CHUNK", chunk)
    inputs, given = draw(1, chunk + 3, 1, 24, 9, agree=1.0)
    mine = differentiated("triton", inputs, given)
    assert worst(mine, differentiated("reference", inputs, given, dtype=torch.float64)) <= 2e-6


@pytest.mark.parametrize("agree", [3.0, 1e4])
@pytest.mark.parametrize("full", [False, True])
def test_keys_that_nearly_agree_meet_the_bar(agree, full):
    """Of equal keys, powers of the system overflow at 64 tokens."""
    inputs, given = draw(1, 130, 1, 32, 16, agree=agree)
    inputs[4] = None
    if full:
        inputs[3] = torch.ones_like(inputs[3])
    mine = differentiated("triton", inputs, given)
    truth = differentiated("reference", inputs, given, dtype=torch.float64)
    assert worst(mine[:2], truth[:2]) <= 3e-6
    assert worst(mine, truth) <= 2e-5


@pytest.mark.parametrize("agree", [0.0, 3.0])
def test_writes_up_to_two_meet_the_bar_of_keys_that_nearly_agree(agree):
    inputs, given = draw(1, 130, 1, 32, 16, agree=agree)
    inputs[4] = None
    inputs[3] = 2 * inputs[3]
    mine = differentiated("triton", inputs, given)
    truth = differentiated("reference", inputs, given, dtype=torch.float64)
    assert worst(mine[:2], truth[:2]) <= 3e-6
    assert worst(mine, truth) <= 2e-5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_costs_a_few_roundings(dtype, packed):
    inputs, given = draw(2, 50, 1, 20, 16)
    positions = documents(50) if packed else None
    inputs[:3] = [x.to(dtype).float() for x in inputs[:3]]
    given = (given[0].to(dtype).float(), given[1])
    mine = differentiated("triton", inputs, given, positions, dtype)
    truth = differentiated("reference", inputs, given, positions, torch.float64)
    rounding = relative(truth[0].to(dtype), truth[0])
    assert relative(mine[0], truth[0]) <= 2.5 * rounding
    assert relative(mine[1], truth[1]) <= 2.5 * rounding
    assert mine[1].dtype == torch.float32
    assert worst(mine, truth) <= 6 * rounding


@pytest.mark.usefixtures("small")
def test_the_gates_may_have_any_dtype_and_tensors_any_strides():
    (q, k, v, beta, decay, state), _ = draw(2, 40, 2, 6, 5)
    truth, end = REMEMBER(q, k, v, beta, decay=decay, state=state)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, beta, decay)]
    out, final = REMEMBER(*turned[:4], decay=turned[4], state=state.mT.contiguous().mT)
    assert torch.equal(out, truth)
    assert torch.equal(final, end)
    out, final = REMEMBER(q, k, v, beta.double(), decay=decay.double(), state=state.double())
    assert relative(out, truth) <= 1e-6
    assert final.dtype == torch.float32
    out, _ = REMEMBER(q, k, v, beta.bfloat16(), decay=decay.half(), state=state)
    exact, _ = REMEMBER(q, k, v, beta.bfloat16().float(), decay=decay.half().float(), state=state)
    assert torch.equal(out, exact)


@pytest.mark.usefixtures("small")
def test_each_document_has_the_numbers_it_has_alone():
    (q, k, v, beta, decay, state), _ = draw(2, 75, 1, 6, 5)
    positions = documents(75)
    out, final = REMEMBER(q, k, v, beta, decay=decay, state=state, positions=positions)
    for b in range(2):
        live = (positions[b] >= 0).nonzero()[:, 0]
        assert not out[b, positions[b] < 0].any()
        heads = [0, *((positions[b, live] == 0).nonzero()[:, 0].tolist()), len(live)]
        for begin, end in itertools.pairwise(heads):
            place = live[begin:end]
            alone, last = REMEMBER(
                *(x[b : b + 1, place] for x in (q, k, v, beta)),
                decay=decay[b : b + 1, place],
                state=state[b : b + 1] if begin == 0 else None,
            )
            assert relative(out[b, place], alone[0]) <= 1e-6
        assert relative(final[b], last[0]) <= 1e-6


@pytest.mark.usefixtures("small")
def test_a_row_of_padding_alone_keeps_its_state():
    (q, k, v, beta, decay, state), _ = draw(1, 20, 1, 6, 5)
    q[:] = k[:] = v[:] = beta[:] = decay[:] = torch.nan
    positions = torch.full((1, 20), -1)
    out, final = REMEMBER(q, k, v, beta, decay=decay, state=state, positions=positions)
    assert not out.any()
    assert torch.equal(final, state)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
@pytest.mark.parametrize("place", [3, 24])
def test_what_is_not_finite_stays_in_its_document_and_reaches_its_rest(bad, which, place):
    """Of two documents in one chunk, and across chunks."""
    *clean, state = draw(1, 60, 1, 6, 5)[0]
    edge = 22
    positions = torch.cat((torch.arange(edge), torch.arange(60 - edge)))[None]
    *tensors, decay = clean
    truth, end = REMEMBER(*tensors, decay=decay, state=state, positions=positions)
    inputs = [x.clone() for x in clean]
    inputs[which][:, place] = bad
    leaves = [x.requires_grad_() for x in (*inputs, state.clone())]
    out, final = REMEMBER(*leaves[:4], decay=leaves[4], state=leaves[5], positions=positions)
    own = (torch.arange(60) < edge) == (place < edge)
    reached = own & (torch.arange(60) >= place)
    assert torch.equal(out[:, ~own], truth[:, ~own])
    assert not out[:, reached].isfinite().any()
    assert torch.equal(final, end) == (place < edge)
    assert final.isfinite().all() == (place < edge)
    gradients = torch.autograd.grad(out[:, own].sum() + out[:, ~own].square().sum(), leaves)
    for gradient in gradients[:5]:
        assert gradient[:, ~own].isfinite().all()
    if place >= edge:
        assert gradients[5].isfinite().all()


@pytest.mark.usefixtures("small")
def test_the_future_never_reaches_the_past():
    tensors, edge = draw_memory(1, 60, 1, 6, 5), 37
    *given, decay = tensors
    out, _ = REMEMBER(*given, decay=decay)
    for how, safe in ((1e6, edge), (torch.nan, edge // 16 * 16)):
        turn = how if how != how else -1.0  # long keys make the state overflow, which spreads
        spoiled = [
            torch.cat((x[:, :edge], x[:, edge:] * by), 1)
            for x, by in zip(given[:3], (how, turn, how), strict=True)
        ]
        other, _ = REMEMBER(*spoiled, given[3], decay=decay)
        assert relative(other[:, :safe], out[:, :safe]) <= 1e-6


@pytest.mark.usefixtures("small")
def test_every_element_of_every_buffer_is_written(monkeypatch):
    """torch.empty filled with NaN: what a kernel leaves out would show."""
    inputs, given = draw(2, 75, 1, 20, 18)
    plain = [*inputs[:4], None, inputs[5]]
    cases = [(plain, given), (inputs, given, documents(75))]
    clean = [differentiated("triton", *case) for case in cases]
    new, like = torch.Tensor.new_empty, torch.empty_like

    def spoiled(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **b: spoiled(new(*a, **b)))
    monkeypatch.setattr(torch, "empty_like", lambda x: spoiled(like(x)))
    for case, truth in zip(cases, clean, strict=True):
        for got, exact in zip(differentiated("triton", *case), truth, strict=True):
            assert torch.equal(got, exact)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wanted", [{"q"}, {"beta"}, {"decay"}, {"state"}, set(NAMES)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_any_subset_of_inputs_and_again(wanted, packed):
    inputs, _ = draw(2, 30, 1, 4, 3)
    positions = documents(30) if packed else None

    def twice(dtype, method):
        leaves = [
            x.detach().to(dtype).requires_grad_(name in wanted)
            for name, x in zip(NAMES, inputs, strict=True)
        ]
        asked = [x for x in leaves if x.requires_grad]
        out, final = delta_memory(
            *leaves[:4], decay=leaves[4], state=leaves[5], positions=positions, method=method
        )
        loss = (out**3).sum() + (final**2).sum()
        first = torch.autograd.grad(loss, asked, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), asked)
        return *first, *second

    pairs = zip(twice(torch.float32, "triton"), twice(torch.float64, "chunked"), strict=True)
    assert all(relative(mine, exact) <= 4e-6 for mine, exact in pairs)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("of", ["out", "state"])
def test_either_result_alone_has_gradients(of):
    inputs, _ = draw(1, 20, 1, 4, 3)

    def gradients(dtype, method):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, final = delta_memory(*leaves[:4], decay=leaves[4], state=leaves[5], method=method)
        y = out if of == "out" else final
        return torch.autograd.grad((y**2).sum(), leaves, allow_unused=True)

    for mine, truth in zip(
        gradients(torch.float32, "triton"), gradients(torch.float64, "reference"), strict=True
    ):
        if truth is None:  # a query and the final state
            assert not mine.any()
        else:
            assert relative(mine, truth) <= 2e-6


@pytest.mark.parametrize("gated", [False, True])
def test_registered_operators_pass_opcheck(gated):
    (q, k, v, beta, decay, state), given = draw(1, 6, 1, 6, 5)
    positions = torch.arange(6)[None] if gated else None
    rest = (decay, state) if gated else (None, None)
    call = [x if x is None else x.requires_grad_() for x in (q, k, v, beta, *rest)]
    torch.library.opcheck(triton_delta.delta_rule.registered, (*call, positions))
    plain = [x if x is None else x.detach() for x in call]
    _, _, solved, gates = triton_delta.delta_rule(*plain, positions)
    backward = triton_delta.delta_rule_backward.registered
    torch.library.opcheck(backward, (*plain, positions, solved, gates, *given))


def test_a_recorded_call_has_the_bits_of_an_eager_one_and_no_break():
    inputs, given = draw(1, 20, 1, 6, 5)
    truth = differentiated("triton", inputs, given)
    recorded = torch.compile(REMEMBER, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in inputs]
    for call in (
        lambda *x: triton_delta.delta_rule.registered(*x, None)[:2],
        lambda *x: recorded(*x[:4], decay=x[4], state=x[5]),
    ):
        results = call(*leaves)
        mine = *results, *torch.autograd.grad(results, leaves, given)
        assert all(torch.equal(x, y) for x, y in zip(mine, truth, strict=True))


@pytest.mark.usefixtures("small")
def test_calls_from_several_threads_at_once_do_not_mix():
    cases = [draw(1, 20 + n, 1, 6, 5) for n in range(4)]
    alone = [differentiated("triton", *case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        together = threads.map(lambda case: differentiated("triton", *case), cases)
        for mine, truth in zip(together, alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, truth, strict=True))


def test_wide_keys_are_left_to_another_method():
    q = torch.randn(1, 3, 1, 257)
    with pytest.raises(UserError, match="at most 256"):
        REMEMBER(q, q, q, torch.ones(1, 3, 1))


# --- deliberate bugs ----------------------------------------------------------------------------


def no_delta_term(q, k, v, beta, *, decay=None, state=None):
    """What the memory holds is not taken from what is written: linear attention."""
    outs, states = [], state
    for t in range(q.shape[1]):
        cut = [x[:, t : t + 1] for x in (q, k, v, beta)]
        less = None if decay is None else decay[:, t : t + 1]
        _, write = REMEMBER(*cut)
        base = torch.zeros_like(write) if states is None else states
        if less is not None:
            base = base * torch.exp(-less[:, 0])[..., None, None]
        states = base + write
        outs.append(torch.einsum("bhk,bhkv->bhv", cut[0][:, 0], states)[:, None])
    return torch.cat(outs, 1), states


def beta_forgotten(q, k, v, beta, *, decay=None, state=None):
    return REMEMBER(q, k, v, torch.ones_like(beta), decay=decay, state=state)


def state_not_carried(q, k, v, beta, *, decay=None, state=None):
    """From one chunk to the next."""
    outs = []
    for begin in range(0, q.shape[1], 64):
        cut = [x[:, begin : begin + 64] for x in (q, k, v, beta)]
        less = None if decay is None else decay[:, begin : begin + 64]
        out, end = REMEMBER(*cut, decay=less, state=state if begin == 0 else None)
        outs.append(out)
    return torch.cat(outs, 1), end


def decay_forgotten(q, k, v, beta, *, decay=None, state=None):
    return REMEMBER(q, k, v, beta, state=state)


@pytest.mark.parametrize(
    ("bug", "caught_by"),
    [
        (no_delta_term, operators.memory_recalls_what_was_written_last),
        (beta_forgotten, operators.memory_equals_the_recurrence),
        (decay_forgotten, operators.memory_equals_the_recurrence),
        (state_not_carried, operators.memory_carries_its_state),
    ],
    ids=lambda f: f.__name__,
)
def test_deliberate_bug_is_caught(bug, caught_by):
    with pytest.raises(AssertionError):
        caught_by(bug)


@pytest.mark.usefixtures("small")
def test_a_leak_between_documents_would_show():
    inputs, given = draw(2, 75, 1, 6, 5)
    positions = documents(75)
    truth = differentiated("reference", inputs, given, positions, torch.float64)
    leaking = Documents(torch.where(positions == 0, 1, positions), checked=True)
    mine = differentiated("triton", inputs, given, leaking)
    assert rms(mine[0].double() - truth[0]) > 1e-3
