"""Rotary position embedding (RoPE).

Each pair (x_2i, x_2i+1) is rotated by the angle position * theta^(-2i/K). Paper section 1:
theta = 10000, interleaved pairs, *global* positions, applied before the text is cut into chunks.
Angles are computed in float64 and rounded once: in float32 an angle at position 10^6 has an error
of 3e-2 radians.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.ops.modes import exact_dtype


def angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of shape [*positions.shape, dim / 2] in `dtype`."""
    home = positions.device
    if exact_dtype(home) is not torch.float64:
        positions = positions.cpu()
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angle = positions.to(torch.float64)[..., None] * theta**-exponent
    return torch.cos(angle).to(home, dtype), torch.sin(angle).to(home, dtype)


def check_theta(theta: float) -> None:
    """Raise UserError unless `theta` is a finite number above 0: angles are powers of it."""
    if not 0 < theta < math.inf:
        raise UserError(f"rope_theta is {theta} (rotary): expected a finite number above 0")


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate x to `positions`, computed in at least float32.

    Args:
        x: [B, T, H, K].
        positions: [T] or [B, T].
        theta: base of the angles, above 0.

    Returns:
        [B, T, H, K] in x's dtype.

    Raises:
        UserError: an odd K, or a bad theta (a ValueError).
    """
    check_theta(theta)
    dim = x.shape[-1]
    if dim % 2:
        raise UserError(f"head size {dim} is odd (rotary): pairs need an even head size")
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles(positions, dim, theta, dtype)
    cos, sin = cos[..., None, :], sin[..., None, :]
    even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
