"""`spectral-window info`: what a model costs, and how it computes here."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from spectral_window.commands.show import print_json, print_table, size, tell
from spectral_window.data.tokenizers import SMALLEST, bpe_size, load_tokenizer
from spectral_window.errors import UserError, unknown
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.hf.config import CORE
from spectral_window.hf.model import SWHLayer
from spectral_window.nn.options import chosen
from spectral_window.ops import resolve as resolve_method
from spectral_window.training.loading import choose_device, find_model, load_config
from spectral_window.training.machine import in_force
from spectral_window.training.recipes import RECIPES, Recipe
from spectral_window.training.recipes import resolve as resolve_recipe

CONTEXTS = (1024, 32_768, 1_048_576)


def run(*, model: str, overrides: list[str], context: list[int], device: str, json: bool) -> None:
    """Print what a model costs and how it computes; see `spectral-window info --help`."""
    place = choose_device(device)
    config, source, dtype = _describe(model, overrides)
    with torch.device("meta"):
        own = SWHForCausalLM(config)
        other = SWHForCausalLM(config.papers_layer("attention"))
    for each in (own, other):
        each.tie_weights()
        torch.nn.Module.to(each, dtype)
    contexts = sorted(set(context)) or list(CONTEXTS)
    facts: dict[str, Any] = {
        "model": source,
        "config": config.deciding("state", "function"),
        "options": _options(config),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": own.count_parameters(),
        "parameters_without_embeddings": own.count_parameters(embeddings=False),
        "transformer_parameters": other.count_parameters(),
        "transformer_parameters_without_embeddings": other.count_parameters(embeddings=False),
        "contexts": [
            {
                "context": n,
                "state_bytes": own.state_bytes(n),
                "transformer_state_bytes": other.state_bytes(n),
                "flops_per_token": own.flops_per_token(n),
                "transformer_flops_per_token": other.flops_per_token(n),
            }
            for n in contexts
        ],
        "methods": _methods(own, place),
        "environment": {
            "spectral_window": metadata.version("spectral-window"),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": str(place),
            "threads": torch.get_num_threads(),
            "matmul_precision": in_force(),
        },
    }
    if json:
        return print_json(facts)
    return _print_info(facts)


def _describe(name: str, overrides: list[str]) -> tuple[SWHConfig, str, torch.dtype]:
    """(config, what it is, dtype) of a model's folder or a recipe."""
    if name in RECIPES:
        recipe = resolve_recipe(name, overrides)
        from spectral_window.training.trainer import model_config

        return model_config(recipe, _vocabulary(recipe)), f"recipe {name}", torch.float32
    if not Path(os.path.expanduser(name)).exists() and "/" not in name:
        error = unknown("recipe", name, RECIPES)
        raise UserError(f"no such folder, and {error}")
    if overrides:
        raise UserError(f"{overrides[0]} ({name}): only a recipe's knobs can be changed")
    folder, notes = find_model(name)
    tell(notes)
    config = load_config(folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return config, str(folder), dtype


def _vocabulary(recipe: Recipe) -> int:
    """How many tokens the recipe's tokenizer will have (at most, where it is yet to be trained)."""
    if recipe.model["vocab_size"] is not None:
        return recipe.model["vocab_size"]
    if recipe.tokenizer.startswith("bpe:"):
        return bpe_size(recipe.tokenizer)
    return SMALLEST if recipe.tokenizer == "bytes" else len(load_tokenizer(recipe.tokenizer))


def _options(config: SWHConfig) -> list[dict[str, Any]]:
    """What the parts that were chosen are told."""
    told = [option for option in chosen(CORE, vars(config)) if option not in CORE]
    return [{"option": o.name, "value": getattr(config, o.name), "help": o.help} for o in told]


def _methods(model: SWHForCausalLM, device: torch.device) -> list[dict[str, Any]]:
    """The method that "auto" means for each operator that the model calls, on this machine, and
    why those preferred to it are passed over."""
    layer = cast(SWHLayer, model.model.layers[0])
    called = [*layer.mixer.operators(), ("linear", ()), ("rms_norm", ())]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for op, others in called:
        for use, length in (("prefill", 1024), ("step", 1)):
            x = torch.empty(1, length, model.config.hidden_size, device=device, dtype=model.dtype)
            with torch.no_grad():
                choice = resolve_method(op, "auto", x, *others)
            row = {"method": choice.name, "reason": choice.reason}
            found[op, use] = {"op": op, "use": use, **row, "passed_over": dict(choice.passed)}
    return list(found.values())


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _print_info(facts: dict[str, Any]) -> None:
    config = facts["config"]
    print_table(
        f"{facts['model']}: {config['mixer']}, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']} channels, {config['num_attention_heads']} heads, "
        f"vocabulary {config['vocab_size']:,}",
        ("parameters", "this model", "Transformer of equal shape"),
        [
            (
                "all",
                f"{facts['parameters']:,}",
                f"{facts['transformer_parameters']:,}",
            ),
            (
                "without embeddings and head",
                f"{facts['parameters_without_embeddings']:,}",
                f"{facts['transformer_parameters_without_embeddings']:,}",
            ),
        ],
    )
    print_table(
        "options of its parts",
        ("option", "value", "what it is"),
        [(row["option"], _words(row["value"]), row["help"]) for row in facts["options"]],
        numbers=False,
    )
    print_table(
        f"one sequence in {facts['dtype']}: memory kept after N tokens, work for each of them",
        ("N", "state", "Transformer's", "FLOPs a token", "Transformer's"),
        [
            (
                f"{row['context']:,}",
                size(row["state_bytes"]),
                size(row["transformer_state_bytes"]),
                f"{row['flops_per_token']:,}",
                f"{row['transformer_flops_per_token']:,}",
            )
            for row in facts["contexts"]
        ],
    )
    shown: dict[tuple[str, str, str], list[str]] = {}
    passed: dict[tuple[str, str, str], None] = {}
    for row in facts["methods"]:
        shown.setdefault((row["op"], row["method"], row["reason"]), []).append(row["use"])
        for name, why in row["passed_over"].items():
            if not name.startswith("step"):  # of course, for a text
                passed[row["op"], name, why] = None
    print_table(
        "methods here",
        ("operator", "for", "method", "how"),
        [(op, ", ".join(uses), name, how) for (op, name, how), uses in shown.items()],
        numbers=False,
    )
    if passed:
        head = ("operator", "method", "why it is passed over here")
        print_table("preferred to them", head, list(passed), numbers=False)
    print(", ".join(f"{name} {value}" for name, value in facts["environment"].items()))
