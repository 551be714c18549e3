"""Several processes: the rank of each, work that only the first does, sums over all of them.

Started by `torchrun --nproc-per-node N`, every process trains a copy of the model on its own part
of each batch, and the gradients are averaged. Where `context_parallel` is P, P processes of
neighbouring ranks take the same sequences, and each of them a span. The first process alone
prepares data, writes files and saves checkpoints; if that fails, every process gets the same error,
so none is left waiting for the others. Where one dies or hangs, the others end with an error that
names it (`rollcall.py`), and torchrun starts all of them again (`launch`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spectral_window.errors import (
    NetworkError,
    ResourceError,
    SpectralWindowError,
    UserError,
    is_out_of_memory,
)
from spectral_window.ops.context_parallel import ContextParallel
from spectral_window.training.rollcall import MEETING_SECONDS, RollCall

_T = TypeVar("_T")
_SETTLING = 0.1  # seconds
_PROBE = 1 << 16  # a tag that no other message has
COLLECTIVE_TIMEOUT = 1800  # seconds


class World:
    """The processes of this run: `rank` of `size`, `local_size` of them on each machine, each
    `context` of them with the same sequences. With one, every method is the trivial one.

    Raises UserError if `size` is no multiple of `context`.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_size: int | None = None, context: int = 1
    ) -> None:
        if size % context:
            raise UserError(
                f"context_parallel={context} (recipe): must divide the number of processes, which "
                f"is {size}; start them with torchrun --nproc-per-node"
            )
        self.rank, self.size, self.context = rank, size, context
        self.local_size = local_size or size
        self._started = False
        self._roll: RollCall | None = None
        self._rows: list[dist.ProcessGroup] = []  # groups that share sequences
        self._timeout = COLLECTIVE_TIMEOUT

    @classmethod
    def join(
        cls,
        device: str,
        settings: dict[str, Any] | None = None,
        timeout: int = COLLECTIVE_TIMEOUT,
        context: int = 1,
    ) -> World:
        """Read torchrun's environment and meet the other processes.

        Numbers in memory are exchanged by gloo, those on a GPU by nccl.

        Args:
            device: "cpu" or "cuda".
            settings: JSON values that must be the same in all processes.
            timeout: how long a collective waits for the others, in seconds.
            context: the number of processes that take the same sequences.

        Raises:
            UserError: only part of that environment is set, it makes no sense, the port is taken,
                or the processes were started with different settings.
            NetworkError: a process did not start.
        """
        # Checked for one process too: transformers reads them as well.
        size = _number("WORLD_SIZE", 1, 1 << 20) or 1
        rank = _number("RANK", 0, size - 1)
        local = _number("LOCAL_RANK", -1, size - 1)  # -1: not distributed, to transformers
        local_size = _number("LOCAL_WORLD_SIZE", 1, size)
        _number("MASTER_PORT", 0, 65_535)
        launched = size > 1 or (local is not None and local >= 0)
        missing = [
            name
            for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            if name not in os.environ
        ]
        if launched and missing:
            raise UserError(
                f"{missing[0]} is not set (WORLD_SIZE is {size}): "
                "start several processes with torchrun"
            )
        if size == 1:
            return cls(context=context)
        world = cls(rank or 0, size, local_size, context)
        world._timeout = timeout
        if not dist.is_initialized():
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            if device == "cuda":
                torch.cuda.set_device(local or 0)
            try:
                seconds = timedelta(seconds=MEETING_SECONDS)
                store, _, _ = next(dist.rendezvous("env://", timeout=seconds))
                world._roll = RollCall(store, where, world.rank, size)
                prefix = world._roll.meet(settings or {})
            except (RuntimeError, ValueError) as error:
                if isinstance(error, SpectralWindowError):
                    raise
                raise UserError(
                    f"the {size} processes do not meet ({where}): "
                    f"{_brief(error)}; start all of them with torchrun"
                ) from None
            try:
                dist.init_process_group(
                    "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
                    store=dist.PrefixStore(prefix, store),
                    rank=world.rank,
                    world_size=size,
                    timeout=timedelta(seconds=timeout),
                )
            except RuntimeError as error:
                world._roll.leave()
                raise NetworkError(
                    f"rank {rank} of {size} cannot reach another one: {_brief(error)}; "
                    "look at what the others said, and at the network"
                ) from None
            world._started = True
        return world

    def leave(self) -> None:
        """Part from the others, if `join` met them."""
        if self._roll is not None:
            self._roll.leave()
        if self._started and dist.is_initialized():
            # gloo's threads free the last collective's tensors a moment after it is done, for which
            # they need the interpreter's lock; a thread that asks for it while the interpreter is
            # ending takes the process down ("terminate called without an active exception").
            time.sleep(_SETTLING)
            dist.destroy_process_group()
            self._started = False

    def begin(self, step: int) -> None:
        """Note that optimiser step `step` begins, for the message if a process is lost in it."""
        if self._roll is not None:
            self._roll.step = step

    def lost(self, error: Exception) -> SpectralWindowError | None:
        """What an error means that other processes caused: it names those that ended or hang.

        None for an error of this process's own; the others are told of it.
        """
        if self._roll is None or not self._started:
            return None
        if isinstance(error, RuntimeError) and self._is_broken(error):
            return self._roll.call(self._timeout)
        kind, line = _as_told(error, self.rank)
        self._roll.tell(kind.exit_code, line)
        return None

    def _is_broken(self, error: RuntimeError) -> bool:
        """Whether a collective has failed. gloo's errors have no class of their own, but the
        connection on which one failed, or waited in vain, is closed and refuses to send."""
        if isinstance(error, dist.DistError):
            return True
        try:
            for group in (dist.group.WORLD, *self._rows):
                for rank in dist.get_process_group_ranks(group):
                    if rank != self.rank:
                        dist.isend(torch.zeros(1), dst=rank, group=group, tag=_PROBE)
        except RuntimeError:
            return True
        return False

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` parts of a batch this process takes, whole or a span of it."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """In how many parts a batch is taken."""
        return self.size // self.context

    def row(self) -> ContextParallel | None:
        """The processes that share sequences with this one, None if there are none; all processes
        call this together."""
        if self.context == 1:
            return None
        limit = timedelta(seconds=self._timeout)
        group, _ = dist.new_subgroups(self.context, timeout=limit)
        self._rows.append(group)
        return ContextParallel(group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[[], _T]) -> _T:
        """What `work()` returns in the first process, in every process; an error it raises there is
        raised in all of them; in the others by its own class if it is ours, else by what it means
        for the program."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                box[0] = work()
            except Exception as error:
                failure = error
                box[1:] = _as_told(error)
        dist.broadcast_object_list(box, src=0)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise box[1](box[2])
        return box[0]

    def every(self, work: Callable[[], _T]) -> list[_T]:
        """What `work()` returns in each process, by rank; an error it raises in any of them is
        raised in all, the one of the lowest rank where it did not fail itself. `work` must not wait
        for other processes."""
        if self.size == 1:
            return [work()]
        value: Any = None
        told, failure = None, None
        try:
            value = work()
        except Exception as error:
            failure, told = error, _as_told(error, self.rank)
        answers = self.gather((value, told))
        if failure is not None:
            raise failure
        for _, failed in answers:
            if failed is not None:
                raise failed[0](failed[1])
        return [answer for answer, _ in answers]

    def gather(self, value: _T) -> list[_T]:
        """Every process's `value`, by rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def sum(self, *values: float) -> list[float]:
        """Each value added over the processes (in float64)."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()


def launch() -> str | None:
    """The launch by torchrun that this process belongs to, or None without torchrun.

    It is the same after a restart, and another one for each call of torchrun, which draws it; with
    several machines it is the id given by --rdzv-id.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "", "none"):  # its word for no id; its folder of logs is new for each launch
        reports = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        return str(Path(reports).parents[2]) if reports.count(os.sep) > 3 else None
    return name


def restarts() -> int:
    """How often torchrun has started this process again."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, 1 << 20) or 0


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _as_told(error: Exception, rank: int = 0) -> tuple[type[SpectralWindowError], str]:
    """The class and the words by which other processes raise this one's error."""
    if isinstance(error, SpectralWindowError):
        return type(error), str(error)
    lacking = isinstance(error, OSError) or is_out_of_memory(error)
    kind = ResourceError if lacking else SpectralWindowError
    where = "the first process" if rank == 0 else f"process {rank}"
    return kind, f"{type(error).__name__} in {where}: {error}"


def _number(name: str, least: int, most: int) -> int | None:
    """The environment's `name`, or None where it is not set; UserError outside the range."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch("-?[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(
            f"{name} is {text[:40]!r} (environment): a whole number from {least} to {most} is "
            "needed; unset it, or start several processes with torchrun"
        )
    return int(text)
