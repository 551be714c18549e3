"""From a recipe to a trained model: `train(recipe, folder)`.

    folder/
      config.json       the recipe, the model's config, the data's fingerprint, the command, the versions
      data/             the prepared tokens (unless another place was given)
      metrics.jsonl     what happened, a line at a time
      checkpoints/      step-N folders, the newest verified ones
      model/            the final weights, config and tokenizer: from_pretrained(folder / "model")
      result.json       how it ended

A run that was interrupted goes on with `resume=True` and ends with the very same bits as one that
was not: the weights, Adam's moments, the schedule, the random generators and the place in the data
are all restored (on the same machine with the same number of threads and processes).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import resource
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import spectral_window
from spectral_window.data.text import Corpus, open_corpus, prepare
from spectral_window.errors import IntegrityError, ResourceError, UserError
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM, count_parameters, match_parameters
from spectral_window.training.evaluate import evaluate
from spectral_window.training.recipes import FREE_ON_RESUME, Recipe
from spectral_window.training import checkpoints, state
from spectral_window.training.interrupt import Interrupted, catch_signals
from spectral_window.training.loop import RecipeTrainer, accumulation, pick_device
from spectral_window.training.metrics import MetricsLog
from spectral_window.training.parallel import World
from spectral_window.training.progress import Progress

_MODEL_FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size window kernel fusion mixer branches mlp "
    "rope_theta initializer_range tie_word_embeddings"
).split()


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    corpus: Path | str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train as `recipe` says, write everything to the folder `out`, and return what result.json
    holds.

    resume: True goes on from the newest checkpoint that verifies; "auto" does so if there is one
    and else begins. overwrite: remove an earlier run in `out` first.  corpus: where the prepared
    tokens are kept or found (default `out`/data); several runs may share it.  progress: who is told
    how it goes (`RichProgress()`; None: nobody). command: what to record as the command that made
    this run (default: this process's own).

    Under torchrun every process calls this with the same arguments; each sees its own part of every
    batch.

    Raises UserError (bad recipe or data, or `out` is not empty; nothing is left behind),
    IntegrityError (the checkpoint belongs to another recipe or data, or is damaged), DivergedError
    (a loss, gradient or weight is not finite; the last good checkpoint stays), ResourceError
    (memory or disk), Interrupted (SIGINT or SIGTERM; after saving a checkpoint).
    """
    out = Path(out)
    teller = progress if progress is not None else _Silent()
    device = pick_device(recipe)
    world = World.join(device)
    created = world.first(lambda: not out.exists())
    started = False
    try:
        accumulation(recipe, world)
        model_config(
            recipe, vocab_size=recipe.vocab_size or 50304
        )  # a bad model is refused before the text is read
        world.first(lambda: _check_folder(out, resume, overwrite))
        with _lock(out, world), _matmul_precision(recipe):
            data = _corpus(
                recipe, out, corpus, world, teller, resume=bool(resume), overwrite=overwrite
            )
            config = model_config(recipe, _vocab_size(recipe, data), data.tokenizer)
            run = _Run(recipe, out, world, data, config, device, teller, command)
            start = world.first(lambda: run.find_start(resume))
            started = True
            return run.go(Path(start) if start else None)
    except BaseException as error:
        if (
            created
            and world.is_first
            and not started
            and isinstance(error, (Exception, KeyboardInterrupt))
        ):
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        teller.stop()
        world.leave()


def model_config(recipe: Recipe, vocab_size: int, tokenizer: Any = None) -> SWHConfig:
    """The model's config: the recipe's fields at a vocabulary, sized as `match` or `parameters`
    ask.

    Raises UserError for fields that cannot make a model or a size that cannot be met.
    """
    fields = {name: getattr(recipe, name) for name in _MODEL_FIELDS}
    fields |= {"vocab_size": vocab_size, "max_position_embeddings": recipe.sequence_length}
    if tokenizer is not None:
        fields |= {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")
        }
    config = SWHConfig(**fields)
    if recipe.parameters is not None:
        return match_parameters(config, recipe.parameters)
    if recipe.match is not None:
        whole = SWHConfig(**fields | {"mixer": recipe.match, "branches": ("spectral", "window")})
        if (whole.mixer, whole.branches) != (config.mixer, config.branches):
            return match_parameters(config, count_parameters(whole))
    return config


class _Run:
    """One call of `train`, after its inputs were found good."""

    def __init__(
        self, recipe: Recipe, out: Path, world: World, corpus: Corpus, config: SWHConfig, device: str,
        progress: Progress, command: str | None,
    ) -> None:  # fmt: skip
        self.recipe, self.out, self.world, self.corpus, self.config = (
            recipe,
            out,
            world,
            corpus,
            config,
        )
        self.device, self.progress = device, progress
        self.command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.parameters = count_parameters(config)
        self.metrics = MetricsLog(out / "metrics.jsonl" if world.is_first else None)
        self.about = {
            "recipe": {k: v for k, v in recipe.to_dict().items() if k not in FREE_ON_RESUME},
            "data": corpus.fingerprint,
            "parameters": self.parameters,
        }

    def find_start(self, resume: bool | str) -> str | None:
        """The checkpoint to go on from, verified and of this very run, or None to begin."""
        _check_memory(self.parameters, self.device)
        if not resume:
            return None
        root = self.out / "checkpoints"
        checkpoints.clean(root)
        folder, refused = checkpoints.newest(root)
        for line in refused:
            self._warn(line)
        if folder is None:
            if refused:
                raise IntegrityError(
                    f"no checkpoint is whole ({root}): start again with --overwrite"
                )
            if resume == "auto":
                return None
            raise UserError(f"no checkpoint to resume ({root}): leave --resume out to begin")
        about = checkpoints.verify(folder)["about"]
        differences = _differences(about, self.about)
        if differences:
            raise IntegrityError(
                f"this run is another one ({folder}): {'; '.join(differences)}; use its own settings or another folder"
            )
        if about["processes"] != self.world.size:
            self._warn(
                f"{about['processes']} processes saved {folder.name} and {self.world.size} resume it: sums may round differently"
            )
        return str(folder)

    def go(self, start: Path | None) -> dict[str, Any]:
        recipe, world = self.recipe, self.world
        result_file = self.out / "result.json"
        step = int(start.name.removeprefix("step-")) if start else 0
        if (
            start
            and step >= recipe.steps
            and result_file.exists()
            and (self.out / "model").is_dir()
        ):
            return json.loads(
                result_file.read_text(encoding="utf-8")
            )  # there is nothing left to do

        transformers.set_seed(recipe.seed)
        model = SWHForCausalLM(self.config)
        with catch_signals(echoes=world.size > 1) as stop:
            trainer = RecipeTrainer(
                recipe=recipe, model=model, corpus=self.corpus, folder=self.out, about=self.about,
                world=world, stop=stop, metrics=self.metrics, progress=self.progress,
            )  # fmt: skip
            world.first(lambda: self._record(step))
            self.progress.start(f"{recipe.name} ({recipe.mixer})", step, recipe.steps)
            if start:
                self.metrics.write(
                    {"step": step, "tokens": step * recipe.tokens_per_step, "event": "resume"}
                )
                self.progress.note(f"resumed from {start.name}")
                trainer.resume(start)
            else:
                trainer.train()
            if trainer.stopping and trainer.state.global_step < recipe.steps:
                raise Interrupted(trainer.stopping, trainer.saved)
            return self._finish(trainer, result_file)

    def _record(self, step: int) -> None:
        checkpoints.write_json(
            self.out / "config.json",
            {
                "recipe": self.recipe.to_dict(),
                "model": self.config.to_diff_dict()
                | {name: getattr(self.config, name) for name in _MODEL_FIELDS},
                "parameters": self.parameters,
                "data": {"fingerprint": self.corpus.fingerprint, **_sizes(self.corpus)},
                "command": self.command,
                "environment": environment(self.recipe, self.world, self.device),
            },
        )
        self.metrics.rewind(step)

    def _finish(self, trainer: RecipeTrainer, result_file: Path) -> dict[str, Any]:
        """Evaluate on all held-out text, write the model and the result."""
        recipe, world, model = self.recipe, self.world, trainer.model
        scores = evaluate(
            model, self.corpus.valid, length=recipe.sequence_length, batch=recipe.eval_batch_size,
            dtype=recipe.dtype, world=world,
        )  # fmt: skip
        peak = world.gather(_peak_memory(self.device))
        losses = [row["loss"] for row in self.metrics.read() if "loss" in row]
        result = {
            "recipe": recipe.name,
            "mixer": recipe.mixer,
            "parameters": self.parameters,
            "steps": recipe.steps,
            "tokens": recipe.steps * recipe.tokens_per_step,
            "train_loss": losses[-1] if losses else None,
            "eval_loss": scores["loss"],
            "perplexity": scores["perplexity"],
            "bits_per_byte": scores["bits_per_byte"],
            "eval_tokens": scores["tokens"],
            "eval_bytes": scores["bytes"],
            "eval_length": recipe.sequence_length,
            "tokens_per_second": self.metrics.speed(),
            "peak_memory_bytes": max(peak),
            "wall_seconds": round(trainer.seconds(), 3),
            "command": self.command,
            "environment": environment(recipe, world, self.device),
        }

        def write() -> dict[str, Any]:
            checkpoints.write_folder(
                self.out / "model",
                lambda folder: state.save_model(folder, model, self.corpus.tokenizer),
            )
            checkpoints.write_json(result_file, result)
            return result

        result = world.first(write)
        self.progress.note(
            f"done: held-out loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f}, "
            f"{scores['bits_per_byte']:.4f} bits per byte over {scores['tokens']:,} tokens"
        )
        return result

    def _warn(self, line: str) -> None:
        if isinstance(self.progress, _Silent):
            warnings.warn(line, stacklevel=2)
        else:
            self.progress.note(f"warning: {line}")


class _Silent:
    """A Progress that tells nobody."""

    def prepare(self, stage: str, done: int, total: int | None) -> None: ...
    def start(self, title: str, first_step: int, steps: int) -> None: ...
    def step(self, step: int, loss: float | None, tokens_per_second: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


# ---------------------------------------------------------------------------------- before training


def _check_folder(out: Path, resume: bool | str, overwrite: bool) -> None:
    if resume not in (True, False, "auto"):
        raise UserError(f"resume={resume!r}: use True, False or 'auto'")
    if out.exists() and not out.is_dir():
        raise UserError(f"the output is a file ({out}): choose a folder")
    if resume is True and not (out / "checkpoints").is_dir():
        raise UserError(f"no checkpoint to resume ({out}): leave --resume out to begin")
    if not resume and out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(
                f"the output folder is not empty ({out}): choose another, or use --resume or --overwrite"
            )
        for name in ("config.json", "metrics.jsonl", "result.json", "samples.json", "report.html"):
            (out / name).unlink(missing_ok=True)
        for name in ("checkpoints", "model"):
            shutil.rmtree(out / name, ignore_errors=True)


def _corpus(
    recipe: Recipe,
    out: Path,
    folder: Path | str | None,
    world: World,
    progress: Progress,
    *,
    resume: bool,
    overwrite: bool,
) -> Corpus:
    """The prepared text: made or found by the first process, opened by all."""
    where = Path(folder) if folder is not None else out / "data"
    resuming = resume and (out / "checkpoints").is_dir()

    def make() -> None:
        try:
            prepare(
                list(recipe.data), recipe.tokenizer, where, valid_fraction=recipe.valid_fraction,
                valid_sources=list(recipe.valid) or None, seed=recipe.seed, txt_documents=recipe.txt_documents,
                errors=recipe.errors, skip_bad=recipe.skip_bad, max_bytes=recipe.max_bytes, progress=progress.prepare,
                overwrite=overwrite and folder is None,
            )  # fmt: skip
        except UserError as error:
            if resuming and error.exit_code == 2 and where.is_dir():
                raise IntegrityError(
                    f"the run's text or tokenizer changed, so it cannot be resumed: {error}"
                ) from None
            raise

    world.first(make)
    return open_corpus(where)


def _vocab_size(recipe: Recipe, corpus: Corpus) -> int:
    size = recipe.vocab_size or corpus.vocab_size
    if size < corpus.vocab_size:
        raise UserError(
            f"vocab_size={size} (recipe): the tokenizer has {corpus.vocab_size} entries; leave vocab_size out"
        )
    return size


def _check_memory(parameters: int, device: str) -> None:
    """ResourceError before anything large is allocated: weights, gradients and Adam's two moments
    are 16 bytes each."""
    needed = 16 * parameters
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"{parameters:,} parameters need at least {needed / 1e9:,.1f} GB to train and {free / 1e9:,.1f} GB are free "
            f"({device}): use a smaller model"
        )


@contextlib.contextmanager
def _lock(out: Path, world: World) -> Iterator[None]:
    """Hold `out` for this run alone. The system lets go of the lock when the process ends, however
    it ends."""
    if not world.is_first or os.name == "nt":
        world.first(lambda: None)
        yield
        return
    import fcntl

    out_existed = out.exists()
    handle: list[Any] = []

    def take() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            handle.append((out / ".lock").open("w"))
            fcntl.flock(handle[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is using this folder ({out}): wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"cannot write: {error.strerror} ({out}): choose another folder"
            ) from None

    try:
        world.first(take)
        yield
    finally:
        for file in handle:
            (out / ".lock").unlink(missing_ok=True)
            file.close()
        if not out_existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


@contextlib.contextmanager
def _matmul_precision(recipe: Recipe) -> Iterator[None]:
    """The recipe's float32 matrix-multiply setting (see FINDINGS on "medium" in ARCHITECTURE.md),
    put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(recipe.matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What a checkpoint was made with that this run does not have, in words."""
    have, want = stored.get("recipe", {}), wanted["recipe"]
    lines = [
        f"{key} was {have.get(key)!r} and is {want.get(key)!r}"
        for key in sorted(have | want)
        if have.get(key) != want.get(key)
    ]
    if stored.get("data") != wanted["data"]:
        lines.append("the text or its tokenizer is another (data fingerprint)")
    elif not lines and stored.get("parameters") != wanted["parameters"]:
        lines.append(
            f"the model had {stored.get('parameters')} parameters and has {wanted['parameters']}"
        )
    return lines


# --------------------------------------------------------------------------------------- the record


def environment(recipe: Recipe, world: World, device: str) -> dict[str, Any]:
    """What the numbers were measured on. Names no user, host or path."""
    return {
        "spectral_window": spectral_window.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "dtype": recipe.dtype,
        "matmul_precision": recipe.matmul_precision,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory(device: str) -> int:
    """Bytes: the largest resident memory of this process so far, or the GPU memory its tensors held
    at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sizes(corpus: Corpus) -> dict[str, Any]:
    return {
        split: {"tokens": len(stream), "documents": len(stream.documents), "bytes": stream.bytes}
        for split, stream in (("train", corpus.train), ("valid", corpus.valid))
    }
