"""A training step over several processes: `sharded`.

    weights   each process has rows of its own. Parameters, gradients and Adam's moments are whole
              in every process (`shard=none`) or in parts (`shard=full`, FSDP2)
    row       all have the same long row: one process computes all of it, with one thread or with
              one for each process, or each computes a span of it (`context_parallel`), with one

A step is forward, backward, the sum of the gradients over the processes, clipping and AdamW, in
float32, on random tokens: of the recipe `small` for `weights`, of two layers of `memory` for `row`.
First the losses and the norms of the gradients are compared. The processes are started by torchrun,
as in a training, and stay: one step of each kind in turn, and the first process says which.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectral_window.errors import ResourceError
from spectral_window.files import scratch_folder, write_json
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.lab.bench import PRECISION
from spectral_window.lab.bench.peaks import RESET, added
from spectral_window.lab.bench.timing import Call, Timing, disqualified
from spectral_window.lab.jobs import Row, child_environment
from spectral_window.ops.context_parallel import ContextParallel
from spectral_window.training.machine import keep_memory, matmul_precision
from spectral_window.training.optimizer import adamw
from spectral_window.training.parallel import World
from spectral_window.training.recipes import Recipe, resolve
from spectral_window.training.sharded import empty_model, fill, own_part
from spectral_window.training.trainer import model_config

PROCESSES = 2
WEIGHTS, ROW = "weights", "one row"  # the parts
WHOLE, PARTS = "shard=none", "shard=full"
ALONE, SPANS = "1 process", f"context_parallel={PROCESSES}"
THREADED = f"{ALONE}, {PROCESSES} threads"
ROWS, LENGTH = 4, 256  # of each process, for `weights`
LENGTHS, LAYERS = (4096, 16_384), 2  # for `row`: all layers are equal
VOCABULARY = 4096
BAR = 2e-5  # of the relative error of a loss, or of the norm of a gradient
_ENOUGH = ""  # instead of the name of a step
_ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b")
_TORCHRUN = re.compile(r"^[WE]\d{4} .*(?:closing signal|failed \(exitcode)", re.MULTILINE)

Result = tuple[float, float]  # of a step in one process: its part of the loss, the gradient's norm


def bench_sharded(dtype: torch.dtype, quick: bool) -> list[Row]:
    """Rows by part; for `weights` with the bytes that a process holds, for `row` by model and
    length with the bytes that a step adds at its peak and those of states that it sends.

    All is float32: `dtype` is not looked at. Raises ResourceError if a process fails.
    """
    with scratch_folder() as folder:
        out = folder / "rows.json"
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        words = [*torchrun, "-m", __name__, str(out), str(int(quick))]
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env=child_environment(PROCESSES),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            said = first_error(done.stderr)
            raise ResourceError(f"{said} (bench sharded, one of {PROCESSES} processes)")
        return json.loads(out.read_text(encoding="utf-8"))


def first_error(said: str) -> str:
    """Return the line by which the first process that failed names its error.

    Args:
        said: the errors of a torchrun: those of its processes, and then its own about them.
    """
    lines = _TORCHRUN.split(said)[0].strip().splitlines() or ["it said nothing"]
    return next(filter(_ERROR.match, lines), lines[-1])[:200]


# ------------------------------------------------------------------------------- in each process


class Training:
    """A model with its optimizer, which makes one step after another on the same tokens.

    Args:
        recipe: of the model.
        tokens: [B, T].
        kind: "alone", or how several processes share it: "none" and "full" as the setting `shard`.
        world: the processes.
        row: those that share the row; None where each has rows of its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokens: Tensor,
        kind: str,
        world: World,
        row: ContextParallel | None = None,
    ):
        self.tokens, self.row = tokens, row
        # gradients are averaged over the processes, but the losses of spans are to be added
        self.scale = 1 if row is None else row.size
        config = model_config(recipe, VOCABULARY)
        torch.manual_seed(0)
        model: nn.Module = SWHForCausalLM(config)
        self.parameters = sum(p.numel() for p in model.parameters())
        if kind == "full":
            parts = empty_model(config, kind=kind, dtype="float32", device="cpu", world=world)
            fill(parts, model if world.is_first else None)
            model = parts
        self.model = model.train()
        self.optimizer = adamw(model, recipe)
        self.called = DistributedDataParallel(model) if kind == "none" else model

    def step(self) -> Result:
        """Forward, backward, clipping and AdamW. The gradients stay until the next."""
        self.optimizer.zero_grad()
        given = {"labels": self.tokens, "use_cache": False, "context_parallel": self.row}
        loss = self.called(self.tokens, **given).loss
        (loss * self.scale).backward()
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def held(self) -> dict[str, int]:
        """Bytes of this process, by what they are."""
        parameters: list[Tensor] = list(self.model.parameters())
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        kinds = {"parameters": parameters, "gradients": gradients, "moments": moments}
        return {kind: sum(own_part(x).nbytes for x in tensors) for kind, tensors in kinds.items()}


Lead = Callable[[str], list[Any]]


def together(
    world: World, works: Mapping[str, Callable[[], Any]], first: Callable[[Lead], list[Row]]
) -> list[Row]:
    """Let the first process say, by its name, which of `works` all do next.

    Args:
        world: the processes.
        works: what they can do.
        first: is called in the first process with a function that makes all of them do a work, and
            returns what it returned in each.

    Returns:
        What `first` returned, in the first process; nothing in the others.
    """
    if world.is_first:

        def lead(name: str) -> list[Any]:
            dist.broadcast_object_list([name])
            return world.gather(works[name]())

        rows = first(lead)
        dist.broadcast_object_list([_ENOUGH])
        return rows
    while True:
        told = [_ENOUGH]
        dist.broadcast_object_list(told)
        if told[0] == _ENOUGH:
            return []
        world.gather(works[told[0]]())


def timed(
    lead: Lead, names: tuple[str, ...], wrong: str | None, quick: bool, tokens: int, **tags: Any
) -> list[Row]:
    """The rows of steps that take turns, with tokens a second; the last may be wrong."""
    timing = Timing(seconds=0.0 if quick else 30.0, fewest=1 if quick else 3, longest=600.0)
    timing.out = {names[-1]: wrong} if wrong else {}
    timing.warm = set(names)  # by the comparison
    calls: dict[str, Call] = {name: partial(lead, name) for name in names}
    rows = timing.run(calls, **tags)
    for row in rows:
        if row["status"] == "ok":
            row["tokens_per_s"] = float(f"{1000 * tokens / row['milliseconds']:.4g}")
    return rows


def off(one: Result, other: Result) -> float:
    """The largest relative difference of two results."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def measure_weights(world: World, quick: bool) -> list[Row]:
    """The same training twice, whole in every process and in parts."""
    recipe = resolve("small", ["num_hidden_layers=1", "hidden_size=32"] if quick else [])
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    trainings = {WHOLE: "none", PARTS: "full"}
    made = {name: Training(recipe, tokens, kind, world) for name, kind in trainings.items()}
    works: dict[str, Callable[[], Any]] = {name: each.step for name, each in made.items()}
    works |= {f"bytes of {name}": each.held for name, each in made.items()}

    def first(lead: Lead) -> list[Row]:
        def error() -> float:
            losses = {name: lead(name) for name in made}
            return max(map(off, losses[PARTS], losses[WHOLE]))

        wrong = disqualified(error, BAR)
        about = {"part": WEIGHTS, "model": "small", "parameters": made[WHOLE].parameters}
        tokens = world.size * ROWS * LENGTH
        rows = timed(lead, (WHOLE, PARTS), wrong, quick, tokens, length=LENGTH, **about)
        for row in rows:
            each = lead(f"bytes of {row['contestant']}")
            row["bytes"] = max(each, key=lambda held: sum(held.values()))
        return rows

    return together(world, works, first)


def measure_row(world: World, length: int, quick: bool) -> list[Row]:
    """The same training twice, of the first process and of all, on one row."""
    recipe = resolve("memory", ["hidden_size=32"] if quick else [])
    recipe = recipe.replace(num_hidden_layers=1 if quick else LAYERS)
    tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    row = ContextParallel()
    shared = Training(recipe, tokens, "none", world, row)
    alone = Training(recipe, tokens, "alone", world) if world.is_first else None

    def by_one(threads: int) -> Result | None:
        if alone is None:
            return None
        torch.set_num_threads(threads)
        try:
            return alone.step()
        finally:
            torch.set_num_threads(1)

    def measured(step: Callable[[], Any]) -> tuple[int, int]:
        before = row.sent
        if RESET.exists():
            return added(step), row.sent - before
        step()
        return 0, row.sent - before

    works: dict[str, Callable[[], Any]] = {
        ALONE: partial(by_one, 1),
        THREADED: partial(by_one, world.size),
        SPANS: shared.step,
    }
    names = tuple(works)
    works |= {f"bytes of {each}": partial(measured, works[each]) for each in names}

    def first(lead: Lead) -> list[Row]:
        def error() -> float:
            (whole, *_), spans = lead(ALONE), lead(SPANS)
            loss = sum(loss for loss, _ in spans)
            return max(off((loss, norm), whole) for _, norm in spans)

        wrong = disqualified(error, BAR)
        about = {"part": ROW, "model": "memory", "parameters": shared.parameters}
        rows = timed(lead, names, wrong, quick, length, length=length, **about)
        for each in rows:
            if each["status"] == "ok":
                peaks, sent = zip(*lead(f"bytes of {each['contestant']}"), strict=True)
                if max(peaks):
                    each["peak_bytes"] = max(peaks)
                if sum(sent):
                    each["sent_bytes"] = sum(sent)
        return rows

    return together(world, works, first)


def main(out: Path, quick: bool) -> None:
    """Measure in all processes, and let the first write the rows."""
    torch.set_num_threads(1)
    keep_memory()
    world = World.join("cpu")
    try:
        with matmul_precision(PRECISION, "cpu"):
            rows = measure_weights(world, quick)
            for length in (64,) if quick else LENGTHS:
                rows += measure_row(world, length, quick)
        world.first(lambda: write_json(out, rows))
    finally:
        world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), bool(int(sys.argv[2])))
