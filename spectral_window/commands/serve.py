"""`spectral-window serve`: a model behind the OpenAI HTTP interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.options import Debug, Device, Model, Threads
from spectral_window.cli.output import log, warn
from spectral_window.errors import UserError

EXAMPLE = "serve runs/mine --port 8000 --sessions sessions"
KEY = "SPECTRAL_WINDOW_API_KEY"
HERE = ("127.0.0.1", "localhost", "::1")


def run(
    model: Model,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="The address to listen at; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What requests call the model. Default: its folder's."),
    ] = None,
    sessions: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep named sessions here. Default: there are none."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar=KEY,
            show_envvar=False,
            help="Answer only requests that bring this key. Others on the machine can read a "
            f"command line, so the environment variable {KEY} is the better place.",
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=4096, metavar="N", help="Texts that are written at once.")
    ] = 64,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Texts that may wait beyond them.")
    ] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="The longest prompt, in tokens.")
    ] = 131_072,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="The longest text that one request writes.")
    ] = 4_096,
    max_body: Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="The largest body of a request.")
    ] = 4 << 20,
    prefix_cache: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="MB",
            help="Memory for the states after beginnings that prompts share; 0: none.",
        ),
    ] = 256,
    grace: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="On SIGTERM or Ctrl-C, how long texts may go on."
        ),
    ] = 30.0,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP: OpenAI's interface, many texts at once, sessions, a page to try."""
    try:
        from spectral_window.serving import server
        from spectral_window.serving.service import Limits, Service
    except ModuleNotFoundError as error:
        raise UserError(
            f"no package {error.name} (serve): pip install 'spectral-window[serve]'"
        ) from None
    from spectral_window.training.loading import load

    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        raise UserError(f"the key is empty or not ASCII (--api-key, {KEY}): give another")
    # First what fails at once, then the model, which takes its time.
    with server.listen(host, port) as listener:
        loaded = load(model, device=device)
        warn(loaded.notes)
        limits = Limits(
            slots=slots,
            queue=queue,
            prompt_tokens=max_prompt_tokens,
            new_tokens=max_new_tokens,
            prefix_bytes=prefix_cache << 20,
            body_bytes=max_body,
        )
        service = Service(
            loaded.model,
            loaded.tokenizer,
            name=name or Path(os.path.abspath(os.path.expanduser(model))).name,
            limits=limits,
            sessions=sessions,
        )
        if not loaded.model.constant_state:
            warn([f"the state of this model grows with its text ({model}): memory is the limit"])
        if api_key is None and host not in HERE:
            warn([f"everybody who reaches {host} may use this server: set {KEY}"])
        service.warm_up()
        where = server.address(listener)
        server.run(
            service,
            listener,
            api_key=api_key,
            grace=grace,
            ready=lambda: log(f"serving {service.name} at {where} (Ctrl-C ends it)"),
        )
