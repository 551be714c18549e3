"""The delta-rule memory in compiled code: the contract of the others, its own chunks, segments,
blocks of columns and threads, and what it keeps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from spectral_window.ops import delta_memory, reference
from spectral_window.ops.compiled import delta
from tests.contracts import operators
from tests.contracts.measure import block_error, relative
from tests.contracts.operators import MEMORY_CONTRACT, draw_memory
from tests.ops.compiled_delta import compiled_memory

CHUNK = delta.CHUNK
NAMES = ("q", "k", "v", "beta", "decay", "state")
plain = partial(delta_memory, method="chunked")


def steps(*tensors, decay=None, state=None, positions=None):
    """One token at a time, without gradients: as in decoding."""
    parts = []
    with torch.no_grad():
        for t in range(tensors[0].shape[1]):
            q, k, v, beta, less, at = (
                None if x is None else x[:, t : t + 1] for x in (*tensors, decay, positions)
            )
            options = {"decay": less, "state": state, "positions": at}
            out, state = compiled_memory(q, k, v, beta, **options, method="step")
            parts.append(out)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("promise", MEMORY_CONTRACT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("memory", [compiled_memory, steps], ids=["compiled", "step"])
def test_memory_keeps(memory, promise):
    promise(memory)


# --- outputs, states and gradients --------------------------------------------------------------


def draw(batch, time, heads, key_dim, value_dim, agree=0.0):
    """All inputs, and gradients of the output and of the final state."""
    inputs = draw_memory(batch, time, heads, key_dim, value_dim, agree=agree)
    inputs.append(torch.randn(batch, heads, key_dim, value_dim))
    given = torch.randn(batch, time, heads, value_dim), torch.randn_like(inputs[-1])
    return inputs, given


def differentiated(memory, inputs, given, positions=None, dtype=torch.float32):
    """(out, final state, the gradients of the inputs that are not None)."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    *tensors, decay, state = leaves
    outputs = memory(*tensors, decay=decay, state=state, positions=positions)
    asked = [x for x in leaves if x is not None]
    weights = [x.to(y.dtype) for x, y in zip(given, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, asked, weights)
    return *outputs, *gradients


def worst(mine, truth):
    """The largest error: over everything, and per channel and block where blocks are full."""
    errors = []
    for x, y in zip(mine, truth, strict=True):
        full = x.shape[1] // CHUNK * CHUNK  # 0 for states
        errors.append(relative(x, y))
        errors.append(block_error(x[:, :full].flatten(2), y[:, :full].flatten(2)))
    return max(errors)


def two_documents(batch, time):
    """Each row goes on or begins, is padded inside and behind, and begins again."""
    first, gap = time // 3, time // 9
    rows = []
    for b in range(batch):
        row = torch.full((time,), -1)
        row[:first] = torch.arange(first) + 7 * (b % 2)
        row[first + gap : -1 - gap] = torch.arange(time - first - 2 * gap - 1)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("shape", "forget"),
    [
        ((2, 1, 2, 6, 5), True),
        ((1, 2, 1, 1, 1), False),
        ((1, 63, 1, 7, 1), False),
        ((3, 65, 2, 5, 33), True),
        ((1, 200, 3, 16, 48), False),
        ((2, 330, 1, 100, 70), True),
        ((1, 300, 1, 33, 257), False),
        ((1, 200, 1, 300, 20), True),
    ],
)
def test_outputs_states_and_gradients_meet_the_bar(shape, forget, packed):
    inputs, given = draw(*shape)
    if not forget:
        inputs[4] = None
    positions = two_documents(*shape[:2]) if packed and shape[1] > 9 else None
    mine = differentiated(compiled_memory, inputs, given, positions)
    truth = differentiated(plain, inputs, given, positions, torch.float64)
    assert worst(mine, truth) <= 2e-6


@pytest.mark.parametrize("full", [False, True])
def test_keys_that_nearly_agree_cost_gradients_twice_the_bar(full):
    """With keys at 0.9 of one another what is written is a small difference of large numbers, in
    the system of a chunk and in that of its gradients: float32 products of keys show it."""
    inputs, given = draw(1, 600, 1, 64, 64, agree=3.0)
    inputs[4] = None
    if full:
        inputs[3] = torch.ones_like(inputs[3])
    mine = differentiated(compiled_memory, inputs, given)
    truth = differentiated(plain, inputs, given, dtype=torch.float64)
    assert worst(mine[:2], truth[:2]) <= 2e-6
    assert max(relative(x, y) for x, y in zip(mine, truth, strict=True)) <= 2e-6
    assert worst(mine, truth) <= 6e-6


@pytest.mark.parametrize("agree", [0.0, 3.0, 1e4])
def test_keys_that_agree_are_no_harder(agree):
    *inputs, _ = draw_memory(2, 300, 1, 32, 32, agree=agree)
    inputs[3] = torch.ones_like(inputs[3])
    truth, _ = plain(*(x.double() for x in inputs))
    out, _ = compiled_memory(*inputs)
    assert block_error(out.flatten(2), truth.flatten(2)) <= 2e-6


@pytest.mark.parametrize(("agree", "bar"), [(0.0, 2e-6), (3.0, 6e-6)])
def test_writes_up_to_two_meet_the_bar_of_keys_that_nearly_agree(agree, bar):
    """The gate `reflecting`. A write above 1 turns what is stored around and does not shrink it, so
    earlier roundings stay too."""
    inputs, given = draw(1, 600, 1, 64, 64, agree=agree)
    inputs[4] = None
    inputs[3] = 2 * inputs[3]
    mine = differentiated(compiled_memory, inputs, given)
    truth = differentiated(plain, inputs, given, dtype=torch.float64)
    assert max(relative(x, y) for x, y in zip(mine, truth, strict=True)) <= bar / 2
    assert worst(mine, truth) <= bar


@pytest.mark.parametrize("agree", [0.0, 3.0, 1e4])
def test_mirrors_alone_cost_no_more_than_four_digits(agree):
    inputs, given = draw(1, 600, 1, 64, 64, agree=agree)
    inputs[4] = None
    inputs[3] = torch.full_like(inputs[3], 2.0)
    mine = differentiated(compiled_memory, inputs, given)
    truth = differentiated(plain, inputs, given, dtype=torch.float64)
    assert max(relative(x, y) for x, y in zip(mine, truth, strict=True)) <= 1e-4


@pytest.mark.parametrize("strength", [0.0, 1e-6, 5.0, 100.0, 1e30])
def test_any_decay_is_exact_and_gives_finite_gradients(strength):
    inputs, given = draw(1, 150, 1, 8, 8)
    inputs[4] = torch.full_like(inputs[4], strength)
    mine = differentiated(compiled_memory, inputs, given)
    truth = differentiated(plain, inputs, given, dtype=torch.float64)
    names = ("out", "final", *NAMES)
    for name, x, y in zip(names, mine, truth, strict=True):
        assert x.isfinite().all(), name
        if name not in ("decay", "state") or strength < 50:  # below, a gradient is underflow
            assert relative(x, y) <= 2e-6, name


@pytest.mark.parametrize("wanted", [{"q"}, {"v"}, {"beta", "state"}, {"decay"}, set(NAMES)])
def test_gradients_reach_any_subset_of_inputs_and_again(wanted):
    inputs, _ = draw(1, 70, 1, 4, 3)

    def twice(memory, dtype):
        leaves = [
            x.to(dtype).requires_grad_(name in wanted)
            for name, x in zip(NAMES, inputs, strict=True)
        ]
        asked = [x for x in leaves if x.requires_grad]
        out, final = memory(*leaves[:4], decay=leaves[4], state=leaves[5])
        goal = (out**3).sum() + (final**3).sum()
        first = torch.autograd.grad(goal, asked, create_graph=True)
        return *first, *torch.autograd.grad(sum((g**2).sum() for g in first), asked)

    for x, y in zip(
        twice(compiled_memory, torch.float32), twice(plain, torch.float64), strict=True
    ):
        assert relative(x, y) <= 4e-6


# --- documents, splits, causality ---------------------------------------------------------------


@st.composite
def packed(draw):
    """Rows of (padding before, document length), and whether a state is given."""
    piece = st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 7, 63, 64, 65, 130]))
    rows = draw(st.lists(st.lists(piece, max_size=3), min_size=1, max_size=3))
    return rows, draw(st.booleans())


@settings(max_examples=25)
@given(packed(), st.sampled_from(["compiled", "step"]), st.booleans(), st.data())
def test_documents_packed_together_are_each_document_alone(case, method, forget, data):
    """To the bit. Also: padding takes no part, not even a NaN, and a row of padding alone keeps its
    state."""
    memory = compiled_memory if method == "compiled" else steps
    rows, known = case
    time = 1 + max(sum(a + b for a, b in row) for row in rows)
    *rows_of_nan, less = (torch.full_like(x, torch.nan) for x in draw_memory(len(rows), time))
    state = torch.randn(len(rows), 2, 6, 5) if known else None
    expected, positions = torch.zeros(len(rows), time, 2, 5), torch.full((len(rows), time), -1)
    ends = torch.zeros(len(rows), 2, 6, 5) if state is None else state.clone()
    for b, row in enumerate(rows):
        at = 0
        for i, (gap, size) in enumerate(row):
            at += gap
            goes_on = known and i == 0 and data.draw(st.booleans())
            *text, decay = draw_memory(1, size)
            before = state[b : b + 1] if goes_on else None
            alone, end = memory(*text, decay=decay if forget else None, state=before)
            for place, x in zip((*rows_of_nan, less), (*text, decay), strict=True):
                place[b, at : at + size] = x[0]
            expected[b, at : at + size], ends[b] = alone[0], end[0]
            positions[b, at : at + size] = torch.arange(size) + (5 if goes_on else 0)
            at += size
    out, final = memory(
        *rows_of_nan, decay=less if forget else None, state=state, positions=positions
    )
    assert torch.equal(out, expected)
    assert torch.equal(final, ends)


def test_padding_has_no_gradient_and_gives_none():
    inputs, given = draw(2, 150, 2, 6, 5)
    positions = two_documents(2, 150)
    clean = differentiated(compiled_memory, inputs, given, positions)
    for x in (*inputs[:5], given[0]):
        x[positions < 0] = torch.nan
    spoiled = differentiated(compiled_memory, inputs, given, positions)
    for x, y in zip(clean, spoiled, strict=True):
        assert torch.equal(x, y)
    for gradient in spoiled[2:7]:
        assert not gradient[positions < 0].any()


@pytest.mark.parametrize("how", [1.0, 1e3, torch.nan, torch.inf])
def test_a_changed_document_leaves_the_others_and_their_gradients_untouched(how):
    inputs, given = draw(2, 150, 2, 6, 5)
    inputs[5] = torch.zeros_like(inputs[5])
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in row]) for row in ((20, 65, 65), (83, 67))]
    )
    before = differentiated(compiled_memory, inputs, given, positions)
    for x in (*inputs[:4], given[0]):
        x[0, 20:85] = torch.randn_like(x[0, 20:85]) * how
    after = differentiated(compiled_memory, inputs, given, positions)
    outside = torch.ones(2, 150, dtype=torch.bool)
    outside[0, 20:85] = False
    for x, y in zip((before[0], *before[2:7]), (after[0], *after[2:7]), strict=True):
        assert torch.equal(x[outside], y[outside])


@pytest.mark.parametrize("forget", [False, True])
def test_a_split_between_chunks_changes_no_bit_and_any_other_stays_within_the_bar(forget):
    *inputs, decay = draw_memory(2, 300, 2, 20, 37)
    whole, end = compiled_memory(*inputs, decay=decay if forget else None)
    for at in (CHUNK, 3 * CHUNK, 1, 100, 299):
        state, parts = None, []
        for cut in (slice(0, at), slice(at, None)):
            less = decay[:, cut] if forget else None
            out, state = compiled_memory(*(x[:, cut] for x in inputs), decay=less, state=state)
            parts.append(out)
        out = torch.cat(parts, 1)
        if at % CHUNK == 0:
            assert torch.equal(out, whole)
            assert torch.equal(state, end)
        assert block_error(out.flatten(2), whole.flatten(2)) <= 2e-6
        assert relative(state, end) <= 2e-6


@pytest.mark.parametrize("how", [1.0, 1e6, torch.inf, torch.nan])
@pytest.mark.parametrize("t", [1, 17, 63, 64, 65, 139])
def test_the_future_never_reaches_the_past(how, t):
    """To the bit; what is not finite, or soon is not, reaches at most its chunk's beginning."""
    *inputs, decay = draw_memory(2, 140, 2, 6, 37)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, t:] = torch.randn_like(x[:, t:]) * how
    safe = t if how == 1.0 else t // CHUNK * CHUNK
    for forget in (None, decay):
        out, _ = compiled_memory(*inputs, decay=forget)
        other, _ = compiled_memory(*changed, decay=forget)
        assert torch.equal(out[:, :safe], other[:, :safe])


def test_no_gradient_flows_from_the_past_to_the_future():
    for t in (0, 15, 16, 63, 64, 100):
        leaves = [x.requires_grad_() for x in draw_memory(1, 130)]
        out, _ = compiled_memory(*leaves[:4], decay=leaves[4])
        for gradient in torch.autograd.grad(out[:, t].sum(), leaves):
            assert not gradient[:, t + 1 :].any()


# --- no choice of speed changes a bit ------------------------------------------------------------


@pytest.fixture
def speeds(monkeypatch):
    """Runs a call with one thread and with four, and with segments of one chunk."""
    before = torch.get_num_threads()

    def run(call):
        torch.set_num_threads(1)
        yield call()
        torch.set_num_threads(4)
        yield call()
        monkeypatch.setattr(delta, "_SCRATCH", 0)
        yield call()

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("packed", [False, True])
def test_threads_segments_and_blocks_of_columns_change_no_bit(speeds, packed):
    inputs, given = draw(1, 400, 1, 40, 300)
    positions = two_documents(1, 400) if packed else None
    call = partial(differentiated, compiled_memory, inputs, given, positions)
    first, *others = speeds(call)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_rows_of_a_batch_are_each_row_alone():
    inputs, given = draw(3, 150, 2, 20, 20)
    together = differentiated(compiled_memory, inputs, given)
    for b in range(3):
        row = slice(b, b + 1)
        alone = differentiated(compiled_memory, [x[row] for x in inputs], [x[row] for x in given])
        assert all(torch.equal(x[row], y) for x, y in zip(together, alone, strict=True))


def test_neither_autocast_nor_the_precision_of_products_matters():
    inputs, given = draw(2, 150, 1, 32, 32)
    usual = differentiated(compiled_memory, inputs, given)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = differentiated(compiled_memory, inputs, given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))


# --- bfloat16, memory, steps ---------------------------------------------------------------------


def test_half_precision_is_rounded_once():
    inputs, given = draw(2, 150, 2, 16, 21)
    halves = [*(x.bfloat16() for x in inputs[:5]), inputs[5]]
    exact = [x.double() for x in halves]
    given = given[0].bfloat16(), given[1]

    def run(memory, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        outputs = memory(*leaves[:4], decay=leaves[4], state=leaves[5])
        weights = [x.to(y.dtype) for x, y in zip(given, outputs, strict=True)]
        return *outputs, *torch.autograd.grad(outputs, leaves, weights)

    for mine, truth in zip(run(compiled_memory, halves), run(plain, exact), strict=True):
        rounded = relative(truth.to(mine.dtype), truth)
        assert relative(mine, truth) <= max(1.25 * rounded, 2e-6)
    out, _ = steps(*(x[:, :3] for x in halves[:4]), decay=halves[4][:, :3], state=halves[5])
    truth, _ = plain(*(x[:, :3] for x in exact[:4]), decay=exact[4][:, :3], state=exact[5])
    assert relative(out, truth) <= 1.25 * relative(truth.bfloat16(), truth)


@pytest.mark.parametrize("cuts", [None, [0, 1, 2, 70, 512], list(range(0, 513, 8))])
def test_at_most_one_state_is_kept_for_64_tokens(cuts):
    size, time = 96, 512
    leaves = [x.requires_grad_() for x in draw_memory(1, time, 1, size, size)[:4]]
    kept: dict[int, int] = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    given = {} if cuts is None else {"cu_seqlens": torch.tensor(cuts)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        compiled_memory(*leaves, **given)
    inputs = sum(x.nbytes for x in leaves) + 8 * time
    assert sum(kept.values()) <= inputs + (1 + time // 64) * size * size * 4


@pytest.mark.parametrize("sizes", [(6, 5), (64, 64), (100, 200), (65, 16)])
def test_a_step_is_the_recurrence_and_leaves_its_state(sizes):
    q, k, v, beta, decay = draw_memory(3, 1, 2, *sizes)
    state = torch.randn(3, 2, *sizes)
    kept, positions = state.clone(), torch.tensor([[5], [0], [-1]])
    for forget in (None, decay):
        options = {"decay": forget, "state": state, "positions": positions}
        with torch.no_grad():
            out, after = compiled_memory(q, k, v, beta, **options, method="step")
        truth, end = delta_memory(q, k, v, beta, **options, method="reference")
        assert relative(out, truth) <= 1e-6
        assert relative(after, end) <= 1e-7
        assert torch.equal(after[2], state[2])
        assert torch.equal(state, kept)


def test_thousands_of_steps_stay_exact():
    """The state in float32 is rounded at every step; the delta rule forgets the roundings."""
    *inputs, _ = draw_memory(1, 2048, 1, 8, 8)
    out, state = steps(*inputs)
    truth, end = plain(*(x.double() for x in inputs))
    assert block_error(out.flatten(2), truth.flatten(2)) <= 2e-6
    assert relative(state, end) <= 2e-6


# --- deliberate bugs: a bar that none of these breaks would be no bar ---------------------------


def wrong(change):
    """The compiled memory with one input changed beforehand."""

    def memory(q, k, v, beta, *, decay=None, state=None, positions=None):
        x = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "state": state}
        x |= change(x)
        tensors = (x[name] for name in NAMES[:4])
        return compiled_memory(*tensors, decay=x["decay"], state=x["state"], positions=positions)

    return memory


def by_chunks(q, k, v, beta, *, decay=None, state=None, positions=None, between):
    """A wrong hand-over between chunks."""
    parts = []
    for at in range(0, q.shape[1], CHUNK):
        cut = slice(at, at + CHUNK)
        out, state = compiled_memory(
            *(x[:, cut] for x in (q, k, v, beta)), decay=decay[:, cut], state=state
        )
        state = between(state)
        parts.append(out)
    return torch.cat(parts, 1), state


def shifted(x):
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


WRONG = {
    "beta forgotten": wrong(lambda x: {"beta": torch.ones_like(x["beta"])}),
    "decay forgotten": wrong(lambda x: {"decay": None}),
    "decay of the token before": wrong(lambda x: {"decay": shifted(x["decay"])}),
    "state not taken": wrong(lambda x: {"state": torch.zeros_like(x["state"])}),
    "key of the token before": wrong(lambda x: {"k": shifted(x["k"])}),
    "key not of length 1": wrong(lambda x: {"k": x["k"] * (1 + 1e-5)}),
    "value in bfloat16": wrong(lambda x: {"v": x["v"].bfloat16().float()}),
    "products in bfloat16": wrong(lambda x: {"k": x["k"].bfloat16().float()}),
    "state lost between chunks": partial(by_chunks, between=torch.zeros_like),
    "state in bfloat16 between chunks": partial(by_chunks, between=lambda s: s.bfloat16().float()),
    "no gradient between chunks": partial(by_chunks, between=torch.detach),
    "padding is written": lambda *x, positions, **o: compiled_memory(*x, **o),
    "documents not parted": lambda *x, positions, **o: compiled_memory(
        *x, **o, positions=torch.where(positions < 0, -1, (positions >= 0).cumsum(1))
    ),
}


@pytest.mark.parametrize("bug", [None, *WRONG])
def test_deliberate_bug_is_caught(bug):
    inputs, given = draw(1, 200, 1, 8, 8)
    packed = bug in ("padding is written", "documents not parted")
    positions = two_documents(1, 200) if packed else None

    def memory(*tensors, **options):
        out, state = (WRONG[bug] if bug else compiled_memory)(*tensors, **options)
        # so that a gradient, if of zero, reaches what the bug forgets
        forgotten = sum(x.sum() for x in (*tensors, options["decay"], options["state"]))
        return out, state + 0 * forgotten

    mine = differentiated(memory, inputs, given, positions)
    truth = differentiated(plain, inputs, given, positions, torch.float64)
    assert (worst(mine, truth) <= 2e-6) == (bug is None)


# --- torch's dispatcher --------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("forget", [False, True])
def test_registered_operators_pass_opcheck(forget, packed):
    inputs, given = draw(2, 70, 2, 6, 5)
    if not forget:
        inputs[4] = None
    leaves = [x if x is None else x.requires_grad_() for x in inputs]
    positions = two_documents(2, 70) if packed else None
    torch.library.opcheck(delta.delta_rule, (*leaves, positions, True, True))
    plain_inputs = [x if x is None else x.detach() for x in inputs]
    *_, kept = delta.delta_rule(*plain_inputs, positions, True, True)
    torch.library.opcheck(delta.delta_rule_backward, (*plain_inputs, positions, kept, *given))


def test_torch_compile_has_no_graph_break():
    inputs, given = draw(1, 70, 1, 6, 5)

    def call(*x):
        state = x[5]
        return delta.memory([*x[:3], x[3][..., None], x[4][..., None]], state, None, True)

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for run in (call, traced):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = run(*leaves)
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, given)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_positions_that_do_not_count_on_are_named():
    *inputs, _ = draw_memory(2, 5)
    with pytest.raises(ValueError, match="row 1, column 0"):
        compiled_memory(*inputs, positions=torch.tensor([[*range(5)], [*range(1, 6)]]))


def test_the_reference_is_what_all_is_measured_against():
    inputs, given = draw(1, 70, 1, 5, 4)
    truth = differentiated(plain, inputs, given, dtype=torch.float64)
    q, k, v, beta, decay, state = (x.double() for x in inputs)
    out, final = reference.delta(q, k, v, beta[..., None], decay[..., None], state=state)
    assert relative(truth[0], out) <= 1e-13
    assert relative(truth[1], final) <= 1e-13
    assert operators.BARS[torch.float32] == 2e-6
