"""`spectral-window generate`: a model writes, and may go on another time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectral_window.commands.show import tell
from spectral_window.errors import UserError
from spectral_window.generation.decoding import Sampling, check_stops
from spectral_window.generation.session import Session, check_length
from spectral_window.generation.session_file import check_place
from spectral_window.training.loading import load


def run(
    *,
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    unconditional: bool,
    max_new_tokens: int,
    sampling: dict[str, Any],
    seed: int | None,
    stop: list[str],
    ignore_eos: bool,
    echo: bool,
    session: Path | None,
    save_session: Path | None,
    device: str,
) -> None:
    """Print a prompt and its continuation as it comes; see `spectral-window generate --help`."""
    # All that can be wrong is found before the model loads and before anything is printed.
    check_length(max_new_tokens)
    Sampling(**sampling)
    stops = check_stops([_unescape(text) for text in stop])
    text = _prompt(prompt, prompt_file, unconditional, optional=session is not None)
    if save_session is not None:
        check_place(save_session)
    loaded = load(model, device=device)
    tell(loaded.notes)
    if session is None:
        conversation = Session(loaded.model, loaded.tokenizer, seed=seed)
    else:
        conversation = Session.load(session, loaded.model, loaded.tokenizer)
        if seed is not None:
            conversation.reseed(seed)
    Sampling(**sampling).check_vocabulary(conversation.vocab_size)
    write = _writer()
    if text is not None:
        conversation.feed(text)
        if echo:
            write(text)
    elif unconditional:
        conversation.feed([loaded.tokenizer.bos_token_id])
    try:
        for piece in conversation.stream(
            max_new_tokens,
            stop=stops,
            ignore_eos=ignore_eos,
            finish=save_session is None,
            **sampling,
        ):
            write(piece)
    except KeyboardInterrupt:
        # The session is whole at any moment, and what was said so far is worth keeping.
        if save_session is not None:
            conversation.save(save_session)
        raise
    if sys.stdout.isatty():
        write("\n")
    if save_session is not None:
        conversation.save(save_session)


def _prompt(
    prompt: str | None, file: Path | None, unconditional: bool, *, optional: bool
) -> str | None:
    """The prompt's text from wherever it comes; None if there is none and none is needed."""
    given = [prompt is not None, file is not None, unconditional]
    if sum(given) > 1:
        raise UserError(
            "more than one beginning (PROMPT, --prompt-file, --unconditional): give one"
        )
    if not any(given):
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
        # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
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
    """Text as training reads it: strict UTF-8, without a byte order mark, CRLF as LF."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 at byte {error.start} ({where}): convert the text first"
        ) from None


def _unescape(text: str) -> str:
    """`\\n`, `\\t` and `\\\\` as one types them in a shell."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


def _writer() -> Callable[[str], None]:
    """Writes text to stdout at once; on a terminal control characters are shown, not obeyed."""
    controls = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
    visible = {**controls, 9: "\t", 10: "\n"} if sys.stdout.isatty() else {}

    def write(text: str) -> None:
        sys.stdout.write(text.translate(visible))
        sys.stdout.flush()

    return write
