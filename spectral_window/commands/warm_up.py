"""`spectral-window warm-up`: see `ops/compiled/ahead.py` and `hf/rehearsal.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectral_window.cli.options import Debug, Json
from spectral_window.cli.output import print_json
from spectral_window.errors import UserError

if TYPE_CHECKING:
    from spectral_window.hf import SWHConfig

EXAMPLE = "warm-up memory"


def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL_OR_RECIPE]...",
            help="Compile what these call, and no more: folders of models, or recipes' names. "
            "Default: everything.",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile the loops for this processor and store them, so that no later command has to. What is
    stored already is kept."""
    from spectral_window.ops.methods import HAS_NUMBA

    if not HAS_NUMBA:
        raise UserError("numba is missing (warm-up): nothing can be compiled; pip install numba")
    from spectral_window.ops.compiled.ahead import compile_all, compiled_kernels, processor

    if models:
        from spectral_window.hf.rehearsal import rehearse

        for config in [_config(name) for name in models]:
            rehearse(config)
    else:
        compile_all()
    kernels = compiled_kernels()
    fresh = {name: each.seconds for name, each in kernels.items() if not each.was_stored}
    folders = sorted({str(each.file.parent) for each in kernels.values() if each.file})
    if json:
        return print_json(
            {
                "processor": processor(),
                "folders": folders,
                "compiled": fresh,
                "stored_before": [name for name in kernels if name not in fresh],
            }
        )
    for name, seconds in fresh.items():
        print(f"{name}: {seconds:.1f} s")
    return print(
        f"{len(fresh)} loops compiled in {sum(fresh.values()):.0f} s for {processor()}, "
        f"{len(kernels) - len(fresh)} were stored before, in {', '.join(folders)}"
    )


def _config(name: str) -> SWHConfig:
    """Find the config of a model's folder or of a recipe."""
    from spectral_window.hf.rehearsal import VOCABULARY
    from spectral_window.training.loading import find_model, load_config
    from spectral_window.training.recipes import RECIPES, resolve
    from spectral_window.training.trainer import model_config

    if name in RECIPES or Path(name).suffix in (".yaml", ".yml"):
        return model_config(resolve(name), VOCABULARY)
    return load_config(find_model(name)[0])
