"""Kernels: modules whose parameters define `Modes` or `Taps`.

A kernel decides which convolutions can be learned and how they are initialised; `ops` computes
them. Every kernel has a state of constant size, so every kernel trains, takes packed documents and
generates token by token:

    sums of damped oscillators (Modes)             state: one complex number per mode
      damped_oscillator  exp(-|a| t) cos(w t), a and w from N(0, 1): that of the paper
      pure_decay         the same without oscillation
      log_spaced         half-lives from 1 to 4096 tokens, each of unit energy
      multi_mode         four of the paper's modes per channel, with learned gains
    FIR filters (Taps)                             state: the last L - 1 inputs of each channel
      free_form          256 free taps
      implicit_mlp       1024 taps, computed from time by a small network (as in Hyena)
      short_filter       4 free taps, the short convolution of Mamba and H3

A FIR filter ignores inputs L or more tokens back. So at a length greater than in training it does
not extrapolate, unlike an oscillator.

To add one, subclass `Kernel` and return `Modes` from `forward` (or `Filter` and `Taps`), and
decorate it with `@register("name")`. The contract suite (tests/contracts) then tests it with every
method. Options that `register` declares are keywords of the constructor, after the channels. Every
kernel here starts with an energy sum K[t]^2 of about 1 or less, so that the convolution of white
noise has about its variance. The exception is a slowly decaying channel of the paper's kernel,
whose energy grows with its half-life.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectral_window.nn.options import Part, PartRegistry
from spectral_window.ops.documents import Documents
from spectral_window.ops.fir import Taps, fir_conv
from spectral_window.ops.modes import Modes, exact_dtype
from spectral_window.ops.spans import Share, last_inputs, oscillators
from spectral_window.ops.spectral import spectral_conv

KERNELS: PartRegistry[Kernel] = PartRegistry("kernel")
register = KERNELS.register


class Kernel(Part, nn.Module):
    """Base class: the kernels of D channels.

    `forward()` returns their `Modes` or `Taps`, which also define the shape of the state and the
    work per token.

    The parameters stay in float32 when the model is cast to half precision: rounding decays and
    frequencies to bfloat16 changes the logits of a 12-layer model by a fifth. They are plain
    parameters and not submodules: an `nn.Linear` would be cast, decayed and initialised like the
    model's linear maps.

    Args:
        channels: D.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self) -> Modes | Taps:
        raise NotImplementedError

    operator = "spectral"  # the operator in METHODS that convolves with this kernel

    def convolve(
        self, u: Tensor, *, state: Tensor | None, positions: Tensor | Documents | None, method: str
    ) -> tuple[Tensor, Tensor]:
        """Convolve with this kernel.

        Args:
            u: [B, T, D].
            state: the state after the earlier tokens, or None.
            positions: documents and padding, see `spectral_window.ops`.
            method: a method's name, or "auto".

        Returns:
            y [B, T, D] and the state after the last token.
        """
        return spectral_conv(u, self(), state=state, positions=positions, method=method)  # type: ignore[arg-type]

    def share(self, u: Tensor, documents: Documents, method: str) -> Share:
        """Return what a span of rows does to the convolution's state (see `ops/spans.py`).

        Args:
            u: [B, T, D], its input in the span.
            documents: of the span.
            method: a method's name, or "auto".
        """
        return oscillators(u, self(), documents, method)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Initialise the parameters in place."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kernel:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float32, torch.float64):
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)


class Filter(Kernel):
    """Base class of FIR filters, one per channel: `forward()` returns `Taps`."""

    operator = "fir"

    def forward(self) -> Taps:
        raise NotImplementedError

    def convolve(
        self, u: Tensor, *, state: Tensor | None, positions: Tensor | Documents | None, method: str
    ) -> tuple[Tensor, Tensor]:
        return fir_conv(u, self(), state=state, positions=positions, method=method)

    def share(self, u: Tensor, documents: Documents, method: str) -> Share:
        return last_inputs(u, self().weights.shape[1] - 1, documents)


def float32_parameter(*shape: int) -> nn.Parameter:
    """Return an uninitialised float32 parameter, whatever torch's default dtype is."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def initialize(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy an initial value into a parameter, unless a checkpoint has been loaded into it.

    transformers marks loaded parameters, and its `nn.init` functions skip them in the same way.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(value)


def _log_decay(channels: int, longest: float) -> Tensor:
    """Return the log of decays [D] whose half-lives are log-spaced from 1 to `longest` tokens."""
    half_lives = torch.logspace(0, math.log2(longest), channels, base=2.0, dtype=torch.float64)
    return (math.log(2) / half_lives).log()


def _unit_energy(decay: Tensor) -> Tensor:
    """Return the gain for which sum_t (gain exp(-decay t))^2 = 1."""
    return torch.sqrt(-torch.expm1(-2 * decay))


# ------------------------------------------------------------------- sums of damped oscillators


@register("damped_oscillator")
class DampedOscillator(Kernel):
    """The paper's kernel: K[t] = exp(-|decay| t) cos(frequency t), both from N(0, 1) (section 1).

    Half of the channels have a memory of less than about 1.5 tokens, and 2.5 % of more than 32: at
    initialisation it is a bank of short filters.

    Example:
        >>> kernel = KERNELS["damped_oscillator"](channels=3)
        >>> y, state = kernel.convolve(
        ...     torch.randn(2, 5, 3), state=None, positions=None, method="auto"
        ... )
        >>> y.shape
        torch.Size([2, 5, 3])
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = float32_parameter(channels)
        self.frequency = float32_parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decay)
        nn.init.normal_(self.frequency)

    def forward(self) -> Modes:
        return Modes(self.decay.abs(), self.frequency)


@register("pure_decay")
class PureDecay(Kernel):
    """The paper's kernel without oscillation: K[t] = exp(-|decay| t), decay from N(0, 1).

    The difference to `damped_oscillator` is the effect of the frequencies.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = float32_parameter(channels)
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

    - log_decay: an optimizer step changes a half-life by a relative amount, at any scale.
    - turn: from N(0, 1), the angle in radians per half-life. So all channels have shapes of one
      family, stretched in time (constant Q, as in wavelets). With frequencies from N(0, 1) radians
      per token every slow channel would be a resonator with a period of a few tokens, insensitive
      to slow changes, and an optimizer step would change its phase far back by many radians.
    - g: the sum of (g exp(-a t))^2 is 1. Without it the output of a channel grows with the root of
      its half-life, and slow channels dominate the RMSNorm that follows.
    """

    longest = 4096.0

    def __init__(self, channels: int):
        super().__init__(channels)
        self.log_decay = float32_parameter(channels)
        self.turn = float32_parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize(self.log_decay, _log_decay(self.channels, self.longest))
        nn.init.normal_(self.turn)

    def forward(self) -> Modes:
        decay = self.log_decay.exp()
        return Modes(decay, self.turn * decay / math.log(2), _unit_energy(decay))


@register("multi_mode")
class MultiMode(Kernel):
    """Four of the paper's oscillators per channel.

        K[t] = sum_m gain_m exp(-|decay_m| t) cos(frequency_m t)

    decay and frequency [D, 4] are drawn from N(0, 1), gain [D, 4] from N(0, 1/4). So the expected
    energy at every t is that of the paper's kernel, and only the shapes differ.
    """

    modes = 4

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = float32_parameter(channels, self.modes)
        self.frequency = float32_parameter(channels, self.modes)
        self.gain = float32_parameter(channels, self.modes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decay)
        nn.init.normal_(self.frequency)
        nn.init.normal_(self.gain, std=self.modes**-0.5)

    def forward(self) -> Modes:
        return Modes(self.decay.abs(), self.frequency, self.gain)


# ------------------------------------------------------------------------------------ FIR filters


@register("free_form")
class FreeForm(Filter):
    """256 free taps per channel: a kernel without a prescribed form.

    Initialised as noise under an envelope that halves every 32 tokens, with unit energy. Inputs
    more than 255 tokens back have no effect.
    """

    taps = 256
    half_life = 32.0

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weights = float32_parameter(channels, self.taps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        home = self.weights.device
        lag = torch.arange(self.taps, dtype=torch.float32, device=home)
        envelope = 2.0 ** (-lag / self.half_life)
        noise = torch.randn(self.channels, self.taps, dtype=torch.float32, device=home)
        initialize(self.weights, noise * envelope / envelope.square().sum().sqrt())

    def forward(self) -> Taps:
        return Taps(self.weights)


@register("short_filter")
class ShortFilter(Filter):
    """4 learned taps per channel: the short convolution of Mamba and H3.

    It covers a token and the three before it, and so tests whether the global branch does more than
    that. Initialised from N(0, 1/4): unit energy.
    """

    taps = 4

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weights = float32_parameter(channels, self.taps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weights, std=self.taps**-0.5)

    def forward(self) -> Taps:
        return Taps(self.weights)


@register("implicit_mlp")
class ImplicitMLP(Filter):
    """1024 taps per channel, computed by a network from features of time.

    Hyena, Poli et al. 2023, section 3.3:

        K[t] = g exp(-a t) * (W_3 sin(W_2 sin(W_1 features(t) + b_1) + b_2))

    features(t) are t / L and 16 sines and cosines with periods log-spaced from 2 to 2 L tokens; the
    sines between the layers allow equally fast changes. The number of parameters does not depend on
    L. The envelopes a = exp(log_decay) start with half-lives log-spaced from 1 to L tokens across
    channels, and g gives them unit energy (see `LogSpaced`). Inputs more than 1023 tokens back have
    no effect.

    Computed in float64, so that neither autocast nor the precision setting of float32 products
    changes the kernel. It is computed again at every call: for a single token that is most of the
    work.
    """

    taps = 1024
    hidden = 64
    waves = 16

    def __init__(self, channels: int):
        super().__init__(channels)
        self.log_decay = float32_parameter(channels)
        self.weight_1 = float32_parameter(self.hidden, 1 + 2 * self.waves)
        self.bias_1 = float32_parameter(self.hidden)
        self.weight_2 = float32_parameter(self.hidden, self.hidden)
        self.bias_2 = float32_parameter(self.hidden)
        self.weight_3 = float32_parameter(channels, self.hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize(self.log_decay, _log_decay(self.channels, self.taps))
        # the mean square of a sine or cosine, and of the hidden layers, is 1/2, so that the output
        # of every layer has variance 1
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
