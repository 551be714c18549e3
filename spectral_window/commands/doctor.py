"""`spectral-window doctor`: the architecture's known failures, checked on a model or a recipe.

Exit code 0 where no check found a fault (warnings are advice), 7 where one did; 3 stays for files
that are damaged, 4 for numbers that broke down while training.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from spectral_window.commands.show import print_json, print_table, tell
from spectral_window.errors import FaultFound, UserError, unknown
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.lab.doctor import Finding, examine, summary
from spectral_window.training.loading import (
    WeightsNotFinite,
    choose_device,
    load,
    load_config,
)
from spectral_window.training.recipes import RECIPES
from spectral_window.training.recipes import resolve as resolve_recipe

VOCABULARY = 512  # of a recipe's model: no check depends on it


def run(*, model: str, overrides: list[str], context: int | None, device: str, json: bool) -> None:
    """Print what each check found; raises FaultFound (exit code 7) if one found a fault."""
    try:
        patient, source = _find(model, overrides, device)
    except WeightsNotFinite as error:  # a damaged file, though, is not a sick model
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
        _show(source, findings)
    faults = [finding.check for finding in findings if finding.verdict == "fault"]
    if faults:
        raise FaultFound(f"the doctor found a fault ({source}): see {', '.join(faults)}")


def _find(name: str, overrides: list[str], device: str) -> tuple[SWHForCausalLM, str]:
    """The model to examine, and what it is: a checkpoint, or a recipe's or a config.json's model
    with its first weights."""
    path = Path(os.path.expanduser(name))
    if name in RECIPES:
        from spectral_window.training.trainer import model_config

        recipe = resolve_recipe(name, overrides)
        return _begin(model_config(recipe, VOCABULARY), recipe.seed, device), f"recipe {name}"
    if not path.exists() and "/" not in name:
        raise UserError(f"no such folder, and {unknown('recipe', name, RECIPES)}")
    if overrides:
        raise UserError(f"{overrides[0]} ({name}): only a recipe's knobs can be changed")
    if path.is_file() and path.name == "config.json":
        return _begin(load_config(path.parent), 0, device), name
    loaded = load(name, device=device)
    tell(loaded.notes)
    return loaded.model, str(loaded.folder)


def _begin(config: SWHConfig, seed: int, device: str) -> SWHForCausalLM:
    """A model with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SWHForCausalLM(config).eval()
    torch.nn.Module.to(model, choose_device(device))
    return model


def _show(source: str, findings: list[Finding]) -> None:
    print_table(
        source,
        ("check", "verdict", "measured"),
        [(f.check, f.verdict, f.measured) for f in findings],
        numbers=False,
    )
    for finding in findings:
        if finding.verdict != "ok":
            print(f"{finding.verdict}: {finding.check}: {finding.why}: {finding.todo}")
