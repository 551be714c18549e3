"""Fusions: how the outputs of the two branches are combined.

The paper adds the normalised output of the spectral branch to that of the local branch. Each other
fusion tests one question: a learned sum (`weighted`), a sum chosen by each token (`gated`), norms
on both sides (`symmetric_norm`) or none (`sum`).

To add one, subclass `Fusion` and decorate it with `@register("name")`; the contract suite then
tests it. Options that `register` declares are keywords of the constructor, after the branches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_window.nn.layers import RMSNorm, project
from spectral_window.nn.options import Part, PartRegistry

FUSIONS: PartRegistry[Fusion] = PartRegistry("fusion")
register = FUSIONS.register


class Fusion(Part, nn.Module):
    """Base class: combines spectral and local [B, T, D] to [B, T, D], for each token.

    One of the two is None if its branch is switched off; the output is then the other one.

    Args:
        dim: D.
        eps: of the norms.
        branches: the branches that are on.
    """

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__()

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise the fusion's own parameters, not those of its submodules."""


def _add(spectral: Tensor | None, local: Tensor | None) -> Tensor:
    """Return the sum of the branches that are on."""
    if spectral is None:
        assert local is not None
        return local
    return spectral if local is None else spectral + local


@register("norm_add")
class NormAdd(Fusion):
    """The paper's fusion: RMSNorm(spectral) + local (section 1).

    The norm bounds slow channels, whose sums grow.
    """

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__(dim, eps, branches)
        self.norm = RMSNorm(dim, eps) if "spectral" in branches else None

    def normed(self, spectral: Tensor | None) -> Tensor | None:
        return None if spectral is None or self.norm is None else self.norm(spectral)

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        return _add(self.normed(spectral), local)


@register("weighted")
class Weighted(NormAdd):
    """w_s * RMSNorm(spectral) + w_l * local, a learned weight a channel for both, from 1: it starts
    as the paper's. w_s is the RMSNorm's own weight; what is added is w_l."""

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__(dim, eps, branches)
        self.local_weight = nn.Parameter(torch.empty(dim)) if "window" in branches else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.local_weight is not None:
            nn.init.ones_(self.local_weight)

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        if local is not None and self.local_weight is not None:
            local = local * self.local_weight
        return _add(self.normed(spectral), local)


@register("gated")
class Gated(NormAdd):
    """g * RMSNorm(spectral) + (1 - g) * local, g = sigmoid(W [RMSNorm(spectral); local] + b).

    Each token weights both branches, per channel. W [D, 2D] is initialised like the model's other
    linear maps, so g starts near 1/2.
    """

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__(dim, eps, branches)
        self.gate = nn.Linear(2 * dim, dim) if len(branches) == 2 else None

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        normed = self.normed(spectral)
        if normed is None or local is None or self.gate is None:
            return _add(normed, local)
        (logit,) = project(torch.cat((normed, local), -1), self.gate)
        return torch.lerp(local, normed, torch.sigmoid(logit))


@register("symmetric_norm")
class SymmetricNorm(NormAdd):
    """RMSNorm(spectral) + RMSNorm(local): neither branch can dominate by its scale."""

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__(dim, eps, branches)
        self.local_norm = RMSNorm(dim, eps) if "window" in branches else None

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        if local is not None and self.local_norm is not None:
            local = self.local_norm(local)
        return _add(self.normed(spectral), local)


@register("sum")
class Sum(Fusion):
    """spectral + local, without a norm: an ablation of the paper's norm."""

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        return _add(spectral, local)
