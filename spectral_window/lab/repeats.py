"""The loss on tokens whose context has occurred before, and on those whose context is new.

A memory of what followed what helps where a text repeats itself, so a text of repeated phrases
flatters it. Here the tokens of held-out rows are counted apart: by how often the last
`CONTEXT` tokens have occurred before in the same document and row, and by whether the token to
predict followed one of these times ("repeated") or none ("other"). No model sees more of the text
than the row, so what is counted is all that it can have seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional as F

from spectral_window.data.blocks import IGNORED, TokenStream, blocks_of
from spectral_window.lab import figures
from spectral_window.training.evaluate import spread

CONTEXT = 2  # tokens
SEEN = (0, 1, 2, 4)  # how often before, at least
NAMES = ("new", "once", "2 or 3 times", "4 times or more")
NEXT = ("other", "repeated")  # the token to predict: followed none of these times, or one


def kinds(ids: Sequence[int], starts: Sequence[bool], labels: Sequence[int]) -> np.ndarray:
    """Return the kind of each place of a row.

    Args:
        ids: [T] tokens.
        starts: [T], whether a document starts at the place.
        labels: [T] the tokens to predict; `IGNORED` for none.

    Returns:
        int64 [T]: 2 * (index in `SEEN`) + (index in `NEXT`), -1 for a place that predicts nothing.
    """
    found = np.full(len(ids), -1, dtype=np.int64)
    seen: Counter[tuple[int, ...]] = Counter()
    followed: set[tuple[int, ...]] = set()
    begin = 0
    for place, label in enumerate(labels):
        if starts[place]:
            begin = place
            seen.clear()
            followed.clear()
        if label == IGNORED:
            continue
        context = tuple(ids[max(begin, place + 1 - CONTEXT) : place + 1])
        times, whole = seen[context], (*context, label)
        found[place] = 2 * (bisect_right(SEEN, times) - 1) + (whole in followed)
        seen[context] += 1
        followed.add(whole)
    return found


@torch.no_grad()
def measure(
    models: Mapping[str, Any],
    stream: TokenStream,
    *,
    length: int,
    max_tokens: int | None = None,
    batch: int = 16,
) -> dict[str, Any]:
    """Measure models on the blocks of a stream.

    Args:
        models: label -> language model; all predict the tokens of `stream`.
        stream: held-out text.
        length: tokens of a row.
        max_tokens: about how many to predict at most, as in `training.evaluate.evaluate`.
        batch: rows at a time.

    Returns:
        JSON values: the settings, and "rows", one for each kind that occurs: "context" (of
        `NAMES`), "next" (of `NEXT`), "tokens", and "loss", label -> nats per token.

    Raises:
        UserError: the stream is too short.
    """
    blocks = blocks_of(stream, length, allow_short=True)
    wanted = len(blocks) if max_tokens is None else -(-max_tokens // length)
    chosen = spread(len(blocks), wanted)
    size = len(SEEN) * len(NEXT)
    tokens, nats = np.zeros(size, np.int64), {label: np.zeros(size) for label in models}
    for begin in range(0, len(chosen), batch):
        rows = [blocks[index] for index in chosen[begin : begin + batch]]
        inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        kind = np.stack(
            [
                kinds(ids, starts, labels)
                for ids, starts, labels in zip(
                    inputs["input_ids"].tolist(),
                    (inputs["position_ids"] == 0).tolist(),
                    inputs["shift_labels"].tolist(),
                    strict=True,
                )
            ]
        )
        here = kind >= 0
        tokens += np.bincount(kind[here], minlength=size)
        for label, model in models.items():
            loss = _losses(model, inputs).cpu().numpy()
            nats[label] += np.bincount(kind[here], weights=loss[here], minlength=size)
    found = [
        {
            "context": NAMES[kind // 2],
            "next": NEXT[kind % 2],
            "tokens": int(tokens[kind]),
            "loss": {label: float(nats[label][kind] / tokens[kind]) for label in models},
        }
        for kind in range(size)
        if tokens[kind]
    ]
    return {"text": stream.name, "length": length, "context_tokens": CONTEXT, "rows": found}


def _losses(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the nats [B, T] that a model spends on each label."""
    device = next(model.parameters()).device
    given = {name: inputs[name].to(device) for name in ("input_ids", "position_ids")}
    logits = model(**given, use_cache=False).logits
    labels = inputs["shift_labels"].to(device)
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(labels.shape).double()


def picture(found: dict[str, Any], path: Path) -> Path:
    """Draw what `measure` found into a PNG, a panel for each of `NEXT`; returns `path`."""
    titles = ("The next token is another", "The next token is repeated")
    panels = [
        figures.Panel(
            f"repeats-{after}", title, "loss by how often the context occurred before",
            partial(_paint, [row for row in found["rows"] if row["next"] == after]),
        )
        for after, title in reversed(list(zip(NEXT, titles, strict=True)))
    ]  # fmt: skip
    about = (
        f"by how often the last {found['context_tokens']} tokens occurred before, "
        f"in rows of {found['length']:,} tokens"
    )
    return figures.sheet(panels, 2, about, path)


def _paint(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    labels = list(rows[0]["loss"]) if rows else []
    names = [row["context"] for row in rows]
    for label, color in zip(labels, figures.SERIES, strict=False):
        axes.plot(names, [row["loss"][label] for row in rows], "o-", color=color, label=label)
    axes.set_ylabel("nats a token")
