"""Linear maps of one input: y = x W^T + b for several W at once.

For many vectors that is PyTorch's matrix product. For a few, as when text is generated token by
token, it is bound by reading W: compiled code then reads all the matrices in one go
(`numba_linear`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops.dispatch import resolve


def linear_maps(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, method: str = "auto"
) -> tuple[Tensor, ...]:
    """x [..., K] times each of `weights` [N, K], plus its bias [N] or None: a [..., N] for each.

    method: "auto", "matmul", or "rows" (no gradients, a CPU, one dtype of float32 or bfloat16;
    anything else takes "matmul"). Raises what PyTorch's `linear` raises.
    """
    method, _ = resolve("linear", method, x)
    if method == "matmul" or not (
        all(_readable(w, x) and w.dim() == 2 and w.shape[1] == x.shape[-1] for w in weights)
        and all(b is None or _readable(b, x) for b in biases)
    ):
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    from spectral_window.ops.numba_linear import multiply

    y = multiply(x.reshape(-1, x.shape[-1]).contiguous(), weights, biases)
    y = y.view(*x.shape[:-1], y.shape[1])
    if len(weights) == 1:
        return (y,)
    return y.split_with_sizes([weight.shape[0] for weight in weights], -1)


def _readable(w: Tensor, x: Tensor) -> bool:
    return w.dtype is x.dtype and w.is_contiguous() and w.device == x.device
