"""Linear maps of one input: y = x W^T + b for several W at once.

For many vectors that is PyTorch's matrix product. For a few, as when text is generated token by
token, it is bound by reading W: compiled code then reads all the matrices in one go
(`linear`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops.methods import HAS_NUMBA, Method, Reason, enrol, resolve
from spectral_window.ops.tracing import PLAIN, may_bypass

FEW = 4  # vectors at once; more are served better by a matrix product

Maps = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def linear_maps(
    x: Tensor, weights: Maps, biases: Biases, *, method: str = "auto"
) -> tuple[Tensor, ...]:
    """x [..., K] times each of `weights` [N, K], plus its bias [N] or None: a [..., N] for each.

    method: a name in METHODS["linear"], or "auto". Raises UserError where "rows" is asked for by
    name and cannot serve, else what PyTorch's `linear` raises.
    """
    if not weights:
        return ()
    return resolve("linear", method, x, weights, biases).function(x, weights, biases)


def _by_rows(x: Tensor, weights: Maps, biases: Biases) -> tuple[Tensor, ...]:
    from spectral_window.ops.compiled.linear import MOST, multiply

    if len(weights) > MOST:
        first = _by_rows(x, weights[:MOST], biases[:MOST])
        return first + _by_rows(x, weights[MOST:], biases[MOST:])
    y = multiply(x.reshape(-1, x.shape[-1]), weights, biases)
    y = y.view(*x.shape[:-1], y.shape[1])
    if len(weights) == 1:
        return (y,)
    return tuple(y.split_with_sizes([weight.shape[0] for weight in weights], -1))


def _by_products(x: Tensor, weights: Maps, biases: Biases) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def _not_for_rows(x: Tensor, weights: Maps = (), biases: Biases = ()) -> Reason:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not may_bypass(x):
        return "gradients, autocast, graphs and transformations need torch's operations"
    dtype = x.dtype
    if not (HAS_NUMBA and x.is_cpu and (dtype is torch.float32 or dtype is torch.bfloat16)):
        return "it needs numba, and float32 or bfloat16 on a CPU"
    size = x.shape[-1] if x.dim() else 0
    if not x.numel() or (dtype is torch.bfloat16 and size % 2):
        return "nothing to multiply, or an odd size: bfloat16 is read in pairs"
    for weight, bias in zip(weights, biases, strict=True):
        if (
            type(weight) not in PLAIN
            or weight.dtype is not dtype
            or weight.shape[1:] != (size,)
            or not weight.is_contiguous()
            or not weight.is_cpu
            or (bias is not None and not _fits(bias, weight))
        ):
            return "it needs plain contiguous weights and biases of the input's dtype"
    return None


def _fits(bias: Tensor, weight: Tensor) -> bool:
    alike = type(bias) in PLAIN and bias.dtype is weight.dtype and bias.is_cpu
    return alike and bias.shape == weight.shape[:1] and bias.is_contiguous()


def _many(x: Tensor, *_: object) -> Reason:
    if x.dim() and x.numel() <= FEW * x.shape[-1]:
        return None
    return f"a matrix product is quicker for more than {FEW} vectors"


enrol(
    "linear",
    Method(
        "rows",
        _by_rows,
        "every row of the weights read once, in compiled code (numba), for a few vectors",
        _not_for_rows,
        _many,
    ),
    Method("matmul", _by_products, "PyTorch's matrix product"),
)
