"""The memory: keys and values in one matrix per head, written by the delta rule.

    S_t   = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,   a_t = exp(-decay_t)
    out_t = S_t^T q_t

The value that the memory returns for the key k_t moves towards v_t by the fraction beta_t. The
values of keys orthogonal to k_t do not change (Schlag et al. 2021, "Linear Transformers Are
Secretly Fast Weight Programmers"; with `decay`, the gated delta rule of Yang et al. 2025). For keys
of length 1 and 0 <= beta <= 2 no write can make the memory grow, since |I - beta k k^T| <= 1: a
beta of 1 replaces what the key held, a beta of 2 mirrors it. The table of methods is at the end of
this file.

Precision. The state is float32 (float64 for float64 inputs), whatever the inputs' dtype. On a CPU
`chunked` computes in float64 and rounds once, so neither autocast nor the precision setting of
float32 products affects it. On other devices it computes in float32 under that setting: with
`torch.set_float32_matmul_precision("highest")` the error is below 3e-6 of the output for nearly
equal keys and 1e-6 for others; with TF32 products it is about 1e-3. `triton` follows the setting
too, for float32 inputs; for 16-bit inputs it rounds the operands of products to their dtype and
keeps the state and every sum in float32, see `triton_delta`. A beta above 1 does not shrink earlier
roundings: in float32 the errors of compiled code are twice as large for 0 <= beta <= 2, and reach
3e-5 where all writes are mirrors of keys that agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops import reference
from spectral_window.ops.chunked_delta import chunked
from spectral_window.ops.documents import Documents, anywhere, documents_after, each_document
from spectral_window.ops.methods import (
    Method,
    Reason,
    enrol,
    first_of,
    not_exported,
    not_interpreted,
    not_transformed,
    numba_on_cpu,
    one_token,
    past_the_dispatcher,
    resolve,
    triton_on_gpu,
)
from spectral_window.ops.tracing import readable, without_autocast

EXACT = ("cpu",)  # devices on which `chunked` computes in float64, see the module's docstring


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
    """Write v at the key k by the fraction beta, then read at q, token by token in every head.

    Twice differentiable in q, k, v, beta, decay and state.

    Args:
        q: [B, T, H, K] floating; any T >= 0 and B >= 0.
        k: [B, T, H, K]; keys should have length 1.
        v: [B, T, H, V], in the dtype of q and k.
        beta: [B, T, H], any floating dtype, from 0 (no write) over 1 (replace the old value) to 2
            (mirror it).
        decay: [B, T, H], >= 0 and finite, in nats, applied before the token is written; None for
            no decay. (The negative logarithm of a_t.)
        state: [B, H, K, V], the state that an earlier call for the same rows returned, or None. It
            continues the first document of a row, unless that starts at position 0.
        positions: documents and padding, see `spectral_window.ops`.
        cu_seqlens: the same as offsets.
        method: a name in METHODS["delta"], or "auto".

    Returns:
        out [B, T, H, V] in v's dtype (0 at padding), and the state after the last token of each
        row, float32 (float64 for float64 inputs).

    Raises:
        UserError: a bad argument (a ValueError); raised before any work.
        UserTypeError: an argument of a wrong type or dtype (a TypeError).

    Example:
        A value is found again at its key:

        >>> key = torch.nn.functional.one_hot(torch.tensor([2, 5, 2]), 8).float().view(1, 3, 1, 8)
        >>> value = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)
        >>> out, state = delta_memory(key, key, value, torch.ones(1, 3, 1))
        >>> state[0, 0, 5].item(), state[0, 0, 2].item()
        (20.0, 30.0)
    """
    _check(q, k, v, beta, decay, state)
    given = positions.positions if isinstance(positions, Documents) else positions
    given = cu_seqlens if given is None else given
    chosen = resolve("delta", method, q, k, v, beta, decay, state, given)
    documents = documents_after(state, positions, cu_seqlens, q)
    final_dtype = state_dtype(q.dtype)
    if not q.numel() or not v.numel():
        shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        return v.clone(), q.new_zeros(shape, dtype=final_dtype) if state is None else state.to(
            final_dtype
        )
    inputs = [q, k, v, beta[..., None], *([] if decay is None else [decay[..., None]])]
    with without_autocast(q.device):
        out, final = chosen.function(inputs, state, documents)
    return out.to(v.dtype), final.to(final_dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the state's dtype for inputs of `dtype`: at least float32, since it sums the past."""
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


def _initial_state(inputs: list[Tensor], state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the state to start from, in `dtype`."""
    q, v = inputs[0], inputs[2]
    if state is None:
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    return state.to(dtype)


# ------------------------------------------------------------------------------ the methods
#
# Each is called with [q, k, v, beta [B, T, H, 1]] and optionally decay [B, T, H, 1] (not empty),
# state or None, documents or None.


def _chunked(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    q = inputs[0]
    exact = q.device.type in EXACT or q.dtype == torch.float64
    before = _initial_state(inputs, state, torch.float64 if exact else torch.float32)
    if documents is not None:
        documents.check(None if state is None else anywhere(q.shape[0]), wait=True)
    return chunked(inputs, before, documents)


def _step(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Process one token per row. A padded row keeps its state; position 0 resets it.

    It uses sums of products: matrix products may be rounded to bfloat16 by a setting.
    """
    state = _initial_state(inputs, state, state_dtype(inputs[0].dtype))
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
    exact, before = [x.double() for x in inputs], _initial_state(inputs, state, torch.float64)

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return reference.delta(*args[:-1], state=args[-1])

    if documents is None:
        return run(*exact, before)
    documents.check(None if state is None else anywhere(len(before)), wait=True)
    return each_document(run, exact, before, documents, exact[2])


def _compiled(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.compiled.delta import memory

    before = _initial_state(inputs, state, torch.float32)
    positions = None if documents is None else documents.positions
    checked = documents is None or documents.checked or readable(documents.positions)
    return memory(inputs, before, positions, checked)


def _step_compiled(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.compiled.delta_step import step

    positions = None if documents is None else documents.positions
    return step(inputs, _initial_state(inputs, state, torch.float32), positions)


def _triton(
    inputs: list[Tensor], state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.triton_delta import memory

    positions = None if documents is None else documents.positions
    return memory(inputs, None if state is None else state.float(), positions)


def _few_keys(x: Tensor, *_: object) -> Reason:
    """Reason of kernels that hold all rows of the state in registers."""
    return "its kernels hold at most 256 channels of a key" if x.shape[-1] > 256 else None


CHECKED = (32, 64, 128, 192)  # channels of a head for which tests check the machine code


def _compiled_wrongly(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    beta: Tensor | None = None,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    *_: object,
) -> Reason:
    """Reason of kernels that an old assembler compiles wrongly (see `triton_launch`), or may."""
    sizes = {q.shape[-1], q.shape[-1] if v is None else v.shape[-1]}
    checked = len(sizes) == 1 and sizes <= set(CHECKED) and q.dtype != torch.float16
    if not q.is_cuda or (checked and positions is None):
        return None
    from spectral_window.ops.triton_launch import sound

    if sound(q.device):
        return None
    return (
        "on Hopper, documents, float16 and heads of other than 32, 64, 128 or 192 channels need "
        "the assembler of CUDA 13: pip install 'spectral-window[gpu]'"
    )


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
        "triton",
        _triton,
        "a triangular system in each chunk and a scan over chunks, O(T), Triton kernels for a GPU",
        first_of(
            triton_on_gpu(torch.float32, torch.bfloat16, torch.float16), not_transformed, _few_keys
        ),
        first_of(not_interpreted, _compiled_wrongly),
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
