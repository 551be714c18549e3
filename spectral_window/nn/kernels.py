"""Kernels: learnable parameters -> `Modes`.

A parameterisation says which oscillators can be learned and where they start; how they are
computed is the business of `ops`. To add one: subclass `Kernel`, yield `Modes` from `forward`, and
decorate it with `@register("name")`. That enrols it in the contract suite (tests/contracts), where
every method must agree on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectral_window.ops.modes import Modes

KERNELS: dict[str, type[Kernel]] = {}


def register(name: str) -> Callable[[type[Kernel]], type[Kernel]]:
    """Class decorator: make a kernel known under `name` (a name is given once)."""

    def enrol(kernel: type[Kernel]) -> type[Kernel]:
        if name in KERNELS:
            raise ValueError(f"kernel '{name}' is registered already: choose another name")
        KERNELS[name] = kernel
        return kernel

    return enrol


class Kernel(nn.Module):
    """Kernels of D channels. `forward()` yields their `Modes`; `modes_per_channel` is M.

    Its parameters stay in float32 when the model is cast to half precision: rounding decays and
    frequencies to bfloat16 moves a 12-layer model's logits by a fifth.
    """

    modes_per_channel = 1

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self) -> Modes:
        raise NotImplementedError

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


@register("damped_oscillator")
class DampedOscillator(Kernel):
    """The paper's kernel: K[t] = exp(-|decay| t) cos(frequency t), both drawn from N(0, 1)
    (section 1).

    Half of the channels forget within about 1.5 tokens and 2.5 % reach past 32: at initialisation
    it is a bank of short filters.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        # float32 by name: a model may be built while half precision is the default
        self.decay = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.frequency = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decay)
        nn.init.normal_(self.frequency)

    def forward(self) -> Modes:
        return Modes(self.decay.abs(), self.frequency)
