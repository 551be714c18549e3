"""From a recipe to a trained model: `train(recipe, folder)`.

    folder/
      config.json       the recipe, the model's config, the data's fingerprint, the command
      data/             the prepared tokens (unless another place was given)
      metrics.jsonl     losses, speed and events, one JSON object per line
      checkpoints/      step-N folders, the newest verified ones
      model/            the final weights, config, tokenizer and model card, for from_pretrained
      result.json       final loss, speed, memory, environment

An interrupted run resumes with `resume=True` and ends with the same bits as an uninterrupted one:
the weights, Adam's moments, the schedule, the random generators and the position in the data are
all restored (on the same machine with the same number of threads and processes).

`steps` may grow on a resume only with the constant schedule, which does not depend on it: the
longer run is then exactly the one that asked for that many steps at once. A cosine depends on its
number of steps from the first one on, so a longer one is a new run: start it from the finished
model (`init`).
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from spectral_window import __version__
from spectral_window.data.blocks import blocks_of
from spectral_window.data.chat import end_ids
from spectral_window.data.remote import PieceCache
from spectral_window.data.text import Corpus
from spectral_window.data.tokenizers import SMALLEST
from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import write_folder, write_json
from spectral_window.hf.card import TrainingRecord
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM, count_parameters, match_parameters
from spectral_window.training import checkpoints, loading, machine, manifest, sharded, state
from spectral_window.training import folder as run_folder
from spectral_window.training.initial import Initial
from spectral_window.training.interrupt import Interrupted, StopRequest, catch_signals
from spectral_window.training.loop import Loop, accumulation
from spectral_window.training.memory import check_memory
from spectral_window.training.metrics import MetricsLog
from spectral_window.training.parallel import World, launch
from spectral_window.training.plan import describe
from spectral_window.training.progress import Progress, Silent
from spectral_window.training.recipes import FREE_ON_RESUME, MATMUL_PRECISIONS, Recipe, defaults
from spectral_window.training.text import corpus_of, vocabulary_size


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    corpus: Path | str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    init: Initial | Path | str | None = None,
    workers: int | None = None,
    cache: PieceCache | None = None,
) -> dict[str, Any]:
    """Train as `recipe` says, write everything to the folder `out`; returns what result.json holds.

    resume: True resumes from the newest checkpoint that verifies, or starts again a run that was
    stopped before its first; "auto" does so in any folder. overwrite: remove an earlier run in
    `out`, after everything else was checked. corpus: folder of the prepared tokens (default
    `out`/data); several runs may share it. progress: receives the events (`RichProgress()`; None:
    nothing is shown). command: recorded as the command that made this run (default: this
    process's own). init: a model to start from (see `initial.py`); it decides the architecture and
    the tokenizer, whatever the recipe says of them. workers: processes that prepare the text (None:
    one a core). cache: keeps what was read last, where `corpus` is a URL (see `data.remote`).

    Under torchrun every process calls this with the same arguments; each computes its own part of
    every batch. One that torchrun starts again goes on with the run, whatever `resume` and
    `overwrite` say.

    Raises UserError (bad recipe or data, or `out` is not empty; nothing is left behind),
    IntegrityError (the checkpoint belongs to another recipe or data, or is damaged), DivergedError
    (a loss, gradient or weight is not finite; the last good checkpoint stays), ResourceError
    (memory or disk), NetworkError (another process ended or hangs), Interrupted (SIGINT or SIGTERM;
    after saving a checkpoint).
    """
    out = Path(out)
    progress = progress if progress is not None else Silent()
    device = machine.choose_device(recipe.device, ("cpu", "cuda")).type
    settings = recipe.to_dict() | {"version": __version__}
    world = World.join(device, settings, recipe.collective_timeout, recipe.context_parallel)
    try:
        accumulation(recipe, world)
        restarted = world.first(lambda: run_folder.is_restarted(out))
        if restarted:
            resume, overwrite = resume or "auto", False
            progress.note("torchrun has started the processes again: the run goes on")
        if resume:
            recipe = _with_first_precision(recipe, out)
        world.first(lambda: run_folder.check(out, resume, overwrite))
        if init is not None and not isinstance(init, Initial):
            init = Initial.read(init)
        recipe = recipe if init is None else init.adopt(recipe)
        # A bad model is refused before the text is read, which can take long.
        given = recipe.model["vocab_size"]
        config = model_config(recipe, vocab_size=given or SWHConfig.vocab_size)
        if given is None:
            config.vocab_size = SMALLEST
        check_memory(recipe, config, device, world)
        with (
            run_folder.claim(out, world, run_folder.RESTART_SECONDS * restarted) as claim,
            machine.matmul_precision(recipe.matmul_precision, device),
        ):
            data = corpus_of(
                recipe, out, corpus, world, progress, bool(resume), overwrite, workers, cache
            )
            vocab_size = vocabulary_size(recipe, data)
            if init is None:
                config = model_config(recipe, vocab_size, data.tokenizer)
            else:
                config = init.config_for(recipe, data.tokenizer)
            check_memory(recipe, config, device, world)
            blocks_of(data.train, recipe.sequence_length)  # too little text is refused here
            run = _Run(
                recipe, out, world, data, config, device, progress, command, init, claim, corpus
            )
            start = world.first(lambda: run.find_start(resume))
            claim.began = True
            if overwrite:
                world.first(lambda: run_folder.remove_run(out))
            return run.go(start)
    except Exception as error:
        if (lost := world.lost(error)) is not None:
            raise lost from error
        raise
    finally:
        progress.stop()
        world.leave()


def model_config(recipe: Recipe, vocab_size: int, tokenizer: Any = None) -> SWHConfig:
    """The model's config: the recipe's fields, sized as its `match` or `parameters` ask.

    Raises UserError for fields that cannot make a model or a size that cannot be met.
    """
    fields = dict(recipe.model)
    fields |= {"vocab_size": vocab_size, "training_length": recipe.sequence_length}
    if tokenizer is not None:
        fields |= {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end_ids(tokenizer),
        }
        if tokenizer.pad_token_id != tokenizer.eos_token_id:  # older tokenizers pad with eos
            fields["pad_token_id"] = tokenizer.pad_token_id
    config = SWHConfig(**fields)
    if recipe.parameters is not None:
        return match_parameters(config, recipe.parameters)
    if recipe.match is not None:
        target = count_parameters(config.papers_layer(recipe.match))
        if count_parameters(config) != target:
            return match_parameters(config, target)
    return config


class _Run:
    """One call of `train`, after its inputs were checked."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        world: World,
        corpus: Corpus,
        config: SWHConfig,
        device: str,
        progress: Progress,
        command: str | None,
        init: Initial | None,
        claim: run_folder.Claim,
        tokens: Path | str | None,
    ) -> None:
        self.recipe, self.out, self.world = recipe, out, world
        self.corpus, self.config, self.init = corpus, config, init
        self.device, self.progress, self.claim = device, progress, claim
        self.tokens = tokens  # the folder of the prepared text, if it is not in the run's
        self.command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.parameters = count_parameters(config)
        self.metrics = MetricsLog(out / "metrics.jsonl" if world.is_first else None, claim.confirm)
        # Compared with a checkpoint before this run resumes it.
        self.about = {
            "recipe": {k: v for k, v in recipe.to_dict().items() if k not in FREE_ON_RESUME},
            "data": corpus.fingerprint,
            "parameters": self.parameters,
        }
        if init is not None:
            self.about["init"] = init.sha256

    def find_start(self, resume: bool | str) -> Path | None:
        """The checkpoint to resume from, verified and of this very run, or None to start."""
        if not resume:
            return None
        root = self.out / "checkpoints"
        newest, refused = checkpoints.newest(root)
        for line in refused:
            self._warn(line)
        if newest is not None:
            self._check_same_run(newest)
            return newest
        if refused:
            raise IntegrityError(f"no checkpoint is whole ({root}): start again with --overwrite")
        if (self.out / "model").exists():
            raise UserError(
                f"the run has ended and its checkpoints are gone ({root}): train its model further "
                f"with --init {self.out} and another --out"
            )
        if resume is True:
            self.progress.note("no checkpoint yet: the run begins")
        return None

    def _check_same_run(self, checkpoint: Path) -> None:
        about = checkpoints.verify(checkpoint).get("about")
        about = about if isinstance(about, dict) else {}
        differences = _differences(about, self.about)
        if differences:
            raise IntegrityError(
                f"this run is another one ({checkpoint}): {'; '.join(differences)}; "
                "use its own settings or another folder"
            )
        step = checkpoints.step_of(checkpoint)
        if step > self.recipe.steps:
            raise IntegrityError(
                f"steps={self.recipe.steps} (recipe): {checkpoint} is past them; use {step} or more"
            )
        processes = about.get("processes")
        if processes != self.world.size:
            self._warn(
                f"{processes} processes saved {checkpoint.name} and {self.world.size} "
                "resume it: sums may round differently"
            )

    def go(self, start: Path | None) -> dict[str, Any]:
        """Train from the checkpoint `start` (None: from the beginning) to the end."""
        step = checkpoints.step_of(start) if start else 0
        done = self.world.first(lambda: self._finished(start)) if start else None
        if done is not None:
            return done
        model = self._model(begins=start is None)
        with self._on_signals() as stop:
            transformers.set_seed(self.recipe.seed)  # whatever building the model has drawn
            loop = Loop(
                recipe=self.recipe,
                model=model,
                device=self.device,
                corpus=self.corpus,
                folder=self.out,
                about=self.about,
                world=self.world,
                stop=stop,
                metrics=self.metrics,
                progress=self.progress,
                confirm=self.claim.confirm,
            )
            self.world.first(lambda: self._record(step))
            if self.world.is_first:
                for line in describe(self.recipe, model, self.corpus, self.out):
                    self.progress.note(line)
            self.progress.note(str(machine.precision(self.recipe.matmul_precision, self.device)))
            if slow := machine.slow_dtype(self.recipe.dtype, self.device):
                self.progress.note(slow)
            self.progress.start(
                f"{self.recipe.name} ({self.recipe.model['mixer']})", step, self.recipe.steps
            )
            if start:
                tokens = step * self.recipe.tokens_per_step
                self.metrics.write({"step": step, "tokens": tokens, "event": "resume"})
                self.progress.note(f"resumed from {start.name}")
            loop.run(start)
            # A signal during the very last step arrives after the loop has checked for one.
            signum = loop.stopping or stop.signum
        if signum:
            raise Interrupted(signum, loop.saved, self._how_to_resume(), loop.step)
        return self._finish(loop)

    def _model(self, begins: bool) -> SWHForCausalLM:
        """The model to train, with its initial weights if the training begins."""
        recipe, world = self.recipe, self.world
        divided = sharded.pieces(recipe.shard, world) > 1
        whole = None
        if not divided or (begins and world.is_first):
            transformers.set_seed(recipe.seed)
            whole = SWHForCausalLM(self.config)
            if begins and self.init is not None:
                whole.load_state_dict(self.init.weights_for(whole))
        if whole is not None and not divided:
            return whole
        model = sharded.empty_model(
            self.config, kind=recipe.shard, dtype=recipe.dtype, device=self.device, world=world
        )
        if begins:
            sharded.fill(model, whole)
        return model

    @contextlib.contextmanager
    def _on_signals(self) -> Iterator[StopRequest]:
        """`catch_signals`; the error of a second signal also says how to resume."""
        try:
            with catch_signals() as stop:
                yield stop
        except Interrupted as stopped:
            raise Interrupted(stopped.signum, None, self._how_to_resume()) from None

    def _how_to_resume(self) -> str:
        """How to resume after a signal: the command itself where it is known. The run's folder
        holds all that it needs, but for the program's plugins and the number of threads."""
        words = shlex.split(self.command)
        if words[:1] != ["spectral-window"] or "train" not in words or self.world.size > 1:
            return "go on with --resume"
        command = [*words[: words.index("train") + 1], "--resume", str(self.out)]
        if "--threads" in words[:-1]:
            at = words.index("--threads")
            command += words[at : at + 2]
        return f"go on with: {shlex.join(command)}"

    def _finished(self, checkpoint: Path) -> dict[str, Any] | None:
        """The result, if the run has ended with `checkpoint` and all files agree; otherwise None,
        and the files of its end are removed, to be written again."""
        if checkpoints.step_of(checkpoint) == self.recipe.steps:
            try:
                return self._verified_result(checkpoint)
            except (UserError, IntegrityError, OSError, KeyError) as error:
                if (self.out / "result.json").exists():
                    self._warn(f"the result is made again: {error}")
        (self.out / "result.json").unlink(missing_ok=True)
        shutil.rmtree(self.out / "model", ignore_errors=True)
        return None

    def _verified_result(self, checkpoint: Path) -> dict[str, Any]:
        """result.json, if it belongs to the model beside it, and that to the checkpoint. Raises
        UserError, IntegrityError, OSError or KeyError."""
        result = loading.read_json(self.out / "result.json")
        model = manifest.verify(self.out / "model")
        same = _weights(model) == _weights(checkpoints.verify(checkpoint))
        # A model older than this rule does not name its result.
        if not same or model.get("result", result) != result:
            raise IntegrityError(f"result.json and model are of another run ({self.out})")
        if (result["steps"], result["parameters"]) != (self.recipe.steps, self.parameters):
            raise IntegrityError(f"result.json is of another run ({self.out})")
        return result

    def _record(self, step: int) -> None:
        """Write config.json, and drop the metrics of steps that will run again."""
        write_json(
            self.out / "config.json",
            {
                "recipe": self.recipe.to_dict(),
                "model": self.config.to_diff_dict(),
                "parameters": self.parameters,
                "data": {"fingerprint": self.corpus.fingerprint, **self.corpus.sizes()},
                "tokens": None if self.tokens is None else str(self.tokens),
                "init": self.init and {"model": str(self.init.folder), "sha256": self.init.sha256},
                "command": self.command,
                "launch": launch(),
                "environment": self._environment(),
            },
        )
        self.metrics.rewind(step)

    def _finish(self, loop: Loop) -> dict[str, Any]:
        """Evaluate on all held-out text, write the model and the result."""
        recipe, world, model = self.recipe, self.world, loop.model
        scores = loop.evaluate()
        peaks = world.gather(machine.peak_memory(self.device))
        losses = [row["loss"] for row in self.metrics.read() if "loss" in row]
        result = {
            "recipe": recipe.name,
            "mixer": recipe.model["mixer"],
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
            "peak_memory_bytes": max(peaks),
            "wall_seconds": round(loop.seconds, 3),
            "command": self.command,
            "environment": self._environment(),
        }

        record = TrainingRecord(
            recipe=recipe.name,
            command=self.command,
            data=recipe.data,
            tokens=result["tokens"],
            loss=scores["loss"],
            perplexity=scores["perplexity"],
            bits_per_byte=scores["bits_per_byte"],
            held_out=int(scores["tokens"]),
            context=recipe.sequence_length,
        )

        def write_model(parts: list[sharded.Part], folder: Path) -> None:
            state.save_model(folder, model, self.corpus.tokenizer, record, parts)
            manifest.seal(folder, sharded.hashes(parts), result=result)

        def write(parts: list[sharded.Part]) -> dict[str, Any]:
            self.claim.confirm()
            folder = self.out / "model"
            write_folder(folder, partial(write_model, parts), needs=4 * self.parameters)
            write_json(self.out / "result.json", result)
            return result

        world.first(self.claim.confirm)
        with state.written_by_all(model, None, self.out, world) as parts:
            result = world.first(partial(write, parts))
        self.progress.note(
            f"done: held-out loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f}, "
            f"{scores['bits_per_byte']:.4f} bits per byte over {scores['tokens']:,} tokens"
        )
        return result

    def _environment(self) -> dict[str, Any]:
        return machine.environment(
            self.device,
            asked=self.recipe.matmul_precision,
            processes=self.world.size,
            dtype=self.recipe.dtype,
        )

    def _warn(self, line: str) -> None:
        if isinstance(self.progress, Silent):
            warnings.warn(line, stacklevel=2)
        else:
            self.progress.note(f"warning: {line}")


def _weights(contents: dict[str, Any]) -> dict[str, Any]:
    """The files of weights in a manifest, as it has them."""
    files = contents["files"].items()
    return {name: entry for name, entry in files if name.startswith("model")}


def _with_first_precision(recipe: Recipe, out: Path) -> Recipe:
    """`recipe` for resuming the run in `out`: unless it names a precision, with the one that the
    run started with (runs older than "auto" started with another)."""
    try:
        first = loading.read_json(out / "config.json")["recipe"]["matmul_precision"]
    except (UserError, IntegrityError, LookupError, TypeError):  # reported later
        return recipe
    if recipe.matmul_precision != "auto" or first not in MATMUL_PRECISIONS:
        return recipe
    return recipe.replace(matmul_precision=first)


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Each setting of the checkpoint that differs from this run's, as a line."""
    recipe = stored.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {"recipe": recipe}
    # a checkpoint older than a key was made with the key's default
    absent = {k: v for k, v in defaults().items() if k in recipe or k in wanted["recipe"]}
    have, want = absent | recipe, absent | wanted["recipe"]
    if have.get("schedule") == want.get("schedule") == "constant":  # the rate does not depend on it
        have["steps"] = want["steps"]
    lines = [
        f"{key} was {have.get(key)!r} and is {want.get(key)!r}"
        for key in sorted(have | want)
        if have.get(key) != want.get(key)
    ]
    if have.get("steps") != want.get("steps"):
        lines.append("a cosine ends with its steps, so begin a new run from the model with --init")
    if stored.get("init") != wanted.get("init"):
        lines.append("the model to begin from (--init) is another")
    if stored.get("data") != wanted["data"]:
        lines.append("the text or its tokenizer is another (data fingerprint)")
    elif not lines and stored.get("parameters") != wanted["parameters"]:
        count = stored.get("parameters")
        lines.append(f"the model had {count} parameters and has {wanted['parameters']}")
    return lines
