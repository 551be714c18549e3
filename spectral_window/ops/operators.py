"""Operators with a backward pass of their own, cheap where nothing is recorded.

torch.library makes an operator known to graphs (torch.compile, opcheck, fake tensors), at a price:
a call with gradients spends about a millisecond in its dispatch, more than a kernel takes on a GPU.
So a call on plain tensors goes through a `torch.autograd.Function`, or runs directly where no
gradient is wanted; both have the same forward and backward passes as the registered operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_window.ops.tracing import PLAIN, is_recorded, is_transformed


def is_plain(*args: Any) -> bool:
    """Return whether nothing is recorded or transformed, and all tensors are plain ones."""
    if is_recorded() or is_transformed():
        return False
    return all(type(x) in PLAIN for x in args if isinstance(x, Tensor))


def operator(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `run` as the operator spectral_window::NAME, and return what calls it.

    Args:
        name: of the operator.
        run: the forward pass; its annotations give the operator's schema. It returns new tensors.
        fake: returns empty tensors of the outputs' shapes and dtypes, for graphs.
        save: `save(ctx, inputs, output)` stores what `backward` needs; None without gradients.
        backward: `backward(ctx, *gradients)` returns a gradient for each input.

    Returns:
        A function with the arguments and results of `run`.
    """
    registered = torch.library.custom_op(f"spectral_window::{name}", run, mutates_args=())
    registered.register_fake(fake)
    apply = None
    if save is not None and backward is not None:
        registered.register_autograd(backward, setup_context=save)
        members = {"forward": run, "setup_context": save, "backward": backward}
        function: Any = type(
            name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()}
        )
        apply = function.apply

    def call(*args: Any) -> Any:
        if not is_plain(*args):
            return registered(*args)
        learns = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in args
        )
        return run(*args) if apply is None or not learns else apply(*args)

    call.__name__, call.__doc__ = name, run.__doc__
    call.registered = registered  # type: ignore[attr-defined]  # for opcheck
    return call
