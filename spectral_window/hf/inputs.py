"""What a caller passes, checked, and turned into the one thing the mixers want: `Documents`.

transformers says where a row's text lies in overlapping ways: `attention_mask` (0 marks padding),
`position_ids` (which restart at 0 where the next packed document begins), and keywords that number
the documents (`keywords.py`). The mixers take each token's
position inside its own document, -1 for padding; or None where every row simply goes on, the fast
path. `generate()` sends both, almost always saying nothing; that is found out here, once a forward,
on the CPU: this is the one place where the host waits for what lies on a device.

    attention_mask  0  0  1  1  1     position_ids  0  1  2  0  1     both: 1 1 1, 5 6 7 after 5
    positions      -1 -1  0  1  2     positions     0  1  2  0  1     None

Values are looked at only when they may be: never while compiling, tracing or capturing a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectral_window.data.blocks import IGNORED
from spectral_window.errors import UserError
from spectral_window.ops.documents import Documents
from spectral_window.ops.tracing import readable


def check_integers(name: str, tensor: Any) -> None:
    """Raise `ValueError` unless `tensor` holds whole numbers."""
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} is a {type(tensor).__name__} (model): pass a tensor of integers")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise UserError(f"{name} are {tensor.dtype} (model): pass integers, torch.int64")


def as_indices(ids: Tensor) -> Tensor:
    """`ids` in a type that an embedding takes and that holds -100, if they are integers at all."""
    narrow = ids.dtype not in (torch.int32, torch.int64)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids.to(torch.int64) if narrow and whole else ids


def check_count_kept(name: str, count: Any) -> None:
    """Raise `ValueError` unless `count` is 0 (all) or a number of last positions."""
    if isinstance(count, bool) or not isinstance(count, int | torch.SymInt) or count < 0:
        raise UserError(
            f"{name} is {count!r} (model): use 0 for all, or the number of last positions"
        )


def check_ids(
    ids: Tensor, limit: int, name: str = "input_ids", shape: tuple[int, ...] | None = None
) -> None:
    """Raise `ValueError` unless `ids` are integers [B, T] in 0 ... limit - 1 (labels: or -100)."""
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
    """Raise `ValueError` unless `mask` is a real tensor [B, past + T] (its numbers are looked at
    later: prompt tuning makes ones that are floats)."""
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
    """[B]: where each row goes on after `positions` [B, T]; a row of padding only stays at `start`.

    `start` [B] is where it went on before.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    last = torch.where(positions >= 0, index, -1).amax(1)
    return torch.where(last >= 0, positions.gather(1, last.clamp(min=0)[:, None])[:, 0] + 1, start)


def next_start(
    documents: Documents | None, start: Tensor | None, seen: int, length: int
) -> Tensor | None:
    """`start` after `length` more tokens of `documents` [B, length]: [B], or None while every row
    goes on at the number of tokens seen (`seen` before them)."""
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
    """The documents of the new tokens [B, T] for the mixers, checked, or None. Raises `ValueError`.

    attention_mask: [B, past + T] or None.   position_ids: [B, T] or [1, T] or None.
    tokens:  [B, T, ...] gives sizes and device.
    past:    tokens (padding included) that the cache has seen.
    start:   [B] position at which each row goes on; None: at `past`, every row being one document
             without padding.
    numbers: [B, T] the document of each token, negative for padding; only where `past` is 0.
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

    look = readable(attention_mask, position_ids, numbers, start)
    # values that may be looked at are brought to the CPU at once; a graph stays where it is
    at = torch.device("cpu") if look else tokens.device
    mask = None if attention_mask is None else attention_mask.to(at)
    new = None if mask is None else mask[:, past:]
    full = look and numbers is None and (new is None or bool((new == 1).all()))
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
        told = begins(torch.where(valid, numbers, -1))
        if first is not None and look:
            _refuse_other_documents(first, told, valid)
        first = told
    positions = _count(valid, first, begin)
    if not look:
        return Documents(positions, checked=True)
    _refuse_contradictions(mask, position_ids, positions)
    if bool((positions == counting).all()):
        return None
    return Documents(positions.to(tokens.device), positions, checked=True)


def begins(documents: Tensor) -> Tensor:
    """Whether a token [B, T] is of another document than the token before it, padding left out."""
    index = torch.arange(documents.shape[1], device=documents.device)
    last = torch.where(documents >= 0, index, -1).cummax(1).values
    before = nn.functional.pad(last, (1, 0), value=-1)[:, :-1]
    same = documents.gather(1, before.clamp(min=0)) == documents
    return (documents >= 0) & ((before < 0) | ~same)


def _count(valid: Tensor, first: Tensor | None, begin: Tensor) -> Tensor:
    """Number the valid tokens of every row from `begin` [B], and from 0 again at `first` [B, T]."""
    ordinal = valid.cumsum(1) - 1
    positions = begin[:, None] + ordinal
    if first is not None:
        head = torch.where(first, ordinal, -1).cummax(1).values
        positions = torch.where(head >= 0, ordinal - head, positions)
    return torch.where(valid, positions, -1)


def _refuse_other_documents(first: Tensor, told: Tensor, valid: Tensor) -> None:
    """Raise `ValueError` where position_ids begin documents at other tokens than are told."""
    wrong = (first != told) & (valid.cumsum(1) > 1)  # a row's first token begins one anyway
    if wrong.any():
        b, t = torch.nonzero(wrong)[0].tolist()
        has, lacks = ("a document", "position_ids do not") if told[b, t] else ("none", "they do")
        raise UserError(
            f"position_ids and the documents given contradict each other at [{b}, {t}] (model): "
            f"{has} begins there, {lacks}; position_ids restart at 0 in each"
        )


def _refuse_contradictions(
    attention_mask: Tensor | None, position_ids: Tensor | None, positions: Tensor
) -> None:
    """Raise `ValueError` for a mask that is no mask, and for position_ids that do not count.

    Beside a mask with zeros they are only asked where documents begin: what they count there,
    with or without the padding, differs from caller to caller.
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
