"""transformers' Trainer with our rules.

What the library does well stays: the training step, mixed precision, accumulation, several
processes. What it gets wrong for us is replaced, one method each:

    get_train_dataloader  the order is a function of (seed, step): a run resumes at any step exactly
    get_batch_samples     counts the tokens of the whole step, so each token weighs the same; looks
                          for a stop that was asked for
    create_optimizer      AdamW that leaves dynamics, gains, norms and biases undecayed
    _get_grad_norm        a loss or gradient that is not finite ends the run before any weight moves
    evaluate              exact loss over held-out text, from `evaluate.py`
    log                   metrics.jsonl
    _save_checkpoint, _load_*
                          all or nothing, verified, nothing pickled: `checkpoints.py`, `state.py`
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from spectral_window.data.blocks import IGNORED, PackedBlocks, ShuffledBlocks
from spectral_window.data.text import Corpus
from spectral_window.errors import DivergedError, IntegrityError, UserError
from spectral_window.training import checkpoints, state
from spectral_window.training.evaluate import evaluate
from spectral_window.training.interrupt import StopRequest
from spectral_window.training.machine import pick_device
from spectral_window.training.metrics import MetricsLog
from spectral_window.training.optimizer import adamw, learning_rate_factor
from spectral_window.training.parallel import World
from spectral_window.training.progress import Progress
from spectral_window.training.recipes import Recipe


def accumulation(recipe: Recipe, world: World) -> int:
    """Micro-batches a process takes per optimiser step; UserError if the batch does not divide."""
    steps, rest = divmod(recipe.batch_size, recipe.micro_batch_size * world.size)
    if rest or not steps:
        raise UserError(
            f"batch_size={recipe.batch_size} (recipe): must be a multiple of "
            f"micro_batch_size={recipe.micro_batch_size} times {world.size} processes; "
            "lower micro_batch_size"
        )
    return steps


class _Order(Sampler[int]):
    """This process's samples of the whole run; iteration begins at optimiser step `first_step`.

    Its length is the whole run's even then: Trainer counts its steps by it. One step takes
    `batch_size` consecutive samples of the endless shuffled order, dealt out to the processes in
    turn.
    """

    def __init__(self, count: int, recipe: Recipe, world: World) -> None:
        self.count, self.recipe, self.world = count, recipe, world
        self.first_step = 0

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size // self.world.size

    def __iter__(self) -> Iterator[int]:
        recipe, world = self.recipe, self.world
        order = ShuffledBlocks(
            self.count,
            seed=recipe.seed,
            epochs=None,
            start=self.first_step * recipe.batch_size,
            rank=world.rank,
            world=world.size,
        )
        left = (recipe.steps - self.first_step) * recipe.batch_size // world.size
        return islice(iter(order), left)


class RecipeTrainer(Trainer):
    """Trains `model` as `recipe` says; the module's text tells what differs from Trainer."""

    model: Any  # Trainer allows None; here it is a model from the start
    lr_scheduler: Any

    def __init__(
        self,
        *,
        recipe: Recipe,
        model: Any,
        corpus: Corpus,
        folder: Path,
        about: dict[str, Any],
        world: World,
        stop: StopRequest,
        metrics: MetricsLog,
        progress: Progress,
        confirm: Callable[[], None],
    ) -> None:
        self.confirm_folder = confirm
        self.recipe, self.corpus, self.folder, self.about = recipe, corpus, folder, about
        self.world, self.stop, self.log_file, self.progress = world, stop, metrics, progress
        self.blocks = PackedBlocks(corpus.train, recipe.sequence_length)
        self.order = _Order(len(self.blocks), recipe, world)
        self.saved: Path | None = None
        self.stopping = 0  # the signal that all processes agreed to stop for
        self.last_loss: float | None = None  # as last logged
        self.last_speed: float | None = None
        self._counters: dict[str, Any] = {}  # of the checkpoint that the run resumed from
        self._generators: list[dict[str, Any]] = []
        self._clock = _Clock()
        if recipe.gradient_checkpointing:
            # Renamed between the versions of transformers that we support.
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        arguments = _arguments(recipe, folder, world)
        super().__init__(model=model, args=arguments, train_dataset=self.blocks)
        # One process drives one device; several need torchrun.
        self.args._n_gpu = min(1, self.args._n_gpu)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self))

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches from where the run stands. accelerate must not wrap it: the order is split
        among the processes already."""
        # Its own generator: by default a DataLoader draws from torch's each time it starts, and a
        # resumed run starts once more.
        return DataLoader(
            self.blocks,
            batch_size=self.recipe.micro_batch_size,
            sampler=self.order,
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        self._clock.start()
        samples = list(islice(epoch_iterator, num_batches))
        counted = sum(int((sample["shift_labels"] != IGNORED).sum()) for sample in samples)
        # One sum tells every process both the tokens of the step and whether any was asked to stop.
        asked = [float(self.stop.signum == signum) for signum in (signal.SIGTERM, signal.SIGINT)]
        total, term, ctrl_c = self.world.sum(counted, *asked, device=self.args.device)
        self.stopping = signal.SIGTERM if term else signal.SIGINT if ctrl_c else 0
        return samples, torch.tensor(int(total), device=device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None counted: Trainer would go over every parameter at every step for an estimate."""
        return 0

    # ------------------------------------------------------------------ optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(self.model, self.recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                _unwrapped(optimizer or self.optimizer), learning_rate_factor(self.recipe)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step between the backward pass and the optimiser: the last moment to refuse
        numbers that are not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not (math.isfinite(float(norm)) and math.isfinite(float(self._tr_loss))):
            raise self._diverged(self.state.global_step + 1)
        return norm

    def _diverged(self, step: int) -> DivergedError:
        self.log_file.write(self._row({"event": "diverged"}, step=step))
        last = f"resume from {self.saved.name}" if self.saved else "start again"
        return DivergedError(
            f"the loss, its gradient or a weight is not finite (step {step}): nothing of it was "
            f"kept; {last} with a lower lr (it is {self.recipe.lr:g}) or more warmup_steps"
        )

    @contextmanager
    def _naming_the_rate(self, step: int) -> Iterator[None]:
        """Whatever a weight that is not finite leads to within the block becomes DivergedError: the
        optimiser itself overflows without a word, and an operator or a save refuses it later."""
        try:
            yield
        except (ValueError, ArithmeticError, RuntimeError) as error:
            finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
            if isinstance(error, DivergedError) or not finite:
                raise self._diverged(step) from error
            raise

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._naming_the_rate(self.state.global_step + 1):
            return super().training_step(*args, **kwargs)

    # ------------------------------------------------------------------ what is written down

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.control.should_log = False
        if "loss" not in logs:  # Trainer's own summary at the end
            return
        speed = self._clock.speed(self.recipe.tokens_per_step)
        self.last_loss, self.last_speed = logs["loss"], speed
        self.log_file.write(
            self._row(
                {
                    "loss": logs["loss"],
                    "lr": logs["learning_rate"],
                    "grad_norm": logs["grad_norm"],
                    "tokens_per_second": speed,
                }
            )
        )

    def _row(self, values: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        step = self.state.global_step if step is None else step
        return {
            "step": step,
            "tokens": step * self.recipe.tokens_per_step,
            "seconds": round(self.seconds(), 3),
        } | values

    def seconds(self) -> float:
        """Wall time of training, over all sessions."""
        return self._counters.get("seconds", 0.0) + self._clock.total()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.control.should_evaluate = False
        recipe = self.recipe
        with self._naming_the_rate(self.state.global_step):
            scores = evaluate(
                self.model,
                self.corpus.valid,
                length=recipe.sequence_length,
                batch=recipe.eval_batch_size,
                max_tokens=recipe.eval_tokens,
                dtype=recipe.dtype,
                world=self.world,
            )
        found = {key: scores[key] for key in ("perplexity", "bits_per_byte")}
        self.log_file.write(
            self._row({"eval_loss": scores["loss"], **found, "eval_tokens": scores["tokens"]})
        )
        self.progress.note(
            f"step {self.state.global_step}: held-out loss {scores['loss']:.4f}, "
            f"perplexity {scores['perplexity']:.2f}, {scores['bits_per_byte']:.4f} bits per byte"
        )
        return {"eval_loss": scores["loss"]}

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, parameters = self.state.global_step, self.model.parameters()
        schedule = self.lr_scheduler.state_dict()
        schedule.pop("lr_lambdas")
        counters = {
            "step": step,
            "samples": step * self.recipe.batch_size,
            "seconds": self.seconds(),
            "schedule": schedule,
            "loss_sum": sum(self.world.gather(float(self._tr_loss))) / self.world.size,
            "logged_step": self._globalstep_last_logged,
        }
        generators = self.world.gather(state.random_state())

        def write(folder: Path) -> None:
            state.save_model(folder, self.model, self.corpus.tokenizer)
            state.save_optimizer(folder, self.model, _unwrapped(self.optimizer))
            state.save_rest(folder, counters, generators)
            self.state.save_to_json(str(folder / "trainer_state.json"))

        def save() -> Path:
            self.confirm_folder()
            return checkpoints.save(
                self.folder / "checkpoints",
                step,
                write,
                about=self.about | {"samples": counters["samples"], "processes": self.world.size},
                keep=self.recipe.keep_checkpoints,
                needs=3 * sum(parameter.nbytes for parameter in parameters),  # and two moments
            )

        with self._naming_the_rate(step):
            self.saved = self.world.first(save)

    def resume(self, folder: Path) -> None:
        """Train on from a checkpoint that `checkpoints.verify` accepted."""
        self._counters, self._generators = state.load_rest(folder)
        self._check_progress(folder)
        self._load_rng_state(str(folder))  # tried now: Trainer does so with its first step, if any
        self.order.first_step = self._counters["step"]
        self.saved = folder
        self.train(resume_from_checkpoint=str(folder))

    def _check_progress(self, folder: Path) -> None:
        """IntegrityError unless the files of `folder` agree on how far the training was."""
        step, recipe = checkpoints.step_of(folder), self.recipe
        schedule, factor = self._counters["schedule"], learning_rate_factor(recipe)
        wrong = []
        if (self._counters["step"], self._counters.get("samples")) != (
            step,
            step * recipe.batch_size,
        ):
            wrong.append("training.json is of another step")
        rates = [*schedule.get("base_lrs", []), *schedule["_last_lr"]]
        expected = [recipe.lr] * 2 + [recipe.lr * factor(step)] * 2
        if len(rates) != 4 or not all(map(math.isclose, rates, expected)):
            wrong.append("training.json has another learning rate")
        try:
            told = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            if told.global_step != step or not math.isfinite(told.epoch or 0.0):
                wrong.append(f"trainer_state.json is of step {told.global_step!r}")
        except Exception as error:  # the library raises whatever senseless values make it raise
            wrong.append(f"trainer_state.json cannot be used, {' '.join(str(error).split())[:100]}")
        if wrong:
            raise IntegrityError(f"{'; '.join(wrong)} ({folder}): resume another checkpoint")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state.load_model(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, schedule = _unwrapped(self.optimizer), self._counters["schedule"]
        state.load_optimizer(Path(checkpoint), self.model, optimizer)
        own = self.lr_scheduler.state_dict() | {"lr_lambdas": [None] * 2}
        self.lr_scheduler.load_state_dict(
            own | {key: schedule[key] for key in own.keys() & schedule.keys()}
        )
        # The groups keep the rate of the moment; the schedule's state alone does not set it.
        for group, rate in zip(optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            if self.world.rank < len(self._generators):
                state.restore_random_state(self._generators[self.world.rank])
            else:
                # More processes than were saved: a stream of its own for each of the others.
                torch.manual_seed(self.recipe.seed * 1_000_003 + self.world.rank)

    def restore_sums(self) -> None:
        """The loss summed since the last logged step, which Trainer keeps to itself and forgets."""
        if self._counters:
            self._tr_loss += self._counters["loss_sum"]
            self._globalstep_last_logged = self._counters["logged_step"]


class _Flow(TrainerCallback):
    """When to log, evaluate, save and stop."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._clock = _Clock()
        self.trainer.restore_sums()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        trainer, recipe, step = self.trainer, self.trainer.recipe, state.global_step
        trainer._clock.stop()
        last, stopping = step >= recipe.steps, bool(trainer.stopping)
        control.should_log = last or step % recipe.log_every == 0
        control.should_evaluate = last or step % recipe.eval_every == 0
        control.should_save = last or stopping or step % recipe.save_every == 0
        control.should_training_stop = last or stopping
        trainer.progress.step(step, trainer.last_loss, trainer.last_speed)
        return control


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


def _arguments(recipe: Recipe, folder: Path, world: World) -> TrainingArguments:
    cpu = pick_device(recipe) == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=accumulation(recipe, world),
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=cpu,
        ddp_backend=None if world.size == 1 else "gloo" if cpu else "nccl",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["shift_labels"],
        dataloader_pin_memory=False,
        ignore_data_skip=True,  # the sampler itself starts where the run stands
        skip_memory_metrics=True,
    )


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser itself; accelerate wraps it."""
    return getattr(optimizer, "optimizer", optimizer)
