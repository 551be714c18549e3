"""The contract of every registered kernel, fusion and mixer."""

from __future__ import annotations

import pytest
import torch

from spectral_window import nn
from spectral_window.nn import fusions, kernels, mixers
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS
from spectral_window.nn.layers import no_weight_decay
from spectral_window.nn.mixers import BRANCHES, MIXERS, map_state
from spectral_window.ops import Modes, Taps, resolve
from spectral_window.ops.methods import serving
from tests.contracts.measure import block_error, relative

DIM, HEADS, WINDOW = 16, 2, 5
# Every kernel with the paper's fusion, every fusion and branch with the paper's kernel: what a
# fusion does, it does token by token and never sees which kernel made its input.
PAPER = {
    "kernel": "damped_oscillator",
    "fusion": "norm_add",
    "branches": BRANCHES,
    "window": WINDOW,
}
VARIANTS = [
    ("attention", {}),
    ("attention", {"shifted_keys": True}),
    *[("memory", PAPER | {"branches": branches}) for branches in (BRANCHES, ("window",))],
    ("memory", {"write_gate": "reflecting", "short_convolution": True, "window": WINDOW}),
    ("memory", {"write_gate": "closing", "memory_heads": 2, "window": WINDOW}),
    ("memory", {"short_convolution": True, "memory_heads": 2, "window": WINDOW}),
    *[("spectral_window", PAPER | {"kernel": kernel}) for kernel in KERNELS],
    *[
        ("spectral_window", PAPER | {"fusion": fusion, "branches": branches})
        for fusion in FUSIONS
        for branches in (BRANCHES, ("spectral",), ("window",))
        if (fusion, branches) != ("norm_add", BRANCHES)
    ],
]
every_kernel = pytest.mark.parametrize("name", KERNELS)
every_mixer = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else options_id(v)
)


def options_id(options: dict) -> str:
    known = [key for key in PAPER if key in options]
    return "-".join(str(options[key]) for key in known or options) or "plain"


def by_spectra(kernel: torch.nn.Module) -> bool:
    """Is this kernel convolved by an FFT, whose rounding mixes all positions?"""
    return resolve(kernel.operator, "auto", torch.empty(1, 2, DIM), *kernel()).name == "fft"


def build(name: str, options: dict) -> mixers.Mixer:
    return MIXERS[name](hidden_size=DIM, num_heads=HEADS, **options).double()


def test_every_registered_mixer_is_tried():
    ours = {name for name, mixer in MIXERS.items() if mixer.__module__.startswith(nn.__name__)}
    assert {name for name, _ in VARIANTS} == ours  # the laboratory's have no state


def methods(kernel: torch.nn.Module) -> list[str]:
    served = serving(kernel.operator, torch.empty(1, 2, DIM), *kernel())
    return [name for name in served if name != "reference"]


def convolve(kernel: torch.nn.Module, u: torch.Tensor, method: str = "auto"):
    return kernel.convolve(u, state=None, positions=None, method=method)


@every_kernel
def test_kernel_yields_what_all_methods_agree_on(name):
    kernel = KERNELS[name](DIM)
    given = kernel()
    assert isinstance(given, Modes | Taps)
    u = torch.randn(2, 70, DIM)
    truth, end = convolve(kernel, u.double(), "reference")
    assert end.shape == given.state_shape(2)
    for method in methods(kernel):
        y, state = convolve(kernel, u, method)
        assert block_error(y, truth) <= 4e-6
        assert relative(state, end) <= 1e-10
        assert state.dtype == given.state_dtype(u.dtype, u.device)


@every_kernel
def test_kernel_gradients_reach_all_parameters_and_agree(name):
    kernel = KERNELS[name](DIM)
    u = torch.randn(2, 70, DIM)
    grads = {}
    for method in (*methods(kernel), "reference"):
        y, _ = convolve(kernel, u, method)
        grads[method] = torch.autograd.grad(y.square().sum(), list(kernel.parameters()))
    for method in methods(kernel):
        for mine, truth in zip(grads[method], grads["reference"], strict=True):
            assert truth.abs().max() > 0
            assert relative(mine, truth) <= 1e-5


@every_kernel
def test_kernel_begins_with_an_output_of_the_scale_of_its_input(name):
    """White noise through it: the median channel's variance is near 1, so that the norm after it
    and the learning rate mean the same for every kernel."""
    kernel = KERNELS[name](128)
    with torch.no_grad():
        y, _ = convolve(kernel, torch.randn(1, 4096, 128))
    spread = y[0, 2048:].var(0)
    assert 0.4 < float(spread.median()) < 1.6
    assert torch.isfinite(spread).all()


@every_kernel
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_kernel_stays_in_float32_when_the_model_is_cast(name, cast):
    kernel = KERNELS[name](DIM)
    before = {k: v.clone() for k, v in kernel.state_dict().items()}
    holder = torch.nn.ModuleDict({"kernel": kernel, "proj": torch.nn.Linear(2, 2)}).to(cast)
    assert holder["proj"].weight.dtype == cast
    assert all(torch.equal(kernel.state_dict()[k], v) for k, v in before.items())


@every_kernel
def test_kernel_reset_draws_anew(name):
    kernel = KERNELS[name](DIM)
    before = [p.clone() for p in kernel.parameters()]
    torch.manual_seed(123)
    kernel.reset_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, kernel.parameters(), strict=True))


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_is_token_by_token_and_takes_a_missing_branch(name):
    x, z = torch.randn(2, 9, DIM), torch.randn(2, 9, DIM)
    both = FUSIONS[name](DIM, 1e-6, BRANCHES)
    y = both(x, z)
    assert y.shape == x.shape
    changed = x.clone()
    changed[:, 4] += 1
    other = both(changed, z)
    assert torch.equal(other[:, :4], y[:, :4])
    assert torch.equal(other[:, 5:], y[:, 5:])
    assert FUSIONS[name](DIM, 1e-6, ("spectral",))(x, None).shape == x.shape
    assert FUSIONS[name](DIM, 1e-6, ("window",))(None, z).shape == x.shape


@every_mixer
def test_mixer_decodes_as_it_forwards_for_any_split(name, options):
    mixer = build(name, options)
    x = torch.randn(2, 33, DIM, dtype=torch.float64)
    whole, end = mixer(x)
    for sizes in ([33], [1] * 33, [7, 1, 1, 20, 4]):
        state, parts = None, []
        for part in x.split(sizes, 1):
            y, state = mixer(part, state=state)
            parts.append(y)
        assert relative(torch.cat(parts, 1), whole) <= 1e-11
        ends, states = [], []
        map_state(end, ends.append)
        map_state(state, states.append)
        assert all(
            relative(a.double(), b.double()) <= 1e-10 for a, b in zip(states, ends, strict=True)
        )


@every_mixer
def test_mixer_from_its_initial_state_is_mixer_from_none(name, options):
    mixer = build(name, options)
    x = torch.randn(3, 12, DIM, dtype=torch.float64)
    state = mixer.init_state(3, dtype=torch.float64, device="cpu")
    assert relative(mixer(x, state=state)[0], mixer(x)[0]) <= 1e-12


@every_mixer
def test_mixer_is_causal(name, options):
    mixer = build(name, options)
    x = torch.randn(2, 21, DIM, dtype=torch.float64)
    y, _ = mixer(x)
    changed = x.clone()
    changed[:, 13:] = torch.randn_like(changed[:, 13:]) * 1e3
    past, before = mixer(changed)[0][:, :13], y[:, :13]
    if hasattr(mixer, "kernel") and by_spectra(mixer.kernel):
        assert (past - before).abs().max() <= 4e-6 * 1e3 * torch.finfo(x.dtype).eps / 1.2e-7
    else:
        assert torch.equal(past, before)


@every_mixer
def test_mixer_takes_padding_and_packing_as_each_document_alone(name, options):
    mixer = build(name, options)
    a, b = torch.randn(1, 9, DIM, dtype=torch.float64), torch.randn(1, 14, DIM, dtype=torch.float64)
    alone_a, _ = mixer(a)
    alone_b, end_b = mixer(b)
    hole = torch.full((1, 3, DIM), torch.nan, dtype=torch.float64)
    x = torch.cat((hole, a, hole, b, hole), 1)
    counts = [[-1] * 3, range(9), [-1] * 3, range(14), [-1] * 3]
    positions = torch.tensor([[p for part in counts for p in part]])
    y, state = mixer(x.nan_to_num(7.0), positions)
    assert relative(y[:, 3:12], alone_a) <= 1e-12
    assert relative(y[:, 15:29], alone_b) <= 1e-12
    token = torch.randn(1, 1, DIM, dtype=torch.float64)
    expected, _ = mixer(token, state=end_b)
    assert relative(mixer(token, torch.tensor([[14]]), state)[0], expected) <= 1e-12
    assert relative(mixer(token, state=state)[0], expected) <= 1e-12


@every_mixer
def test_mixer_counts_its_state_bytes(name, options):
    mixer = build(name, options).float()
    x = torch.randn(3, 64, DIM)
    _, state = mixer(x)
    sizes: list[int] = []
    map_state(state, lambda t: sizes.append(t.nbytes) or t)
    assert mixer.state_bytes(64, batch_size=3, dtype=torch.float32) == sum(sizes)


@every_mixer
def test_mixer_state_has_the_batch_first(name, options):
    mixer = build(name, options)
    x = torch.randn(4, 8, DIM, dtype=torch.float64)
    _, state = mixer(x)
    order = torch.tensor([2, 0, 3, 3])
    picked = map_state(state, lambda t: t.index_select(0, order))
    token = torch.randn(4, 1, DIM, dtype=torch.float64)
    y, _ = mixer(token, state=picked)
    _, alone = mixer(x[order])
    assert relative(y, mixer(token, state=alone)[0]) <= 1e-12


@every_mixer
def test_mixer_dynamics_norms_and_biases_are_not_decayed(name, options):
    mixer = build(name, options)
    kept = no_weight_decay(mixer)
    for parameter, value in mixer.named_parameters():
        dynamics = parameter.startswith(("kernel.", "memory.", "shift.", "short_convolution."))
        assert (parameter in kept) == (dynamics or value.dim() < 2), parameter


@every_mixer
def test_mixer_flops_count_the_work(name, options):
    """At a long context the count grows for attention and stays for the hybrid."""
    mixer = build(name, options)
    maps = 2 * sum(p.weight.numel() for p in mixer.modules() if isinstance(p, torch.nn.Linear))
    assert mixer.flops_per_token(1) >= maps
    growth = mixer.flops_per_token(100_000) - mixer.flops_per_token(50_000)
    assert growth == (2 * DIM * 50_000 if name == "attention" else pytest.approx(0, abs=2))


@pytest.mark.parametrize("registry", [kernels, fusions, mixers])
def test_a_name_is_registered_once(registry):
    names = {kernels: "damped_oscillator", fusions: "norm_add", mixers: "attention"}
    with pytest.raises(ValueError, match="registered already"):
        registry.register(names[registry])(object)


@pytest.mark.parametrize(
    ("says", "options"),
    [
        ("did you mean 'damped_oscillator'", {"kernel": "damped_oscilator"}),
        ("did you mean 'norm_add'", {"fusion": "norm_ad"}),
        ("branches", {"branches": ("spectal",)}),
        ("branches", {"branches": ()}),
        ("use 4 heads", {"num_heads": 5}),
        ("head size 1 is odd", {"num_heads": 16}),
        ("did you mean 'window'", {"windw": 4}),
        ("window is 0", {"window": 0}),
    ],
)
def test_bad_options_are_named(says, options):
    with pytest.raises(ValueError, match=says):
        MIXERS["spectral_window"](**{"hidden_size": 16, "num_heads": 2, "window": 4, **options})
