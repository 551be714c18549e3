"""Memory and time of a training step whose tensors are whole in every process, or in parts.

    torchrun --nproc-per-node 2 -m spectral_window.lab.bench.sharded results/cpu/sharded.json

Every process trains the same two models at once, one wrapped for data parallelism (`shard=none`)
and one by FSDP2 (`shard=full`), on random tokens, a step of each in turn; both are the shape of the
recipe `small`. Bytes are those of parameters, gradients and Adam's moments, as tensors have them;
buffers of the exchange and activations are not in them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectral_window.files import write_json
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.training.machine import environment, in_force
from spectral_window.training.optimizer import adamw
from spectral_window.training.parallel import World
from spectral_window.training.recipes import resolve
from spectral_window.training.sharded import empty_model, fill, own_part
from spectral_window.training.trainer import model_config

ROUNDS, WARM_UP = 20, 3
ROWS, LENGTH, VOCABULARY = 4, 256, 4096


def build(kind: str, world: World) -> nn.Module:
    """The model of `small`, held as the setting `shard=kind` says."""
    config = model_config(resolve("small"), VOCABULARY)
    torch.manual_seed(0)
    whole = SWHForCausalLM(config)
    if kind == "none":
        return DistributedDataParallel(whole.train())
    model = empty_model(config, kind=kind, dtype="float32", device="cpu", world=world)
    fill(model, whole if world.is_first else None)
    return model.train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """Seconds of forward, backward, clipping and AdamW. Gradients stay until the next."""
    optimizer.zero_grad()
    start = time.perf_counter()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - start


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process, by what they are."""
    parameters: list[Tensor] = list(model.parameters())
    moments: list[Tensor] = [x for state in optimizer.state.values() for x in state.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = {"parameters": parameters, "gradients": gradients, "moments": moments}
    return {kind: sum(own_part(x).nbytes for x in tensors) for kind, tensors in kinds.items()}


def measure(world: World) -> dict[str, Any]:
    """Bytes and seconds of both, of the process that takes most."""
    recipe, kinds = resolve("small"), ("none", "full")
    models = {kind: build(kind, world) for kind in kinds}
    optimizers = {kind: adamw(model, recipe) for kind, model in models.items()}
    generator = torch.Generator().manual_seed(world.rank)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(WARM_UP + ROUNDS):
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        for kind in kinds if turn % 2 else reversed(kinds):
            took = max(world.gather(step(models[kind], optimizers[kind], tokens)))
            if turn >= WARM_UP:
                seconds[kind].append(took)
    times = np.array(seconds["full"]) / np.array(seconds["none"])
    rows = []
    for kind in kinds:
        of_all = world.gather(held(models[kind], optimizers[kind]))
        most = max(of_all, key=lambda each: sum(each.values()))
        rows.append({"shard": kind, "bytes": most, "seconds": median(seconds[kind])})
    return {
        "parameters": sum(p.numel() for p in models["none"].parameters()),
        "tokens": world.size * ROWS * LENGTH,
        "rounds": ROUNDS,
        "rows": rows,
        "times": [float(np.quantile(times, q)) for q in (0.1, 0.5, 0.9)],
        "environment": environment("cpu", asked=in_force(), processes=world.size),
    }


def main(out: Path) -> None:
    """Measure, and write the file `out`."""
    world = World.join("cpu")
    try:
        found = measure(world)
        world.first(lambda: write_json(out, found))
    finally:
        world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
