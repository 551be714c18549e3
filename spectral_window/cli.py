"""The command line: one table of commands, each imported when it is called.

So `--help` and a misspelt option answer at once, without waiting for torch. What a command does
is in `commands/`, how it fails in `failures.py`; here is what it is called and what it takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from spectral_window.commands.failures import PROGRAM, explain, say

app = typer.Typer(
    name=PROGRAM,
    help="Language models of linear time and constant state, the Spectral-Window Hybrid, on your "
    "own text: train one, measure it, let it write.",
    epilog=f"A first look: {PROGRAM} demo. Your own text: {PROGRAM} train tiny --data texts/",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _call(name: str, threads: int | None, **arguments: Any) -> None:
    """Import the command `name` now (it needs torch) and run it."""
    if threads is not None:
        # Before torch is imported, so that every library of the process sees the same number.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
    # transformers shows bars for files that load in milliseconds; ours show what takes time.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import_module(f"spectral_window.commands.{name}").run(**arguments)


# ------------------------------------------------------------------------------------- the table

Threads = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="CPU threads to compute with. Default: all."),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one."),
]
# `main` looks for it: where it stands does not matter.
Debug = Annotated[
    bool, typer.Option("--debug", help="On an error, show the Python traceback as well.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder (its final model, else its newest intact checkpoint), or a folder that "
        "save_pretrained wrote.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"{PROGRAM} {metadata.version(PROGRAM)}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="demo, tiny, small or paper-lm: see `info RECIPE`."),
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
            help="Text to learn from: files, folders, globs (.txt .md .py .jsonl .parquet, also "
            ".gz .zst), 'stdlib' (Python's own library) or hub:NAME:CONFIG. Default: the recipe's.",
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
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on, exactly, from the newest intact checkpoint in DIR."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run in DIR first.")
    ] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Train a model on text. Ctrl-C saves a checkpoint, and --resume goes on from it."""
    _call(
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
            min=1, metavar="T", help="Tokens a sequence. Default: what the run was trained with."
        ),
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Measure a model on text: loss (nats a token), perplexity and bits per byte."""
    _call(
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
    _call(
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
    _call(
        "info",
        threads,
        model=model,
        overrides=overrides or [],
        context=context or [],
        device=device,
        json=json,
    )


@app.command()
def bench(
    benches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BENCH]...",
            help="spectral, window, prefill, decode, train, scaling, memory, or all (the default).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write BENCH.json, goals.json and pictures there."),
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
    debug: Debug = False,
) -> None:
    """How fast every path is here, beside what you would take instead and what the hardware allows;
    each contestant is checked first."""
    _call(
        "bench",
        None,
        benches=benches or [],
        dtypes=dtype or [],
        counts=[threads] if threads else [],  # each gets a process of its own
        out=out,
        quick=quick,
        json=json,
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
    _call("demo", threads, out=out, quick=quick)


# ------------------------------------------------------------------------- running it, failing well


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, never a UnicodeEncodeError.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # A plain SIGTERM ends a process on the spot; an exception lets temporary files be removed.
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, _terminate)
    try:
        command = typer.main.get_command(app)
        words = _spread(arguments)
        with command.make_context(PROGRAM, words, obj=shlex.join([PROGRAM, *arguments])) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain again when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        line, code = explain(error)
        say(line)
        return code
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""

    exit_code = 143


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated("terminated")


def _spread(arguments: list[str]) -> list[str]:
    """`--data a b c` as `--data a --data b --data c`, so that `--data texts/*.txt` works.

    The list ends at the next option or key=value (an existing file of that name is a file).
    """
    lists = ("--data", "--valid")
    spread: list[str] = []
    current = None
    for index, argument in enumerate(arguments):
        if argument == "--":
            return spread + arguments[index:]
        option = argument.startswith("-") and argument != "-"
        knob = re.match(r"[A-Za-z_]\w*=", argument) and not os.path.exists(argument)
        if option or knob:
            current = argument if argument in lists else None
        elif current is not None and spread[-1] != current:
            spread.append(current)
        spread.append(argument)
    return spread


if __name__ == "__main__":
    sys.exit(main())
