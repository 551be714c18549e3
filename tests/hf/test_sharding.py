"""`shard`: FSDP2 over two processes equals one process; kernels stay float32."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch import nn

from spectral_window.hf import SWHForCausalLM, shard
from tests.hf.small import small_model, tokens

STEPS, ROWS = 3, 4
POLICY_CASES = ("float32", "bfloat16 model", "bfloat16 policy")


def _train(model: SWHForCausalLM, rows: slice) -> list[float]:
    """Losses of a few steps on `rows` of the same four rows."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
    losses = []
    for step in range(STEPS):
        x = tokens(ROWS, 12, seed=step)[rows]
        loss = model(x, labels=x, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _kernel_dtypes(model: SWHForCausalLM) -> set[torch.dtype]:
    """The dtypes that kernels are computed from, in a forward."""
    seen: set[torch.dtype] = set()

    def look(kernel: nn.Module, given: Any) -> None:
        seen.update(p.dtype for p in kernel.parameters())

    for name, part in model.named_modules():
        if name.endswith("mixer.kernel"):
            part.register_forward_pre_hook(look)
    return seen


def _process(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for case in POLICY_CASES:
        model = small_model().train()
        if case == "bfloat16 model":
            model.to(torch.bfloat16)
        policy = MixedPrecisionPolicy(torch.bfloat16) if case == "bfloat16 policy" else None
        dtypes = _kernel_dtypes(model)
        shard(model, policy=policy)
        losses = _train(model, slice(2 * rank, 2 * rank + 2))
        mean = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(mean)
        sharded = {name: p.to_local().numel() for name, p in model.named_parameters()}
        found[case] = (mean / 2, dtypes, sharded)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes computed: case -> (losses, dtypes of the dynamics, numbers held)."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, str(folder)), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=False)


def test_two_processes_have_the_losses_of_one(found: dict[str, Any]) -> None:
    want = torch.tensor(_train(small_model().train(), slice(None)), dtype=torch.float64)
    torch.testing.assert_close(found["float32"][0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", POLICY_CASES[1:])
def test_bfloat16_trains_with_dynamics_in_float32(case: str, found: dict[str, Any]) -> None:
    losses, dtypes, _ = found[case]
    torch.testing.assert_close(losses, found["float32"][0], rtol=0.05, atol=0)
    assert dtypes == {torch.float32}


def test_every_parameter_is_held_in_halves(found: dict[str, Any]) -> None:
    whole = {name: p.numel() for name, p in small_model().named_parameters()}
    for _, _, held in found.values():
        assert held.keys() == whole.keys()
        for name, count in held.items():
            assert count <= whole[name] // 2 + 64, name


def test_what_has_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no SWH layers \(shard\)"):
        shard(nn.Linear(2, 2))
