"""The little that several processes need: who am I, let the first one do it, add numbers up.

Started by `torchrun --nproc-per-node N`, every process trains a copy of the model on its own part
of each batch, and the gradients are averaged. The first process alone prepares data, writes files
and saves checkpoints; if that fails, every process gets the same error, so none is left waiting for
the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spectral_window import errors
from spectral_window.errors import UserError

_T = TypeVar("_T")
_SETTLING = 0.1  # seconds


class World:
    """The processes of this run: `rank` of `size`. With one, every method is the trivial one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._started = False

    @classmethod
    def join(cls, device: str) -> World:
        """Read torchrun's environment and meet the other processes (gloo on a CPU, nccl on a GPU).

        Raises UserError if only part of that environment is set.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size <= 1:
            return cls()
        missing = [
            name
            for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            if name not in os.environ
        ]
        if missing:
            raise UserError(
                f"{missing[0]} is not set (WORLD_SIZE is {size}): "
                "start several processes with torchrun"
            )
        world = cls(int(os.environ["RANK"]), size)
        if not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("gloo" if device == "cpu" else "nccl")
            world._started = True
        return world

    def leave(self) -> None:
        """Part from the others, if `join` met them."""
        if self._started and dist.is_initialized():
            # gloo's threads free the last collective's tensors a moment after it is done, for which
            # they need the interpreter's lock; a thread that asks for it while the interpreter is
            # ending takes the process down ("terminate called without an active exception").
            time.sleep(_SETTLING)
            dist.destroy_process_group()
            self._started = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[[], _T]) -> _T:
        """What `work()` returns in the first process, in every process; an error it raises there is
        raised in all of them (as a UserError in the others)."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                box[0] = work()
            except Exception as error:
                failure = error
                box[1:] = [type(error).__name__, str(error)]
        dist.broadcast_object_list(box, src=0)
        if failure is not None:
            raise failure
        if box[1] is not None:
            kind = getattr(errors, box[1], UserError)
            raise (kind if issubclass(kind, UserError) else UserError)(box[2])
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """Every process's `value`, by rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def sum(self, *values: float, device: torch.device | str = "cpu") -> list[float]:
        """Each value added over the processes (in float64)."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()
