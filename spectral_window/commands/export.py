"""`spectral-window export`: a model as graphs for ONNX Runtime or torch.export.load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Debug, Model, Threads
from spectral_window.cli.output import log, warn

EXAMPLE = "export runs/mine --format onnx --out exported"


def run(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="onnx (needs the extra 'export') or torch (torch.export.load)."
        ),
    ] = "onnx",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Write a model as two graphs, of a text and of a token, that run without this package."""
    from spectral_window.hf.export import export
    from spectral_window.training.loading import load

    loaded = load(model, device="cpu")
    warn(loaded.notes)
    errors = export(loaded.model, loaded.tokenizer, out, format, log)
    for name, error in errors.items():
        print(f"{name}: differs from the model by {error:.1e}")
    print(f"{out}/README.md tells the inputs and outputs")
