"""How a call is run: eagerly, recorded as a graph, or transformed by torch.func.

This decides which operations its tensors allow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


def is_recorded() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records the call as a graph.

    Then values cannot be read, and no shape may depend on them.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_exporting() -> bool:
    """Return whether torch.export records the call: a graph for any length, if its sizes are
    dynamic.

    `torch.compiler.is_exporting()` cannot tell: torch 2.11 records it as true in every graph of
    torch.compile. This is the flag that it returns.
    """
    return torch.compiler._is_exporting_flag


def is_exported() -> bool:
    """Return whether torch.export or torch.jit.trace records the call, to run it elsewhere.

    Such a graph may only use PyTorch's own operations.
    """
    return is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing())


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, which would round products to half precision.

    In a recording for another place there is none, and a file of torch.export cannot hold one.
    """
    if device.type == "meta" or is_exported():
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_transformed() -> bool:
    """Return whether torch.func (vmap, jvp, ...) or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def takes_tangents() -> bool:
    """Return whether forward-mode derivatives are computed."""
    return not is_recorded() and forward_ad._current_level >= 0


def may_bypass(*tensors: Tensor | None) -> bool:
    """Return whether compiled code may use the tensors' memory, bypassing torch's dispatcher.

    It may not where the call needs a gradient, a graph or a transformation.
    """
    if is_recorded() or is_transformed():
        return False
    learns = torch.is_grad_enabled()
    return all(
        x is None or (type(x) in PLAIN and not (learns and x.requires_grad)) for x in tensors
    )


def readable(*tensors: Tensor | None) -> bool:
    """Return whether Python can read the values of `tensors` now.

    Not while a graph is recorded or captured, and not on the meta device.
    """
    if is_recorded():
        return False
    present = [x for x in tensors if x is not None]
    if any(type(x) not in PLAIN or x.device.type == "meta" for x in present):
        return False
    return not (any(x.is_cuda for x in present) and torch.cuda.is_current_stream_capturing())
