"""The memory: keys and values in one matrix a head, written by the delta rule.

    S_t   = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,   a_t = exp(-decay_t)
    out_t = S_t^T q_t

What the memory holds at the key k_t is read, and replaced by v_t in the proportion beta_t; what it
holds at keys orthogonal to k_t stays as it is (Schlag et al. 2021, "Linear Transformers Are
Secretly Fast Weight Programmers"; with `decay`, the gated delta rule of Yang et al. 2025). Keys
should have length 1 and 0 <= beta <= 1: then no write makes the memory grow, for
|I - beta k k^T| <= 1.

    chunked    a triangular system inside chunks of 64, a scan between them (`chunked_delta`).
    step       one token: the recurrence.
    reference  the recurrence in float64, token by token.

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
from spectral_window.ops.dispatch import resolve
from spectral_window.ops.documents import find_documents, given_positions


def delta_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    positions: Tensor | None = None,
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
    method: one of `dispatch.METHODS`, or "auto".

    Returns out [B, T, H, V] in v's dtype (0 at padding) and the state after each row's last token,
    float32 (float64 for float64 inputs). Differentiable, twice, in q, k, v, beta, decay and state.
    Raises ValueError or TypeError before any work.
    """
    _check(q, k, v, beta, decay, state)
    method, _ = resolve("delta", method, q)
    begin = None  # a state does not know its position: any but 0 continues it
    if cu_seqlens is not None and state is not None:
        begin = torch.ones(q.shape[0], dtype=torch.int64, device=q.device)
    positions = given_positions(positions, cu_seqlens, q, begin)
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    kept = state_dtype(q.dtype)
    known = state is not None
    if state is None:
        state = q.new_zeros(shape, dtype=kept)
    state = state.to(kept)
    if not q.numel() or not v.numel():
        return v.clone(), state
    inputs = [q, k, v, beta[..., None], *([] if decay is None else [decay[..., None]])]
    with _without_autocast(q.device):
        if method == "step":
            out, final = _step(inputs, state, positions)
        elif method == "reference":
            out, final = _reference(inputs, state.double(), positions, known)
        else:
            out, final = chunked(inputs, state.to(_working_dtype(q)), positions, known)
    return out.to(v.dtype), final.to(kept)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state's dtype for inputs of `dtype`: at least float32, for it is a sum over the past."""
    return torch.promote_types(dtype, torch.float32)


def _working_dtype(q: Tensor) -> torch.dtype:
    """What `chunked` computes in (see the module)."""
    exact = q.device.type == "cpu" or q.dtype == torch.float64
    return torch.float64 if exact else torch.float32


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


def _step(
    inputs: list[Tensor],
    state: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token a row. A padded row keeps its state; a row at position 0 begins afresh.

    Sums of products and no matrix products, which a setting may round to bfloat16.
    """
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
    inputs: list[Tensor],
    state: Tensor,
    positions: Tensor | None,
    known: bool,
) -> tuple[Tensor, Tensor]:
    """The reference, every document alone."""
    exact = [x.double() for x in inputs]
    if positions is None:
        return reference.delta(*exact, state=state)
    batch, time = positions.shape
    any_position = (
        torch.full((batch,), -1, dtype=torch.int64, device=positions.device) if known else None
    )
    docs = find_documents(positions, any_position)
    flat = [x.flatten(0, 1) for x in exact]
    out, final = torch.zeros_like(flat[2]), list(state.unbind(0))
    for tokens in docs.token.tensor_split(docs.head[1:].cpu()):
        if not len(tokens):
            continue
        row = int(tokens[0]) // time
        fresh = int(positions.flatten()[tokens[0]]) == 0
        before = torch.zeros_like(state[:1]) if fresh else final[row][None]
        y, end = reference.delta(*(x[tokens][None] for x in flat), state=before)
        out = out.index_copy(0, tokens, y[0])
        final[row] = end[0]
    return out.view(exact[2].shape), torch.stack(final)
