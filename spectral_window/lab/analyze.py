"""What a model has learned, in numbers: its kernels, and what each branch is worth.

**Kernels.** A mode exp(-a t) cos(w t) has a half-life of ln 2 / a tokens. A kernel that is no sum
of modes (a learned filter) has none written in it, so the word is extended: the lag from which on a
quarter of the kernel's energy sum K[t]^2 is left, which for an exponential is ln 2 / a again. The
frequency response of a mode needs no truncated transform: with z = exp(-a + i w),

    H(v) = sum_t K[t] e^(-i v t) = (1 / (1 - z e^(-i v)) + 1 / (1 - z* e^(-i v))) / 2.

**Branches.** A branch's part of the fusion's sum is what the fusion gives with the other branch at
zero: RMSNorm(Y_spec) and Y_local for the paper's, and it is defined for every other fusion too. Two
numbers are read from it on text: the share of energy, mean |part|^2, and what silencing a branch
costs, the rise of the held-out loss in nats per token. Energy says what enters the sum, the loss
says what is used; they need not agree.

**Drift.** How far the kernels are from where they began. A run's seed gives back its very first
weights, so every channel is compared with itself; and in any case the learned decays and
frequencies are compared with fresh draws of the same kernel by the statistic of Kolmogorov and
Smirnov: the largest distance of the two cumulative distributions, 0 for equal and 1 for disjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from spectral_window.data.blocks import TokenStream
from spectral_window.errors import UserError, UserTypeError
from spectral_window.hf import SWHForCausalLM
from spectral_window.nn.fusions import Fusion
from spectral_window.nn.mixers import BRANCHES, Mixer
from spectral_window.ops.fir import Taps
from spectral_window.ops.modes import Modes, kernel
from spectral_window.training.evaluate import evaluate

QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "longest": 1.0}
SHOWN = {"fast (10 %)": 0.1, "median": 0.5, "slow (90 %)": 0.9, "slowest": 1.0}
ANGLES = np.linspace(0.0, np.pi, 129)  # radians per token, where responses are evaluated
LAGS = 65  # tokens of an impulse response that are written down
FRESH = 64  # fresh kernels that stand for the initial distribution
KS_5_PERCENT = 1.358  # times sqrt(1/n + 1/m): what one in twenty pairs of equal samples exceeds


class Kernels(NamedTuple):
    """One layer's kernels as arrays. N oscillators (or D learned filters), D channels.

    half_life: [N] tokens.  frequency: [N] radians per token, None for learned filters.
    slowest: [D] the longest half-life of each channel.  modes: what the layer computes with.
    """

    half_life: np.ndarray
    frequency: np.ndarray | None
    slowest: np.ndarray
    modes: Any


# -------------------------------------------------------------------------------------- the kernels


def read_kernels(model: SWHForCausalLM) -> list[Kernels]:
    """The kernels of every layer, in order. Raises UserError where a model has none."""
    mixers, config = with_branch(model, "spectral"), model.config
    if not mixers:
        raise UserError(
            f"no learned kernels (mixer {config.mixer}, branches {', '.join(config.branches)}): "
            "give a model with the spectral branch"
        )
    with torch.no_grad():
        return [_read(mixer.kernel()) for mixer in mixers]


@singledispatch
def _read(yielded: Any) -> Kernels:
    """What a kernel module yields, as arrays. Sums of oscillators and learned filters are read
    differently, so this and the next two functions have one form for each."""
    raise UserTypeError(f"a kernel that yields {type(yielded).__name__} cannot be read (analyze)")


@_read.register
def _(yielded: Modes) -> Kernels:
    decay = yielded.decay.detach().double().abs().cpu().numpy()
    life = math.log(2) / np.maximum(decay, 1e-12)
    slowest = life if life.ndim == 1 else life.max(1)
    frequency = yielded.frequency.detach().double().cpu().numpy().ravel()
    return Kernels(life.ravel(), frequency, slowest, yielded)


@_read.register
def _(yielded: Taps) -> Kernels:
    energy = yielded.weights.detach().double().cpu().numpy() ** 2
    left = energy[:, ::-1].cumsum(1)[:, ::-1]  # from lag t on
    # a filter of a single zero lag has no energy; its half-life is 0
    life = (left > left[:, :1] / 4).sum(1).astype(float)
    return Kernels(life, None, life, yielded)


@singledispatch
def impulse_response(modes: Any, length: int) -> np.ndarray:
    """K[t] of every channel, t = 0 ... length - 1: [D, length]."""
    raise UserTypeError(f"no impulse response of {type(modes).__name__} (analyze)")


@impulse_response.register
@torch.no_grad()
def _(modes: Modes, length: int) -> np.ndarray:
    return kernel(modes.validated(modes.decay.shape[0]), length).cpu().numpy()


@impulse_response.register
def _(taps: Taps, length: int) -> np.ndarray:
    weights = taps.weights.detach().double().cpu().numpy()[:, :length]
    return np.pad(weights, ((0, 0), (0, length - weights.shape[1])))


@singledispatch
def frequency_response(modes: Any, angles: np.ndarray) -> np.ndarray:
    """|H| of every channel at `angles` (radians per token): [D, len(angles)]; infinite at the
    frequency of a mode that never decays."""
    raise UserTypeError(f"no frequency response of {type(modes).__name__} (analyze)")


@frequency_response.register
def _(modes: Modes, angles: np.ndarray) -> np.ndarray:
    turn = np.exp(-1j * angles)
    two = modes.validated(modes.decay.shape[0])
    decay, frequency = (part.detach().double().cpu().numpy() for part in two[:2])
    z = np.exp(-decay + 1j * frequency)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        each = (1 / (1 - z * turn) + 1 / (1 - z.conj() * turn)) / 2
    if two.gain is not None:
        each = each * two.gain.detach().double().cpu().numpy()[..., None]
    return np.abs(each.sum(1))


@frequency_response.register
def _(taps: Taps, angles: np.ndarray) -> np.ndarray:
    weights = taps.weights.detach().double().cpu().numpy()
    return np.abs(weights @ np.exp(-1j * angles)[None, :] ** np.arange(weights.shape[1])[:, None])


def chosen_channels(kernels: Kernels) -> dict[str, int]:
    """A readable selection: the channels at some quantiles of the half-life, fast to slow."""
    order = np.argsort(kernels.slowest, kind="stable")
    return {name: int(order[round(q * (len(order) - 1))]) for name, q in SHOWN.items()}


def _describe(kernels: Kernels, window: int) -> dict[str, Any]:
    """One layer's kernels in numbers."""
    summary: dict[str, Any] = {
        "oscillators": 0 if kernels.frequency is None else len(kernels.half_life),
        "half_life": _quantiles(kernels.half_life),
        "past_window": float((kernels.half_life > window).mean()),
    }
    if kernels.frequency is not None:
        summary["frequency"] = _quantiles(fold(kernels.frequency))
    impulse = impulse_response(kernels.modes, LAGS)
    response = frequency_response(kernels.modes, ANGLES)
    summary["channels"] = [
        {
            "name": name,
            "channel": channel,
            "half_life": float(kernels.slowest[channel]),
            "impulse": impulse[channel].round(6).tolist(),
            "response": [round(x, 6) if math.isfinite(x) else None for x in response[channel]],
        }
        for name, channel in chosen_channels(kernels).items()
    ]
    return summary


def fold(frequency: np.ndarray) -> np.ndarray:
    """Frequencies as a sampled signal shows them: in 0 ... pi radians per token."""
    return np.abs((frequency + np.pi) % (2 * np.pi) - np.pi)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


# ------------------------------------------------------------------------------------- the branches


def mixers_of(model: SWHForCausalLM) -> list[Mixer]:
    """The mixers of all layers, in order."""
    return [layer.mixer for layer in cast(Any, model.model.layers)]


def with_branch(model: SWHForCausalLM, *branches: str) -> list[Any]:
    """The mixers of all layers that have one of the branches, in order."""
    return [mixer for mixer in mixers_of(model) if set(branches) & set(mixer.branches)]


def alone(args: tuple[Any, ...], branch: str) -> tuple[Any, ...]:
    """A fusion's arguments with every other branch at zero."""
    own = BRANCHES.index(branch)
    rest = (x if x is None or i == own else torch.zeros_like(x) for i, x in enumerate(args[:2]))
    return (*rest, *args[2:])


@contextmanager
def _before_fusion(mixers: list[Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Call hook(fusion, its arguments) before each fusion; what it returns replaces these."""
    handles = [mixer.fusion.register_forward_pre_hook(hook) for mixer in mixers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def branch_energy(
    model: SWHForCausalLM, stream: TokenStream, *, length: int, max_tokens: int
) -> tuple[float, list[dict[str, float]]]:
    """(held-out loss, for each layer the energy of each branch's part of the fusion's sum).

    Energies are mean squares per channel and token, under the branch's name; `spectral_share` is
    spectral / (spectral + window).
    """
    mixers = with_branch(model, *BRANCHES)
    sums: dict[Fusion, dict[str, float]] = {
        m.fusion: dict.fromkeys(m.branches, 0.0) for m in mixers
    }
    count = 0

    def measure(fusion: Fusion, args: tuple[Tensor | None, ...]) -> None:
        nonlocal count
        for branch in sums[fusion]:
            part = fusion.forward(*alone(args, branch))
            sums[fusion][branch] += float(part.double().square().sum())
        if fusion is mixers[0].fusion:
            count += part.numel()

    with _before_fusion(mixers, measure):
        loss = evaluate(model, stream, length=length, max_tokens=max_tokens)["loss"]
    layers = []
    for energies in sums.values():
        means = {branch: total / count for branch, total in energies.items()}
        whole = sum(means.values())
        layers.append({**means, "spectral_share": means.get("spectral", 0.0) / whole})
    return loss, layers


def silenced_loss(
    model: SWHForCausalLM,
    stream: TokenStream,
    branch: str,
    layer: int | None = None,
    *,
    length: int,
    max_tokens: int,
) -> float:
    """Held-out loss, nats per token, with `branch` zeroed where it enters the fusion, in one layer
    (from 0) or in all."""
    mixers = with_branch(model, *BRANCHES)

    def silence(fusion: Fusion, args: tuple[Any, ...]) -> tuple[Any, ...]:
        own = BRANCHES.index(branch)
        return tuple(torch.zeros_like(x) if i == own else x for i, x in enumerate(args))

    with _before_fusion(mixers if layer is None else [mixers[layer]], silence):
        return evaluate(model, stream, length=length, max_tokens=max_tokens)["loss"]


# ---------------------------------------------------------------------------------------- the drift


def initial_model(model: SWHForCausalLM, seed: int) -> SWHForCausalLM:
    """The weights that a run with this seed began with, exactly; torch's generator is left alone.

    Training seeds every generator and builds the model next (`training/trainer.py`); of these only
    torch's is drawn from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SWHForCausalLM(model.config)


def _fresh(part: Any) -> list[Kernels]:
    """Draws of the initial distribution of a kernel like `part`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [_read(type(part)(part.channels)()) for _ in range(FRESH)]


def ks_statistic(one: np.ndarray, other: np.ndarray) -> float:
    """Largest distance of the two samples' cumulative distributions (Kolmogorov and Smirnov)."""
    at = np.concatenate((one, other))
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


def _drift(now: Kernels, part: Any, begun: Kernels | None) -> dict[str, Any]:
    """How far one layer's kernels are from their beginning."""
    fresh = _fresh(part)
    drawn = np.concatenate([each.half_life for each in fresh])
    n, m = len(now.half_life), len(drawn)
    summary: dict[str, Any] = {
        "half_life_ks": ks_statistic(now.half_life, drawn),
        "ks_5_percent": KS_5_PERCENT * math.sqrt(1 / n + 1 / m),
        "initial_half_life": _quantiles(drawn),
    }
    if now.frequency is not None:
        turns = np.concatenate([each.frequency for each in fresh if each.frequency is not None])
        summary["frequency_ks"] = ks_statistic(fold(now.frequency), fold(turns))
        summary["mean_decay"] = float((math.log(2) / now.half_life).mean())
        summary["initial_mean_decay"] = float((math.log(2) / drawn).mean())
    if begun is not None:
        ratio = np.log2(np.maximum(now.half_life, 1e-9) / np.maximum(begun.half_life, 1e-9))
        summary["half_life_log2_ratio"] = _quantiles(ratio)
        summary["slower_by_half"] = float((ratio > math.log2(1.5)).mean())
        summary["faster_by_half"] = float((ratio < -math.log2(1.5)).mean())
        if now.frequency is not None and begun.frequency is not None:
            moved = np.abs(now.frequency - begun.frequency)
            summary["frequency_moved"] = _quantiles(moved)
    return summary


# -------------------------------------------------------------------------------- all of it at once


def analyze(
    model: SWHForCausalLM,
    stream: TokenStream,
    *,
    length: int,
    max_tokens: int,
    begun: list[Kernels] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything about `model` that this module's text describes, as JSON values.

    stream: held-out text, of which `max_tokens` are read in rows of `length`, once for each number.
    begun: the kernels that the model began with (`initial_model`), for the drift of each channel.
    progress(done, total): called after each reading of the text.

    Raises UserError for a model without a spectral branch (a Transformer has no kernels).
    """
    mixers, kernels, config = with_branch(model, *BRANCHES), read_kernels(model), model.config
    text = {"length": length, "max_tokens": max_tokens}
    total = 1 + len(config.branches) * (1 + len(mixers))
    loss, energies = branch_energy(model, stream, **text)
    progress(1, total)
    done = 1
    silenced: list[dict[str, float]] = []
    for layer in (None, *range(len(mixers))):
        rises = {}
        for branch in config.branches:
            rises[branch] = silenced_loss(model, stream, branch, layer, **text) - loss
            done += 1
            progress(done, total)
        silenced.append(rises)
    layers = []
    for index, (mixer, now) in enumerate(zip(mixers, kernels, strict=True)):
        layers.append(
            {
                "layer": index + 1,
                **_describe(now, config.window),
                "energy": energies[index],
                "silenced": silenced[index + 1],
                "drift": _drift(now, mixer.kernel, None if begun is None else begun[index]),
            }
        )
    return {
        **config.deciding("state"),
        "loss": loss,
        "silenced": silenced[0],
        "angles": ANGLES.round(6).tolist(),
        "layers": layers,
    }
