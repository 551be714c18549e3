"""Commands that make and use a model: train, eval, generate, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.app import Debug, Device, Json, Model, Threads, app, call


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="demo, tiny, small, memory or paper-lm: see `info RECIPE`."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Change knobs of the recipe, e.g. steps=500 window=64 lr=1e-3 mixer=attention.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to learn from: files, folders, globs (.txt .md .py .jsonl .json .csv .tsv "
            ".parquet, also .gz .zst), 'stdlib' (Python's own library) or hub:NAME:CONFIG. "
            "Default: the recipe's.",
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to measure on. Default: whole documents held out of --data.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run folder to make: settings, metrics, checkpoints, model, result. "
            "Default: runs/RECIPE.",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the tokens are kept, so that several runs may share them. "
            "Default: in the run folder.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Begin from the weights of this model, a run folder or what save_pretrained "
            "wrote: it gives the architecture and the tokenizer. Default: random weights.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on, exactly, from the newest intact checkpoint in DIR. With "
            "schedule=constant, steps=MORE trains a finished run further.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run in DIR first.")
    ] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Train a model on text. Ctrl-C saves a checkpoint, and --resume goes on from it."""
    call(
        "train",
        threads,
        recipe=recipe,
        overrides=overrides or [],
        data=data or [],
        valid=valid or [],
        out=out,
        corpus=corpus,
        resume=resume,
        overwrite=overwrite,
        init=init,
        command=context.obj,
    )


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to measure on, as for train. Default: what the run held out.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="About so many tokens, evenly spread. Default: all."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**31 - 1,
            metavar="T",
            help="Tokens a sequence. Default: what the run was trained with.",
        ),
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Measure a model on text: loss (nats a token), perplexity and bits per byte."""
    call(
        "evaluate",
        threads,
        model=model,
        data=data or [],
        max_tokens=max_tokens,
        length=length,
        device=device,
        json=json,
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to go on from; '-' reads it from stdin.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read the prompt from a UTF-8 file; '-' is stdin."),
    ] = None,
    unconditional: Annotated[
        bool,
        typer.Option("--unconditional", help="No prompt: begin as the training texts begin."),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "-n", metavar="N", help="Write at most N tokens; 0: none."
        ),
    ] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="0: always the likeliest token; 1: the model's own odds. Default: 0.8.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0: all. Default: 0."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw from the likeliest tokens that hold P of the odds; 1: all. Default: 1.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="The same seed, the same text. Default: a new one."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text (\\n: a new line). Repeatable."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's own end of text.")
    ] = False,
    echo: Annotated[
        bool, typer.Option("--echo/--no-echo", help="Print the prompt before the continuation.")
    ] = True,
    save_session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Afterwards keep the model's state here, to go on another time."
        ),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on from where --save-session left off, with PROMPT (if any) as new input.",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Let a model write. Text appears as it is made; memory is constant however long it runs."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    call(
        "generate",
        threads,
        model=model,
        prompt=prompt,
        prompt_file=prompt_file,
        unconditional=unconditional,
        max_new_tokens=max_new_tokens,
        sampling={name: value for name, value in sampling.items() if value is not None},
        seed=seed,
        stop=stop or [],
        ignore_eos=ignore_eos,
        echo=echo,
        session=session,
        save_session=save_session,
        device=device,
    )


@app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_RECIPE", help="A model's folder, or a recipe's name."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Knobs of the recipe to change, as for train."),
    ] = None,
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
    call(
        "info",
        threads,
        model=model,
        overrides=overrides or [],
        context=context or [],
        device=device,
        json=json,
    )
