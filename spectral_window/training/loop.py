"""The training loop, on accelerate: data, step, log, evaluation, checkpoint and stop.

`Loop.run` is the loop; the methods below it are its parts, in the order in which it calls them.
accelerate does what depends on the machine: the device, mixed precision, gradients averaged over
processes. The rest is here, because a run must be exact:

    batches      the order is a function of (seed, step), so a run resumes at any step exactly
    step         every token of the whole step has the same weight, over all micro-batches and
                 processes; a loss or gradient that is not finite ends the run before a weight moves
    evaluation   the exact loss over held-out text (`evaluate.py`)
    checkpoint   written whole or not at all, verified, nothing pickled (`checkpoints.py`,
                 `state.py`)
    stop         all processes agree on the step after which they stop
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from spectral_window.data.blocks import IGNORED, ShuffledBlocks, blocks_of
from spectral_window.data.remote import read_ahead
from spectral_window.data.text import Corpus
from spectral_window.errors import DivergedError, IntegrityError, UserError
from spectral_window.ops.cuda_graphs import Replayed
from spectral_window.training import checkpoints, sharded, state
from spectral_window.training.evaluate import evaluate
from spectral_window.training.interrupt import StopRequest
from spectral_window.training.metrics import MetricsLog
from spectral_window.training.optimizer import adamw, learning_rate_factor
from spectral_window.training.parallel import World
from spectral_window.training.progress import Progress
from spectral_window.training.recipes import Recipe

Batch = dict[str, Tensor]


def accumulation(recipe: Recipe, world: World) -> int:
    """Micro-batches per process and optimiser step; UserError if the batch does not divide."""
    count, rest = divmod(recipe.batch_size, recipe.micro_batch_size * world.data_size)
    if rest or not count:
        raise UserError(
            f"batch_size={recipe.batch_size} (recipe): must be a multiple of "
            f"micro_batch_size={recipe.micro_batch_size} times {world.size} processes"
            + f" / context_parallel={world.context}" * (world.context > 1)
            + "; lower micro_batch_size"
        )
    return count


class Loop:
    """Train `model` as `recipe` says, from the first step or from a checkpoint.

    model: an `SWHForCausalLM`; it is moved to `device` ("cpu" or "cuda"), unless it is sharded
    (`sharded.empty_model`). about: JSON values that a
    checkpoint must agree with to be resumed. confirm: raises if the run's folder is gone.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        model: Any,
        device: str,
        corpus: Corpus,
        folder: Path,
        about: dict[str, Any],
        world: World,
        stop: StopRequest,
        metrics: MetricsLog,
        progress: Progress,
        confirm: Callable[[], None],
    ) -> None:
        self.recipe, self.model, self.corpus, self.folder = recipe, model, corpus, folder
        self.about, self.world, self.stop, self.confirm = about, world, stop, confirm
        self.metrics, self.progress = metrics, progress
        self.blocks = blocks_of(corpus.train, recipe.sequence_length)
        self.accelerator = _accelerator(device, recipe.dtype, recipe.track, folder)
        self.sharded = sharded.is_sharded(model)  # and on its device then
        if not self.sharded:
            model.to(self.accelerator.device)
        model.train()
        if recipe.gradient_checkpointing:
            # transformers 5.17 and 5.23 have different names for it
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        self.row = world.row()
        self.optimizer = adamw(model, recipe)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, learning_rate_factor(recipe)
        )
        self.graphed: Replayed | None = None
        self.step = 0  # optimiser steps done
        self.stopping = 0  # the signal that all processes agreed to stop for
        self.saved: Path | None = None  # the newest checkpoint
        self.loss_sum = torch.zeros((), device=self.accelerator.device)  # since the last log line
        self.logged_step = 0
        self.logged: tuple[float | None, float | None] = (None, None)  # loss, tokens per second
        self.earlier_seconds = 0.0  # of the sessions that this one resumes
        self.clock = _Clock()

    def run(self, start: Path | None = None) -> None:
        """Train to the last step, or until a signal; `stopping` tells which.

        start: a checkpoint that `checkpoints.verify` accepted. Raises IntegrityError for one that
        does not fit, DivergedError for numbers that are not finite, ResourceError if a file cannot
        be written.
        """
        recipe = self.recipe
        if start is not None:
            self._restore(start)
        optimizer = self.accelerator.prepare(self.optimizer)
        # one process needs no wrapper, which would also copy all logits to float32
        alone = self.world.size == 1 or self.sharded
        model = self.model if alone else self.accelerator.prepare(self.model)
        self._prepare_step()
        self.clock = _Clock()
        if recipe.track != "none":
            plain = (bool, int, float, str)
            settings = {
                k: v if isinstance(v, plain) else str(v) for k, v in recipe.to_dict().items()
            }
            # the run's folder keeps what they write; nothing is sent anywhere unless asked for
            wandb = {
                "dir": os.environ.get("WANDB_DIR", str(self.folder / "tracker")),
                "mode": os.environ.get("WANDB_MODE", "offline"),
            }
            self.accelerator.init_trackers(
                recipe.name, config=settings, init_kwargs={"wandb": wandb}
            )
        try:
            self._train(model, optimizer)
        finally:
            for (
                tracker
            ) in self.accelerator.trackers:  # `end_training` ends the processes' group too
                tracker.finish()

    def _train(self, model: Any, optimizer: Any) -> None:
        recipe, batches = self.recipe, self._batches()
        while self.step < recipe.steps and not self.stopping:
            self.clock.start()
            step_batches = list(islice(batches, accumulation(recipe, self.world)))
            tokens = self._agree(step_batches)
            with self._divergence_named(self.step + 1):
                self._accumulate(model, step_batches, tokens)
            norm = self._clip(model)
            optimizer.step()
            rate = float(self.schedule.get_last_lr()[0])  # of this step
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=self.graphed is None)
            self.step += 1
            self.clock.stop()
            self.progress.step(self.step, *self.logged)
            last = self.step >= recipe.steps
            if last or self.step % recipe.log_every == 0:
                self._log(norm, rate)
            if last or self.step % recipe.eval_every == 0:
                self._evaluate()
            if last or self.stopping or self.step % recipe.save_every == 0:
                self._save()

    @property
    def seconds(self) -> float:
        """Wall time of training, over all sessions."""
        return self.earlier_seconds + self.clock.total()

    # ------------------------------------------------------------------------------------- data

    def _batches(self) -> Iterator[Batch]:
        """This process's micro-batches from step `self.step` on. One step takes `batch_size`
        consecutive samples of the endless shuffled order, which the processes take in turn; those
        that share rows take the same."""
        order = ShuffledBlocks(
            len(self.blocks),
            seed=self.recipe.seed,
            epochs=None,
            start=self.step * self.recipe.batch_size,
            rank=self.world.data_rank,
            world=self.world.data_size,
        )
        # A DataLoader without a generator draws from torch's at each start, and a resumed run
        # starts once more.
        return iter(
            DataLoader(
                self.blocks,
                batch_size=self.recipe.micro_batch_size,
                sampler=read_ahead(order, self.blocks),
                generator=torch.Generator(),
            )
        )

    def _agree(self, batches: list[Batch]) -> Tensor:
        """The tokens that count in this step, over all processes. The same sum tells every process
        whether any of them was asked to stop."""
        counted = sum(int((batch["shift_labels"] != IGNORED).sum()) for batch in batches)
        asked = [float(self.stop.signum == signum) for signum in (signal.SIGTERM, signal.SIGINT)]
        self.world.begin(self.step + 1)
        total, terminate, interrupt = self.world.sum(counted, *asked)
        self.stopping = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
        # processes that share rows count the same tokens
        counted_once = int(total) // self.world.context
        return torch.tensor(counted_once, device=self.accelerator.device)

    # ------------------------------------------------------------------------------------- step

    def _prepare_step(self) -> None:
        """Compile the layers, and replay the step as a graph, where the recipe and the machine
        ask for it."""
        if self.recipe.compile:
            for layer in self.model.model.layers:
                layer.compile()
            self.model.compile_loss()
        alone_on_gpu = self.accelerator.device.type == "cuda" and self.world.size == 1
        if alone_on_gpu and self.recipe.cuda_graphs and not self.recipe.gradient_checkpointing:
            self.graphed = Replayed(
                partial(self._compute, self.model),
                self.accelerator.device,
                note=self.progress.note,
            )

    def _accumulate(self, model: Any, batches: list[Batch], tokens: Tensor) -> None:
        """Gradients of the mean loss over `tokens`; processes exchange them once, with the last
        micro-batch."""
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            inputs = batch | {"num_items_in_batch": tokens}
            if _is_counting(inputs["position_ids"]):  # whole rows of one document
                del inputs["position_ids"]
            if self.sharded:
                model.set_requires_gradient_sync(last)
            together = last or self.sharded
            with contextlib.nullcontext() if together else self.accelerator.no_sync(model):
                if self.graphed is not None:
                    self.loss_sum += self.graphed(inputs)
                else:
                    here = {name: x.to(self.accelerator.device) for name, x in inputs.items()}
                    self.loss_sum += self._compute(model, here)

    def _compute(self, model: Any, inputs: Batch) -> Tensor:
        """Add to the gradients, and return the loss of a micro-batch."""
        with self.accelerator.autocast():
            output = model(**inputs, use_cache=False, context_parallel=self.row)
        # gradients are averaged over the processes, and the mean is over all their tokens; of a
        # row that is shared, each process has the loss of its span
        loss = output.loss * self.world.size
        self.accelerator.backward(loss)
        return loss.detach()

    def _clip(self, model: Any) -> float:
        """Scale the gradient to at most `clip` (0: not at all); returns its norm before that. This
        is the last moment to refuse numbers that are not finite."""
        largest = self.recipe.clip or math.inf
        whole = self.accelerator.clip_grad_norm_(model.parameters(), largest)
        norm = float(whole.full_tensor() if isinstance(whole, DTensor) else whole)
        if not (math.isfinite(norm) and math.isfinite(float(self.loss_sum))):
            raise self._diverged(self.step + 1)
        return norm

    def _diverged(self, step: int) -> DivergedError:
        self.metrics.write(self._row({"event": "diverged"}, step))
        last = f"resume from {self.saved.name}" if self.saved else "start again"
        return DivergedError(
            f"the loss, its gradient or a weight is not finite (step {step}): nothing of it was "
            f"kept; {last} with a lower lr (it is {self.recipe.lr:g}) or more warmup_steps"
        )

    @contextlib.contextmanager
    def _divergence_named(self, step: int) -> Iterator[None]:
        """Raise DivergedError for any error within the block that a non-finite weight caused: the
        optimiser overflows silently, and an operator or a save refuses the weight later."""
        try:
            yield
        except (ValueError, ArithmeticError, RuntimeError) as error:
            parameters = map(sharded.own_part, self.model.parameters())
            finite = all(bool(p.isfinite().all()) for p in parameters)
            if not isinstance(error, DivergedError) and finite:
                raise
            raise self._diverged(step) from error

    # -------------------------------------------------------------------------- log, evaluation

    def _log(self, norm: float, rate: float) -> None:
        steps = self.step - self.logged_step
        loss = self.accelerator.gather(self.loss_sum).mean().item() / steps
        speed = self.clock.speed(self.recipe.tokens_per_step)
        self.loss_sum.zero_()
        self.logged_step, self.logged = self.step, (loss, speed)
        values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": speed}
        self._record(values)

    def evaluate(self, max_tokens: int | None = None) -> dict[str, float]:
        """`evaluate` on the held-out text, by all processes together."""
        recipe = self.recipe
        scores = evaluate(
            self.model,
            self.corpus.valid,
            length=recipe.sequence_length,
            batch=recipe.eval_batch_size,
            max_tokens=max_tokens,
            dtype=recipe.dtype,
            world=self.world,
        )
        sharded.release(self.model)
        return scores

    def _evaluate(self) -> None:
        recipe = self.recipe
        with self._divergence_named(self.step):
            scores = self.evaluate(recipe.eval_tokens)
        loss, tokens = scores["loss"], scores["tokens"]
        others = {key: scores[key] for key in ("perplexity", "bits_per_byte")}
        values = {"eval_loss": loss, **others, "eval_tokens": tokens}
        self._record(values)
        sampled = recipe.eval_tokens is not None and recipe.eval_tokens < len(self.corpus.valid) - 1
        sample = f" (a sample: {tokens:,} tokens)" if sampled else ""
        self.progress.note(
            f"step {self.step}: held-out loss {loss:.4f}, perplexity "
            f"{scores['perplexity']:.2f}, {scores['bits_per_byte']:.4f} bits per byte{sample}"
        )

    def _record(self, values: dict[str, Any]) -> None:
        """Write metrics of this step to the run's file, and to the tracker if there is one."""
        self.metrics.write(self._row(values, self.step))
        self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=self.step)

    def _row(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * self.recipe.tokens_per_step,
            "seconds": round(self.seconds, 3),
        } | values

    # ------------------------------------------------------------------------------- checkpoint

    def _save(self) -> None:
        schedule = self.schedule.state_dict()
        schedule.pop("lr_lambdas")
        counters = {
            "step": self.step,
            "samples": self.step * self.recipe.batch_size,
            "seconds": self.seconds,
            "schedule": schedule,
            "loss_sum": sum(self.world.gather(float(self.loss_sum))) / self.world.size,
            "logged_step": self.logged_step,
        }
        generators = self.world.gather(state.random_state())

        def write(parts: list[sharded.Part], folder: Path) -> None:
            state.save_model(folder, self.model, self.corpus.tokenizer, parts=parts)
            if not parts:
                state.save_optimizer(folder, self.model, self.optimizer)
            state.save_rest(folder, counters, generators)

        def save(parts: list[sharded.Part]) -> Path:
            self.confirm()
            return checkpoints.save(
                self.folder / "checkpoints",
                self.step,
                partial(write, parts),
                about=self.about | {"samples": counters["samples"], "processes": self.world.size},
                keep=self.recipe.keep_checkpoints,
                needs=3 * sum(p.nbytes for p in self.model.parameters()),  # and two moments
                hashes=sharded.hashes(parts),
            )

        self.world.first(self.confirm)
        together = state.written_by_all(self.model, self.optimizer, self.folder, self.world)
        with self._divergence_named(self.step), together as parts:
            self.saved = self.world.first(partial(save, parts))

    def _restore(self, folder: Path) -> None:
        """Go back to the moment at which the checkpoint `folder` was saved."""
        counters, generators = state.load_rest(folder)
        self._check_progress(folder, counters)
        self.world.every(lambda: state.load_model(folder, self.model))
        self.world.every(lambda: state.load_optimizer(folder, self.model, self.optimizer))
        own = self.schedule.state_dict() | {"lr_lambdas": [None] * 2}
        stored = counters["schedule"]
        self.schedule.load_state_dict(own | {key: stored[key] for key in own.keys() & stored})
        # The groups hold the current rate; the schedule's state alone does not set it.
        for group, rate in zip(self.optimizer.param_groups, stored["_last_lr"], strict=True):
            group["lr"] = rate
        self.step, self.saved = counters["step"], folder
        self.earlier_seconds = counters["seconds"]
        self.loss_sum += counters["loss_sum"]
        self.logged_step = counters["logged_step"]
        if self.world.rank < len(generators):
            state.restore_random_state(generators[self.world.rank])
        else:  # more processes than were saved: a stream of its own for each of the others
            torch.manual_seed(self.recipe.seed * 1_000_003 + self.world.rank)

    def _check_progress(self, folder: Path, counters: dict[str, Any]) -> None:
        """IntegrityError unless the files of `folder` agree on how far the training was."""
        step, recipe = checkpoints.step_of(folder), self.recipe
        factor, schedule = learning_rate_factor(recipe), counters["schedule"]
        wrong = []
        if (counters["step"], counters.get("samples")) != (step, step * recipe.batch_size):
            wrong.append("training.json is of another step")
        rates = [*schedule.get("base_lrs", []), *schedule["_last_lr"]]
        expected = [recipe.lr] * 2 + [recipe.lr * factor(step)] * 2
        if len(rates) != 4 or not all(map(math.isclose, rates, expected)):
            wrong.append("training.json has another learning rate")
        if wrong:
            raise IntegrityError(f"{'; '.join(wrong)} ({folder}): resume another checkpoint")


def _is_counting(positions: Tensor) -> bool:
    """Whether every row of [B, T] is 0, 1, 2, ..."""
    return bool((positions == torch.arange(positions.shape[1])).all())


class _Clock:
    """Wall time since the start, and the time spent in training steps alone."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._step = 0.0
        self._spent, self._steps = 0.0, 0

    def start(self) -> None:
        self._step = time.perf_counter()

    def stop(self) -> None:
        self._spent += time.perf_counter() - self._step
        self._steps += 1

    def total(self) -> float:
        return time.perf_counter() - self._begin

    def speed(self, tokens_per_step: int) -> float | None:
        """Tokens per second over the steps since the last call."""
        speed = self._steps * tokens_per_step / self._spent if self._spent else None
        self._spent, self._steps = 0.0, 0
        return speed


def _accelerator(device: str, dtype: str, track: str, folder: Path) -> Accelerator:
    if track != "none":
        if find_spec(track) is None:
            raise UserError(f"{track} is missing (track): pip install {track}, or leave track out")
        if track == "trackio":  # which reads it once, when it is imported
            os.environ.setdefault("TRACKIO_DIR", str(folder / "tracker"))
    # accelerate keeps its state per process, and would refuse another precision than the first
    # run's; transformers' Trainer resets it in the same way.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        log_with=None if track == "none" else track,
        project_dir=folder / "tracker",
        # `Loop` accumulates; an environment variable of accelerate's must not divide the loss too
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
