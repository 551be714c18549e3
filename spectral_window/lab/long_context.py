"""What a language model does with a long context, on its own held-out text, in constant memory.

Two questions are hidden in text and asked at its end, as the tasks of `data/tasks` do with noise:

- *needle*: one key and its value anywhere in the text; at the end the key again;
- *recall*: four keys, each with its value, of which one is asked.

A key is some tokens and a value is one token, drawn from those of the text, so the same question is
asked of every tokenizer, and nobody can answer by knowing the language. A right answer is the value
that is the likeliest of `VALUES` candidates: 1 / VALUES is chance.

Loss by position: one long row of text, and beside it the loss on the same tokens if they are read
in rows of the length of training. Where the first is lower, more context helps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch.nn import functional as F

from spectral_window.data.blocks import TokenStream
from spectral_window.errors import UserError
from spectral_window.generation.engine import Engine
from spectral_window.lab import figures

VALUES = 10  # candidates
PAIRS = {"needle": 1, "recall": 4}
KEY_TOKENS = 4
SHORTEST = 32  # tokens of a question
SEGMENT = 1024  # tokens whose logits are held at once


class Question(NamedTuple):
    """Tokens that end with a key, the candidates, and which of them is its value."""

    ids: list[int]
    candidates: list[int]
    answer: int


def read_lengths(text: str) -> list[int]:
    """Return the lengths of `1k,4k,1M`: k is 1,024 and M is 1,048,576 tokens.

    Raises:
        UserError: one is no number, or below `SHORTEST`.

    Example:
        >>> read_lengths("64,1k")
        [64, 1024]
    """
    lengths = []
    for word in text.split(","):
        digits = word.strip().rstrip("kKM")
        unit = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20}.get(word.strip()[len(digits) :])
        if not digits.isdecimal() or unit is None or int(digits) * unit < SHORTEST:
            raise UserError(
                f"no length {word!r} (--needle): write as 1k,4k,1M, each at least {SHORTEST} tokens"
            )
        lengths.append(int(digits) * unit)
    return sorted(set(lengths))


def question(
    stream: TokenStream,
    length: int,
    pairs: int,
    rng: np.random.Generator,
    key_tokens: int = KEY_TOKENS,
) -> Question:
    """Return a question of `length` tokens.

    Args:
        stream: the text around it; from its beginning again where it is shorter.
        length: tokens, the key at the end included.
        pairs: keys with values in it.
        rng: draws the text, the keys, the values and their places.
        key_tokens: tokens of a key.

    Raises:
        UserError: the text has too few different tokens.
    """
    size = length - 1 - key_tokens - pairs * (key_tokens + 1)
    start = int(rng.integers(0, len(stream)))
    first = np.asarray(stream.tokens[start : start + size], dtype=np.int64)
    whole = np.asarray(stream.tokens[: min(size, len(stream))], dtype=np.int64)
    text = np.resize(np.concatenate((first, whole)), size)
    known = np.unique(np.concatenate((whole, first)))
    if len(known) < VALUES:
        raise UserError(f"{len(known)} different tokens ({stream.name}): a question needs {VALUES}")
    candidates = rng.choice(known, VALUES, replace=False)
    keys = rng.choice(known, (pairs, key_tokens))
    answers = rng.choice(VALUES, pairs, replace=False)
    places = np.sort(rng.integers(0, size + 1, pairs))
    parts, before = [np.asarray(stream.tokens[:1], dtype=np.int64)], 0
    for key, answer, place in zip(keys, answers, places, strict=True):
        parts += [text[before:place], key, candidates[answer : answer + 1]]
        before = place
    asked = int(rng.integers(0, pairs))
    ids = np.concatenate((*parts, text[before:], keys[asked]))
    return Question(ids.tolist(), candidates.tolist(), int(answers[asked]))


def is_right(engine: Engine, asked: Question) -> bool:
    """Ask a question: read it segment by segment, and compare the candidates."""
    row = engine.add(asked.ids)
    try:
        while engine.prefill(row):
            pass
        engine.step([row])
        assert row.logits is not None
        return int(row.logits[asked.candidates].argmax()) == asked.answer
    finally:
        engine.drop(row)


def share_right(
    model: Any, stream: TokenStream, length: int, pairs: int, count: int, seed: int,
    key_tokens: int = KEY_TOKENS,
) -> float:  # fmt: skip
    """Return the share of right answers to `count` questions of `length` tokens."""
    rng = np.random.default_rng([seed, length, pairs])
    engine = Engine(model)
    right = (
        is_right(engine, question(stream, length, pairs, rng, key_tokens)) for _ in range(count)
    )
    return sum(right) / count


@torch.no_grad()
def loss_by_position(model: Any, stream: TokenStream, length: int) -> list[dict[str, float]]:
    """Return the loss in nats between positions that double: of one row, and of short rows.

    Args:
        model: a language model.
        stream: its text, of which the first `length` tokens are read as one row.
        length: tokens.

    Returns:
        For each range of positions "from" ... "to": "loss", in the whole row, and "short", the same
        tokens read in rows of the model's training length.
    """
    length = min(length, len(stream) - 1)
    trained = model.config.training_length
    losses, short = np.zeros(length), np.zeros(length)
    cache = None
    step = min(SEGMENT, length)
    for start in range(0, length, step):
        stop = min(start + step, length)
        output = model(_ids(model, stream, start, stop), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        losses[start:stop] = _nats(output.logits, _ids(model, stream, start + 1, stop + 1))
    for start in range(0, length, trained):
        stop = min(start + trained, length)
        logits = model(_ids(model, stream, start, stop), use_cache=False).logits
        short[start:stop] = _nats(logits, _ids(model, stream, start + 1, stop + 1))
    edges = [0, *(2**i for i in range(4, math.ceil(math.log2(length)))), length]
    edges = sorted({edge for edge in edges if edge <= length})
    return [
        {
            "from": a,
            "to": b,
            "loss": float(losses[a:b].mean()),
            "short": float(short[a:b].mean()),
        }
        for a, b in pairwise(edges)
    ]


def _ids(model: Any, stream: TokenStream, start: int, stop: int) -> torch.Tensor:
    tokens = np.asarray(stream.tokens[start:stop], dtype=np.int64)
    return torch.from_numpy(tokens)[None].to(model.device)


def _nats(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    nats = F.cross_entropy(logits[0].float(), labels[0], reduction="none")
    return nats.double().cpu().numpy()


def measure(
    model: Any, stream: TokenStream, lengths: Sequence[int], *, count: int = 50, seed: int = 0
) -> dict[str, Any]:
    """Ask `count` questions of every kind and length, and take the loss by position.

    Returns:
        JSON values: "questions", a row for each kind and length with the share of "right" answers;
        "chance"; "loss", see `loss_by_position`; and the settings.
    """
    rows = [
        {
            "task": task,
            "length": length,
            "right": share_right(model, stream, length, pairs, count, seed),
            "asked": count,
        }
        for length in lengths
        for task, pairs in PAIRS.items()
    ]
    return {
        "text": stream.name,
        "training_length": model.config.training_length,
        "key_tokens": KEY_TOKENS,
        "seed": seed,
        "chance": 1 / VALUES,
        "questions": rows,
        "loss": loss_by_position(model, stream, max(lengths)),
    }


def picture(found: dict[str, Any], name: str, path: Path) -> Path:
    """Draw what `measure` found into a PNG; returns `path`."""
    panels = [
        figures.Panel(
            "right", "Right answers", "share of right answers by length", partial(_right, found)
        ),
        figures.Panel("loss", "Loss by position", "loss by position", partial(_loss, found)),
    ]
    about = f"{name}, trained on rows of {found['training_length']:,} tokens"
    return figures.sheet(panels, 2, about, path)


def _right(found: dict[str, Any], axes: Axes) -> None:
    for task, color in zip(PAIRS, figures.SERIES, strict=False):
        rows = [row for row in found["questions"] if row["task"] == task]
        lengths, right = [r["length"] for r in rows], [r["right"] for r in rows]
        axes.plot(lengths, right, "o-", color=color, label=task)
    axes.axhline(found["chance"], color=figures.MUTED, linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: figures.count(x))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens")


def _loss(found: dict[str, Any], axes: Axes) -> None:
    ends = [row["to"] for row in found["loss"]]
    names = {"loss": "one row", "short": "rows of the training length"}
    for (key, label), color in zip(names.items(), figures.SERIES[2:], strict=False):
        axes.plot(ends, [row[key] for row in found["loss"]], "o-", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: figures.count(x))
    axes.set_xlabel("position")
    axes.set_ylabel("nats a token")
