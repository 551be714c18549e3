"""The shapes of OpenAI's HTTP interface: what a request may say, and how an answer looks.

Fields are OpenAI's, and three are ours: `top_k`, `ignore_eos` and `session_id`. A field that would
change the text and is not supported is refused when it is set, never ignored; what only describes
the caller is accepted.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spectral_window.errors import UserError  # a ValueError, which pydantic reports

MOST_CHOICES = 128
Count = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    ignore_eos: bool | None = None
    session_id: str | None = None
    # Not supported: only values that change nothing.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # They describe the caller and change no text.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _changes_nothing(cls, value: Any) -> Any:
        if value:
            raise UserError("not supported by this server; leave it out")
        return value

    @property
    def choices(self) -> int:
        """How many texts are asked for, of each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: Any = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("prompt")
    @classmethod
    def _is_text_or_ids(cls, value: Any) -> Any:
        if value is None:
            return ""
        several = isinstance(value, list) and bool(value) and not _are_ids(value)
        for prompt in value if several else [value]:
            if isinstance(prompt, str):
                check_unicode(prompt)
            elif not _are_ids(prompt):
                raise UserError("give a text, a list of texts, a list of token ids, or of such")
        return value

    @field_validator("suffix")
    @classmethod
    def _not_supported(cls, value: Any) -> Any:
        if value:
            raise UserError("not supported by this server; leave it out")
        return value

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise UserError("best_of is supported as n alone; leave it out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        whole = isinstance(self.prompt, str) or _are_ids(self.prompt)
        return [self.prompt] if whole else self.prompt


def check_unicode(text: str) -> str:
    """Return `text`; raise UserError where it has half of a surrogate pair, which JSON can say."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half a surrogate pair at {error.start}; send whole characters") from None
    return text


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation. Fields of an answer that was sent back are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: None = None

    @model_validator(mode="after")
    def _is_unicode(self) -> Message:
        check_unicode(self.text)
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(BaseModel):
    """Only plain text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        return self


# ------------------------------------------------------------------------------- answers


class Reply:
    """The frame of one answer: its id, time and model, and the names of its objects.

    Args:
        chat: the answer of /v1/chat/completions.
        model: the name of the model.
    """

    def __init__(self, chat: bool, model: str) -> None:
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model

    def frame(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """Return an answer, or a chunk of a stream, with `choices`."""
        kind = ("chat.completion" + ".chunk" * chunk) if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": list(choices)}

    def choice(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish: str | None,
        *,
        chunk: bool,
    ) -> dict[str, Any]:
        """Return one choice: all of its text, or what a chunk adds to it."""
        if not self.chat:
            content: dict[str, Any] = {"text": text}
        elif chunk:
            content = {"delta": {"content": text} if text else {}}
        else:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Return the choices of the chunk that a stream of a conversation begins with."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            for i in range(count)
        ]


def usage(prompt: int, made: int, cached: int) -> dict[str, Any]:
    """Return the numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error(
    message: str, kind: str = "invalid_request_error", *, param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return an error as OpenAI writes one."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
