"""Sharding a model's parameters over processes with FSDP2 (`torch.distributed.fsdp.fully_shard`).

FSDP2 gathers a group of parameters as one buffer, which has one dtype, and a mixed-precision policy
casts a whole group. Decays and frequencies are float32 in every model and must not be rounded, so
the kernels are groups of their own; all else is sharded a block at a time, by the policy given.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from spectral_window.errors import UserError
from spectral_window.hf.model import SWHLayer
from spectral_window.nn.kernels import Kernel

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def shard(model: AnyModel, mesh: Any = None, policy: Any = None, **options: Any) -> AnyModel:
    """Shard `model` in place by FSDP2, and return it.

    model:   an SWH model, or one that contains it; on the device it will run on.
    mesh:    a `DeviceMesh`; None: all processes of the default group.
    policy:  a `MixedPrecisionPolicy` for everything but the kernels; None: as the parameters are.
    options: passed on to `fully_shard` (reshard_after_forward, offload_policy, ...).

    Raises ValueError where there is nothing to shard. The optimiser is built afterwards.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = [part for part in model.modules() if isinstance(part, SWHLayer)]
    if not layers:
        raise UserError(f"a {type(model).__name__} has no SWH layers (shard): pass an SWH model")
    policy = MixedPrecisionPolicy() if policy is None else policy
    for kernel in [part for part in model.modules() if isinstance(part, Kernel)]:
        # gathered once a step: a kernel is small, and what it returns is no tensor whose backward
        # could tell when to gather it again
        exact = {**options, "reshard_after_forward": False}
        fully_shard(kernel, mesh=mesh, mp_policy=MixedPrecisionPolicy(), **exact)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, **options)
    fully_shard(model, mesh=mesh, mp_policy=policy, **options)
    return model
