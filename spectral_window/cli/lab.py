"""Commands that measure and compare: bench, demo, reproduce, ablate, analyze, doctor, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectral_window.cli.app import Debug, Device, Json, Model, Threads, app, call

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the results go. Default: results/paper; runs/quick/results with --quick.",
        show_default=False,
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where single runs are kept, so that a stopped one goes on. Default: runs/paper; "
        "runs/quick with --quick.",
        show_default=False,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="Runs side by side. Default: one a core."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Under 3 minutes: shows the way, and no result.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="SRC...", help="Text to learn from, as for train."),
]
Valid = Annotated[
    list[str] | None,
    typer.Option(metavar="SRC...", help="Text to measure on, as for train."),
]


@app.command()
def bench(
    benches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BENCH]...",
            help="spectral, window, prefill, decode, train, scaling, memory, memory_op, "
            "memory_layer, or all (the default). With --device cuda: ceilings, spectral, window, "
            "train.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write BENCH.json, goals.json and pictures to DIR/PROCESSOR."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="float32 or bfloat16. Repeatable. Default: both."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes and few rounds: to see that it works.")
    ] = False,
    json: Json = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=4096, metavar="N", help="CPU threads. Default: 1, and then all."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu or cuda. With cuda, --out is needed.")
    ] = "cpu",
    minutes: Annotated[
        float, typer.Option(min=0.1, max=600, metavar="N", help="On a GPU: about how long in all.")
    ] = 10.0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="With --device cuda: every step at toy size on a CPU, Triton interpreted.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """How fast every path is here, beside what you would take instead and what the hardware allows;
    each contestant is checked first."""
    call(
        "bench",
        None,
        benches=benches or [],
        dtypes=dtype or [],
        counts=[threads] if threads else [],  # each gets a process of its own
        out=out,
        quick=quick,
        json=json,
        device=device,
        minutes=minutes,
        dry_run=dry_run,
    )


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the two runs and the report go.")
    ] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead: shows the way, and no result.")
    ] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Minutes on any computer: train SWH and a Transformer of equal size, and compare them."""
    call("demo", threads, out=out, quick=quick)


@app.command()
def reproduce(
    context: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...",
            help="synthetic, efficiency, lm, or all of these in this order (the default). Beyond "
            "the paper, into results/memory: memory, language models with a memory beside the "
            "branches; recall, what that memory recalls, at up to 1,024 times the length.",
        ),
    ] = None,
    data: Data = None,
    valid: Valid = None,
    size: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the language models: small (hours on CPU cores, any text), short (a million "
            "tokens, for `memory` on any CPU), 125m (the paper's; "
            "a GPU, FineWeb-Edu), or 125m-short (its shape, 20 million tokens of any text).",
        ),
    ] = "small",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of a main language-model run, instead of the size's own."
        ),
    ] = None,
    out: Out = None,
    work: Work = None,
    jobs: Jobs = None,
    quick: Quick = False,
    debug: Debug = False,
) -> None:
    """The paper's experiments, each as published and well-posed. What is done is skipped; Ctrl-C
    stops, the same command goes on."""
    call(
        "reproduce",
        None,
        suites=suites or [],
        data=data or [],
        valid=valid or [],
        size=size,
        tokens=tokens,
        out=out,
        work=work,
        jobs=jobs,
        quick=quick,
        command=context.obj,
    )


@app.command()
def ablate(
    context: typer.Context,
    groups: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GROUP]...",
            help="window, branches, fusion, kernel, or all of these (the default). Beyond the "
            "paper, by its name alone and into results/memory: memory, what decides the memory's "
            "form.",
        ),
    ] = None,
    data: Data = None,
    valid: Valid = None,
    out: Out = None,
    work: Work = None,
    jobs: Jobs = None,
    quick: Quick = False,
    debug: Debug = False,
) -> None:
    """One part of the layer changed at a time: recall, length generalisation and language
    modelling. What is done is skipped; Ctrl-C stops, the same command goes on."""
    call(
        "ablate",
        None,
        groups=groups or [],
        data=data or [],
        valid=valid or [],
        out=out,
        work=work,
        jobs=jobs,
        quick=quick,
        command=context.obj,
    )


@app.command()
def analyze(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC...",
            help="Text to measure the branches on, as for train. Default: what the run held out, "
            "else a part of Python's own library.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write analysis.json and pictures (PNG, SVG) there."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="About so many tokens a number. Default: 16384."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="2,048 tokens a measurement: rough losses, in seconds.")
    ] = False,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """What a model has learned: its kernels, what each branch is worth, how far they moved."""
    call(
        "analyze",
        threads,
        model=model,
        data=data or [],
        out=out,
        max_tokens=max_tokens,
        quick=quick,
        device=device,
        json=json,
    )


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RECIPE",
            help="A model's folder, a config.json, or a recipe's name.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Knobs of the recipe to change, as for train."),
    ] = None,
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
    call(
        "doctor",
        threads,
        model=model,
        overrides=overrides or [],
        context=context,
        device=device,
        json=json,
    )


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Results of reproduce and ablate (default: results/paper), or run folders.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page. Default: FOLDER/report.html.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """One page of the paper's claims, verdicts, figures and tables; or of runs."""
    call("report", None, folders=folders or [Path("results/paper")], out=out)
