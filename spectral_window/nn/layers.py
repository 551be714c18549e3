"""The small parts around a mixer: RMSNorm, the feed-forward layers, and which parameters must not
be decayed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_window.nn.kernels import Kernel
from spectral_window.nn.options import Part, Registry
from spectral_window.ops.methods import resolve
from spectral_window.ops.pointwise import rms_norm, swiglu
from spectral_window.ops.tracing import is_recorded


def project(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
    """Each of `maps` (linear layers of one input size) applied to x [..., K]; together where that
    is faster.

    A layer that is more than a plain `nn.Linear` (an adapter, a quantised weight, hooks) is called
    by itself.
    """
    if not (torch.is_grad_enabled() or is_recorded()) and all(map(_is_plain, maps)):
        # looked up directly: this runs for every token
        held: list[Any] = [layer._parameters for layer in maps]
        weights, biases = [of["weight"] for of in held], [of["bias"] for of in held]
        chosen = resolve("linear", "auto", x, weights, biases)
        if chosen.name != "matmul":
            return chosen.function(x, weights, biases)
    return tuple(layer(x) for layer in maps)


def _is_plain(layer: nn.Linear) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer._parameters["weight"]) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype (statistics in at
    least float32)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


MLPS: Registry[MLP] = Registry("mlp")
register = MLPS.register


class MLP(Part, nn.Module):
    """A feed-forward layer, token by token: [.., D] -> [.., D], `hidden` wide inside. Options that
    `register` declares are keywords of the constructor, after these two."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def default_hidden(dim: int) -> int:
        """The width where none is asked for."""
        raise NotImplementedError


@register("swiglu")
class SwiGLU(MLP):
    """W_down(silu(W_gate x) * W_up x): the feed-forward layer of the paper's language models. [..,
    D] -> [.., D]"""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, hidden)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return project(swiglu(gate, up), self.down_proj)[0]

    @staticmethod
    def default_hidden(dim: int) -> int:
        return int(4 * dim * 2 / 3)


@register("gelu")
class GeluMLP(MLP):
    """W_down gelu(W_up x): the feed-forward layer of the paper's synthetic tasks. [.., D] -> [..,
    D]"""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, hidden)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(F.gelu(project(x, self.up_proj)[0]), self.down_proj)[0]

    @staticmethod
    def default_hidden(dim: int) -> int:
        return 4 * dim


def no_weight_decay(module: nn.Module) -> set[str]:
    """Qualified names of the parameters that weight decay must leave alone: dynamics, gains, norms
    and biases.

    Decaying a decay rate or a frequency does not regularise it, it moves the kernel; the paper's
    code does so unnoticed. Matrices and embeddings are decayed. The answer comes from the modules
    and not from marks on the parameters, which loading a checkpoint would lose.
    """
    names = set()
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(prefix, recurse=isinstance(part, Kernel)):
            if isinstance(part, Kernel) or parameter.dim() < 2:
                names.add(name)
    return names
