"""The layer with a memory: its equations in plain loops, its initial state, and recall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spectral_window.errors import UserError
from spectral_window.hf import SWHForCausalLM
from spectral_window.lab.experiments.probes import Exam, Probe, run
from spectral_window.nn.layers import no_weight_decay
from spectral_window.nn.memory import MemoryMixer
from spectral_window.nn.spectral_window import SpectralWindowMixer
from spectral_window.ops import memory_step
from spectral_window.ops.methods import HAS_NUMBA
from tests.contracts.measure import relative
from tests.hf.small import small_config, small_model, tokens

DIM, HEADS, WINDOW = 12, 2, 4


def convolved_by_hand(u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of each token and the three before it, the sum by weights of its channel."""
    out = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for i in range(min(t + 1, 4)):
            out[:, t] += weights[:, i] * u[:, t - i]
    return out


def memory_by_hand(
    x: torch.Tensor, p: dict[str, torch.Tensor], heads: int, gate: str = "sigmoid"
) -> torch.Tensor:
    """m_t of the module's docstring, one row and token after another."""
    out = torch.zeros_like(x)
    size = x.shape[2] // heads
    q, v = x @ p["q_proj.weight"].T, x @ p["v_proj.weight"].T
    if "short_convolution.weights" in p:
        filters = p["short_convolution.weights"].split(x.shape[2])
        q, v = (convolved_by_hand(u, w) for u, w in ((q, filters[0]), (v, filters[2])))
    for b in range(x.shape[0]):
        for h in range(heads):
            mine = slice(h * size, (h + 1) * size)
            S = x.new_zeros(size, size)
            for t in range(x.shape[1]):
                key = x.new_zeros(size)
                for i in range(min(t + 1, 4)):
                    key += p["memory.lag"][mine, i] * q[b, t - i, mine]
                key = key / max(float(key.norm()), 1e-4)
                query = q[b, t, mine] / max(float(q[b, t, mine].norm()), 1e-4)
                logit = p["gate_proj.weight"] @ x[b, t]
                write = torch.sigmoid(logit[h] + p["memory.write_bias"][h])
                if gate == "closing":
                    write = torch.tanh((logit[h] + p["memory.write_bias"][h]).clamp(min=0))
                if gate == "reflecting":
                    write = 2 * write
                read = torch.sigmoid(logit[heads + h] + p["memory.read_bias"][h])
                S = S + write * torch.outer(key, v[b, t, mine] - S.T @ key)
                out[b, t, mine] = read * p["memory.scale"][mine] * (S.T @ query)
    return out


class Alone(MemoryMixer):
    """A mixer that yields what the memory adds to the window, and nothing else."""

    def forward(self, x: torch.Tensor, positions: Any = None, state: Any = None) -> Any:
        projected = self._project(x)[:4]
        self._convolve_first(projected, positions, state)
        both, _ = self._local(projected, positions, state)
        window, _ = SpectralWindowMixer._local(self, projected[:3], positions, None)
        return both - window


def drawn(kind: type[MemoryMixer] = Alone, **options: Any) -> MemoryMixer:
    """Every parameter away from where it starts."""
    layer = kind(hidden_size=DIM, num_heads=HEADS, window=WINDOW, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "closing", "reflecting"])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_memory_is_its_equations_to_the_last_digit(heads, gate, convolved):
    layer = drawn(memory_heads=heads, write_gate=gate, short_convolution=convolved)
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    truth = memory_by_hand(x, dict(layer.state_dict()), heads, gate)
    assert (layer(x) - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_what_the_memory_finds_joins_before_the_local_map():
    """Beyond that, the layer is the paper's with the same weights, to the bit."""
    layer = drawn(MemoryMixer)
    paper = SpectralWindowMixer(hidden_size=DIM, num_heads=HEADS, window=WINDOW).double()
    missing = paper.load_state_dict(layer.state_dict(), strict=False)
    assert not missing.missing_keys
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    layer.fusion = paper.fusion = torch.nn.Identity()
    layer.fusion.forward = lambda spectral, local: local
    found = memory_by_hand(x, dict(layer.state_dict()), 1) @ layer.local_proj.weight.T
    difference = layer(x)[0] - paper(x)[0]
    assert (difference - found @ layer.out_proj.weight.T).abs().max() <= 1e-10
    with torch.no_grad():
        layer.memory.scale.zero_()
    assert torch.equal(layer(x)[0], paper(x)[0])


def test_the_short_convolution_is_before_window_and_memory():
    """As the layer without it, given convolved queries, keys and values."""
    layer = drawn(MemoryMixer, short_convolution=True)

    class Given(MemoryMixer):
        def _project(self, x):
            projected = super()._project(x)
            filters = layer.short_convolution.weights.double().split(DIM)
            for i, weights in enumerate(filters):
                projected[i] = convolved_by_hand(projected[i], weights)
            return projected

    other = Given(hidden_size=DIM, num_heads=HEADS, window=WINDOW).double()
    assert other.load_state_dict(layer.state_dict(), strict=False).unexpected_keys
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    assert relative(layer(x)[0], other(x)[0]) <= 1e-12


def test_the_short_convolution_starts_as_nothing_but_for_half_of_the_keys():
    """Those of half of the heads, the last ones, are those of the token before."""
    mixer = (
        small_model(mixer="memory", short_convolution=True, hidden_size=32).model.layers[1].mixer
    )
    q, k, v = mixer.short_convolution.weights.split(32)
    own, before = torch.eye(4)[:2]
    assert torch.equal(torch.cat((q, k[:16], v)), own.expand(80, 4))
    assert torch.equal(k[16:], before.expand(16, 4))


class KeyNotNormalised(Alone):
    def _vectors(self, q, positions, state):
        queries, _, after = super()._vectors(q, positions, state)
        lagged, _ = self.memory.convolve(q, state=None, positions=positions, method="auto")
        return queries, self._heads(lagged) / q.shape[-1], after


class KeyOfThisToken(Alone):
    def _local(self, projected, positions, state):
        with torch.no_grad():
            self.memory.lag.copy_(self.memory.lag.roll(-1, 1))
        return super()._local(projected, positions, state)


class WriteGateForgotten(Alone):
    def _local(self, projected, positions, state):
        *others, gates = projected
        return super()._local([*others, gates + torch.tensor([1e3, 0.0])], positions, state)


class ReadGateForgotten(Alone):
    def _local(self, projected, positions, state):
        *others, gates = projected
        return super()._local([*others, gates + torch.tensor([0.0, 1e3])], positions, state)


class RotatedQuery(Alone):
    def _local(self, projected, positions, state):
        q, *others = projected
        turned = torch.cat((q[..., 1:], -q[..., :1]), -1)
        return super()._local([turned, *others], positions, state)


@pytest.mark.parametrize(
    "bug",
    [KeyNotNormalised, KeyOfThisToken, WriteGateForgotten, ReadGateForgotten, RotatedQuery],
)
def test_deliberate_bug_of_the_layer_is_caught(bug):
    layer = drawn(bug)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    truth = memory_by_hand(x, before, 1)
    assert not (layer(x) - truth).abs().max() <= 1e-3 * truth.abs().max()


@pytest.mark.parametrize("initializer_range", [0.02, None])
def test_the_memory_starts_as_the_token_before(initializer_range):
    """Gates begin at one half for every token that their maps ignore, also where PyTorch's own
    initial values are asked for."""
    mixer = small_model(mixer="memory", initializer_range=initializer_range).model.layers[1].mixer
    own = mixer.memory
    assert torch.equal(own.lag, torch.tensor([0.0, 1, 0, 0]).expand(32, 4))
    assert torch.equal(own.scale, torch.ones(32))
    assert not own.write_bias.any()
    assert not own.read_bias.any()
    if initializer_range:
        assert 0.01 < float(mixer.gate_proj.weight.detach().std()) < 0.03


def test_its_parameters_are_few_and_only_the_map_of_its_gates_is_decayed():
    """5 D + 2 H (D + 1) beside the paper's and 12 D of the short convolution, of which the gates'
    map alone is decayed."""
    options = {"hidden_size": DIM, "num_heads": HEADS, "window": WINDOW}
    layer = MemoryMixer(**options, short_convolution=True)
    plain = MemoryMixer(**options)
    paper = SpectralWindowMixer(hidden_size=DIM, num_heads=HEADS, window=WINDOW)
    more = dict(layer.named_parameters()).keys() - dict(paper.named_parameters()).keys()
    assert sum(layer.get_parameter(name).numel() for name in more) == 17 * DIM + 2 * (DIM + 1)
    assert (
        sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in plain.parameters())
        == 12 * DIM
    )
    decayed = more - no_weight_decay(layer)
    assert decayed == {"gate_proj.weight"}


def test_without_a_window_there_is_no_memory():
    with pytest.raises(ValueError, match="uses the window's queries"):
        SWHForCausalLM(small_config(mixer="memory", branches=("spectral",)))


def test_a_key_does_not_reach_across_a_document_or_into_padding():
    layer = drawn()
    x = torch.randn(1, 24, DIM, dtype=torch.float64)
    positions = torch.tensor([[-1, *range(9), -1, -1, *range(12)]])
    found = layer(x, positions)
    for begin, end in ((1, 10), (12, 24)):
        alone = layer(x[:, begin:end])
        assert (found[:, begin:end] - alone).abs().max() <= 1e-12 * alone.abs().max()
    assert not found[positions < 0].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("convolved", [False, True])
def test_a_token_in_a_single_call_is_what_the_operators_make_of_it(
    convolved, heads, dtype, monkeypatch
):
    """A row goes on, one begins afresh, one has no token; or all go on."""
    layer = drawn(MemoryMixer, memory_heads=heads, short_convolution=convolved).float().to(dtype)
    start, token = torch.randn(3, 9, DIM).to(dtype), torch.randn(3, 1, DIM).to(dtype)
    state, asked = layer(start)[1], []
    serves, convolves = memory_step.serves, memory_step.convolves
    for at in (None, torch.tensor([[9], [0], [-1]])):
        monkeypatch.setattr(memory_step, "serves", lambda *x: asked.append(serves(*x)) or asked[-1])
        monkeypatch.setattr(
            memory_step, "convolves", lambda *x: asked.append(convolves(*x)) or asked[-1]
        )
        single = layer(token, at, state)
        monkeypatch.setattr(memory_step, "serves", lambda *x: False)
        monkeypatch.setattr(memory_step, "convolves", lambda *x: False)
        apart = layer(token, at, state)
        pairs = list(zip(single[1][:4], apart[1][:4], strict=True))
        for mine, true in [(single[0], apart[0]), *pairs[2:]]:
            assert mine.dtype == true.dtype
            assert relative(mine, true) <= (1e-6 if dtype == torch.float32 else 4e-3)
        assert torch.equal(single[1].queries, apart[1].queries)
        if convolved:
            assert torch.equal(single[1].inputs, apart[1].inputs)
    assert asked == [HAS_NUMBA] * (4 if convolved else 2)


@pytest.mark.parametrize("split", [1, 7])
def test_a_closed_gate_writes_nothing_to_the_bit(split):
    """By tokens and by chunks: what is stored is what was stored, however long it stays closed."""
    layer = drawn(MemoryMixer, write_gate="closing").float()
    state = layer(torch.randn(1, 9, DIM))[1]
    with torch.no_grad():
        layer.memory.write_bias.fill_(-1e3)
        after = state
        for x in torch.randn(1, 70, DIM).split(split, 1):
            after = layer(x, state=after)[1]
    assert torch.equal(after.memory, state.memory)


@pytest.mark.skipif(not HAS_NUMBA, reason="numba makes the single call")
def test_the_closing_gate_of_a_single_token_is_tanh_at_every_size():
    """S after one token from nothing is b kappa v^T: b, from where tanh is x to where it is 1."""
    layer = drawn(MemoryMixer, write_gate="closing").float()
    wide = drawn(MemoryMixer, write_gate="closing")
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(1, 1, DIM)
    for bias in (-torch.inf, -1.0, 0.0, 1e-30, 1e-6, 0.2499, 0.25, 0.2501, 1.0, 9.0, torch.inf):
        states = []
        for mixer in (layer, wide):
            with torch.no_grad():
                mixer.gate_proj.weight.zero_()
                mixer.memory.write_bias.fill_(bias)
                empty = mixer.init_state(1, dtype=mixer.memory.lag.dtype, device="cpu")
                given = x.to(mixer.q_proj.weight.dtype)
                states.append(mixer(given, state=empty)[1].memory)
        assert (states[0] - states[1]).abs().max() <= 1e-6 * states[1].abs().max(), bias
        assert bool(states[0].any()) == (bias > 0)


def test_a_method_asked_for_by_name_is_not_passed_over_by_the_single_call():
    layer = drawn(MemoryMixer).float()
    state = layer(torch.randn(1, 5, DIM))[1]
    given = torch.randn(1, 1, DIM), torch.randn(1, 1, DIM), torch.randn(1, 1, DIM)
    own = layer.memory
    parameters = memory_step.Parameters(own.lag, own.write_bias, own.read_bias, own.scale, 1e-4)
    inputs, past = (*given, torch.randn(1, 1, 2)), (state.memory, state.queries)
    with torch.no_grad():
        for asked in ({"delta": "step"}, {"delta": "chunked"}, {"fir": "shifts"}):
            assert not memory_step.serves(asked, inputs, past, parameters)
        assert memory_step.serves({}, inputs, past, parameters) == HAS_NUMBA
        assert not memory_step.serves({}, inputs, (state.memory.double(), past[1]), parameters)
    assert not memory_step.serves({}, inputs, past, parameters)  # gradients may be wanted


def test_autocast_leaves_the_memory_as_exact_as_its_inputs():
    """Under autocast q, k, v come in bfloat16; the memory itself is computed as without."""
    model, ids = small_model(mixer="memory"), tokens(2, 80)
    with torch.no_grad():
        want = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, use_cache=True)
    assert F.cosine_similarity(out.logits.float(), want, dim=-1).min() > 0.99
    assert out.past_key_values.layers[0].state.memory.dtype == torch.float32


@pytest.mark.slow
def test_it_recalls_at_32_times_the_length_it_was_trained_at():
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 8}
    tests = tuple(Exam("recall", length, 256) for length in (32, 256, 1024))
    row = run(Probe("recall", shape | {"mixer": "memory"}, tests, steps=300, lr=3e-3))
    assert all(test["right"] >= 0.99 * test["asked"] for test in row["tests"])


def test_heads_are_an_option_of_the_memory_alone():
    config = small_config(mixer="memory", memory_heads=4)
    model = SWHForCausalLM(config)
    assert model.model.layers[0].mixer.init_state(2, dtype=torch.float32, device="cpu")[
        2
    ].shape == ((2, 4, 8, 8))
    assert "memory_heads" not in small_config().to_dict()
    assert small_config(mixer="memory").to_dict()["memory_heads"] == 1
    with pytest.raises(UserError, match=r"memory_heads 5 does not divide hidden_size 32"):
        small_config(mixer="memory", memory_heads=5)
