"""Modes: sums of damped oscillators, the interface between learned kernels and algorithms.

The kernel of a channel is K[t] = sum_m gain_m exp(-decay_m t) cos(frequency_m t), t = 0, 1, 2, ...
(paper section 1, with one mode and gain 1). With z = exp(-decay + i frequency) this is
Re(sum_m gain_m z_m^t), so the convolution is the recurrence

    h_t = z h_{t-1} + u_t        y_t = Re(sum_m gain_m h_t)

with two numbers of state per mode, whatever the length.

Precision. An angle frequency * t in float32 has an error of 1e-2 at t = 10^6. So powers of z are
computed in float64 and rounded at most once, as exp(t log z) and not as z**t, which underflows to
NaN for strong damping. Complex numbers are stored as real pairs (re, im), because compilers and
exporters do not support complex tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_window.errors import NotFiniteError, UserError, UserTypeError
from spectral_window.ops.tracing import readable


class Modes(NamedTuple):
    """Damped oscillators of D channels, M per channel.

    Attributes:
        decay: [D] or [D, M] float32 or float64, >= 0, in nats per step. 0 never forgets.
        frequency: same shape, in radians per step.
        gain: same shape, or None for 1.
    """

    decay: Tensor
    frequency: Tensor
    gain: Tensor | None = None

    def named(self) -> tuple[tuple[str, Tensor | None], ...]:
        """Return (name, tensor) of each field."""
        return ("decay", self.decay), ("frequency", self.frequency), ("gain", self.gain)

    def shaped(self, channels: int) -> Modes:
        """Return these modes as [D, M] tensors.

        Raises:
            UserTypeError: a dtype below float32. Rounding decays to bfloat16 changes the logits of
                a 12-layer model by 20 %.
            UserError: a wrong shape.
        """
        for name, value in self.named():
            if value is None:
                continue
            if value.dtype not in (torch.float32, torch.float64):
                raise UserTypeError(
                    f"{name} is {value.dtype} (modes): keep it in float32 or float64, "
                    "lower precision changes the kernel"
                )
            if (
                value.shape != self.decay.shape
                or value.dim() not in (1, 2)
                or value.shape[0] != channels
            ):
                raise UserError(
                    f"{name} has shape {tuple(value.shape)} (modes): expected [{channels}] or "
                    f"[{channels}, M], the same for decay, frequency and gain"
                )
        if self.decay.dim() == 2:
            return self
        gain = None if self.gain is None else self.gain[:, None]
        return Modes(self.decay[:, None], self.frequency[:, None], gain)

    def check_values(self) -> None:
        """Raise ValueError for NaN, infinity or a negative decay.

        Values on a GPU, and values inside torch.compile, are not checked.
        """
        for name, value in self.named():
            if value is None or value.device.type != "cpu" or not readable(value):
                continue
            if not bool(torch.isfinite(value).all()):
                raise NotFiniteError(
                    f"{name} is not finite (modes): training diverged or a file is corrupt"
                )
            if name == "decay" and bool((value < 0).any()):
                raise UserError(
                    "decay is negative (modes): the kernel would grow; pass its absolute value"
                )

    def validated(self, channels: int) -> Modes:
        """Return `shaped(channels)` after `check_values()`."""
        self.check_values()
        return self.shaped(channels)

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of a state: [B, D, M, 2], one complex number (re, im) per mode."""
        each = 1 if self.decay.dim() == 1 else self.decay.shape[1]
        return batch, self.decay.shape[0], each, 2

    def state_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype of a state: float64 for every input, since it sums the whole past."""
        return exact_dtype(device)

    def flops_per_token(self) -> int:
        """Return the operations per token: one complex multiply-add per mode."""
        return 8 * self.decay.numel()

    def double(self) -> Modes:
        """Return these modes in float64, or in float32 on a device without float64."""
        exact = exact_dtype(self.decay.device)
        gain = None if self.gain is None else self.gain.to(exact)
        return Modes(self.decay.to(exact), self.frequency.to(exact), gain)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def powers(modes: Modes, steps: Tensor) -> Tensor:
    """Return z^n for every n in `steps`, differentiable in decay and frequency.

    Computed in float64 on every device (on the CPU for a device without float64).

    Args:
        modes: modes of shape [D, M].
        steps: [N], any real numbers.

    Returns:
        [D, M, N, 2], pairs (re, im).
    """
    decay, frequency = modes.decay, modes.frequency
    home = decay.device
    if exact_dtype(home) is not torch.float64:
        decay, frequency, steps = decay.cpu(), frequency.cpu(), steps.cpu()
    n = steps.to(torch.float64)
    size = torch.exp(-decay.double()[..., None] * n)
    angle = frequency.double()[..., None] * n
    table = torch.stack((size * torch.cos(angle), size * torch.sin(angle)), dim=-1)
    return table.to(exact_dtype(home)).to(home)  # a device without float64 gets none


def kernel(modes: Modes, length: int) -> Tensor:
    """Return the impulse response K[t], t = 0 ... length - 1: [D, length] in float64."""
    table = powers(modes, torch.arange(length, dtype=torch.int64, device=modes.decay.device))[
        ..., 0
    ]
    if modes.gain is not None:
        table = table * modes.gain.to(table.dtype)[..., None]
    return table.sum(1)


def times(a: Tensor, b: Tensor) -> Tensor:
    """Multiply complex numbers that are stored as pairs (re, im) in the last dimension."""
    re = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    im = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return torch.stack((re, im), dim=-1)
