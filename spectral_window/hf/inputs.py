"""Check the inputs of a forward pass, and convert masks and position ids to `Documents`.

transformers describes documents and padding in overlapping ways: `attention_mask` (0 marks
padding), `position_ids` (which restart at 0 where the next packed document starts), and keywords
that number the documents (`keywords.py`). The mixers take the position of each token inside its own
document, -1 for padding; or None where every row continues without padding, which is faster.
`generate()` passes a mask and position ids that nearly always mean None. This is decided here, once
per forward pass, on the CPU: the only place where the CPU waits for values on a device.

    attention_mask  0  0  1  1  1     position_ids  0  1  2  0  1     both: 1 1 1, 5 6 7 after 5
    positions      -1 -1  0  1  2     positions     0  1  2  0  1     None

Values are only read where that is possible: not while a graph is compiled, traced or captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectral_window.data.blocks import IGNORED
from spectral_window.errors import UserError
from spectral_window.ops.context_parallel import ContextParallel, SpanDocuments
from spectral_window.ops.documents import Documents
from spectral_window.ops.tracing import readable


def check_integers(name: str, tensor: Any) -> None:
    """Raise UserError unless `tensor` is a tensor of integers."""
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} is a {type(tensor).__name__} (model): pass a tensor of integers")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise UserError(f"{name} are {tensor.dtype} (model): pass integers, torch.int64")


def as_indices(ids: Tensor) -> Tensor:
    """Return integer `ids` in a dtype that an embedding takes and that can hold -100."""
    narrow = ids.dtype not in (torch.int32, torch.int64)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids.to(torch.int64) if narrow and whole else ids


def check_count_kept(name: str, count: Any) -> None:
    """Raise UserError unless `count` is 0 (all) or a number of last positions."""
    if isinstance(count, bool) or not isinstance(count, int | torch.SymInt) or count < 0:
        raise UserError(
            f"{name} is {count!r} (model): use 0 for all, or the number of last positions"
        )


def check_ids(
    ids: Tensor, limit: int, name: str = "input_ids", shape: tuple[int, ...] | None = None
) -> None:
    """Raise UserError unless `ids` are integers [B, T] in 0 ... limit - 1 (labels: or -100)."""
    check_integers(name, ids)
    if ids.dim() != 2 or (shape is not None and ids.shape != shape):
        want = "[batch, time]" if shape is None else str(list(shape))
        raise UserError(f"{name} have shape {list(ids.shape)} (model): expected {want}")
    if not readable(ids):
        return
    wrong = (ids < 0) | (ids >= limit)
    if name != "input_ids":
        wrong &= ids != IGNORED
    if wrong.any():
        b, t = torch.nonzero(wrong)[0].tolist()
        raise UserError(
            f"{name}[{b}, {t}] is {int(ids[b, t])} (model): "
            f"the vocabulary has {limit} tokens, use 0 to {limit - 1}"
        )


def check_mask(mask: Tensor, batch: int, past: int, length: int) -> None:
    """Raise UserError unless `mask` is a real tensor [B, past + T].

    Its values are checked later; prompt tuning passes ones that are floats.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"attention_mask is {kind} (model): pass a tensor, 1 text, 0 padding")
    if mask.shape != (batch, past + length):
        after = f" ({past} already in the cache and {length} new)" if past else ""
        raise UserError(
            f"attention_mask has shape {list(mask.shape)} (model): expected "
            f"{[batch, past + length]}{after}; packed documents are told by position_ids"
        )


def next_position(positions: Tensor, start: Tensor) -> Tensor:
    """Return the position of the next token of each row, [B], after `positions` [B, T].

    A row of padding only stays at its earlier next position, `start` [B].
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    last = torch.where(positions >= 0, index, -1).amax(1)
    return torch.where(last >= 0, positions.gather(1, last.clamp(min=0)[:, None])[:, 0] + 1, start)


def next_start(
    documents: Documents | None, start: Tensor | None, seen: int, length: int
) -> Tensor | None:
    """Return the next position of each row after `length` more tokens.

    Args:
        documents: documents of the new tokens [B, length], or None.
        start: [B], the next positions before them, or None.
        seen: the number of tokens per row before them.
        length: the number of new tokens.

    Returns:
        [B], or None while every row continues at the number of tokens seen.
    """
    if documents is None:
        return None if start is None else start + length
    positions = documents.positions
    if start is None:
        start = torch.full((positions.shape[0],), seen, device=positions.device)
    return next_position(positions, start)


def resolve_documents(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    tokens: Tensor,
    past: int,
    start: Tensor | None,
    numbers: Tensor | None = None,
) -> Documents | None:
    """Return the documents of the new tokens for the mixers, checked.

    Args:
        attention_mask: [B, past + T], or None.
        position_ids: [B, T] or [1, T], or None.
        tokens: the new tokens [B, T, ...]; gives sizes and device.
        past: the number of tokens in the cache, including padding.
        start: [B], the next position of each row; None if it is `past`, that is, if every row is
            one document without padding.
        numbers: [B, T], the document of each token, negative for padding; only if `past` is 0.

    Returns:
        The documents; None if every row continues without padding.

    Raises:
        UserError: arguments that are malformed or contradict each other.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is not None:
        check_mask(attention_mask, batch, past, length)
    if position_ids is not None:
        check_integers("position_ids", position_ids)
        if tuple(position_ids.shape) not in ((1, length), (batch, length)):
            raise UserError(
                f"position_ids have shape {list(position_ids.shape)} (model): "
                f"expected {[batch, length]}, the new tokens only"
            )
    if length == 0 or (attention_mask is None and position_ids is None and numbers is None):
        return None

    values_readable = readable(attention_mask, position_ids, numbers, start)
    # values that can be read are copied to the CPU once; a graph stays on its device
    at = torch.device("cpu") if values_readable else tokens.device
    mask = None if attention_mask is None else attention_mask.to(at)
    new = None if mask is None else mask[:, past:]
    full = values_readable and numbers is None and (new is None or bool((new == 1).all()))
    if full and position_ids is None:
        return None
    if position_ids is not None:
        position_ids = position_ids.to(at, torch.int64).expand(batch, length)
    begin = torch.full((batch,), past, device=at) if start is None else start.to(at)
    counting = begin[:, None] + torch.arange(length, device=at)
    if full and position_ids is not None and bool((position_ids == counting).all()):
        return None

    valid = torch.ones_like(counting, dtype=torch.bool) if new is None else new.bool()
    if position_ids is not None:
        valid = valid & (position_ids >= 0)
    if numbers is not None:
        numbers = numbers.to(at)
        valid = valid & (numbers >= 0)
    first = None if position_ids is None else valid & (position_ids == 0)
    if numbers is not None:
        by_number = starts(torch.where(valid, numbers, -1))
        if first is not None and values_readable:
            _refuse_other_documents(first, by_number, valid)
        first = by_number
    positions = _count(valid, first, begin)
    if not values_readable:
        return Documents(positions, checked=True)
    _refuse_contradictions(mask, position_ids, positions)
    if bool((positions == counting).all()):
        return None
    return Documents(positions.to(tokens.device), positions, checked=True)


def span_documents(
    documents: Documents | None, context: ContextParallel, tokens: Tensor, past: int
) -> SpanDocuments:
    """Return the documents of this process's span of rows that several processes share.

    Args:
        documents: of the whole rows; None if each is one document without padding.
        context: the processes.
        tokens: the whole rows [B, T, ...]; gives sizes and device.
        past: the number of tokens in the cache.

    Raises:
        UserError: a cache that is not empty.
    """
    if past:
        raise UserError(
            f"context_parallel beside a cache of {past} tokens (model): rows must start here; go "
            "on with whole rows from the last process's cache"
        )
    if documents is not None:
        positions = documents.positions.cpu() if documents.host is None else documents.host
    else:
        counting = torch.arange(tokens.shape[1], dtype=torch.int64, device="cpu")
        positions = counting.expand(tokens.shape[0], -1)
    return SpanDocuments(positions, context, tokens.device)


def starts(documents: Tensor) -> Tensor:
    """Return whether each token starts a document: [B, T] bool.

    Args:
        documents: [B, T], the document of each token, negative for padding.
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    last = torch.where(documents >= 0, index, -1).cummax(1).values
    before = nn.functional.pad(last, (1, 0), value=-1)[:, :-1]
    same = documents.gather(1, before.clamp(min=0)) == documents
    return (documents >= 0) & ((before < 0) | ~same)


def _count(valid: Tensor, first: Tensor | None, begin: Tensor) -> Tensor:
    """Count the valid tokens of every row from `begin` [B], and from 0 again at `first` [B, T]."""
    ordinal = valid.cumsum(1) - 1
    positions = begin[:, None] + ordinal
    if first is not None:
        head = torch.where(first, ordinal, -1).cummax(1).values
        positions = torch.where(head >= 0, ordinal - head, positions)
    return torch.where(valid, positions, -1)


def _refuse_other_documents(first: Tensor, by_number: Tensor, valid: Tensor) -> None:
    """Raise UserError where position_ids and document numbers start different documents."""
    wrong = (first != by_number) & (valid.cumsum(1) > 1)  # a row always starts a document
    if wrong.any():
        b, t = torch.nonzero(wrong)[0].tolist()
        has, lacks = (
            ("a document", "position_ids do not") if by_number[b, t] else ("none", "they do")
        )
        raise UserError(
            f"position_ids and the documents given contradict each other at [{b}, {t}] (model): "
            f"{has} begins there, {lacks}; position_ids restart at 0 in each"
        )


def _refuse_contradictions(
    attention_mask: Tensor | None, position_ids: Tensor | None, positions: Tensor
) -> None:
    """Raise UserError for a mask with other values than 0 and 1, and for wrong position_ids.

    With a mask that has zeros, position_ids only tell where documents start: callers differ in
    whether they count padding.
    """
    if attention_mask is not None and bool((attention_mask != 1).any()):
        if bool((attention_mask != 1).logical_and(attention_mask != 0).any()):
            raise UserError(
                "attention_mask holds other numbers than 0 and 1 (model): "
                "tell packed documents by position_ids that restart at 0"
            )
        return
    if position_ids is None:
        return
    wrong = (positions >= 0) & (positions != position_ids)
    if wrong.any():
        b, t = torch.nonzero(wrong)[0].tolist()
        raise UserError(
            f"position_ids[{b}, {t}] is {int(position_ids[b, t])} (model): expected "
            f"{int(positions[b, t])}, which follows the token before it (or the cache given), "
            "or 0, which begins a document"
        )
