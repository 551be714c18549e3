"""Rows of length 1 beside those of their filter: one compiled pass is the operators apart."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad as gradients

from spectral_window.ops import Taps, fir_conv
from spectral_window.ops import lagged_units as module
from spectral_window.ops.lagged_units import lagged_units
from spectral_window.ops.methods import HAS_NUMBA
from tests.contracts.measure import block_error, relative

SHORTEST = 1e-4
compiled = pytest.mark.skipif(not HAS_NUMBA, reason="numba compiles it")
# tokens of four documents, the first after a state, with padding before, between and behind
PACKED = torch.tensor([[-1, *range(5, 75), -1, -1, *range(3), 0, *range(67), -1], list(range(145))])
AFRESH = PACKED.clone()  # the same without a state
AFRESH[0, 1:71] -= 5


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact(u, weights, heads, state=None, positions=None):
    """In plain operations of u's dtype; 0 at padding."""
    y, _ = fir_conv(u, Taps(weights), state=state, positions=positions, method="shifts")
    rows = [x.unflatten(-1, (heads, -1)) for x in (u, y)]
    found = [x / x.norm(dim=-1, keepdim=True).clamp(min=SHORTEST) for x in rows]
    if positions is None:
        return found
    return [x.where((positions >= 0)[..., None, None], 0.0) for x in found]


def drawn(time, heads, size, dtype, taps=4):
    """u with rows that are too short, weights, a state and what the results' gradients are."""
    channels = heads * size
    u = torch.randn(2, time, channels).to(dtype)
    u[:, time // 2 : time // 2 + taps, :size] *= 1e-6
    weights, state = torch.randn(channels, taps), torch.randn(2, taps - 1, channels).to(dtype)
    return u, weights, state, [torch.randn(2, time, heads, size) for _ in range(2)]


def apart(monkeypatch):
    monkeypatch.setattr(module, "_compiled", lambda *given: False)


@compiled
@pytest.mark.parametrize("positions", [None, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("known", [False, True], ids=["", "state"])
@pytest.mark.parametrize(("heads", "size", "taps"), [(1, 3, 4), (3, 17, 1), (2, 64, 4), (6, 16, 6)])
def test_it_is_the_exact_formula_with_its_gradients(heads, size, taps, known, positions, threads):
    u, weights, state, grads = drawn(145, heads, size, torch.float32, taps)
    if not known:
        state, positions = None, positions if positions is None else AFRESH
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (u, weights)]
        past = None if state is None else state.to(dtype)
        if dtype == torch.float32:
            given = leaves[0], Taps(leaves[1]), heads, SHORTEST
            results = lagged_units(*given, state=past, positions=positions)[:2]
        else:
            results = exact(*leaves, heads, past, positions)
        d_u, d_weights = gradients(results, leaves, [g.to(dtype) for g in grads])
        found.append(([x.detach() for x in results], (d_u, d_weights)))
    (mine, my_gradients), (true, true_gradients) = found
    for ours, theirs in zip(mine, true, strict=True):
        assert ours.dtype == torch.float32
        assert block_error(ours.flatten(-2), theirs.flatten(-2)) <= 2e-6
    for ours, theirs in zip(my_gradients, true_gradients, strict=True):
        assert relative(ours, theirs) <= 2e-6


@compiled
@pytest.mark.parametrize("positions", [None, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_states_have_the_bits_of_the_operators_apart(dtype, positions, monkeypatch):
    u, weights, state, grads = drawn(145, 3, 20, dtype)
    leaves = [u.requires_grad_(), weights.requires_grad_()]
    given = u, Taps(weights), 3, SHORTEST
    mine = lagged_units(*given, state=state, positions=positions)
    my_gradients = gradients(mine[:2], leaves, grads)
    apart(monkeypatch)
    theirs = lagged_units(*given, state=state, positions=positions)
    token = torch.ones(2, 145) >= 0 if positions is None else positions >= 0
    assert all(torch.equal(x[token], y[token]) for x, y in zip(mine[:2], theirs[:2], strict=True))
    assert torch.equal(mine[2], theirs[2])
    assert not any(x[~token].any() for x in mine[:2])
    grads = [g * token[..., None, None] for g in grads]
    for x, y in zip(my_gradients, gradients(theirs[:2], leaves, grads), strict=True):
        assert relative(x, y) <= (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_near_the_exact_formula(dtype, threads):
    u, weights, state, grads = drawn(70, 2, 48, dtype)
    leaves = [u.requires_grad_(), weights.requires_grad_()]
    mine = lagged_units(u, Taps(weights), 2, SHORTEST, state=state)[:2]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    true = exact(*wide, 2, state.double())
    bar = 2e-6 if dtype == torch.float32 else 4e-3  # the filter's rows are rounded to u's dtype
    for ours, theirs in zip(mine, true, strict=True):
        assert relative(ours, theirs) <= bar
    found = gradients(mine, leaves, grads), gradients(true, wide, [g.double() for g in grads])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_and_any_packing_has_the_same_bits(dtype):
    u, weights, state, _ = drawn(145, 2, 24, dtype)
    given = Taps(weights), 2, SHORTEST
    whole = lagged_units(u, *given, state=state)
    for sizes in ([1] * 145, [64, 1, 2, 0, 78], [3, 142]):
        past, parts = state, []
        for part in u.split(sizes, 1):
            *rows, past = lagged_units(part, *given, state=past)
            parts.append(rows)
        assert torch.equal(past, whole[2])
        for mine, true in zip(zip(*parts, strict=True), whole[:2], strict=True):
            assert torch.equal(torch.cat(mine, 1), true)
    packed = lagged_units(u, *given, state=state, positions=PACKED)
    for begin, end, past in ((1, 71, state[:1]), (73, 76, None), (76, 77, None), (77, 144, None)):
        alone = lagged_units(u[:1, begin:end], *given, state=past)
        for mine, true in zip(packed[:2], alone[:2], strict=True):
            assert torch.equal(mine[:1, begin:end], true)
    row = lagged_units(u[1:], *given)
    assert torch.equal(packed[1][1:], row[1])
    assert torch.equal(packed[2][1:], row[2])


def test_no_bit_depends_on_the_number_of_threads():
    u, weights, _, grads = drawn(300, 2, 24, torch.float32)
    leaves, found = [u.requires_grad_(), weights.requires_grad_()], []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results = lagged_units(u, Taps(weights), 2, SHORTEST)[:2]
        found.append((*results, *gradients(results, leaves, grads)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("positions", [None, PACKED[:, 68:78]], ids=["rows", "packed"])
def test_second_derivatives_and_the_gradient_of_a_state(positions):
    u, weights, state, _ = drawn(10, 2, 8, torch.float32)
    token = 1.0 if positions is None else (positions >= 0)[..., None, None]
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (u, weights, state)]
        if dtype == torch.float32:
            given = leaves[0], Taps(leaves[1]), 2, SHORTEST
            p, k = lagged_units(*given, state=leaves[2], positions=positions)[:2]
        else:
            p, k = exact(*leaves[:2], 2, leaves[2], positions)
        power = (p * token)[..., 0].sum() + (k[..., 1:3] * token).pow(3).sum()
        once = gradients(power, leaves, create_graph=True)
        weighted = sum((g * x.detach()).pow(2).sum() for g, x in zip(once, leaves, strict=True))
        found.append([*once, *gradients(weighted, leaves)])
    for mine, true in zip(*found, strict=True):
        assert relative(mine, true) <= 1e-5


def test_a_method_asked_for_is_obeyed(monkeypatch):
    u, weights, _, _ = drawn(9, 2, 8, torch.float32)
    taken = []
    for name in ("_in_one_pass", "_one_by_one"):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, f=plain, n=name: taken.append(n) or f(*given)
        )
    for method in ("auto", "shifts", "reference"):
        lagged_units(u, Taps(weights), 2, SHORTEST, method=method)
    lagged_units(u.double(), Taps(weights), 2, SHORTEST)
    first = "_in_one_pass" if HAS_NUMBA else "_one_by_one"
    assert taken == [first, *["_one_by_one"] * 3]
    with pytest.raises(ValueError, match="unknown fir method 'scan'"):
        lagged_units(u, Taps(weights), 2, SHORTEST, method="scan")


def test_a_nan_stays_in_its_document():
    u, weights, _, grads = drawn(145, 2, 8, torch.float32)
    u[0, 72], u[0, 74] = torch.nan, torch.nan  # padding, and a document of three tokens
    u.requires_grad_()
    results = lagged_units(u, Taps(weights), 2, SHORTEST, positions=AFRESH)[:2]
    (d_u,) = gradients(results, [u], grads)
    for x in (*results, d_u):
        assert bool(x[1].isfinite().all())
        assert bool(x[0, :72].isfinite().all())
        assert bool(x[0, 76:].isfinite().all())


def test_padding_alone_and_nothing_at_all():
    u, weights, state, grads = drawn(6, 2, 8, torch.float32)
    weights.requires_grad_()
    padding = torch.full((2, 6), -1)
    p, k, after = lagged_units(u, Taps(weights), 2, SHORTEST, state=state, positions=padding)
    assert torch.equal(after, state)
    if k.requires_grad:
        assert not gradients([p, k], [weights], grads)[0].any()
    for shape in ((0, 5, 16), (2, 0, 16)):
        p, k, after = lagged_units(torch.zeros(shape), Taps(weights), 2, SHORTEST)
        assert p.shape == k.shape == (*shape[:2], 2, 8)
        assert after.shape == (shape[0], 3, 16)


def test_torch_compile_has_no_graph_break():
    u, weights, state, _ = drawn(30, 2, 8, torch.float32)

    def run(u, weights, state):
        return lagged_units(u, Taps(weights), 2, SHORTEST, state=state)

    recorded = torch.compile(run, fullgraph=True, backend="eager")
    for a, b in zip(recorded(u, weights, state), run(u, weights, state), strict=True):
        assert relative(a, b) <= 2e-6


def test_torch_func_transforms_it():
    u, weights, _, _ = drawn(7, 2, 4, torch.float32)

    def run(u):
        return lagged_units(u, Taps(weights), 2, SHORTEST)[1]

    _, tangent = torch.func.jvp(run, (u,), (u.roll(1, 1),))
    small = 1e-5 * u.double().roll(1, 1)
    ends = [exact(u.double() + d, weights.double(), 2)[1] for d in (small, -small)]
    assert relative(tangent[:, :3], ((ends[0] - ends[1]) / 2e-5)[:, :3]) <= 1e-4


U, F = torch.randn(2, 8, 6), Taps(torch.randn(6, 4))


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "heads are 4 for 6 channels", lambda: lagged_units(U, F, 4, SHORTEST)),
        (ValueError, "heads are 0 for 6 channels", lambda: lagged_units(U, F, 0, SHORTEST)),
        (ValueError, r"\[batch, time, channels\]", lambda: lagged_units(U[0], F, 2, SHORTEST)),
        (TypeError, "pass Taps", lambda: lagged_units(U, F.weights, 2, SHORTEST)),
        (TypeError, "floating", lambda: lagged_units(U.int(), F, 2, SHORTEST)),
        (
            ValueError,
            r"expected \[6, L\]",
            lambda: lagged_units(U, Taps(F.weights[:5]), 2, SHORTEST),
        ),
        (ValueError, "not finite", lambda: lagged_units(U, Taps(F.weights / 0), 2, SHORTEST)),
        (
            ValueError,
            "same batch",
            lambda: lagged_units(U, F, 2, SHORTEST, state=torch.zeros(1, 3, 6)),
        ),
        (
            ValueError,
            "counts 0, 1, 2",
            lambda: lagged_units(U, F, 2, SHORTEST, positions=torch.arange(3, 11).expand(2, -1)),
        ),
    ],
)
def test_what_is_wrong_is_named(error, says, call):
    with pytest.raises(error, match=says):
        call()
