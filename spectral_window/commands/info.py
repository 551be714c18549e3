"""`spectral-window info`: what a model costs, and how it computes here."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from spectral_window.cli.options import Debug, Device, Json, Overrides, Threads
from spectral_window.cli.output import format_bytes, print_json, print_table, warn
from spectral_window.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

    from spectral_window.hf import SWHConfig, SWHForCausalLM
    from spectral_window.hf.model import SWHLayer
    from spectral_window.training.recipes import Recipe

EXAMPLE = "info small window=128 --context 1000000"
CONTEXTS = (1024, 32_768, 1_048_576)


def run(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_RECIPE", help="A model's folder, or a recipe's name."),
    ],
    overrides: Overrides = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="N", help="Count at this many tokens of context. Repeatable."),
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """What a model costs beside a Transformer of equal shape, and how it computes here, and why."""
    import torch

    from spectral_window.hf import SWHForCausalLM
    from spectral_window.training.machine import choose_device, in_force

    target = choose_device(device)
    config, source, dtype = _describe(model, overrides or [])
    with torch.device("meta"):
        own = SWHForCausalLM(config)
        transformer = SWHForCausalLM(config.papers_layer("attention"))
    for network in (own, transformer):
        network.tie_weights()
        torch.nn.Module.to(network, dtype)
    contexts = sorted(set(context or ())) or list(CONTEXTS)
    summary: dict[str, Any] = {
        "model": source,
        "config": config.deciding("state", "function"),
        "options": _options(config),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": own.count_parameters(),
        "parameters_without_embeddings": own.count_parameters(embeddings=False),
        "transformer_parameters": transformer.count_parameters(),
        "transformer_parameters_without_embeddings": transformer.count_parameters(embeddings=False),
        "contexts": [
            {
                "context": n,
                "state_bytes": own.state_bytes(n),
                "transformer_state_bytes": transformer.state_bytes(n),
                "flops_per_token": own.flops_per_token(n),
                "transformer_flops_per_token": transformer.flops_per_token(n),
            }
            for n in contexts
        ],
        "methods": _methods(own, target),
        "environment": {
            "spectral_window": metadata.version("spectral-window"),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": str(target),
            "threads": torch.get_num_threads(),
            "matmul_precision": in_force(),
        },
    }
    if json:
        return print_json(summary)
    return _print_info(summary)


def _describe(name: str, overrides: list[str]) -> tuple[SWHConfig, str, torch.dtype]:
    """Find (config, name, dtype) of a model's folder or a recipe."""
    import torch

    from spectral_window.training.loading import find_model, load_config
    from spectral_window.training.recipes import RECIPES, resolve

    if name in RECIPES:
        recipe = resolve(name, overrides)
        from spectral_window.training.trainer import model_config

        return model_config(recipe, _vocabulary(recipe)), f"recipe {name}", torch.float32
    if not Path(os.path.expanduser(name)).exists() and "/" not in name:
        error = unknown("recipe", name, RECIPES)
        raise UserError(f"no such folder, and {error}")
    if overrides:
        raise UserError(f"{overrides[0]} ({name}): only a recipe's settings can be changed")
    folder, notes = find_model(name)
    warn(notes)
    config = load_config(folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return config, str(folder), dtype


def _vocabulary(recipe: Recipe) -> int:
    """Count the tokens of the recipe's tokenizer (at most, if it is yet to be trained)."""
    from spectral_window.data.tokenizers import SMALLEST, bpe_size, load_tokenizer

    if recipe.model["vocab_size"] is not None:
        return recipe.model["vocab_size"]
    if recipe.tokenizer.startswith("bpe:"):
        return bpe_size(recipe.tokenizer)
    return SMALLEST if recipe.tokenizer == "bytes" else len(load_tokenizer(recipe.tokenizer))


def _options(config: SWHConfig) -> list[dict[str, Any]]:
    """List the options of the config's parts."""
    from spectral_window.hf.config import CORE
    from spectral_window.nn.options import chosen

    options = [option for option in chosen(CORE, vars(config)) if option not in CORE]
    return [{"option": o.name, "value": getattr(config, o.name), "help": o.help} for o in options]


def _methods(model: SWHForCausalLM, device: torch.device) -> list[dict[str, Any]]:
    """Find the method that "auto" means here for each operator that the model calls, and the
    reasons why preferred ones are passed over."""
    import torch

    from spectral_window.ops import resolve

    layer = cast("SWHLayer", model.model.layers[0])
    operators = [*layer.mixer.operators(), ("linear", ()), ("rms_norm", ())]
    methods: dict[tuple[str, str], dict[str, Any]] = {}
    for op, others in operators:
        for use, length in (("prefill", 1024), ("step", 1)):
            x = torch.empty(1, length, model.config.hidden_size, device=device, dtype=model.dtype)
            with torch.no_grad():
                choice = resolve(op, "auto", x, *others)
            row = {"method": choice.name, "reason": choice.reason}
            methods[op, use] = {"op": op, "use": use, **row, "passed_over": dict(choice.passed)}
    return list(methods.values())


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _print_info(summary: dict[str, Any]) -> None:
    config = summary["config"]
    print_table(
        f"{summary['model']}: {config['mixer']}, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']} channels, {config['num_attention_heads']} heads, "
        f"vocabulary {config['vocab_size']:,}",
        ("parameters", "this model", "Transformer of equal shape"),
        [
            (
                "all",
                f"{summary['parameters']:,}",
                f"{summary['transformer_parameters']:,}",
            ),
            (
                "without embeddings and head",
                f"{summary['parameters_without_embeddings']:,}",
                f"{summary['transformer_parameters_without_embeddings']:,}",
            ),
        ],
    )
    print_table(
        "options of its parts",
        ("option", "value", "what it is"),
        [(row["option"], _text(row["value"]), row["help"]) for row in summary["options"]],
        numbers=False,
    )
    print_table(
        f"one sequence in {summary['dtype']}: memory kept after N tokens, work for each of them",
        ("N", "state", "Transformer's", "FLOPs a token", "Transformer's"),
        [
            (
                f"{row['context']:,}",
                format_bytes(row["state_bytes"]),
                format_bytes(row["transformer_state_bytes"]),
                f"{row['flops_per_token']:,}",
                f"{row['transformer_flops_per_token']:,}",
            )
            for row in summary["contexts"]
        ],
    )
    uses: dict[tuple[str, str, str], list[str]] = {}
    passed: dict[tuple[str, str, str], None] = {}
    for row in summary["methods"]:
        uses.setdefault((row["op"], row["method"], row["reason"]), []).append(row["use"])
        for name, why in row["passed_over"].items():
            if not name.startswith("step"):  # of course, for a text
                passed[row["op"], name, why] = None
    print_table(
        "methods here",
        ("operator", "for", "method", "how"),
        [(op, ", ".join(use), name, how) for (op, name, how), use in uses.items()],
        numbers=False,
    )
    if passed:
        head = ("operator", "method", "why it is passed over here")
        print_table("preferred to them", head, list(passed), numbers=False)
    print(", ".join(f"{name} {value}" for name, value in summary["environment"].items()))
