"""Several linear maps of one input: y = x W^T + b for several W.

For many vectors this is PyTorch's matrix product. For a few vectors, as in generation token by
token, the time goes into reading W, and compiled code reads all matrices in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops.methods import HAS_NUMBA, Method, Reason, enrol, resolve
from spectral_window.ops.tracing import PLAIN, may_bypass

FEW = 4  # vectors at once; a matrix product is faster for more

Maps = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def linear_maps(
    x: Tensor, weights: Maps, biases: Biases, *, method: str = "auto"
) -> tuple[Tensor, ...]:
    """Apply several linear maps to one input.

    Args:
        x: [..., K].
        weights: matrices [N, K], each with its own N.
        biases: for each matrix a vector [N], or None.
        method: a name in METHODS["linear"], or "auto".

    Returns:
        One [..., N] for each matrix.

    Raises:
        UserError: `method` is unknown, or cannot compute these tensors. Other errors are those of
            PyTorch's `linear`.

    Example:
        >>> a, b = linear_maps(torch.ones(1, 2), [torch.eye(2), torch.ones(3, 2)], [None, None])
        >>> a, b
        (tensor([[1., 1.]]), tensor([[2., 2., 2.]]))
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
    plain = type(bias) in PLAIN and bias.dtype is weight.dtype and bias.is_cpu
    return plain and bias.shape == weight.shape[:1] and bias.is_contiguous()


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
