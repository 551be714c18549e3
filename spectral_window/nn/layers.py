"""The parts around a mixer: linear maps, RMSNorm, feed-forward layers; and the weight-decay rule.

`no_weight_decay` is here, and not with the optimizer, because transformers' Trainer applies it too
(`hf/registration.py`), and because the rule depends on what a `Kernel` is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_window.nn.kernels import Kernel
from spectral_window.nn.options import Part, PartRegistry
from spectral_window.ops.methods import resolve
from spectral_window.ops.pointwise import rms_norm, swiglu
from spectral_window.ops.tracing import is_recorded


def project(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
    """Apply several linear layers to x, in one call where that is faster.

    A layer that is not a plain `nn.Linear` (an adapter, a quantised weight, hooks) is called as it
    is.

    Args:
        x: [..., K].
        maps: linear layers with input size K.

    Returns:
        One [..., N] for each layer.
    """
    if not (torch.is_grad_enabled() or is_recorded()) and all(map(_is_plain, maps)):
        # read without nn.Module.__getattr__, which is slow: this runs for every token
        parameters: list[Any] = [layer._parameters for layer in maps]
        weights, biases = [p["weight"] for p in parameters], [p["bias"] for p in parameters]
        chosen = resolve("linear", "auto", x, weights, biases)
        if chosen.name != "matmul":
            return chosen.function(x, weights, biases)
    if len(maps) > 1 and x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))  # once, and not once for each map
    return tuple(layer(x) for layer in maps)


def _is_plain(layer: nn.Linear) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer._parameters["weight"]) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    The output has x's dtype; the mean is computed in at least float32.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


MLPS: PartRegistry[MLP] = PartRegistry("mlp")
register = MLPS.register


class MLP(Part, nn.Module):
    """Base class of feed-forward layers, applied to each token: [..., D] -> [..., D].

    Options that `register` declares are keywords of the constructor, after these two.

    Args:
        dim: D.
        hidden: width of the hidden layer.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def default_hidden(dim: int) -> int:
        """Return the hidden width that is used if none is given."""
        raise NotImplementedError


@register("swiglu")
class SwiGLU(MLP):
    """W_down(silu(W_gate x) * W_up x): the feed-forward layer of the paper's language models."""

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
    """W_down gelu(W_up x): the feed-forward layer of the paper's synthetic tasks."""

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
    """Return the qualified names of the parameters that get no weight decay.

    These are the parameters of kernels, gains, norms and biases; matrices and embeddings are
    decayed. Decaying a decay rate or a frequency does not regularise it but changes the kernel (the
    paper's code does so). The rule reads the modules and not marks on the parameters, which loading
    a checkpoint would lose.
    """
    names = set()
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(prefix, recurse=isinstance(part, Kernel)):
            if isinstance(part, Kernel) or parameter.dim() < 2:
                names.add(name)
    return names
