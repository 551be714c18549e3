"""`spectral-window doctor`: the architecture's known failures, checked on a model or a recipe.

The exit code is 0 where no check found a fault (warnings are advice) and 7 where one did; 3 means a
damaged file, 4 numbers that are not finite while training.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectral_window.cli.options import Debug, Device, Json, Overrides, Threads
from spectral_window.cli.output import print_json, print_table, warn
from spectral_window.errors import FaultFound, UserError, unknown

if TYPE_CHECKING:
    from spectral_window.hf import SWHConfig, SWHForCausalLM
    from spectral_window.lab.doctor import Finding

EXAMPLE = "doctor runs/tiny --context 4096"
VOCABULARY = 512  # of a recipe's model: no check depends on it


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RECIPE",
            help="A model's folder, a config.json, or a recipe's name.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of text it should serve. Default: what it was trained with.",
        ),
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Check a model or a recipe for the architecture's known failures; exit code 7 for a fault."""
    from spectral_window.lab.doctor import Finding, examine, summary
    from spectral_window.training.loading import WeightsNotFinite

    try:
        patient, source = _find(model, overrides or [], device)
    except WeightsNotFinite as error:  # any other damaged file stays an error
        findings = [
            Finding("finite numbers", "fault", str(error), "every output is NaN",
                    "go back to an earlier checkpoint, and lower lr")
        ]  # fmt: skip
        source = model
    else:
        context = context or patient.config.training_length
        findings = examine(patient, context)
    if json:
        print_json({"model": source, "context": context, **summary(findings)})
    else:
        _print_findings(source, findings)
    faults = [finding.check for finding in findings if finding.verdict == "fault"]
    if faults:
        raise FaultFound(f"the doctor found a fault ({source}): see {', '.join(faults)}")


def _find(name: str, overrides: list[str], device: str) -> tuple[SWHForCausalLM, str]:
    """Load the model to examine, and name it.

    It is a checkpoint, or the model of a recipe or a config.json with its initial weights.
    """
    from spectral_window.training.loading import load, load_config
    from spectral_window.training.recipes import RECIPES, resolve

    path = Path(os.path.expanduser(name))
    if name in RECIPES:
        from spectral_window.training.trainer import model_config

        recipe = resolve(name, overrides)
        return _initialize(model_config(recipe, VOCABULARY), recipe.seed, device), f"recipe {name}"
    if not path.exists() and "/" not in name:
        raise UserError(f"no such folder, and {unknown('recipe', name, RECIPES)}")
    if overrides:
        raise UserError(f"{overrides[0]} ({name}): only a recipe's settings can be changed")
    if path.is_file() and path.name == "config.json":
        return _initialize(load_config(path.parent), 0, device), name
    loaded = load(name, device=device)
    warn(loaded.notes)
    return loaded.model, str(loaded.folder)


def _initialize(config: SWHConfig, seed: int, device: str) -> SWHForCausalLM:
    """Build a model with its initial weights."""
    import torch

    from spectral_window.hf import SWHForCausalLM
    from spectral_window.training.machine import choose_device

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SWHForCausalLM(config).eval()
    torch.nn.Module.to(model, choose_device(device))
    return model


def _print_findings(source: str, findings: list[Finding]) -> None:
    print_table(
        source,
        ("check", "verdict", "measured"),
        [(f.check, f.verdict, f.measured) for f in findings],
        numbers=False,
    )
    for finding in findings:
        if finding.verdict != "ok":
            print(f"{finding.verdict}: {finding.check}: {finding.why}: {finding.todo}")
