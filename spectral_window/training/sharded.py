"""A training's tensors spread over its processes (`shard=full`), and brought together for files.

Each process holds a part of every parameter, of its gradient and of its moments; FSDP2 gathers a
layer's weights while they are needed (`hf/sharding.py`). Whole models are in no process but the
first, which draws the initial weights as one process alone would.

Files hold whole tensors, so whoever reads them need not know how many processes wrote them: they
are as Hugging Face divides a large model, `model-00001-of-00002.safetensors` and an index, and
`optimizer-...` likewise. Each process writes and hashes about an equal part of the bytes, and reads
back its part of each tensor, however many processes there are by then.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from spectral_window.errors import UserError
from spectral_window.files import cannot_write, hash_file, staging_folder, sync_file
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.hf.model import SWHLayer
from spectral_window.hf.sharding import shard
from spectral_window.nn.mixers import Mixer
from spectral_window.training.loading import INDEX
from spectral_window.training.parallel import World

# ---------------------------------------------------------------------------------------- the model


def pieces(kind: str, world: World) -> int:
    """Into how many parts the setting `shard=kind` divides a model. UserError if it cannot."""
    if kind == "hybrid" and world.size % world.local_size:
        raise UserError(
            f"shard=hybrid (recipe): {world.size} processes are not {world.local_size} on each "
            "machine; start equally many on each, or use shard=full"
        )
    return {"none": 1, "full": world.size, "hybrid": world.local_size}[kind]


def empty_model(
    config: SWHConfig, *, kind: str, dtype: str, device: str, world: World
) -> SWHForCausalLM:
    """A model of `config` of which this process holds its part, in memory that is not yet filled.

    kind: "full" or "hybrid". dtype: "bfloat16" gathers and computes in it; parameters, dynamics and
    sums of gradients are float32 in any case.
    """
    with torch.device("meta"):
        model = SWHForCausalLM(config)
    model.tie_weights()
    low = dtype == "bfloat16"
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if low else None
    shard(model, _mesh(kind, device, world), policy)
    nn.Module.to_empty(model, device=device)  # "cuda" is this process's own
    model.tie_weights()
    if any(True for _ in model.buffers()):  # of a part from outside
        whole = SWHForCausalLM(config)
        for name, buffer in model.named_buffers():
            buffer.copy_(whole.get_buffer(name))
    return model


def _mesh(kind: str, device: str, world: World) -> DeviceMesh:
    parts = pieces(kind, world)
    if parts == world.size:
        return init_device_mesh(device, (parts,))
    return init_device_mesh(
        device, (world.size // parts, parts), mesh_dim_names=("replicate", "shard")
    )


@torch.no_grad()
def fill(model: nn.Module, whole: nn.Module | None) -> None:
    """Give every process its part of the weights of `whole`, which the first process has."""
    weights = {} if whole is None else dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        held: Any = parameter
        values = torch.empty(held.shape, dtype=held.dtype) if whole is None else weights[name]
        values = values.detach().to(held.device)
        held.copy_(distribute_tensor(values, held.device_mesh, held.placements))


def described(model: SWHForCausalLM) -> SWHForCausalLM:
    """A model like the sharded `model` without weights, of which all else can be saved."""
    with torch.device("meta"):
        plain = SWHForCausalLM(model.config)
    plain.generation_config = model.generation_config
    return plain


def whole_mixer(model: SWHForCausalLM) -> Mixer:
    """The mixer of the first layer; of a sharded model one like it with other weights, for its own
    can compute only where all processes run the model."""
    if not is_sharded(model):
        return model.model.layers[0].mixer
    with torch.random.fork_rng(devices=[]):
        return SWHLayer(model.config).mixer.to(model.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` is spread over processes."""
    return isinstance(model, FSDPModule)


def release(model: nn.Module) -> None:
    """Let go of whole weights that a forward pass without a backward pass has left."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


# -------------------------------------------------------------------------------------- the tensors


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_held(whole: Tensor, like: Tensor) -> Tensor:
    """The tensor `whole`, which every process has, spread as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    mesh, placements = like.device_mesh, like.placements
    # a copy: `whole` may be a window on a file
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).clone()


def stored_once(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as files have them: tied ones under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


# ---------------------------------------------------------------------------------------- the files


class Part(NamedTuple):
    """A file that a process wrote, to be moved to its folder: `stem`-00001-of-00002.safetensors.

    names: the tensors in it. size: their bytes.
    """

    stem: str
    path: Path
    sha256: str
    names: list[str]
    size: int


@contextlib.contextmanager
def written(
    tensors: Mapping[str, Mapping[str, Tensor]], run: Path, world: World
) -> Iterator[list[Part]]:
    """Write named tensors whole, every process some of them; yields the files of all processes.

    They are on the disk, in temporary folders in the folder `run`. What is not moved within the
    block is removed at its end.

    Args:
        tensors: by the beginning of the files' names; the same names in every process.
        run: an existing folder that all processes see.
        world: the processes; all of them call this together.

    Raises:
        ResourceError: a process cannot write; all raise it.
    """
    with contextlib.ExitStack() as stack:
        folder = world.every(
            lambda: stack.enter_context(staging_folder(run / f"part-{world.rank}"))
        )[world.rank]
        parts: list[Part] = []
        for stem, named in tensors.items():
            share = _share(named, world)
            number = f"{world.rank + 1:05}-of-{world.size:05}"
            path = folder / f"{stem}-{number}.safetensors"
            write = functools.partial(_write, stem, path, share)
            parts += [part for part in world.every(write) if part is not None]
        yield parts


def move(parts: list[Part], folder: Path) -> None:
    """Move files of `written` into `folder`, each kind with the index that finds a tensor's."""
    kinds: dict[str, list[Part]] = {}
    for part in parts:
        os.rename(part.path, folder / part.path.name)
        kinds.setdefault(part.stem, []).append(part)
    for stem, files in kinds.items():
        index = {
            "metadata": {"total_size": sum(part.size for part in files)},
            "weight_map": {name: part.path.name for part in files for name in part.names},
        }
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index), encoding="utf-8")


def hashes(parts: list[Part]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {part.path.name: part.sha256 for part in parts}


def _share(named: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """This process's tensors of `named`, whole and on the CPU: consecutive ones, and about as many
    bytes as every other process has. All processes put each tensor together at the same time."""
    total = sum(tensor.nbytes for tensor in named.values())
    share, before = {}, 0
    for name, tensor in named.items():
        owner = before * world.size // total
        before += tensor.nbytes
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if owner == world.rank:
            share[name] = whole.detach().cpu().contiguous()
    return share


def _write(stem: str, path: Path, share: dict[str, Tensor]) -> Part | None:
    """The file `path` of the tensors `share`, or None where there are none."""
    if not share:
        return None
    size = sum(tensor.nbytes for tensor in share.values())
    try:
        save_file(share, path, {"format": "pt"})
        sync_file(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(error, path, size) from error
    return Part(stem, path, hash_file(path), list(share), size)
