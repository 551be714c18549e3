"""Text from a model, one token at a time, in constant memory.

A `Session` is one conversation: text and a file around one row of an `Engine`. The row has the
model's state (a few numbers per channel and the last 2W keys and values, whatever the length) and
the one token that the state has not seen. To go on, feed that token, look at the logits, draw the
next one: each step costs the same and stores nothing, so it may run for ever. Everything that
decides the next token (state, waiting token, random generator, half a character not yet shown) fits
in one small file, so a session may stop in one process and go on in another with exactly the text
it would have had.

    session = Session(model, tokenizer, seed=7)
    session.feed("Once upon a time")
    for piece in session.stream(200, temperature=0.8, stop=["\\n\\n"]):
        print(piece, end="")
    session.save("story.session")          # later: Session.load("story.session", model, tokenizer)

Many rows at once are the business of `engine.py`, beams and assisted decoding of
`model.generate()`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from torch import Tensor

from spectral_window.errors import IntegrityError, UserError, is_out_of_memory
from spectral_window.generation import session_file
from spectral_window.generation.decoding import (
    MAX_STOP_LENGTH,
    Sampling,
    StopFilter,
    TextStream,
    check_stops,
    require_int,
)
from spectral_window.generation.engine import Engine

PIECE = 1 << 16  # characters of a prompt that are encoded at once
MAX_NEW_TOKENS = 1_000_000_000
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class Session:
    """One conversation: model, tokenizer, state, random generator. Its memory is constant.

    After a prompt or a step the state has seen every token but the newest: the next step feeds it,
    and draws its successor from the logits.

    Args:
        model: a `SWHForCausalLM`; it is put into eval mode.
        tokenizer: the one it was trained with.
        seed: 0 ... 2**63 - 1, or None for a fresh one, which is then in `session.seed`.
        segment: tokens of a prompt that the model reads at once; None for the model's own number.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, seed: int | None = None, segment: int | None = None
    ) -> None:
        if segment is not None:
            require_int("segment", segment, "a number of tokens >= 1", lambda n: n >= 1)
        self.model = model
        self.tokenizer = tokenizer
        self.segment = segment
        self.vocab_size = int(model.config.vocab_size)
        if len(tokenizer) > self.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {self.vocab_size} "
                "(tokenizer): use the one that was saved with the model"
            )
        # A vocabulary rounded up (50304 for GPT-2's 50257) has rows that mean nothing.
        self.engine = Engine(model, len(tokenizer))
        self.row = self.engine.add(seed=seed)
        self.ended = False  # the model wrote end-of-text; `feed` goes on
        self.text = TextStream(tokenizer)
        self.tail = ""  # what the stop strings of the last stream held back

    @property
    def seed(self) -> int:
        """What the random numbers started from."""
        return self.row.seed

    @property
    def tokens_seen(self) -> int:
        """Prompt and generated tokens, the newest included."""
        return self.row.tokens_seen

    def reseed(self, seed: int | None) -> None:
        """Start the random numbers anew; None takes a fresh seed."""
        self.row.reseed(seed)

    # -- input

    def feed(self, prompt: str | Sequence[int]) -> int:
        """Read a prompt.

        A text is encoded with every special token in it as plain characters, and the first one of a
        session gets the beginning-of-text token in front, as in training. Token ids are taken as
        they are. Reading goes segment by segment: beside the ids themselves, memory does not grow
        with the prompt. Text held back by an earlier `stream(..., finish=False)` is dropped: call
        `finish()` before.

        Returns:
            The number of tokens read.

        Raises:
            UserError: the prompt is empty, or an id is outside the vocabulary. After an exception
                nothing was read.
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        with self.engine.all_or_nothing([self.row]):
            self.engine.extend(self.row, ids)
            while self.engine.prefill(self.row, self.segment):
                pass
        self.ended = False
        self.tail = ""
        self.text.skip(ids)
        return len(ids)

    def _encode(self, text: str) -> list[int]:
        if not text:
            raise UserError("the prompt is empty (prompt): give at least one character")
        ids = encode(self.tokenizer, text)
        if not ids:
            raise UserError(
                f"{text[:20]!r} has no tokens (prompt): give text that the tokenizer knows"
            )
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self.tokens_seen == 0 and bos is not None else list(ids)

    # -- output

    def stream(
        self,
        max_new_tokens: int | None = None,
        *,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        stop: Sequence[str] | str = (),
        ignore_eos: bool = False,
        finish: bool = True,
    ) -> Iterator[str]:
        """Yield the continuation, in pieces of whole characters, as they come.

        After end-of-text nothing more comes until `feed`.

        Args:
            max_new_tokens: at most so many tokens; None: until end-of-text or a stop string.
            temperature: see `Sampling`.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            stop: texts before which the output ends (the session itself has read them).
            ignore_eos: treat the end-of-text token as any other.
            finish: at the end also show what is held back (half a character, half a stop string);
                False leaves it for the next call, so that two streams are exactly one.

        Raises:
            UserError: an argument is bad; at once and not with the first piece.
            DivergedError: the logits are not finite.
        """
        check_length(max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        sampling.check_vocabulary(self.vocab_size)
        stops = StopFilter(check_stops(stop), self.tail)
        if self.tokens_seen == 0:
            raise UserError("nothing to continue (session): feed a prompt first")
        eos = frozenset() if ignore_eos else end_tokens(self.model, self.tokenizer)
        return self._stream(max_new_tokens, sampling, stops, eos, finish)

    def _stream(
        self,
        max_new_tokens: int | None,
        sampling: Sampling,
        stops: StopFilter,
        eos: frozenset[int],
        finish: bool,
    ) -> Iterator[str]:
        made = 0
        while not self.ended and (max_new_tokens is None or made < max_new_tokens):
            self.engine.step([self.row])
            self.row.sampling = sampling
            (token,) = self.engine.sample([self.row])
            made += 1
            if token in eos:
                # The end is a signal, not a part of the text: the state never sees it, so `feed`
                # can go on.
                self.ended = True
                break
            self.engine.extend(self.row, [token])
            # All is settled before the piece leaves: a reader may stop after any piece, and go on
            # later.
            piece = stops.push(self.text.push(token))
            self.tail = stops.tail
            if piece:
                yield piece
            if stops.stop is not None:
                return
        if finish and (
            piece := stops.push(self.text.finish()) + ("" if stops.stop else stops.finish())
        ):
            self.tail = ""
            yield piece

    def finish(self) -> str:
        """Return the text that `stream(..., finish=False)` held back."""
        tail, self.tail = self.tail, ""
        return tail + self.text.finish()

    # -- memory and file

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held beside the model: constant for a spectral-window model."""
        tensors = [tensor for _, tensor in self._tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for index, state in enumerate(self.row.states):
            yield from session_file.leaves(f"layers.{index}", state)
        if self.row.logits is not None:
            yield "logits", self.row.logits
        yield "generator", self.row.generator.get_state()

    def save(
        self, path: str | os.PathLike[str], *, owner: session_file.Owner | None = None
    ) -> None:
        """Write the session to `path`: tensors as safetensors, the rest as JSON in their header,
        with a SHA-256. The file appears whole or not at all.

        Args:
            path: the file.
            owner: the fingerprints of model and tokenizer, if the caller has them; they read every
                weight.

        Raises:
            ResourceError: it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors()}
        owner = owner or session_file.Owner.of(self.model, self.tokenizer)
        summary = {
            **owner._asdict(),
            "seed": self.seed,
            "tokens_seen": self.tokens_seen,
            "state_seen": self.row.state_seen,
            "waiting": self.row.unread[0] if self.row.unread else None,
            "ended": self.ended,
            "window": self.text.window,
            "shown": self.text.shown,
            "held": self.tail,
        }
        session_file.write(Path(path), summary, tensors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        tokenizer: Any,
        *,
        segment: int | None = None,
        owner: session_file.Owner | None = None,
    ) -> Session:
        """Return the session that `save` wrote, ready to go on with exactly the text it would have
        had.

        Args:
            path: the file.
            model: the model it was saved with, or an equal one.
            tokenizer: its tokenizer.
            segment: as for `Session`.
            owner: as for `save`.

        Raises:
            UserError: there is no such file.
            IntegrityError: it is not a session, is damaged, was written by a newer version, or
                belongs to another model or tokenizer.
        """
        path = Path(path)
        summary, tensors = session_file.read(path)
        owner = owner or session_file.Owner.of(model, tokenizer)
        if summary["model"] != owner.model:
            raise IntegrityError(
                f"the session belongs to another model ({path}): use the one it was saved with"
            )
        if summary["tokenizer"] != owner.tokenizer:
            raise IntegrityError(
                f"the session belongs to another tokenizer ({path}): use its model's own"
            )
        session = cls(model, tokenizer, seed=0, segment=segment)
        try:
            session._restore(summary, tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise IntegrityError(
                f"the session does not fit the model, {' '.join(str(error).split())[:300]} "
                f"({path}): begin a new one"
            ) from None
        return session

    def _restore(self, summary: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take over what a file says. Raises IntegrityError or KeyError where it does not fit."""
        self.text = TextStream(self.tokenizer, summary["window"], summary["shown"])
        self.tail, self.ended = summary["held"], summary["ended"]
        logits, waiting = tensors.get("logits"), summary["waiting"]
        self._check(summary, logits)
        row = self.row
        row.seed = summary["seed"]
        row.generator.set_state(tensors["generator"])
        if seen := summary["state_seen"]:
            self.engine.restore(row, session_file.states(self.model, tensors, seen), seen)
        if waiting is not None:
            self.engine.extend(row, [waiting])
        row.logits = logits

    def _check(self, summary: dict[str, Any], logits: Tensor | None) -> None:
        """Raise IntegrityError where a summary contradicts itself, which no hash finds."""
        seen, waiting = summary["state_seen"], summary["waiting"]
        vocabulary = range(self.vocab_size)

        def is_token(token: Any) -> bool:
            return type(token) is int and token in vocabulary

        window = self.text.window
        right = {
            "seed": 0 <= summary["seed"] < 2**63,
            "tokens_seen": 0 <= seen == summary["tokens_seen"] - (waiting is not None),
            "waiting": waiting is None or is_token(waiting),
            "logits": (logits is not None) == (waiting is None and seen > 0),
            "window": len(window) <= 2 * TextStream.WINDOW and all(map(is_token, window)),
            "held": len(self.tail) < MAX_STOP_LENGTH,
        }
        if logits is not None:
            expected = (torch.float32, (len(self.tokenizer),))
            right["logits"] &= (logits.dtype, tuple(logits.shape)) == expected
        if right["window"]:
            right["shown"] = 0 <= self.text.shown <= len(self.text.peek())
        wrong = [name for name, good in right.items() if not good]
        if wrong:
            raise IntegrityError(f"{', '.join(wrong)} cannot be")


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 200,
    *,
    seed: int | None = None,
    **sampling: Any,
) -> str:
    """Return the continuation of `prompt` as one text. `sampling`: as for `Session.stream`."""
    session = Session(model, tokenizer, seed=seed)
    session.feed(prompt)
    return "".join(session.stream(max_new_tokens, **sampling))


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a text, of the model's settings and of the tokenizer's."""
    ids: set[int] = set()
    for owner in (model.generation_config, model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(ids)


def check_length(max_new_tokens: int | None) -> None:
    """Raise UserError unless `max_new_tokens` is None or a count in its range."""
    if max_new_tokens is not None:
        rule = f"a whole number from 0 to {MAX_NEW_TOKENS}"
        require_int("max_new_tokens", max_new_tokens, rule, lambda n: 0 <= n <= MAX_NEW_TOKENS)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text`; special tokens written in it are plain characters.

    A long text is encoded in pieces, because encoding takes some 200 bytes per token. A byte-level
    tokenizer never joins a word to the space after it, so pieces that end there have the tokens of
    the whole.
    """
    splits = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    ids: list[int] = []
    start = 0
    while start < len(text):
        space = _BETWEEN_WORDS.search(text, start + PIECE) if splits else None
        end = space.start() if space else len(text)
        ids += tokenizer(
            text[start:end], add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        start = end
    return ids
