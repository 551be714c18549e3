"""The state of window attention: a ring buffer of 2W keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WindowState(NamedTuple):
    """The keys and values that later tokens can see.

    Position p is in slot p mod 2W. Slots that no later query can see hold zeros.

    Attributes:
        key: [B, 2W, H, K] in the model's dtype, rotated already.
        value: [B, 2W, H, V] in the model's dtype.
        position: [B] int64, the position of the next token of each row.
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
    """Return the state before any token."""
    slots = 2 * window
    return WindowState(
        torch.zeros(batch, slots, heads, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, slots, heads, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def slot_positions(position: Tensor, window: int) -> Tensor:
    """Return the position in each of the 2W slots when `position` [R] comes next: [R, 2W].

    -1 marks a slot that no later query can see.
    """
    slots = 2 * window
    slot = torch.arange(slots, dtype=torch.int64, device=position.device)
    latest = position[:, None] - 1
    position_of_slot = latest - (latest - slot) % slots
    oldest = (position // window - 1)[:, None] * window
    return torch.where(position_of_slot >= oldest.clamp(min=0), position_of_slot, -1)
