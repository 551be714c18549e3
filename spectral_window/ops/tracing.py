"""How a call is being run: eagerly, recorded as a graph, or transformed; and so what may be done
with its tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


def is_recorded() -> bool:
    """Is the call recorded as a graph, by torch.compile, torch.export or torch.jit.trace? Then
    values cannot be looked at, and no shape may depend on them."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_exported() -> bool:
    """Is it recorded to be run elsewhere, by torch.export or torch.jit.trace? Then the graph holds
    PyTorch's own operations alone."""
    return torch.compiler.is_exporting() or (
        not torch.compiler.is_compiling() and torch._C._is_tracing()
    )


def is_transformed() -> bool:
    """Is torch.func (vmap, jvp, ...) or forward-mode differentiation at work?"""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def takes_tangents() -> bool:
    """Are forward-mode derivatives being taken?"""
    return not is_recorded() and forward_ad._current_level >= 0


def may_bypass(*tensors: Tensor | None) -> bool:
    """May compiled code be called on these tensors' memory, past torch's dispatcher? Not where a
    gradient, a graph or a transformation of the call is wanted."""
    if is_recorded() or is_transformed():
        return False
    learns = torch.is_grad_enabled()
    return all(
        x is None or (type(x) in PLAIN and not (learns and x.requires_grad)) for x in tensors
    )


def readable(*tensors: Tensor | None) -> bool:
    """May Python look at the values of `tensors` now? Not while a graph is recorded or captured,
    and not where there are none."""
    if is_recorded():
        return False
    given = [x for x in tensors if x is not None]
    if any(type(x) not in PLAIN or x.device.type == "meta" for x in given):
        return False
    return not (any(x.is_cuda for x in given) and torch.cuda.is_current_stream_capturing())
