"""`spectral-window publish`: prepared text on an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Debug
from spectral_window.cli.output import log

EXAMPLE = "publish tokens/ s3://bucket/tokens"


def run(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Prepared text: RUN/data, or what train --corpus made."),
    ],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="Where to copy it: s3://, gs://, or what else fsspec writes to."
        ),
    ],
    piece: Annotated[
        int,
        typer.Option(metavar="N", help="Bytes that are fetched at a time, a multiple of 4096."),
    ] = 1 << 18,
    debug: Debug = False,
) -> None:
    """Copy prepared text to an object store, from which train --corpus URL reads it in pieces."""
    from spectral_window.data.remote import publish

    publish(folder, url, piece=piece)
    log(f"spectral-window train RECIPE --corpus {url}    trains on it")
