"""Linear maps of one input: y = x W^T + b for several W at once.

For many vectors that is PyTorch's matrix product. For a few, as when text is generated token by
token, it is bound by reading W: compiled code then reads all the matrices in one go
(`linear`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from spectral_window.ops.dispatch import resolve


def linear_maps(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, method: str = "auto"
) -> tuple[Tensor, ...]:
    """x [..., K] times each of `weights` [N, K], plus its bias [N] or None: a [..., N] for each.

    method: "auto", "matmul", or "rows" (no gradients, a CPU, one dtype of float32 or bfloat16;
    anything else takes "matmul"). Raises what PyTorch's `linear` raises.
    """
    if weights and resolve("linear", method, x)[0] == "rows":
        return by_rows(x, weights, biases)
    return _by_products(x, weights, biases)


def by_rows(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`linear_maps` where "rows" was chosen for x; by products where a weight does not allow it."""
    dtype, size = x.dtype, x.shape[-1]
    for weight, bias in zip(weights, biases, strict=True):
        if (
            type(weight) not in (Tensor, Parameter)
            or weight.dtype is not dtype
            or weight.shape[1:] != (size,)
            or not weight.is_contiguous()
            or not weight.is_cpu
            or (bias is not None and not _fits(bias, weight))
        ):
            return _by_products(x, weights, biases)
    from spectral_window.ops.compiled.linear import MOST, multiply

    if len(weights) > MOST:
        return _by_products(x, weights, biases)
    y = multiply(x.reshape(-1, size), weights, biases)
    y = y.view(*x.shape[:-1], y.shape[1])
    if len(weights) == 1:
        return (y,)
    return y.split_with_sizes([weight.shape[0] for weight in weights], -1)


def _fits(bias: Tensor, weight: Tensor) -> bool:
    alike = type(bias) in (Tensor, Parameter) and bias.dtype is weight.dtype and bias.is_cpu
    return alike and bias.shape == weight.shape[:1] and bias.is_contiguous()


def _by_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
