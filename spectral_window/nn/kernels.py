"""Kernels: learnable parameters -> `Modes` or `Taps`.

A parameterisation says which kernels can be learned and where they start; how they are computed is
the business of `ops`. Both kinds have a state of constant size, so every kernel trains, takes
packed documents and generates token by token:

    sums of damped oscillators (Modes)             state: one complex number a mode
      damped_oscillator  exp(-|a| t) cos(w t), a and w from N(0, 1): the paper's
      pure_decay         the same without oscillation
      log_spaced         half-lives from 1 to 4096 tokens, each of unit energy
      multi_mode         four of the paper's a channel, with learned gains
    finite filters (Taps)                          state: the last L - 1 inputs of each channel
      free_form          256 free taps
      implicit_mlp       1024 taps that a small network makes from time (Hyena's idea)
      short_filter       4 free taps, the short convolution of Mamba and H3

A finite filter sees nothing that lies L tokens back or more: what it does at a greater length than
it was trained at is no extrapolation of the kernel, unlike an oscillator's.

To add one: subclass `Kernel` and yield `Modes` from `forward`, or `Filter` and `Taps`, and decorate
it with `@register("name")`. That enrols it in the contract suite (tests/contracts), where every
method must agree on it. Options that `register` declares are keywords of the constructor, after the
channels. Every kernel here starts with an energy sum K[t]^2 near 1 or below, so that the
convolution of white noise has about its variance (a slowly decaying channel of the paper's, whose
energy grows with its half-life, is the exception).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectral_window.nn.options import Part, Registry
from spectral_window.ops.documents import Documents
from spectral_window.ops.fir import Taps, fir_conv
from spectral_window.ops.modes import Modes, exact_dtype
from spectral_window.ops.spectral import spectral_conv

KERNELS: Registry[Kernel] = Registry("kernel")
register = KERNELS.register


class Kernel(Part, nn.Module):
    """Kernels of D channels. `forward()` yields their `Modes` or `Taps`, and with them the shape of
    the state and the work a token.

    Its parameters stay in float32 when the model is cast to half precision: rounding decays and
    frequencies to bfloat16 moves a 12-layer model's logits by a fifth. None is a module's of its
    own (`nn.Linear` would be cast, decayed and initialised like the model's maps).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self) -> Modes | Taps:
        raise NotImplementedError

    operator = "spectral"  # in METHODS, which convolves with this kernel

    def convolve(
        self, u: Tensor, *, state: Tensor | None, positions: Tensor | Documents | None, method: str
    ) -> tuple[Tensor, Tensor]:
        """The operator with this kernel: u [B, T, D] -> (y [B, T, D], state)."""
        return spectral_conv(u, self(), state=state, positions=positions, method=method)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw the initial parameters, in place."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kernel:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float32, torch.float64):
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)


class Filter(Kernel):
    """A finite filter a channel: `forward()` yields `Taps`."""

    operator = "fir"

    def forward(self) -> Taps:
        raise NotImplementedError

    def convolve(
        self, u: Tensor, *, state: Tensor | None, positions: Tensor | Documents | None, method: str
    ) -> tuple[Tensor, Tensor]:
        return fir_conv(u, self(), state=state, positions=positions, method=method)


def _parameter(*shape: int) -> nn.Parameter:
    # float32 by name: a model may be built while half precision is the default
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def _begin_at(parameter: nn.Parameter, value: Tensor) -> None:
    """Fill a parameter, unless a checkpoint has filled it already (which the library that loads it
    marks; it does the same inside `nn.init`)."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(value)


def _log_decay(channels: int, longest: float) -> Tensor:
    """log of the decays [D] whose half-lives are log-spaced from 1 to `longest` tokens."""
    half_lives = torch.logspace(0, math.log2(longest), channels, base=2.0, dtype=torch.float64)
    return (math.log(2) / half_lives).log()


def _unit_energy(decay: Tensor) -> Tensor:
    """The gain for which sum_t (gain exp(-decay t))^2 = 1."""
    return torch.sqrt(-torch.expm1(-2 * decay))


# ------------------------------------------------------------------- sums of damped oscillators


@register("damped_oscillator")
class DampedOscillator(Kernel):
    """The paper's kernel: K[t] = exp(-|decay| t) cos(frequency t), both drawn from N(0, 1)
    (section 1).

    Half of the channels forget within about 1.5 tokens and 2.5 % reach past 32: at initialisation
    it is a bank of short filters.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = _parameter(channels)
        self.frequency = _parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decay)
        nn.init.normal_(self.frequency)

    def forward(self) -> Modes:
        return Modes(self.decay.abs(), self.frequency)


@register("pure_decay")
class PureDecay(Kernel):
    """The paper's kernel without oscillation: K[t] = exp(-|decay| t), decay from N(0, 1). What is
    lost against it is what the frequencies earn."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = _parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decay)

    def forward(self) -> Modes:
        return Modes(self.decay.abs(), torch.zeros_like(self.decay))


@register("log_spaced")
class LogSpaced(Kernel):
    """Oscillators of every time scale: half-lives log-spaced from 1 to 4096 tokens.

    K[t] = g exp(-a t) cos(turn t / half-life), a = exp(log_decay), half-life = ln 2 / a,
    g = sqrt(1 - exp(-2 a)).

    log_decay: a step of learning changes a half-life by a share of itself, at any scale.
    turn:      from N(0, 1), the radians a kernel turns in one half-life: the bank is one family of
               shapes, stretched in time (constant Q, as in wavelets). Frequencies from N(0, 1)
               radians a token would make every slow channel a resonator of a period of a few
               tokens, blind to what a text is about, and a step of learning would turn its far end
               by many radians.
    g:         sum of (g exp(-a t))^2 is 1. Without it a channel's output grows with the root of
               its half-life, and the slow ones drown the fast in the RMSNorm that follows.
    """

    longest = 4096.0

    def __init__(self, channels: int):
        super().__init__(channels)
        self.log_decay = _parameter(channels)
        self.turn = _parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _begin_at(self.log_decay, _log_decay(self.channels, self.longest))
        nn.init.normal_(self.turn)

    def forward(self) -> Modes:
        decay = self.log_decay.exp()
        return Modes(decay, self.turn * decay / math.log(2), _unit_energy(decay))


@register("multi_mode")
class MultiMode(Kernel):
    """Four of the paper's oscillators a channel: K[t] = sum_m gain_m exp(-|decay_m| t)
    cos(frequency_m t).

    decay and frequency [D, 4] from N(0, 1), gain [D, 4] from N(0, 1/4): the expected energy at
    every t is that of the paper's kernel, so that only the shapes differ.
    """

    modes = 4

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = _parameter(channels, self.modes)
        self.frequency = _parameter(channels, self.modes)
        self.gain = _parameter(channels, self.modes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decay)
        nn.init.normal_(self.frequency)
        nn.init.normal_(self.gain, std=self.modes**-0.5)

    def forward(self) -> Modes:
        return Modes(self.decay.abs(), self.frequency, self.gain)


# -------------------------------------------------------------------------------- finite filters


@register("free_form")
class FreeForm(Filter):
    """256 free taps a channel: what could be learned where no form is asked for.

    They start as noise under an envelope that halves every 32 tokens, of unit energy. Beyond 255
    tokens back nothing is seen.
    """

    taps = 256
    half_life = 32.0

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weights = _parameter(channels, self.taps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        home = self.weights.device
        lag = torch.arange(self.taps, dtype=torch.float32, device=home)
        envelope = 2.0 ** (-lag / self.half_life)
        noise = torch.randn(self.channels, self.taps, dtype=torch.float32, device=home)
        _begin_at(self.weights, noise * envelope / envelope.square().sum().sqrt())

    def forward(self) -> Taps:
        return Taps(self.weights)


@register("short_filter")
class ShortFilter(Filter):
    """A filter of 4 taps, fixed and short in length; the taps are learned. It is the short
    convolution of Mamba and H3, and the question it asks is whether the global branch is more than
    that: it sees the token and the three before. Taps from N(0, 1/4): unit energy."""

    taps = 4

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weights = _parameter(channels, self.taps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weights, std=self.taps**-0.5)

    def forward(self) -> Taps:
        return Taps(self.weights)


@register("implicit_mlp")
class ImplicitMLP(Filter):
    """1024 taps that a network makes from features of time (Hyena, Poli et al. 2023, section 3.3):

        K[t] = g exp(-a t) * (W_3 sin(W_2 sin(W_1 features(t) + b_1) + b_2))

    features(t) are t / L and 16 sines and cosines, of periods log-spaced from 2 to 2 L tokens; the
    sines between the layers let the network change as fast as they do. The number of parameters
    does not grow with L. Envelopes a = exp(log_decay) start with half-lives log-spaced from 1 to L
    tokens across channels, and g gives them unit energy (see `LogSpaced`). Beyond 1023 tokens back
    nothing is seen.

    Computed in float64, so that neither autocast nor the setting for float32 products changes the
    kernel. It is made anew at every call: for a single token that is most of the work.
    """

    taps = 1024
    hidden = 64
    waves = 16

    def __init__(self, channels: int):
        super().__init__(channels)
        self.log_decay = _parameter(channels)
        self.weight_1 = _parameter(self.hidden, 1 + 2 * self.waves)
        self.bias_1 = _parameter(self.hidden)
        self.weight_2 = _parameter(self.hidden, self.hidden)
        self.bias_2 = _parameter(self.hidden)
        self.weight_3 = _parameter(channels, self.hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _begin_at(self.log_decay, _log_decay(self.channels, self.taps))
        # the mean square of a sine or cosine, and of the hidden layers, is 1/2: so every layer's
        # output has variance 1
        nn.init.normal_(self.weight_1, std=self.waves**-0.5)
        nn.init.normal_(self.weight_2, std=(self.hidden / 2) ** -0.5)
        nn.init.normal_(self.weight_3, std=(self.hidden / 2) ** -0.5)
        nn.init.uniform_(self.bias_1, -math.pi, math.pi)
        nn.init.uniform_(self.bias_2, -math.pi, math.pi)

    def forward(self) -> Taps:
        exact = exact_dtype(self.log_decay.device)
        t = torch.arange(self.taps, dtype=exact, device=self.log_decay.device)
        x = torch.sin(self._features(t) @ self.weight_1.to(exact).T + self.bias_1.to(exact))
        x = torch.sin(x @ self.weight_2.to(exact).T + self.bias_2.to(exact))
        decay = self.log_decay.to(exact).exp()
        envelope = _unit_energy(decay)[:, None] * torch.exp(-decay[:, None] * t)
        return Taps(envelope * (self.weight_3.to(exact) @ x.T))

    def _features(self, t: Tensor) -> Tensor:
        """t [L] -> [L, 1 + 2 * waves]."""
        last = math.log2(self.taps)
        octaves = torch.linspace(0, last, self.waves, dtype=t.dtype, device="cpu")
        angle = math.pi * t[:, None] * 2.0 ** -octaves.to(t.device)
        return torch.cat((t[:, None] / self.taps, torch.sin(angle), torch.cos(angle)), 1)
