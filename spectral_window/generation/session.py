"""Text from a model, one token at a time, in constant memory.

A `Session` is one conversation: a model's state (a few numbers a channel and the last 2W keys and
values, whatever the length), plus the one token that the state has not seen yet. To go on, feed
that token, look at the logits, draw the next one: each step costs the same and keeps nothing, so it
may run for ever. Everything that decides the next token (state, waiting token, random generator,
half a character not yet shown) fits in one small file, so a session may stop in one process and go
on in another with exactly the text it would have had.

    session = Session(model, tokenizer, seed=7)
    session.feed("Once upon a time")
    for piece in session.stream(200, temperature=0.8, stop=["\\n\\n"]):
        print(piece, end="")
    session.save("story.session")          # later: Session.load("story.session", model, tokenizer)

Batches, beams and assisted decoding are the business of `model.generate()`; a session is one row.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from torch import Tensor

from spectral_window.errors import DivergedError, IntegrityError, UserError, is_out_of_memory
from spectral_window.generation import session_file
from spectral_window.generation.decoding import (
    MAX_STOP_LENGTH,
    Sampling,
    StopFilter,
    TextStream,
    check_stops,
    require_int,
)
from spectral_window.hf.cache import Cache, SWHCacheLayer, state_identity
from spectral_window.nn.mixers import map_state

SEGMENT = 4096  # tokens of a prompt that pass through all layers at once
PIECE = 1 << 16  # characters of a prompt that are encoded at once
MAX_NEW_TOKENS = 1_000_000_000
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class Session:
    """One conversation: model, tokenizer, state, random generator. Its memory is constant.

    model:     a `SWHForCausalLM` (it is put into eval mode).
    tokenizer: the one it was trained with.
    seed:      0 ... 2**63 - 1, or None for a fresh one (`session.seed` tells it).
    segment:   tokens of a prompt that pass through all layers at once.

    After a prompt or a step the state has seen every token but the newest, `waiting`: the next step
    feeds it, and draws its successor from the logits.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, seed: int | None = None, segment: int = SEGMENT
    ) -> None:
        require_int("segment", segment, "a number of tokens >= 1", lambda n: n >= 1)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.segment = segment
        self.vocab_size = int(model.config.vocab_size)
        if len(tokenizer) > self.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {self.vocab_size} "
                "(tokenizer): use the one that was saved with the model"
            )
        self.generator = torch.Generator("cpu")
        self.seed = reseed(self.generator, seed)
        # The model's state after every token but the waiting one.
        self.layers = [SWHCacheLayer() for _ in model.model.layers]
        self.cache = Cache(layers=list(self.layers))
        self.waiting: int | None = None  # the newest token, which the state has not seen
        self.logits: Tensor | None = (
            None  # [V] float32 after the newest token, when the state has seen that too
        )
        self.tokens_seen = 0  # prompt and generated tokens, the waiting one included
        self.ended = False  # the model said end-of-text; `feed` goes on
        self.text = TextStream(tokenizer)
        self.held = ""  # generated text that was held back when the last stream stopped

    # -- input

    def feed(self, prompt: str | Sequence[int]) -> int:
        """Read a prompt; returns the number of tokens read.

        A text is encoded with every special token in it as plain characters, and the first one of a
        session gets the beginning-of-text token in front, as in training. Token ids are taken as
        they are. Reading goes segment by segment: beside the ids themselves, memory does not grow
        with the prompt. Text held back by an earlier `stream(..., finish=False)` is dropped: call
        `finish()` before.

        Raises UserError for an empty prompt or an id outside the vocabulary.
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else self._check_ids(prompt)
        unseen = ids if self.waiting is None else [self.waiting, *ids]
        with self._all_or_nothing():
            for start in range(0, len(unseen) - 1, self.segment):
                self._forward(unseen[start : min(start + self.segment, len(unseen) - 1)])
        self.waiting, self.logits = ids[-1], None
        self.tokens_seen += len(ids)
        self.ended = False
        self.held = ""
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

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        ids = list(ids)
        if not ids:
            raise UserError("the prompt is empty (prompt): give at least one token")
        for index, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise UserError(f"token {index} is {token!r} (prompt): token ids are whole numbers")
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"token {index} is {token} (prompt): ids go from 0 to {self.vocab_size - 1}"
                )
        return ids

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
        """The continuation, in pieces of whole characters, as they come.

        max_new_tokens: at most so many tokens (None: until end-of-text or a stop string).
        temperature, top_k, top_p: see `Sampling`.
        stop:       texts before which the output ends (the session itself has read them).
        ignore_eos: treat the end-of-text token as any other.
        finish:     at the end also show what is held back (half a character, half a stop string);
                    False leaves it for the next call, so that two streams are exactly one.

        After end-of-text nothing more comes until `feed`. Raises UserError for bad arguments, at
        once and not with the first piece; DivergedError when the logits are not finite.
        """
        check_length(max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        sampling.check_vocabulary(self.vocab_size)
        stops = StopFilter(check_stops(stop), self.held)
        if self.tokens_seen == 0:
            raise UserError("nothing to continue (session): feed a prompt first")
        return self._stream(
            max_new_tokens, sampling, stops, frozenset() if ignore_eos else self._eos(), finish
        )

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
            if self.waiting is not None:
                with self._all_or_nothing():
                    self._forward([self.waiting])
            token = self._draw(sampling, made)
            made += 1
            if token in eos:
                # The end is a signal, not a part of the text: the state never sees it, so `feed`
                # can go on.
                self.ended = True
                break
            self.waiting, self.logits = token, None
            self.tokens_seen += 1
            # All is settled before the piece leaves: a reader may stop after any piece, and go on
            # later.
            piece = stops.push(self.text.push(token))
            self.held = stops.held
            if piece:
                yield piece
            if stops.found is not None:
                return
        if finish and (
            piece := stops.push(self.text.finish()) + ("" if stops.found else stops.finish())
        ):
            self.held = ""
            yield piece

    def finish(self) -> str:
        """The text that `stream(..., finish=False)` held back."""
        held, self.held = self.held, ""
        return held + self.text.finish()

    def _eos(self) -> frozenset[int]:
        ids: set[int] = set()
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            value = getattr(owner, "eos_token_id", None)
            ids.update(
                value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            )
        return frozenset(ids)

    # -- the model

    def _forward(self, ids: list[int]) -> None:
        """Run `ids` through the model: the state and the logits afterwards."""
        inputs = torch.tensor([ids], dtype=torch.int64, device=self.model.device)
        with torch.inference_mode():
            output = self.model(
                inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        # A vocabulary rounded up (50304 for GPT-2's 50257) has rows that mean nothing.
        logits = output.logits[0, -1, : len(self.tokenizer)].float().cpu()
        self.waiting, self.logits = None, logits

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """After an exception (Ctrl-C, out of memory) the model's state is as it was.

        States are values, never changed in place, so keeping the old ones costs nothing.
        """
        before = [(layer.state, layer.seen) for layer in self.layers]
        newest = self.waiting, self.logits
        try:
            yield
        except BaseException:
            for layer, (state, seen) in zip(self.layers, before, strict=True):
                layer.state, layer.seen = state, seen
            self.waiting, self.logits = newest
            raise

    def _draw(self, sampling: Sampling, step: int) -> int:
        assert self.logits is not None
        # -inf alone is a model's way to forbid a token; NaN, +inf or nothing left to choose is an
        # accident.
        if bool(self.logits.isnan().any()) or not math.isfinite(float(self.logits.max())):
            raise DivergedError(
                f"non-finite logits at step {step} (after {self.tokens_seen} tokens): numbers "
                "overflow in this model; use an earlier checkpoint, or load it in float32"
            )
        return sampling.draw(self.logits, self.generator)

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held beside the model: constant for a spectral-window model."""
        tensors = [tensor for _, tensor in self._tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for index, layer in enumerate(self.layers):
            yield from session_file.leaves(f"layers.{index}", layer.state)
        if self.logits is not None:
            yield "logits", self.logits
        yield "generator", self.generator.get_state()

    # -- to a file and back

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to `path`: tensors as safetensors, the rest as JSON in their header,
        with a SHA-256.

        The file appears whole or not at all. Raises ResourceError if it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors()}
        facts = {
            "model": session_file.fingerprint(self.model),
            "tokenizer": session_file.tokenizer_fingerprint(self.tokenizer),
            "seed": self.seed,
            "tokens_seen": self.tokens_seen,
            "state_seen": self.layers[0].seen,
            "waiting": self.waiting,
            "ended": self.ended,
            "window": self.text.window,
            "shown": self.text.shown,
            "held": self.held,
        }
        session_file.write(Path(path), facts, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Any, tokenizer: Any, *, segment: int = SEGMENT
    ) -> Session:
        """The session that `save` wrote, ready to go on with exactly the text it would have had.

        Raises UserError when there is no such file, IntegrityError when it is not a session, is
        damaged, was written by a newer version, or belongs to another model or tokenizer.
        """
        path = Path(path)
        facts, tensors = session_file.read(path)
        if facts["model"] != session_file.fingerprint(model):
            raise IntegrityError(
                f"the session belongs to another model ({path}): use the one it was saved with"
            )
        if facts["tokenizer"] != session_file.tokenizer_fingerprint(tokenizer):
            raise IntegrityError(
                f"the session belongs to another tokenizer ({path}): use its model's own"
            )
        session = cls(model, tokenizer, seed=0, segment=segment)
        try:
            session.seed = facts["seed"]
            session.generator.set_state(tensors["generator"])
            session._restore(tensors, facts["state_seen"])
            session.tokens_seen, session.waiting = facts["tokens_seen"], facts["waiting"]
            session.logits, session.ended = tensors.get("logits"), facts["ended"]
            session.held, session.text = (
                facts["held"],
                TextStream(tokenizer, facts["window"], facts["shown"]),
            )
            session._check()
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise IntegrityError(
                f"the session does not fit the model, {' '.join(str(error).split())[:300]} "
                f"({path}): begin a new one"
            ) from None
        return session

    def _check(self) -> None:
        """IntegrityError for facts that contradict each other: their hash proves no sense."""
        seen = self.layers[0].seen
        unseen = self.waiting is not None
        known = range(self.vocab_size)
        right = {
            "seed": 0 <= self.seed < 2**63,
            "tokens_seen": 0 <= seen == self.tokens_seen - unseen,
            "waiting": not unseen or (type(self.waiting) is int and self.waiting in known),
            "logits": self.logits is None if unseen or not seen else self.logits is not None,
            "window": all(type(token) is int and token in known for token in self.text.window),
        }
        if self.logits is not None:
            expected = (torch.float32, (len(self.tokenizer),))
            right["logits"] &= (self.logits.dtype, tuple(self.logits.shape)) == expected
        right["window"] &= len(self.text.window) <= 2 * TextStream.WINDOW
        if right["window"]:
            right["shown"] = 0 <= self.text.shown <= len(self.text.peek())
        right["held"] = len(self.held) < MAX_STOP_LENGTH
        wrong = [name for name, good in right.items() if not good]
        if wrong:
            raise IntegrityError(f"{', '.join(wrong)} cannot be")

    def _restore(self, tensors: dict[str, Tensor], seen: int) -> None:
        """Fill the layers' states; KeyError or IntegrityError for a missing or
        misshapen tensor."""
        if seen < 0:
            raise IntegrityError(f"state_seen is {seen}")
        if not seen:
            return
        model, config = self.model.model, self.model.config
        dtype, device = self.model.dtype, self.model.device
        for index, (block, layer) in enumerate(zip(model.layers, self.layers, strict=True)):
            empty = block.mixer.init_state(1, dtype=dtype, device=device)
            names = iter([name for name, _ in session_file.leaves(f"layers.{index}", empty)])
            kept = 0 if block.mixer.constant_state else seen  # attention's state is empty at first

            def stored(like: Tensor, names: Iterator[str] = names, kept: int = kept) -> Tensor:
                name = next(names)
                tensor = tensors[name]
                shape = [size or kept for size in like.shape]
                if list(tensor.shape) != shape or tensor.dtype != like.dtype:
                    raise IntegrityError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
                if name.endswith(".position"):  # of one text without padding
                    counting = torch.arange(seen, dtype=torch.int64, device=tensor.device)
                    if not bool((tensor == (counting if tensor.dim() == 2 else seen)).all()):
                        raise IntegrityError(f"{name} is not what {seen} tokens leave")
                elif not bool(tensor.isfinite().all()):
                    raise IntegrityError(f"{name} is not finite")
                return tensor.to(like.device)

            layer.state, layer.seen = map_state(empty, stored), seen
            layer.owner, layer.batch_size = state_identity(config), 1
            layer.dtype, layer.device, layer.is_initialized = dtype, device, True


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 200,
    *,
    seed: int | None = None,
    **sampling: Any,
) -> str:
    """The continuation of `prompt` as one text. `sampling`: as for `Session.stream`."""
    session = Session(model, tokenizer, seed=seed)
    session.feed(prompt)
    return "".join(session.stream(max_new_tokens, **sampling))


def check_length(max_new_tokens: int | None) -> None:
    """UserError unless `max_new_tokens` is None or a count in its range."""
    if max_new_tokens is not None:
        rule = f"a whole number from 0 to {MAX_NEW_TOKENS}"
        require_int("max_new_tokens", max_new_tokens, rule, lambda n: 0 <= n <= MAX_NEW_TOKENS)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`; special tokens written in it are plain characters.

    A long text goes piece by piece, for encoding takes some 200 bytes a token on its way. A
    byte-level tokenizer never joins a word to the space after it, so pieces that end there have the
    tokens of the whole.
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


def reseed(generator: torch.Generator, seed: int | None) -> int:
    """Seed `generator`; None takes a fresh seed. Returns the seed."""
    if seed is None:
        seed = int.from_bytes(os.urandom(7), "big")
    require_int("seed", seed, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
    generator.manual_seed(seed)
    return seed
