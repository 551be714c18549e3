"""From a request to texts to write, and from their pieces to an answer. No HTTP.

A `Service` turns what a request asks into jobs of the scheduler; an `Answer` collects their pieces
and gives them the shape of OpenAI's interface, at once or chunk by chunk.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from tokenizers import decoders

from spectral_window.data.tokenizers import byte_alphabet
from spectral_window.errors import UserError
from spectral_window.generation.decoding import Sampling, check_stops
from spectral_window.generation.session import Session, encode, end_tokens
from spectral_window.hf import SWHForCausalLM
from spectral_window.serving.metrics import Metrics
from spectral_window.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Message,
    Reply,
    Request,
    usage,
)
from spectral_window.serving.scheduler import Job, Piece, Scheduler, Scored, StateSize
from spectral_window.serving.sessions import Sessions

Found = TypeVar("Found")
COMPLETION_TOKENS = 16  # OpenAI's default


class NoSuchModel(UserError):
    """The request names another model than the one that is served."""


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        slots: texts written at once.
        queue: texts that wait, beyond them.
        prompt_tokens: of one prompt.
        new_tokens: of one text.
        prefix_bytes: for states of prompts' beginnings.
        body_bytes: of a request.
    """

    slots: int = 64
    queue: int = 256
    prompt_tokens: int = 131_072
    new_tokens: int = 4_096
    prefix_bytes: int = 256 << 20
    body_bytes: int = 4 << 20


class Service:
    """One model that answers requests.

    Args:
        model: a `SWHForCausalLM`.
        tokenizer: its tokenizer.
        name: what requests call it.
        limits: what it takes.
        sessions: the folder of named sessions; None for none.

    Raises:
        UserError: the folder of the sessions cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        limits: Limits | None = None,
        sessions: Path | None = None,
    ) -> None:
        self.name, self.limits = name, limits or Limits()
        self.model = model
        self.created = int(time.time())
        # Encoding changes settings of a tokenizer, so it has one, and a thread, to itself.
        self.tokenizer = tokenizer
        self._encoder = deepcopy(tokenizer)
        self._helper = ThreadPoolExecutor(1, "read-requests")
        self.eos = end_tokens(model, tokenizer)
        self.vocabulary = Vocabulary(tokenizer)
        self.sessions = None if sessions is None else Sessions(sessions, model, tokenizer)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler = Scheduler(
            model,
            tokenizer,
            slots=self.limits.slots,
            queue=self.limits.queue,
            prefix_bytes=self.limits.prefix_bytes,
            post=self._post,
        )
        self.metrics = Metrics(self.scheduler)

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    def warm_up(self) -> None:
        """Run a few tokens, before `start`: what is compiled at first use is compiled then."""
        engine = self.scheduler.engine
        rows = [engine.add([0, 0, 0]) for _ in range(2)]
        for row in rows:
            engine.prefill(row)
        engine.step(rows)
        for row in rows:
            engine.drop(row)

    def close(self) -> None:
        """End what still runs, and let go of the sessions."""
        self.scheduler.stop(cut=True)
        self.scheduler.join()
        self._helper.shutdown()
        if self.sessions is not None:
            self.sessions.close()

    def describe(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it, with what its state costs."""
        with torch.device("meta"):
            transformer = SWHForCausalLM(self.model.config.papers_layer("attention"))
        torch.nn.Module.to(transformer, self.model.dtype)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "spectral-window",
            "chat": bool(self.tokenizer.chat_template),
            "sessions": self.sessions is not None,
            "max_tokens": self.limits.new_tokens,
            "state": asdict(self.scheduler.state_size),
            "transformer_state": asdict(StateSize.of(transformer)),
        }

    async def answer(self, request: CompletionRequest | ChatRequest) -> Answer:
        """Begin to answer a request.

        Raises:
            UserError: the request cannot be met.
            QueueFull: too many wait.
            Stopping: the server stops.
            SessionBusy: its session is in use.
            IntegrityError: its session is damaged.
        """
        answer = Answer(self, request)
        self._check(request)
        name = request.session_id
        if name is None:
            await self._submit(request, answer, None)
            return answer
        if self.sessions is None:
            raise UserError("no sessions here (session_id): start the server with --sessions DIR")
        if request.choices > 1:
            raise UserError("n is more than 1 with a session (n): a session has one text")
        self.sessions.claim(name)
        try:
            session = await self._help(self.sessions.open, name)
            await self._submit(request, answer, session)
        except BaseException:
            self.sessions.release(name)
            raise
        return answer

    def _check(self, request: CompletionRequest | ChatRequest) -> None:
        """Raise UserError for what can be seen without the tokens."""
        if request.model is not None and request.model != self.name:
            raise NoSuchModel(f"no model {request.model!r} (model): this server has {self.name!r}")
        if max_tokens(request, self.limits) > self.limits.new_tokens:
            raise UserError(
                f"max_tokens is {max_tokens(request, self.limits):,} (max_tokens): this server "
                f"writes at most {self.limits.new_tokens:,}"
            )
        check_stops(request.stops)
        self._sampling(request).check_vocabulary(self.model.config.vocab_size)

    def _sampling(self, request: Request) -> Sampling:
        return Sampling(
            1.0 if request.temperature is None else request.temperature,
            request.top_k or 0,
            1.0 if request.top_p is None else request.top_p,
        )

    async def _submit(
        self, request: CompletionRequest | ChatRequest, answer: Answer, session: Session | None
    ) -> None:
        """Make the jobs of a request and hand them to the scheduler."""
        seen = 0 if session is None else session.tokens_seen
        prompts = await self._help(partial(self._encode, request, seen))
        answer.expect([len(ids) for ids, _ in prompts])
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        alternatives = _alternatives(request)
        if session is not None and echo:
            raise UserError("echo with a session (echo): leave one of them out")
        jobs = []
        for place, (ids, added) in enumerate(prompts):
            for choice in range(request.choices):
                index = place * request.choices + choice
                seed = None if request.seed is None else (request.seed + choice) % 2**63
                jobs.append(
                    Job(
                        prompt=ids,
                        max_tokens=max_tokens(request, self.limits),
                        receive=partial(answer.receive, index),
                        sampling=self._sampling(request),
                        seed=seed,
                        stops=request.stops,
                        eos=frozenset() if request.ignore_eos else self.eos,
                        alternatives=alternatives,
                        score_prompt=echo and alternatives is not None,
                        unscored=added,
                    )
                )
        if session is not None:
            (job,) = jobs
            assert self.sessions is not None
            self._continue(job, session, str(request.session_id), shown=bool(request.stream))
        answer.jobs = jobs
        self.scheduler.submit(jobs)

    def _continue(self, job: Job, session: Session, name: str, *, shown: bool) -> None:
        """Let a job go on with a session, keep it at the end, and release it then.

        Args:
            job: the job.
            session: the session.
            name: its name.
            shown: the client sees the text as it is written; so if it goes, what it saw is kept.
                A client that saw nothing asks again, and finds the session as it was.
        """
        sessions, deliver = self.sessions, job.receive
        assert sessions is not None

        def keep() -> None:
            if job.cancelled and not shown:
                return
            session.ended, session.tail = job.ended, ""
            sessions.save(name, session)

        def receive(piece: Piece) -> None:
            if piece.last:
                sessions.release(name)
            deliver(piece)

        session.engine.drop(session.row)
        job.row, job.text, job.holds_characters = session.row, session.text, True
        job.ended = session.ended and not job.prompt
        job.keep, job.receive = keep, receive

    def _encode(
        self, request: CompletionRequest | ChatRequest, seen: int
    ) -> list[tuple[Sequence[int], int]]:
        """Return the ids of each prompt, and how many were put in front of its text.

        Args:
            request: whose prompts.
            seen: how many tokens its session has.
        """
        prompts: list[tuple[Sequence[int], int]]
        if isinstance(request, ChatRequest):
            prompts = [(chat_ids(self._encoder, request.messages, continuing=seen > 0), 0)]
        else:
            prompts = [self._encode_one(prompt, seen) for prompt in request.prompts]
        for ids, _ in prompts:
            if len(ids) > self.limits.prompt_tokens:
                raise UserError(
                    f"the prompt has {len(ids):,} tokens (prompt): this server reads at most "
                    f"{self.limits.prompt_tokens:,}"
                )
        return prompts

    def _encode_one(self, prompt: str | list[int], seen: int) -> tuple[Sequence[int], int]:
        if not isinstance(prompt, str):
            size = self.model.config.vocab_size
            for token in prompt:  # before a stream begins, whose status is good
                if not 0 <= token < size:
                    raise UserError(f"token {token} (prompt): ids go from 0 to {size - 1}")
            return prompt, 0
        ids = encode(self._encoder, prompt)
        bos = self._encoder.bos_token_id
        if seen or bos is None:
            if not ids and not seen:
                raise UserError("the prompt is empty (prompt): give at least one token")
            return ids, 0
        return [bos, *ids], 1

    async def _help(self, call: Callable[..., Found], *given: Any) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._helper, call, *given)

    def _post(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


def max_tokens(request: CompletionRequest | ChatRequest, limits: Limits) -> int:
    """Return how many tokens a request asks for, of each text."""
    asked = request.max_tokens
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            asked = request.max_completion_tokens
        return limits.new_tokens if asked is None else asked
    return min(COMPLETION_TOKENS, limits.new_tokens) if asked is None else asked


def _alternatives(request: CompletionRequest | ChatRequest) -> int | None:
    """Return how many likely tokens are told beside each; None where nothing is."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


# ------------------------------------------------------------------------------- chat templates


def chat_ids(tokenizer: Any, messages: Sequence[Message], *, continuing: bool) -> list[int]:
    """Return the ids of a conversation in the tokenizer's template, up to the answer's beginning.

    A special token typed in a message is plain characters, as in every text of users.

    Args:
        tokenizer: one with a chat template.
        messages: all of a conversation; or those that are new to a session.
        continuing: the session's last answer stands before them. What the template writes after it
            (its end, at least) comes first.

    Raises:
        UserError: there is no template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "this model has no chat template (messages): use /v1/completions, or add "
            "chat_template.jinja to its folder"
        )
    # The template sees marks in place of special tokens, and of the answer that went before.
    nonce = secrets.token_hex(8)
    special = sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special})
    mark, answer = f"\ue000{nonce}:", f"\ue000{nonce}\ue001"
    written = []
    for message in messages:
        text = message.text
        for index, token in enumerate(special):
            text = text.replace(token, f"{mark}{index}\ue001")
        written.append({"role": message.role, "content": text})
    before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(
            [*before, *written] if continuing else written,
            tokenize=False,
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the chat template refuses these messages (messages): {reason}") from None
    if continuing:
        _, found, text = text.partition(answer)
        if not found:
            raise UserError(
                "the chat template drops earlier answers (session_id): send all messages, without "
                "a session"
            )
    ids: list[int] = []
    for index, part in enumerate(re.split(f"{mark}([0-9]+)\ue001", text)):
        if index % 2:
            ids += encode(tokenizer, special[int(part)])
        elif part:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=False)[
                "input_ids"
            ]
    return ids


# ------------------------------------------------------------------------------- answers


class Vocabulary:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
        self._bytes = {c: byte for byte, c in enumerate(byte_alphabet())} if byte_level else {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; of one alone they need not be UTF-8."""
        if self._bytes and token not in self._special:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            if all(character in self._bytes for character in piece):
                return bytes(self._bytes[character] for character in piece)
        return self._tokenizer.decode([token]).encode("utf-8", "replace")

    def text_of(self, token: int) -> str:
        """Return a token as text; OpenAI's `bytes:\\xe2\\x82` where it is a part of a character."""
        content = self.bytes_of(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Answer:
    """What a request gets.

    Args:
        service: who answers.
        request: what is asked.

    Attributes:
        jobs: the texts that are written for it, the choices of the first prompt first.
    """

    def __init__(self, service: Service, request: CompletionRequest | ChatRequest) -> None:
        self.service, self.request = service, request
        self.chat = isinstance(request, ChatRequest)
        self.reply = Reply(self.chat, service.name)
        self.jobs: list[Job] = []
        self._began = time.monotonic()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._prompt_tokens = 0
        self._written = False

    def expect(self, prompts: Sequence[int]) -> None:
        """Take the numbers of tokens of the prompts."""
        self._prompt_tokens = sum(prompts)

    def receive(self, index: int, piece: Piece) -> None:
        """Take a piece of the choice `index`."""
        if not self._written and self.jobs[index].made:
            self._written = True
            self.service.metrics.first_token.observe(time.monotonic() - self._began)
        self._pieces.put_nowait((index, piece))

    def close(self) -> None:
        """End what is still being written, and count what was."""
        self.service.scheduler.cancel(self.jobs)
        metrics = self.service.metrics
        metrics.prompt_tokens.inc(self._prompt_tokens)
        metrics.cached_tokens.inc(sum(job.cached for job in self.jobs))
        metrics.completion_tokens.inc(sum(job.made for job in self.jobs))

    async def _each_piece(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all choices as they come; raise the error of one that fails."""
        left = len(self.jobs)
        while left:
            index, piece = await self._pieces.get()
            if piece.error is not None:
                raise piece.error
            left -= piece.finish is not None
            yield index, piece

    async def whole(self) -> dict[str, Any]:
        """Return the answer, when it is complete."""
        texts = self._echoes()
        tokens: list[list[Scored]] = [[] for _ in texts]
        finishes: list[str | None] = [None for _ in texts]
        async for index, piece in self._each_piece():
            texts[index] += piece.text
            tokens[index] += piece.tokens
            finishes[index] = piece.finish
        choices = [
            self.reply.choice(i, texts[i], self._logprobs(tokens[i]), finishes[i], chunk=False)
            for i in range(len(texts))
        ]
        return {**self.reply.frame(choices, chunk=False), "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer as it is written."""
        if self.chat:
            yield self._chunk(self.reply.opening(len(self.jobs)))
        for index, echo in enumerate(self._echoes()):
            if echo:
                yield self._chunk([self.reply.choice(index, echo, None, None, chunk=True)])
        async for index, piece in self._each_piece():
            if piece.text or piece.tokens or piece.finish:
                logprobs = self._logprobs(piece.tokens) if piece.tokens else None
                finish = piece.finish
                if self.chat and finish and (piece.text or piece.tokens):
                    # The last chunk of a conversation has a reason and no text.
                    yield self._chunk(
                        [self.reply.choice(index, piece.text, logprobs, None, chunk=True)]
                    )
                    piece, logprobs = Piece(finish=finish), None
                yield self._chunk(
                    [self.reply.choice(index, piece.text, logprobs, finish, chunk=True)]
                )
        if self.request.include_usage:
            yield {**self.reply.frame([], chunk=True), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = self.reply.frame(choices, chunk=True)
        return {**frame, "usage": None} if self.request.include_usage else frame

    def _echoes(self) -> list[str]:
        """Return what each choice begins with: its prompt, where that is asked for."""
        request = self.request
        if not isinstance(request, CompletionRequest) or not request.echo:
            return [""] * len(self.jobs)
        tokenizer = self.service.tokenizer
        texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in request.prompts]
        return [text for text in texts for _ in range(request.choices)]

    def _usage(self) -> dict[str, Any]:
        firsts = self.jobs[:: self.request.choices]
        return usage(
            self._prompt_tokens,
            sum(job.made for job in self.jobs),
            sum(job.cached for job in firsts),
        )

    def _logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        """Return the log probabilities of tokens in the shape that was asked for."""
        if _alternatives(self.request) is None:
            return None
        words = self.service.vocabulary
        if not self.chat:
            return {
                "tokens": [words.text_of(t.token) for t in tokens],
                "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [
                    {words.text_of(token): value for token, value in t.top} or None for t in tokens
                ],
                "text_offset": [t.offset for t in tokens],
            }

        def told(token: int, value: float | None) -> dict[str, Any]:
            content = words.bytes_of(token)
            return {"token": words.text_of(token), "logprob": value, "bytes": list(content)}

        content = [
            {**told(t.token, t.logprob), "top_logprobs": [told(*one) for one in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}
