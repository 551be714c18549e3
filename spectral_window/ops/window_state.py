"""What window attention remembers of the tokens before: a ring of 2W keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WindowState(NamedTuple):
    """What the tokens to come may still see.

    key, value: [B, 2W, H, K] and [B, 2W, H, V] in the model's dtype, keys already rotated;
                position p lies in slot p mod 2W; slots that no later query can see hold zeros.
    position:   [B] int64, the position of each row's next token.
    """

    key: Tensor
    value: Tensor
    position: Tensor


def empty_state(
    batch: int,
    window: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> WindowState:
    """The state before any token."""
    slots = 2 * window
    return WindowState(
        torch.zeros(batch, slots, heads, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, slots, heads, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def held_positions(position: Tensor, window: int) -> Tensor:
    """The position that each of the 2W slots holds when `position` [R] comes next; -1 for a slot
    no later query sees."""
    slots = 2 * window
    slot = torch.arange(slots, dtype=torch.int64, device=position.device)
    latest = position[:, None] - 1
    held = latest - (latest - slot) % slots
    oldest = (position // window - 1)[:, None] * window
    return torch.where(held >= oldest.clamp(min=0), held, -1)
