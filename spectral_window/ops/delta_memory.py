"""The memory: keys and values in one matrix a head, written by the delta rule.

    S_t   = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,   a_t = exp(-decay_t)
    out_t = S_t^T q_t

What the memory holds at the key k_t is read, and replaced by v_t in the proportion beta_t; what it
holds at keys orthogonal to k_t stays as it is (Schlag et al. 2021, "Linear Transformers Are
Secretly Fast Weight Programmers"; with `decay`, the gated delta rule of Yang et al. 2025). Keys
should have length 1 and 0 <= beta <= 1: then no write makes the memory grow, for
|I - beta k k^T| <= 1. The table of methods is at the end.

Precision. The state is float32 (float64 for float64 inputs), whatever the inputs' dtype. On a CPU
`chunked` computes in float64 and rounds once, so that neither autocast nor the setting for float32
products touches it. Elsewhere it computes in float32, under that setting: with
`torch.set_float32_matmul_precision("highest")` the error is below 3e-6 of the output (keys that
nearly agree; 1e-6 for others), with TF32 products about 1e-3.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops import reference
from spectral_window.ops.chunked_delta import chunked
from spectral_window.ops.documents import Documents, anywhere, documents_after, each_document
from spectral_window.ops.methods import (
    Method,
    enrol,
    first_of,
    not_exported,
    not_transformed,
    numba_on_cpu,
    one_token,
    past_the_dispatcher,
    resolve,
)
from spectral_window.ops.tracing import readable

EXACT = ("cpu",)  # devices on which `chunked` computes in float64, see above


def delta_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    positions: Tensor | Documents | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Write v at k in the proportion beta, read at q, for every head and token in turn.

    q, k:   [B, T, H, K] floating; any T >= 0 and B >= 0. Keys of length 1, unless you know better.
    v:      [B, T, H, V], in their dtype.
    beta:   [B, T, H], any floating dtype, from 0 (nothing is written) to 1 (what was there is
            replaced).
    decay:  [B, T, H], >= 0 and finite, nats forgotten before the token is written; None for none.
            (The gated delta nets' logarithm of a_t, negated.)
    state:  [B, H, K, V], as returned by an earlier call for the same rows; None for none. It enters
            a row's first document unless that begins at position 0.
    positions, cu_seqlens: documents and padding, see `spectral_window.ops`.
    method: a name in METHODS["delta"], or "auto".

    Returns out [B, T, H, V] in v's dtype (0 at padding) and the state after each row's last token,
    float32 (float64 for float64 inputs). Differentiable, twice, in q, k, v, beta, decay and state.
    Raises UserError (a ValueError) or UserTypeError (a TypeError) before any work.
    """
    _check(q, k, v, beta, decay, state)
    chosen = resolve("delta", method, q, k, v, beta, decay, state)
    documents = documents_after(state, positions, cu_seqlens, q)
    kept = state_dtype(q.dtype)
    if not q.numel() or not v.numel():
        shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        return v.clone(), q.new_zeros(shape, dtype=kept) if state is None else state.to(kept)
    inputs = [q, k, v, beta[..., None], *([] if decay is None else [decay[..., None]])]
    with _without_autocast(q.device):
        out, final = chosen.function(inputs, state, documents)
    return out.to(v.dtype), final.to(kept)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state's dtype for inputs of `dtype`: at least float32, for it is a sum over the past."""
    return torch.promote_types(dtype, torch.float32)


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor | None
) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise UserError(
            f"q, k, v have shapes {shapes} (delta_memory): expected [B, T, H, K] twice "
            "and [B, T, H, V]"
        )
    if not q.dtype.is_floating_point or q.dtype != k.dtype or q.dtype != v.dtype:
        raise UserTypeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype} (delta_memory): "
            "expected one floating dtype"
        )
    for name, value in (("beta", beta), ("decay", decay)):
        if value is None:
            continue
        if value.shape != q.shape[:3]:
            raise UserError(
                f"{name} has shape {tuple(value.shape)} (delta_memory): expected "
                f"{tuple(q.shape[:3])}, one for each token and head"
            )
        if not value.dtype.is_floating_point:
            raise UserTypeError(
                f"{name} is {value.dtype} (delta_memory): expected a floating dtype"
            )
    for name, value in (("k", k), ("v", v), ("beta", beta), ("decay", decay), ("state", state)):
        if value is not None and value.device != q.device:
            raise UserError(
                f"{name} is on {value.device}, q on {q.device} (delta_memory): move one"
            )
    if state is not None:
        shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        if state.shape != shape or state.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"state is {tuple(state.shape)} {state.dtype} (delta_memory): expected {shape} in "
                f"{state_dtype(q.dtype)}, as returned by a call with the same rows and heads"
            )


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round products to half precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _begun(inputs: list[Tensor], state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state to begin from, in `dtype`."""
    q, v = inputs[0], inputs[2]
    if state is None:
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    return state.to(dtype)


# ------------------------------------------------------------------------------ the methods
#
# Each is called with [q, k, v, beta [B, T, H, 1]] and perhaps decay [B, T, H, 1], none of them
# empty, state or None, documents or None.


def _chunked(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    q = inputs[0]
    exact = q.device.type in EXACT or q.dtype == torch.float64
    before = _begun(inputs, state, torch.float64 if exact else torch.float32)
    if documents is not None:
        documents.check(None if state is None else anywhere(q.shape[0]), wait=True)
    return chunked(inputs, before, documents)


def _step(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """One token a row. A padded row keeps its state; a row at position 0 begins afresh.

    Sums of products and no matrix products, which a setting may round to bfloat16.
    """
    state = _begun(inputs, state, state_dtype(inputs[0].dtype))
    positions = None if documents is None else documents.positions
    q, k, v, beta, *decay = (x[:, 0].to(state.dtype) for x in inputs)
    before = state
    if positions is not None:
        before = torch.where((positions == 0)[..., None, None], 0.0, state)
    if decay:
        before = before * torch.exp(-decay[0])[..., None]
    written = beta * (v - (before * k[..., None]).sum(-2))
    after = torch.addcmul(before, k[..., None], written[..., None, :])
    out = (after * q[..., None]).sum(-2)
    if positions is not None:
        token = (positions >= 0)[..., None]
        after = torch.where(token[..., None], after, state)
        out = torch.where(token, out, 0.0)
    return out[:, None], after


def _reference(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    exact, before = [x.double() for x in inputs], _begun(inputs, state, torch.float64)

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        return reference.delta(*given[:-1], state=given[-1])

    if documents is None:
        return run(*exact, before)
    documents.check(None if state is None else anywhere(len(before)), wait=True)
    return each_document(run, exact, before, documents, exact[2])


def _compiled(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.compiled.delta import memory

    before = _begun(inputs, state, torch.float32)
    positions = None if documents is None else documents.positions
    checked = documents is None or documents.checked or readable(documents.positions)
    return memory(inputs, before, positions, checked)


def _step_compiled(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.compiled.delta_step import step

    positions = None if documents is None else documents.positions
    return step(inputs, _begun(inputs, state, torch.float32), positions)


_IN_NUMBA = numba_on_cpu(torch.float32, torch.bfloat16)

enrol(
    "delta",
    Method(
        "step_compiled",
        _step_compiled,
        "one token: the recurrence in compiled code (numba), constant state and time, on a CPU",
        first_of(one_token, _IN_NUMBA, past_the_dispatcher),
    ),
    Method(
        "step",
        _step,
        "one token: the recurrence in plain torch, constant state and time",
        one_token,
    ),
    Method(
        "compiled",
        _compiled,
        "a triangular system in each chunk, the state in cache, compiled by numba, O(T), on a CPU",
        first_of(_IN_NUMBA, not_exported, not_transformed),
    ),
    Method(
        "chunked",
        _chunked,
        "a triangular system in each chunk and a scan over chunks, O(T), plain torch",
    ),
    Method(
        "reference",
        _reference,
        "the recurrence in float64, token by token: the truth for the others",
    ),
)
