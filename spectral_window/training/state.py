"""The contents of a checkpoint, and how they are read back without trusting them.

Tensors go to safetensors and everything else to JSON; nothing is pickled, so opening a checkpoint
from elsewhere runs no code from it. A checkpoint folder is also a model folder:
`from_pretrained(folder)` loads it.

    config.json, model.safetensors, tokenizer files     the model, as Hugging Face writes it; of a
                                                         sharded one several files and an index
    README.md, *_spectral_window.py                      its card, and how to load it anywhere
    optimizer.safetensors                                Adam's moments, by parameter name; likewise
    rng.safetensors                                      torch's random generators, one per process
    training.json                                        step counters, schedule, other generators
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from spectral_window.errors import DivergedError, IntegrityError
from spectral_window.hf.card import TrainingRecord, write_card
from spectral_window.training import sharded
from spectral_window.training.loading import weight_files
from spectral_window.training.parallel import World

_JSON = "training.json"


# ---------------------------------------------------------------------------------------- the model


@contextlib.contextmanager
def written_by_all(
    model: Any, optimizer: torch.optim.Optimizer | None, run: Path, world: World
) -> Iterator[list[sharded.Part]]:
    """The files that the processes write together: of a sharded model its weights and, with
    `optimizer`, Adam's moments; else none. See `sharded.written`. DivergedError if a number is not
    finite."""
    if not sharded.is_sharded(model):
        yield []
        return
    tensors = {"model": sharded.stored_once(model)}
    world.every(lambda: check_finite(model))
    if optimizer is not None:
        tensors["optimizer"] = _moments(model, optimizer)
        world.every(lambda: _check_finite_moments(tensors["optimizer"]))
    with sharded.written(tensors, run, world) as parts:
        yield parts


def save_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    training: TrainingRecord | None = None,
    parts: list[sharded.Part] | None = None,
) -> None:
    """Weights, config, tokenizer and model card, as from_pretrained loads them. DivergedError if
    not finite.

    training: what the run knows when it ends, for the card. parts: files of `written_by_all`, which
    hold the weights of a sharded model.
    """
    check_finite(model)
    without: dict[str, Any] = {}
    if parts:
        model, without = sharded.described(model), {"state_dict": {}}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size="1000GB", **without)
    finally:
        if bars:
            logging.enable_progress_bar()
    if parts:  # not before: transformers removes what looks like an earlier save
        sharded.move(parts, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if training is not None:
        write_card(folder, model, training)


def check_finite(model: nn.Module) -> None:
    """Raise DivergedError naming the first parameter that holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(sharded.own_part(parameter)).all():
            raise DivergedError(
                f"weight {name} is not finite (checkpoint): nothing was saved; "
                "lower lr and resume the last checkpoint"
            )


def load_model(folder: Path, model: nn.Module) -> None:
    """Copy the weights of `folder` into `model`. Raises IntegrityError unless names, shapes and
    dtypes are the model's own."""
    stored = _read_tensors(folder, "model")
    wanted = model.state_dict(keep_vars=True)
    # A tied tensor is stored once, under one of its names.
    present = {id(wanted[name]) for name in stored if name in wanted}
    needed = {
        name: tensor
        for name, tensor in wanted.items()
        if name in stored or id(tensor) not in present
    }
    _check_same(folder, "model.safetensors", stored, needed)
    held = {name: sharded.as_held(tensor, wanted[name]) for name, tensor in stored.items()}
    _check_finite_numbers(folder, "model.safetensors", held)
    with torch.no_grad():
        for name, tensor in held.items():
            wanted[name].copy_(tensor)


# ------------------------------------------------------------------------------------ the optimiser


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Adam's tensors, named `moment:parameter`. DivergedError if not finite."""
    moments = _moments(model, optimizer)
    _check_finite_moments(moments)
    tensors = {name: value.detach().cpu().contiguous() for name, value in moments.items()}
    save_file(tensors, folder / "optimizer.safetensors")


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    return {
        f"{key}:{names[parameter]}": value
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
        if isinstance(value, Tensor)
    }


def _check_finite_moments(moments: Mapping[str, Tensor]) -> None:
    for name, tensor in moments.items():
        if not torch.isfinite(sharded.own_part(tensor)).all():
            raise DivergedError(
                f"optimizer state {name} is not finite (checkpoint): nothing was saved; "
                "lower lr and resume the last checkpoint"
            )


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of `optimizer` its stored moments. Raises IntegrityError for one that is
    missing, unexpected or of another shape or dtype."""
    stored = _read_tensors(folder, "optimizer")
    names = {parameter: name for name, parameter in model.named_parameters()}
    wanted: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            wanted[f"step:{names[parameter]}"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                wanted[f"{key}:{names[parameter]}"] = parameter
    _check_same(folder, "optimizer.safetensors", stored, wanted)
    held = {name: sharded.as_held(tensor, wanted[name]) for name, tensor in stored.items()}
    _check_finite_numbers(folder, "optimizer.safetensors", held)
    negative = [
        name
        for name, tensor in held.items()
        if not name.startswith("exp_avg:") and bool((sharded.own_part(tensor) < 0).any())
    ]
    if negative:
        raise IntegrityError(
            f"optimizer.safetensors holds numbers below 0 ({folder}): {', '.join(negative[:10])}"
        )
    state = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        index: {key: held[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(order)
    }
    optimizer.load_state_dict(state)


# -------------------------------------------------------------------------------- random generators


def random_state() -> dict[str, Any]:
    """The state of this process's random generators: Python, NumPy, torch (CPU and current GPU)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`. A generator this machine lacks is passed over. IntegrityError for
    what no generator can take."""
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise IntegrityError(
            f"no state of a random generator ({_JSON}, rng.safetensors): "
            f"{' '.join(str(error).split())[:100]}; resume from another checkpoint"
        ) from None


# ----------------------------------------------------------------------------------------- the rest


def save_rest(folder: Path, counters: dict[str, Any], generators: list[dict[str, Any]]) -> None:
    """`counters` (JSON values) and the random generators of every process."""
    tensors = {
        f"{key}.{rank}": state[key]
        for rank, state in enumerate(generators)
        for key in ("torch", "cuda")
        if key in state
    }
    save_file(tensors, folder / "rng.safetensors")
    others = [{key: state[key] for key in ("python", "numpy")} for state in generators]
    (folder / _JSON).write_text(
        json.dumps({"counters": counters, "generators": others}), encoding="utf-8"
    )


def load_rest(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Inverse of `save_rest`. Raises IntegrityError if a part is missing or makes no sense."""
    tensors = _read_tensors(folder, "rng")
    try:
        values = json.loads((folder / _JSON).read_bytes())
        counters, generators = values["counters"], values["generators"]
        for rank, state in enumerate(generators):
            state["torch"] = tensors[f"torch.{rank}"]
            if f"cuda.{rank}" in tensors:
                state["cuda"] = tensors[f"cuda.{rank}"]
        _check_counters(counters)
        if not generators:
            raise IntegrityError("no random generator")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{_JSON} cannot be used ({folder}): {error!r}; resume from another checkpoint"
        ) from None
    return counters, generators


def _check_counters(counters: dict[str, Any]) -> None:
    """IntegrityError, KeyError or TypeError for counters that no training has."""
    step, logged, schedule = counters["step"], counters["logged_step"], counters["schedule"]
    rates = schedule["_last_lr"]
    for name, value in (("step", step), ("logged_step", logged)):
        if type(value) is not int or value < 0:
            raise IntegrityError(f"{name} is {value!r}")
    if logged > step or schedule["last_epoch"] != step or len(rates) != 2:
        raise IntegrityError("step, logged_step and schedule contradict each other")
    for value in (counters["seconds"], *rates):
        if not math.isfinite(value) or value < 0:
            raise IntegrityError(f"{value!r} among seconds and rates")
    if not math.isfinite(counters["loss_sum"]):
        raise IntegrityError(f"loss_sum is {counters['loss_sum']!r}")


def _read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `stem`.safetensors, or of the files that its index names."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"{path.name} cannot be read ({folder}): {error}") from None
    return tensors


def _check_finite_numbers(folder: Path, file: str, stored: dict[str, Tensor]) -> None:
    """Raise IntegrityError for NaN or Inf: no checkpoint is saved with them."""
    bad = sorted(n for n, x in stored.items() if not bool(sharded.own_part(x).isfinite().all()))
    if bad:
        raise IntegrityError(
            f"{file} holds numbers that are not finite ({folder}): {', '.join(bad[:10])}; "
            "resume from another checkpoint"
        )


def _check_same(
    folder: Path, file: str, stored: dict[str, Tensor], wanted: dict[str, Tensor]
) -> None:
    """Raise IntegrityError naming up to ten tensors that are missing, unexpected or different."""
    wrong = [f"{name} missing" for name in wanted if name not in stored]
    wrong += [f"{name} unexpected" for name in stored if name not in wanted]
    for name in stored.keys() & wanted.keys():
        have, want = stored[name], wanted[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            wrong.append(
                f"{name} is {have.dtype} {tuple(have.shape)}, not {want.dtype} {tuple(want.shape)}"
            )
    if wrong:
        shown = "; ".join(sorted(wrong)[:10])
        if len(wrong) > 10:
            shown += f"; and {len(wrong) - 10} more"
        raise IntegrityError(f"{file} does not fit this model ({folder}): {shown}")
