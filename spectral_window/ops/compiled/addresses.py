"""Where a tensor becomes an address: the one place, and what is asked of the tensor there.

Compiled code trusts its arguments. So the function that makes a kernel's record (see `threads`) can
take an address from here alone:

    def norm(tiles, rows, size, x, weight, y):
        count = rows * size
        return Norm(rows, size, address(x, FLOAT32, count), address(weight, FLOAT32, size), ...)

What passes is a plain tensor (no subclass, nothing fake or wrapped) in memory of the CPU, of the
declared dtype, contiguous, with exactly as many numbers as the other arguments let the kernel
touch, and without torch's negative bit, which says that the numbers in memory are not those of the
tensor. (The conjugate bit is one of complex dtypes, and none is ever declared.)
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from spectral_window.errors import UserTypeError

Address: TypeAlias = int  # of the first number in memory; 0 for no tensor

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
INT64 = torch.int64
NOWHERE: Address = 0


def address(x: Tensor, dtype: torch.dtype, count: int) -> Address:
    """Where the `count` numbers of x lie. Raises TypeError for another kind of tensor or number,
    ValueError for another size, device or layout."""
    kind = x.__class__
    if (
        (kind is Tensor or kind is Parameter)
        and x.dtype is dtype
        and x.numel() == count
        and x.is_contiguous()
        and x.is_cpu
        and not x.is_neg()
        and ((place := x.data_ptr()) or not count)
    ):
        return place
    raise _refusal(x, dtype, f"{count} numbers, contiguous")


def optional(x: Tensor | None, dtype: torch.dtype, count: int) -> Address:
    """The same; 0 for None."""
    return NOWHERE if x is None else address(x, dtype, count)


def strided(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Address, int, int, int]:
    """(address, bytes from one index to the next in the first three dimensions) of x [*shape], of
    four dimensions, the last of which lies densely. Raises as `address` does."""
    kind = x.__class__
    if (
        (kind is Tensor or kind is Parameter)
        and x.dtype is dtype
        and x.shape == shape
        and x.layout is torch.strided
        and ((steps := x.stride())[-1] == 1 or shape[-1] == 1)
        and x.is_cpu
        and not x.is_neg()
        and ((place := x.data_ptr()) or not x.numel())
    ):
        size, (row, time, head, _) = x.itemsize, steps
        return place, row * size, time * size, head * size
    raise _refusal(x, dtype, f"{list(shape)}, dense in its last dimension")


def _refusal(x: Any, dtype: torch.dtype, wanted: str) -> Exception:
    kind = type(x)
    if kind is not Tensor and kind is not Parameter:
        return UserTypeError(
            f"a {kind.__name__} (compiled code): expected a plain tensor of {dtype}"
        )
    found = f"{x.dtype} {list(x.shape)} on {x.device}, {x.layout}"
    if x.dtype is not dtype:
        return UserTypeError(f"{found} (compiled code): expected {dtype}")
    return ValueError(
        f"{found} (compiled code): expected {wanted}, in memory of the CPU, resolved (resolve_neg)"
    )


def dense(x: Tensor) -> Tensor:
    """x as plain numbers that lie one after the other, itself where they do."""
    return settled(x.contiguous())


def settled(x: Tensor) -> Tensor:
    """x with its negative bit worked out, itself where there is none; a subclass that changes
    nothing of how a tensor works as the tensor it is."""
    kind = x.__class__
    if kind is not Tensor and kind is not Parameter and _is_plain(kind):
        x = x.as_subclass(Tensor)
    return x.resolve_neg() if x.is_neg() else x


def _is_plain(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl
