"""From a path that a person typed to a model that can be trusted.

A path may be a run folder (its final `model/`, else its newest checkpoint whose every byte agrees
with its manifest) or any folder that `save_pretrained` wrote. A folder that has a manifest must
agree with it, so a single flipped bit is noticed, and inside a run folder there must be one.
Nothing is fetched and nothing is unpickled; the weights must be safetensors files inside the
folder, hold exactly the tensors that the config asks for, and be finite.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import IntegrityError, ResourceError, UserError
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.training import checkpoints, manifest
from spectral_window.training.machine import choose_device

SHOWN = 10  # tensors that an error names
LARGEST_JSON = 1 << 20
INDEX = ".safetensors.index.json"  # which file holds which tensor, as transformers calls it


class WeightsNotFinite(IntegrityError):
    """Stored weights that hold NaN or infinity: an intact copy of a model that broke down, or a
    damaged one."""


class Loaded(NamedTuple):
    """A model in eval mode, its tokenizer, where they came from, and lines worth telling."""

    model: SWHForCausalLM
    tokenizer: Any
    folder: Path
    notes: list[str]


class Run(NamedTuple):
    """What a run folder's config.json records of the run.

    folder: the run folder. recipe: its values, or None where none are recorded. data_fingerprint:
    names the prepared text, see `data.text.Corpus`. command: the command line that trained it.
    init: the model that it began from, or None. tokens: where the prepared text is, or None for in
    the run folder.
    """

    folder: Path
    recipe: dict[str, Any] | None
    data_fingerprint: str | None
    command: str
    init: str | None = None
    tokens: str | None = None


def read_run(folder: Path) -> Run | None:
    """Read the record of the run folder `folder`; None where it has no config.json."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    values = read_json(path)
    recipe, data, init = (values.get(name) for name in ("recipe", "data", "init"))
    return Run(
        folder,
        recipe if isinstance(recipe, dict) else None,
        data.get("fingerprint") if isinstance(data, dict) else None,
        str(values.get("command", "")),
        init.get("model") if isinstance(init, dict) else None,
        values.get("tokens"),
    )


def run_of(folder: Path) -> Run | None:
    """Read the record of the run that made a model folder (RUN/model, RUN/checkpoints/step-N)."""
    for parent in (folder.parent, folder.parent.parent):
        run = read_run(parent)
        if run is not None and run.recipe is not None:
            return run
    return None


def find_model(path: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """The model folder that `path` means, and a line for each damaged checkpoint passed over.

    Raises UserError where there is none, IntegrityError where there are checkpoints but none is
    intact.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"a URL is not a model ({text[:80]}): download it, then give its folder")
    try:
        text.encode("utf-8")
        folder = Path(os.path.expanduser(text))
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, ValueError):  # not UTF-8, too long, a NUL
        raise UserError(f"not a usable path ({text[:80]}): give a model's folder") from None
    if not is_folder:
        what = "a file, not a folder" if exists else "no such folder"
        raise UserError(
            f"{what} ({text[:200]}): give a run folder or one that save_pretrained wrote"
        )
    for candidate in (folder / "model", folder):
        if _names_a_model(candidate):
            return candidate, []
    root = folder / "checkpoints"
    if root.is_dir():
        newest, refused = checkpoints.newest(root)
        if newest is not None:
            return newest, refused
        if refused:
            raise IntegrityError(f"no intact checkpoint ({root}): {refused[0]}")
        raise UserError(f"no checkpoint yet ({root}): let the training reach its first")
    raise UserError(
        f"no model in the folder ({folder}): give a run folder or one that save_pretrained wrote"
    )


def load(path: str | os.PathLike[str], *, device: str = "auto") -> Loaded:
    """The model and tokenizer at `path`, checked (see the module's text).

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ... Raises UserError (exit code
    2) or IntegrityError (3), naming the file and at most ten tensors.
    """
    where = choose_device(device)
    folder, notes = find_model(path)
    _check_manifest(folder)
    config = load_config(folder)
    tensors = _read_tensors(folder)
    if config.num_hidden_layers > len(tensors):  # before a layer is made, for each takes memory
        raise IntegrityError(
            f"the weights do not fit config.json ({folder}): {config.num_hidden_layers:,} layers "
            f"and {len(tensors)} tensors; copy the model again"
        )
    # Built without memory and given the stored tensors themselves: nothing is initialised in vain.
    with torch.device("meta"):
        model = SWHForCausalLM(config)
    _check_names(folder, tensors, model)
    state, free = model.state_bytes(1), psutil.virtual_memory().available
    if state > free:
        raise ResourceError(
            f"the state of one text takes {state / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free "
            f"({folder}): window={config.window:,} is too large here"
        )
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise WeightsNotFinite(
            f"weights are not finite ({folder}): {_some(bad)}; use an earlier checkpoint"
        )
    tokenizer = load_tokenizer(os.fspath(folder))
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} ({folder}): "
            "put back the tokenizer that was saved with the model"
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    torch.nn.Module.to(model, where)
    return Loaded(model.eval(), tokenizer, folder, notes)


def _check_manifest(folder: Path) -> None:
    """IntegrityError if a file differs from what the folder's manifest says, or if a run made the
    folder and the manifest is gone."""
    if not _made_by_a_run(folder) and not (folder / manifest.MANIFEST).is_file():
        return
    try:
        manifest.verify(folder)
    except IntegrityError as error:
        raise IntegrityError(
            f"{error}; if the change was yours, copy the folder elsewhere without "
            f"{manifest.MANIFEST}"
        ) from None


def _made_by_a_run(folder: Path) -> bool:
    """Whether `folder` is the model or a checkpoint of a run folder: those are always sealed."""
    place = folder.resolve()
    if place.parent.name == "checkpoints":
        place = place.parent
    elif place.name != "model":
        return False
    record = place.parent / "config.json"
    return record.is_file() and "recipe" in read_json(record)


def load_config(folder: Path) -> SWHConfig:
    """The config of a model folder. Raises UserError for a wrong field, ResourceError for sizes
    that no machine holds, IntegrityError for a file that is no config."""
    values = read_json(folder / "config.json")
    try:
        return SWHConfig.from_dict(values)
    except (UserError, ResourceError) as error:  # a wrong field, or sizes that no machine holds
        raise type(error)(f"{error} [{folder / 'config.json'}]") from None
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{' '.join(str(error).split())} ({folder / 'config.json'}): correct it"
        ) from None


def _names_a_model(folder: Path) -> bool:
    """Whether there is a model's config.json (a run folder's is of another kind)."""
    path = folder / "config.json"
    return path.is_file() and "model_type" in read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        values = json.loads(path.read_bytes()) if size <= LARGEST_JSON else None
    except OSError as error:
        raise UserError(f"{error.strerror} ({path}): the model's folder is not complete") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"not JSON ({path}): it was damaged; copy the model again") from None
    if size > LARGEST_JSON:
        raise IntegrityError(f"larger than 1 MB ({path}): it is not a model's file")
    if not isinstance(values, dict):
        raise IntegrityError(f"not a JSON object ({path}): it was damaged; copy the model again")
    return values


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files that hold the tensors of `stem` ("model": the weights), all inside `folder`."""
    index = folder / f"{stem}{INDEX}"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise IntegrityError(
                f"no map of weights ({index}): it was damaged; copy the model again"
            )
        names = sorted(set(weight_map.values()))
    else:
        names = [f"{stem}.safetensors"]
    paths = [folder / name for name in names]
    inside = folder.resolve()
    for path in paths:
        if inside not in path.resolve().parents:
            raise IntegrityError(
                f"a weight file outside the folder ({path}): copy the file itself there"
            )
        if not path.is_file():
            others = sorted(
                p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
            )
            hint = (
                f"{others[0]} is not safetensors and is never opened; convert it"
                if others
                else "copy it again"
            )
            raise IntegrityError(f"{path.name} is missing ({folder}): {hint}")
    return paths


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"not safetensors, or damaged ({path}): {error}") from None
    return tensors


def _check_names(folder: Path, stored: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Raise IntegrityError unless `stored` is what `model` needs; of tied tensors one will do."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in stored if name in parameters}
    wrong = [f"{n} missing" for n, p in parameters.items() if n not in stored and id(p) not in held]
    for name, tensor in stored.items():
        if name not in parameters:
            wrong.append(f"{name} unexpected")
        elif tensor.shape != parameters[name].shape:
            wrong.append(f"{name} is {list(tensor.shape)}, not {list(parameters[name].shape)}")
    if wrong:
        raise IntegrityError(
            f"the weights do not fit config.json ({folder}): {_some(wrong)}; copy the model again"
        )


def _some(items: Iterable[str]) -> str:
    names = sorted(items)
    return "; ".join(names[:SHOWN]) + (
        f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
