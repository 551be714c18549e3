"""Keyword arguments of a forward pass beyond its signature.

If unknown keywords were ignored, `model(x, lables=y)` would train nothing, and
`model(x, cache_params=c)` would start from an empty state, without an error. So an unknown name is
an error that suggests the nearest one. Names that collators, trainers and adapters pass are obeyed:

    seq_idx, document_ids           the document of each token; a new number starts a document
    cu_seq_lens_q/k, cu_seqlens     the same, as offsets of documents in the flattened rows
    max_length_q/k                  with them: no document is longer
    cache_position, token_type_ids, is_causal, output_attentions, output_router_logits
                                    accepted with values that ask for the model's normal behaviour
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_window.errors import UserError, unknown
from spectral_window.hf.inputs import check_integers, readable, starts

_IDS = ("seq_idx", "document_ids")
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_LONGEST = ("max_length_q", "max_length_k")
_WISHES = ("output_hidden_states", "output_attentions", "output_router_logits", "is_causal")
_ANYWAY = ("cache_position", "token_type_ids")
ACCEPTED = frozenset((*_IDS, *_BOUNDS, *_LONGEST, *_WISHES, *_ANYWAY))
_FOREIGN_NAMES = {"cache_params": "past_key_values", "states": "past_key_values"}


def check_keywords(given: dict[str, Any], forward: Callable[..., Any], *more: str) -> None:
    """Raise UserError for an unknown keyword.

    Args:
        given: the keywords beyond the signature.
        forward: the method; the names of its signature are suggested in the message.
        more: further accepted keywords.
    """
    for name in given:
        if name in ACCEPTED or name in more:
            continue
        if name in _FOREIGN_NAMES:
            raise unknown("argument", name, [_FOREIGN_NAMES[name]])
        raise unknown("argument", name, (*_signature(forward), *_IDS, *_BOUNDS[:2], *more))


@lru_cache
def _signature(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(forward).parameters if name[:2] != "kw")


def check_wishes(given: dict[str, Any], tokens: Tensor, past: int) -> None:
    """Raise UserError where a caller asks for something that the model cannot do."""
    if given.get("output_attentions"):
        raise UserError(
            "output_attentions=True (model): no attention weights are made; leave it out"
        )
    if given.get("output_router_logits"):
        raise UserError("output_router_logits=True (model): there are no experts; leave it out")
    if given.get("is_causal") is False:
        raise UserError("is_causal=False (model): every layer is causal; leave it out")
    types, position = given.get("token_type_ids"), given.get("cache_position")
    if types is not None and readable(types) and bool((types != 0).any()):
        raise UserError(
            "token_type_ids hold other numbers than 0 (model): there is one type of token; "
            "leave them out"
        )
    if position is not None and readable(position):
        counting = torch.arange(past, past + tokens.shape[1], device=position.device)
        if position.shape[-1:] != counting.shape or not bool((position == counting).all()):
            raise UserError(
                f"cache_position (model): the new tokens are at {past} to "
                f"{past + tokens.shape[1] - 1}; leave it out"
            )


def read_documents(given: dict[str, Any], tokens: Tensor, past: int) -> Tensor | None:
    """Return the document of every token: [B, T] int64, negative for padding.

    On the CPU if the values can be read; None if no keyword describes documents.

    Raises:
        UserError: malformed values, or keywords that contradict each other.
    """
    values = {name: given[name] for name in (*_IDS, *_BOUNDS) if given.get(name) is not None}
    for name in _LONGEST:
        if given.get(name) is not None and not any(bound in values for bound in _BOUNDS):
            raise UserError(f"{name} without cu_seq_lens_q (model): pass both, or neither")
    if not values:
        return None
    if past:
        raise UserError(
            f"{next(iter(values))} beside a cache of {past} tokens (model): whether the first new "
            "token goes on is not told by it; pass position_ids"
        )
    by_name = {}
    for name, value in values.items():
        check_integers(name, value)
        value = value.to("cpu" if readable(value) else tokens.device, torch.int64)
        if name in _IDS:
            by_name[name] = _from_ids(name, value, tokens)
        else:
            by_name[name] = _from_bounds(name, value, tokens, given)
    (name, documents), *others = by_name.items()
    for other, also in others:
        if readable(documents, also) and not torch.equal(starts(documents), starts(also)):
            raise UserError(f"{name} and {other} begin documents at different tokens (model)")
    return documents


def _from_ids(name: str, ids: Tensor, tokens: Tensor) -> Tensor:
    batch, length = tokens.shape[:2]
    if tuple(ids.shape) not in ((1, length), (batch, length)):
        raise UserError(
            f"{name} has shape {list(ids.shape)} (model): expected {[batch, length]}, "
            "the document of each token"
        )
    ids = ids.expand(batch, length)
    if readable(ids):
        row, at = starts(ids).nonzero(as_tuple=True)
        pairs = torch.stack((row, ids[row, at]), 1)
        if pairs.unique(dim=0).shape[0] < pairs.shape[0]:
            raise UserError(f"{name} comes back to an earlier document (model): number them anew")
    return ids


def _from_bounds(name: str, bounds: Tensor, tokens: Tensor, given: dict[str, Any]) -> Tensor:
    batch, length = tokens.shape[:2]
    if bounds.dim() != 1 or bounds.shape[0] < 1:
        raise UserError(f"{name} has shape {list(bounds.shape)} (model): expected [documents + 1]")
    if readable(bounds):
        sizes = bounds.diff()
        if int(bounds[0]) or int(bounds[-1]) != batch * length or bool((sizes < 0).any()):
            raise UserError(
                f"{name} (model): expected bounds that rise from 0 to {batch * length}, "
                "the number of tokens"
            )
        rows = torch.arange(0, batch * length + 1, max(length, 1), device=bounds.device)
        if not bool(torch.isin(rows, bounds).all()):
            raise UserError(f"{name} (model): a document reaches from one row into the next")
        longest = int(sizes.max()) if len(sizes) else 0
        for limit in _LONGEST:
            if given.get(limit) is not None and int(given[limit]) < longest:
                raise UserError(
                    f"{limit} is {int(given[limit])} (model): a document of {name} has {longest} "
                    "tokens"
                )
    flat = torch.arange(batch * length, device=bounds.device)
    return torch.searchsorted(bounds[1:].contiguous(), flat, right=True).reshape(batch, length)
