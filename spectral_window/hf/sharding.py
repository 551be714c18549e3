"""Shard a model's parameters over processes with FSDP2 (`torch.distributed.fsdp.fully_shard`).

FSDP2 gathers a group of parameters into one buffer of one dtype, and a mixed-precision policy casts
a whole group. Decays and frequencies are float32 in every model and must not be rounded, so every
kernel is a group of its own. Everything else is sharded per block, by the given policy.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from spectral_window.errors import UserError
from spectral_window.hf.model import SWHLayer
from spectral_window.nn.kernels import Kernel

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def shard(model: AnyModel, mesh: Any = None, policy: Any = None, **options: Any) -> AnyModel:
    """Shard `model` in place with FSDP2, and return it. Build the optimizer afterwards.

    Args:
        model: an SWH model, or one that contains it, on its final device.
        mesh: a `DeviceMesh`; None for all processes of the default group.
        policy: a `MixedPrecisionPolicy` for everything except kernels; None keeps the dtypes.
        options: passed on to `fully_shard` (reshard_after_forward, offload_policy, ...).

    Raises:
        UserError: the model has no SWH layers (a ValueError).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = [part for part in model.modules() if isinstance(part, SWHLayer)]
    if not layers:
        raise UserError(f"a {type(model).__name__} has no SWH layers (shard): pass an SWH model")
    policy = MixedPrecisionPolicy() if policy is None else policy
    for kernel in [part for part in model.modules() if isinstance(part, Kernel)]:
        # gathered once per step: a kernel is small, and its output is not a tensor whose backward
        # pass could trigger another gather
        exact = {**options, "reshard_after_forward": False}
        fully_shard(kernel, mesh=mesh, mp_policy=MixedPrecisionPolicy(), **exact)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, **options)
    fully_shard(model, mesh=mesh, mp_policy=policy, **options)
    return model
