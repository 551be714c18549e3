"""Fusions: how the outputs of the two branches become one.

To add one: subclass `Fusion` and decorate it with `@register("name")`; the contract suite enrols
it by itself.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from spectral_window.nn.layers import RMSNorm

FUSIONS: dict[str, type[Fusion]] = {}


def register(name: str) -> Callable[[type[Fusion]], type[Fusion]]:
    """Class decorator: make a fusion known under `name` (a name is given once)."""

    def enrol(fusion: type[Fusion]) -> type[Fusion]:
        if name in FUSIONS:
            raise ValueError(f"fusion '{name}' is registered already: choose another name")
        FUSIONS[name] = fusion
        return fusion

    return enrol


class Fusion(nn.Module):
    """(spectral, local), both [B, T, D] -> [B, T, D], token by token; either may be None where
    that branch is off."""

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__()

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        raise NotImplementedError


@register("norm_add")
class NormAdd(Fusion):
    """The paper's: RMSNorm(spectral) + local (section 1). The norm keeps slow channels, whose sums
    grow, in scale."""

    def __init__(self, dim: int, eps: float, branches: tuple[str, ...]):
        super().__init__(dim, eps, branches)
        self.norm = RMSNorm(dim, eps) if "spectral" in branches else None

    def forward(self, spectral: Tensor | None, local: Tensor | None) -> Tensor:
        if spectral is None or self.norm is None:
            assert local is not None
            return local
        normed = self.norm(spectral)
        return normed if local is None else normed + local
