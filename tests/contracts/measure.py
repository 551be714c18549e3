"""How errors are measured: relative root mean square, per channel and per block of 64 positions."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def relative(x: Tensor, truth: Tensor) -> float:
    """rms(x - truth) / rms(truth) over everything; 0 where both are zero."""
    assert x.shape == truth.shape, f"shape {tuple(x.shape)}, expected {tuple(truth.shape)}"
    x, truth = x.detach(), truth.detach()
    scale = rms(truth)
    error = rms(x.double() - truth.double())
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def block_error(y: Tensor, truth: Tensor) -> float:
    """The worst relative rms error over rows, channels and blocks of 64 positions; y, truth [B, T,
    D].

    A block in which the truth happens to cancel is measured against a hundredth of its channel's
    scale.
    """
    assert y.shape == truth.shape, f"shape {tuple(y.shape)}, expected {tuple(truth.shape)}"
    if not y.numel():
        return 0.0
    y, truth = y.detach().double(), truth.detach().double()
    scale = truth.square().mean(1).sqrt()
    worst = 0.0
    for begin in range(0, y.shape[1], BLOCK):
        part = truth[:, begin : begin + BLOCK]
        error = (y[:, begin : begin + BLOCK] - part).square().mean(1).sqrt()
        size = torch.maximum(part.square().mean(1).sqrt(), 0.01 * scale)
        # a channel that is exactly silent must be exactly silent
        ratio = torch.where(
            size > 0, error / size.clamp(min=1e-300), torch.where(error > 0, torch.inf, 0.0)
        )
        if not bool(torch.isfinite(ratio).all()):
            return float("inf")
        worst = max(worst, float(ratio.max()))
    return worst
