"""`spectral-window generate`: a model continues a text, and may continue it again later."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spectral_window.cli.options import Debug, Device, Model, Threads
from spectral_window.cli.output import warn
from spectral_window.errors import UserError

EXAMPLE = "generate runs/tiny 'Once upon a time' -n 100 --temperature 0.7"


def run(
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
    chat: Annotated[
        str | None,
        typer.Option(
            metavar="QUESTION",
            help="Ask a model that was trained with --chat; only its answer is printed.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="With --chat: what the system message says."),
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
    session_file: Annotated[
        Path | None,
        typer.Option(
            "--session",
            metavar="FILE",
            help="Go on from where --save-session left off, with PROMPT (if any) as new input.",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Let a model write. Text appears as it is made; memory is constant however long it runs."""
    from spectral_window.data.chat import question_ids
    from spectral_window.generation.decoding import Sampling, check_stops
    from spectral_window.generation.session import Session, check_length
    from spectral_window.generation.session_file import check_place
    from spectral_window.training.loading import load

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in options.items() if value is not None}
    # Find every mistake before the model loads and before anything is printed.
    check_length(max_new_tokens)
    Sampling(**sampling)
    stops = check_stops([_unescape(text) for text in stop or ()])
    asked = chat is not None
    given = [prompt is not None, prompt_file is not None, unconditional]
    if asked and any(given):
        raise UserError("--chat beside another beginning (generate): give one")
    if asked and not (chat or "").strip():
        raise UserError("the question is empty (--chat): ask something")
    if system is not None and not asked:
        raise UserError("--system without --chat (generate): it begins a conversation")
    text = None
    if not asked:
        text = _prompt(prompt, prompt_file, unconditional, optional=session_file is not None)
    if save_session is not None:
        check_place(save_session)
    loaded = load(model, device=device)
    warn(loaded.notes)
    if session_file is None:
        session = Session(loaded.model, loaded.tokenizer, seed=seed)
    else:
        session = Session.load(session_file, loaded.model, loaded.tokenizer)
        if seed is not None:
            session.reseed(seed)
    Sampling(**sampling).check_vocabulary(session.vocab_size)
    write = _printer()
    if chat is not None:
        turns = [("system", system)] if system else []
        continuing = session.tokens_seen > 0
        if continuing and system:
            raise UserError("--system with --session (generate): the conversation has begun")
        turns.append(("user", chat))
        session.feed(question_ids(loaded.tokenizer, turns, continuing=continuing))
    elif text is not None:
        session.feed(text)
        if echo:
            write(text)
    elif unconditional:
        session.feed([loaded.tokenizer.bos_token_id])
    try:
        for piece in session.stream(
            max_new_tokens,
            stop=stops,
            ignore_eos=ignore_eos,
            finish=save_session is None,
            **sampling,
        ):
            write(piece)
    except KeyboardInterrupt:
        # The session is consistent at any moment: save what was written so far.
        if save_session is not None:
            session.save(save_session)
        raise
    if sys.stdout.isatty():
        write("\n")
    if save_session is not None:
        session.save(save_session)


def _prompt(
    prompt: str | None, file: Path | None, unconditional: bool, *, optional: bool
) -> str | None:
    """Read the prompt from where it is given; None if there is none and none is needed."""
    sources = [prompt is not None, file is not None, unconditional]
    if sum(sources) > 1:
        raise UserError(
            "more than one beginning (PROMPT, --prompt-file, --unconditional): give one"
        )
    if not any(sources):
        if optional:
            return None
        raise UserError("the prompt is empty (PROMPT): give text, or --unconditional to begin anew")
    if unconditional:
        if optional:
            raise UserError(
                "--unconditional with --session (generate): a session has begun already"
            )
        return None
    if prompt is not None and prompt != "-":
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        text = _utf8(prompt.encode("utf-8", "surrogateescape"), "PROMPT")
    elif prompt == "-" or str(file) == "-":
        text = _utf8(sys.stdin.buffer.read(), "stdin")
    else:
        assert file is not None
        if not file.exists() or file.is_dir() or file.is_char_device() or file.is_block_device():
            raise UserError(f"no such text file ({file}): give a file to --prompt-file")
        text = _utf8(file.read_bytes(), str(file))
    if not text:
        raise UserError("the prompt is empty (PROMPT): give text, or --unconditional to begin anew")
    return text


def _utf8(content: bytes, where: str) -> str:
    """Decode as training does: strict UTF-8, no byte order mark, CRLF as LF."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 at byte {error.start} ({where}): convert the text first"
        ) from None


def _unescape(text: str) -> str:
    """Read `\\n`, `\\t` and `\\\\`, as typed in a shell."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


def _printer() -> Callable[[str], None]:
    """Make a function that prints text at once; a terminal gets no control characters."""
    controls = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
    visible = {**controls, 9: "\t", 10: "\n"} if sys.stdout.isatty() else {}

    def write(text: str) -> None:
        sys.stdout.write(text.translate(visible))
        sys.stdout.flush()

    return write
