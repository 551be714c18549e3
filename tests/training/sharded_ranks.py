"""What each process of the tests of sharded training does: `python sharded_ranks.py JOBS OUT`.

JOBS is a JSON list of trainings, done one after the other; OUT-RANK.json says what they saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_window.errors import SpectralWindowError
from spectral_window.hf import SWHForCausalLM
from spectral_window.nn.kernels import Kernel
from spectral_window.training import train
from spectral_window.training.recipes import Recipe
from spectral_window.training.sharded import own_part
from tests.processes import THREADS
from tests.training.runs import Crash, Stopper, crash


class Network(TorchDispatchMode):
    """Counts the operations that processes do together, by name. (torch's `CommDebugMode` also
    follows modules, and does not bear one that is called inside another's hook.)"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = str(func).partition(".")
        if space in ("c10d", "_c10d_functional", "fsdp"):
            self.calls[name.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def kill(run: Path) -> None:
    """End this process at once, if it is the second."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def occupy(run: Path) -> None:
    """Put a file where the second process is about to make a folder."""
    if dist.get_rank() == 1:
        (run / f".tmp-part-1-{os.getpid()}").write_text("")


STOPS = {"kill": kill, "occupy": occupy, "crash": lambda run: crash(), "": lambda run: None}


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Train, and say what the forward passes and the network saw.

    job: name, recipe, out, corpus; at: a step at which `stop` is done; local: processes on each
    machine, as torchrun would tell.
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(job.get("local", dist.get_world_size()))
    dtypes: dict[str, set[str]] = {"dynamics": set(), "products": set(), "held": set()}
    models: list[SWHForCausalLM] = []
    seen: dict[str, Any] = {"error": None, "kernels": 0}

    def look(part: nn.Module, given: Any, result: Any) -> None:
        if isinstance(part, Kernel):
            seen["kernels"] += 1
            dtypes["dynamics"] |= {str(p.dtype) for p in part.parameters()}
        elif isinstance(part, nn.Linear) and part.out_features < 100:  # not the head
            dtypes["products"].add(str(part.weight.dtype))
        elif isinstance(part, SWHForCausalLM) and part not in models:
            models.append(part)

    hook = nn.modules.module.register_module_forward_hook(look)
    stop = partial(STOPS[job.get("stop", "")], Path(job["out"]))
    stopper = Stopper(job.get("at", 0), stop)
    with warnings.catch_warnings(record=True) as warned, Network() as network:
        warnings.simplefilter("always")
        try:
            train(
                Recipe.from_dict(job["recipe"]),
                job["out"],
                corpus=job["corpus"],
                resume="auto",
                progress=stopper,
            )
        except (Crash, SpectralWindowError) as error:
            seen["error"] = [type(error).__name__, str(error)]
    hook.remove()
    parameters = [own_part(p) for model in models for p in model.parameters()]
    dtypes["held"] = {str(p.dtype) for p in parameters}
    return seen | {
        "notes": [*stopper.notes, *(str(each.message) for each in warned)],
        "dtypes": {name: sorted(found) for name, found in dtypes.items()},
        "numbers": sum(p.numel() for p in parameters),
        "calls": network.calls,
    }


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo")  # one for all trainings
    jobs, out = sys.argv[1:]
    found = {job["name"]: do(job) for job in json.loads(Path(jobs).read_text())}
    Path(f"{out}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
