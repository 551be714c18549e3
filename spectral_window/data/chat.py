"""Conversations: the `messages` format, the tokens of a conversation, and its cuts.

A record is {"messages": [{"role": "system", "user" or "assistant", "content": TEXT}, ...]}. It
becomes one document, with a token for each role and one that ends a turn:

    <|endoftext|><|user|>Hi!<|end|><|assistant|>Hello.<|end|>

Roles are special tokens and not words like "User:", because content is encoded as plain characters:
nothing that a person types can end a turn or speak for another role, the tokens of a turn do not
depend on the turns beside it, and where an answer begins and ends can be read off the tokens
themselves (`data.blocks.ConversationBlocks`). `<|endoftext|>` keeps its meaning, the border of two
texts; a turn ends with a token of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from spectral_window.data.formats import ReadOptions, ReadReport
from spectral_window.data.holdout import Part
from spectral_window.data.kinds import split_suffix
from spectral_window.data.records import Row, rows_of, texts_of
from spectral_window.data.shards import Coded, batches
from spectral_window.data.sources import Piece, Source
from spectral_window.data.tokenizers import HFTokenizer, plain_text
from spectral_window.errors import UserError

ROLES = ("system", "user", "assistant")
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
END_OF_TURN = "<|end|>"
KINDS = (".jsonl", ".ndjson", ".json")
# Keys of a message that ask for something that is not done here.
_NOT_DONE = ("weight", "tool_calls", "tool_call_id", "function_call")

# {% generation %} marks the answers for `apply_chat_template(return_assistant_tokens_mask=True)`.
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ("system", "user", "assistant") -%}
    {{- raise_exception("a role is system, user or assistant, not " ~ message.role) -}}
  {%- endif -%}
  {{- "<|" ~ message.role ~ "|>" -}}
  {%- if message.role == "assistant" -%}
    {%- generation -%}{{- message.content ~ "<|end|>" -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content ~ "<|end|>" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""

Turn = tuple[str, str]  # role and content


# ---------------------------------------------------------------------------- tokens


def add_chat(tokenizer: HFTokenizer) -> HFTokenizer:
    """Give a tokenizer the tokens of conversations that it lacks, and the chat template.

    Returns:
        The tokenizer itself.
    """
    known = tokenizer.get_vocab()
    missing = [t for t in (*ROLE_TOKENS.values(), END_OF_TURN) if t not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def role_ids(tokenizer: HFTokenizer) -> tuple[int, ...] | None:
    """Return the ids of the tokens of `ROLES`, or None if the tokenizer has no conversations."""
    vocabulary = tokenizer.get_vocab()
    if not all(token in vocabulary for token in (*ROLE_TOKENS.values(), END_OF_TURN)):
        return None
    return tuple(vocabulary[ROLE_TOKENS[role]] for role in ROLES)


def end_ids(tokenizer: HFTokenizer) -> int | list[int]:
    """Return what ends a generated text: the end of a text, and of a turn where there are turns."""
    if role_ids(tokenizer) is None:
        return tokenizer.eos_token_id
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def question_ids(
    tokenizer: HFTokenizer, messages: Sequence[Turn], *, continuing: bool = False
) -> list[int]:
    """Return the tokens up to the beginning of the answer to `messages`.

    Args:
        tokenizer: of a model that was trained on conversations.
        messages: (role, content) of each turn.
        continuing: an answer, of which the end was not read, stands before them.

    Raises:
        UserError: the tokenizer has no tokens for conversations.

    Example:
        >>> from spectral_window.data.tokenizers import load_tokenizer
        >>> tokenizer = add_chat(load_tokenizer("bytes"))
        >>> tokenizer.decode(question_ids(tokenizer, [("user", "Hi!")]))
        '<|endoftext|><|user|>Hi!<|end|><|assistant|>'
    """
    roles = role_ids(tokenizer)
    if roles is None:
        raise UserError(
            "the model was not trained on conversations (chat): train it further with "
            "train RECIPE --init MODEL --chat FILE"
        )
    end: Any = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    backend = plain_text(tokenizer)
    first: Any = tokenizer.bos_token_id
    ids: list[int] = [end if continuing else first]
    for role, content in messages:
        content_ids = backend.encode(content, add_special_tokens=False).ids
        ids += [roles[ROLES.index(role)], *content_ids, end]
    return [*ids, roles[ROLES.index("assistant")]]


# ---------------------------------------------------------------------------- reading


def conversation_pieces(
    source: Source, options: ReadOptions, report: ReadReport
) -> Iterator[Piece]:
    """Yield each conversation of a file as one piece, whose text is JSON; see `turns`.

    Raises:
        UserError: the file is not JSON, or a conversation is bad; with file, line and reason.
    """
    kind, name, _, extent, _ = source
    if kind not in KINDS:
        suffix = split_suffix(name)[0] or "this"
        raise UserError(
            f"{suffix} holds no conversations ({name}): give a .jsonl with a field 'messages'"
        )
    rows = rows_of(kind, name, options, report, conversation_row, extent)
    for text, where in texts_of(rows, options, report):
        yield Piece(text, True, where)


def conversation_row(where: str, record: Any) -> Row:
    """Return the row of a record with `messages`, or what is wrong with it."""
    if not isinstance(record, dict) or "messages" not in record:
        fields = ", ".join(list(record)[:10]) if isinstance(record, dict) else ""
        return Row(where, None, f"no 'messages' field, only: {fields or 'none'}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        return Row(where, None, "'messages' is no list of messages")
    for number, message in enumerate(messages, 1):
        fault = _fault(message, number, messages)
        if fault:
            return Row(where, None, f"message {number}: {fault}")
    if not any(message["role"] == "assistant" for message in messages):
        return Row(where, None, "no message of the assistant, so nothing to learn")
    turns = [(message["role"], message["content"]) for message in messages]
    return Row(where, json.dumps(turns, ensure_ascii=False))


def _fault(message: Any, number: int, messages: list[Any]) -> str:
    """Return what is wrong with a message, "" if nothing."""
    if not isinstance(message, dict):
        return "not an object with 'role' and 'content'"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"role is {json.dumps(role, default=str)[:40]}, not system, user or assistant"
    if not isinstance(content, str):
        return f"content is {json.dumps(content, default=str)[:40]}, not a string"
    if not content.strip():
        return "content is empty"
    for key in _NOT_DONE:
        if message.get(key) is not None:
            return f"'{key}' is not supported"
    if role == "system" and number > 1:
        return "a system message stands only at the beginning"
    first = messages[0].get("role") != "system"
    if role == "assistant" and number == (1 if first else 2):
        return "the assistant answers before anybody asks"
    return ""


def turns(text: str) -> list[Turn]:
    """Return the turns of a piece of `conversation_pieces`."""
    return [(role, content) for role, content in json.loads(text)]


# ---------------------------------------------------------------------------- coding


def code_conversations(
    parts: Iterable[Part], tokenizer: HFTokenizer, length: int, report: ReadReport
) -> Iterator[Coded]:
    """Yield the tokens of conversations, as documents of at most `length` + 1 tokens.

    A longer conversation is cut before a question; each part begins with the system message, if
    there is one. A single question with its answer that is longer ends with the row; where not even
    a token of the answer would fit, it is left out. `report` counts them.
    The bytes of a document are those of its answers, for they alone are predicted.
    """
    roles = role_ids(tokenizer)
    assert roles is not None
    end: Any = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    backend = plain_text(tokenizer)
    first: Any = tokenizer.bos_token_id
    for batch in batches(parts):
        spoken = [turns(part.text) for part in batch]
        texts = [content for conversation in spoken for _, content in conversation]
        encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        for part, conversation in zip(batch, spoken, strict=True):
            head, exchanges = _Run([first]), list[_Run]()
            for role, content in conversation:
                ids = [roles[ROLES.index(role)], *next(encodings).ids, end]
                size = len(content.encode()) if role == "assistant" else 0
                if role == "system":
                    head.add(ids, size, role)
                    continue
                if role == "user" and (not exchanges or exchanges[-1].last == "assistant"):
                    exchanges.append(_Run([]))
                exchanges[-1].add(ids, size, role)
            documents: list[_Run] = []
            for exchange in exchanges:
                if not exchange.answered:
                    continue  # a last question without an answer
                room = length + 1 - len(documents[-1].ids) if documents else -1
                if len(exchange.ids) <= room:
                    documents[-1].join(exchange)
                else:
                    documents.append(head.copy().join(exchange))
            report.cut += len(documents) > 1
            for document in documents:
                ids, size = document.ids[: length + 1], document.size
                if len(ids) < len(document.ids):
                    if document.answered >= len(ids):
                        report.lost += 1
                        continue
                    report.ended += 1
                    size = len(backend.decode(ids[document.answered :]).encode())
                yield Coded(part.split, part.spec, True, ids, size)


class _Run:
    """Tokens of some turns: where the first answer begins (0: nowhere), and bytes of answers."""

    def __init__(self, ids: list[int], answered: int = 0, size: int = 0, last: str = ""):
        self.ids, self.answered, self.size, self.last = ids, answered, size, last

    def add(self, ids: list[int], size: int, role: str) -> None:
        if role == "assistant" and not self.answered:
            self.answered = len(self.ids) + 1
        self.ids, self.size, self.last = [*self.ids, *ids], self.size + size, role

    def join(self, other: _Run) -> _Run:
        self.answered = self.answered or len(self.ids) + other.answered
        self.ids, self.size = [*self.ids, *other.ids], self.size + other.size
        return self

    def copy(self) -> _Run:
        return _Run(self.ids, self.answered, self.size, self.last)
