"""The local branch: causal attention in chunks of W tokens, to the own chunk and the one before.

A query at position t sees (t mod W) + 1 + W keys, fewer in the first chunk; `reference.visible` is
the rule, with a drawing. The chunks are counted from position 0 of each document. So the state of a
row is at most 2W keys and values, in a ring buffer: the key of position p is in slot p mod 2W. The
table of methods is at the end of this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops import reference
from spectral_window.ops.chunked_window import (
    attend,
    chunked,
    documents_from,
    empty_of,
    last_two_chunks,
    next_state,
    rotated,
)
from spectral_window.ops.documents import Documents, given_documents
from spectral_window.ops.methods import (
    Method,
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
from spectral_window.ops.rotary import check_theta, rotate
from spectral_window.ops.tracing import readable
from spectral_window.ops.window_state import WindowState, slot_positions


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    rope_theta: float | None = None,
    state: WindowState | None = None,
    positions: Tensor | Documents | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, WindowState]:
    """Attend from every query to its own chunk, causally, and to the whole chunk before it.

    Softmax attention, paper section 1.

    Args:
        q: [B, T, H, K] floating; any T >= 0 and B >= 0.
        k: [B, T, H, K].
        v: [B, T, H, V].
        window: W >= 1, the chunk length.
        rope_theta: base of the rotary embedding that is applied to q and k (interleaved pairs);
            None if they are rotated already.
        state: the state that an earlier call for the same rows returned, or None.
        positions: documents and padding, see `spectral_window.ops`.
        cu_seqlens: the same as offsets.
        method: a name in METHODS["window"], or "auto".

    Returns:
        out [B, T, H, V] (0 at padding), and the state after the last token of each row.

    Raises:
        UserError: a bad argument (a ValueError); raised before any work.
        UserTypeError: an argument of a wrong type or dtype (a TypeError).

    Example:
        >>> q, k, v = (torch.randn(1, 10, 2, 8) for _ in range(3))
        >>> out, state = window_attention(q, k, v, window=4)
        >>> out.shape, state.key.shape, state.position
        (torch.Size([1, 10, 2, 8]), torch.Size([1, 8, 2, 8]), tensor([10]))
    """
    _check(q, k, v, window, rope_theta, state)
    chosen = resolve("window", method, q, k, v, *(state or ())[:2])
    begin = None if state is None else state.position
    documents = given_documents(positions, cu_seqlens, q, begin)
    if documents is not None:
        documents.check(begin)
    if not q.numel():
        after = empty_of(k, v, window) if state is None else state
        return q @ k.transpose(-1, -2) @ v if q.shape[1] else v.clone(), after
    return chosen.function(q, k, v, window, rope_theta, state, documents)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rope_theta: float | None,
    state: WindowState | None,
) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise UserError(f"window is {window!r} (window_attention): expected a whole number >= 1")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise UserError(
            f"q, k, v have shapes {shapes} (window_attention): expected [B, T, H, K] twice "
            "and [B, T, H, V]"
        )
    if not q.dtype.is_floating_point or q.dtype != k.dtype or q.dtype != v.dtype:
        raise UserTypeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype} (window_attention): "
            "expected one floating dtype"
        )
    if not (q.device == k.device == v.device):
        raise UserError(
            f"q, k, v are on {q.device}, {k.device}, {v.device} (window_attention): "
            "move them together"
        )
    if rope_theta is not None:
        check_theta(rope_theta)
        if q.shape[-1] % 2:
            raise UserError(
                f"head size {q.shape[-1]} is odd (window_attention): rotary needs an even one"
            )
    if state is not None:
        want = (q.shape[0], 2 * window, *q.shape[2:])
        if state.key.shape != want or state.value.shape != (*want[:3], v.shape[3]):
            raise UserError(
                f"state holds keys {tuple(state.key.shape)} (window_attention): expected {want}; "
                "it belongs to another batch, window or head size"
            )
        for name, tensor, dtype in zip(
            state._fields, state, (k.dtype, k.dtype, torch.int64), strict=True
        ):
            if tensor.dtype != dtype or tensor.device != k.device:
                raise UserError(
                    f"{name} of the state is {tensor.dtype} on {tensor.device} (window_attention): "
                    f"expected {dtype} on {k.device}"
                )
        if state.position.shape != want[:1]:
            raise UserError(
                f"position of the state is {tuple(state.position.shape)} (window_attention): "
                f"expected {want[:1]}, a row's next position"
            )


# ------------------------------------------------------------------------------ the methods
#
# Each is called with q, k, v (not empty), window, theta, state or None, documents or None.


def _tiled(q, k, v, window, theta, state, documents):
    from spectral_window.ops.compiled.window import attention

    checked = documents is None or documents.checked or readable(documents.positions)
    positions = _positions(documents)
    out, *after = attention(q, k, v, window, theta, *_state_parts(state), positions, checked)
    return out, WindowState(*after)


def _triton(q, k, v, window, theta, state, documents):
    from spectral_window.ops.triton_window import attention

    out, *after = attention(q, k, v, window, theta, *_state_parts(state), _positions(documents))
    return out, WindowState(*after)


def _state_parts(state: WindowState | None) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Return (keys and values, position) of a state."""
    return (None, None) if state is None else (state[:2], state.position)


def _positions(documents: Documents | None) -> Tensor | None:
    return None if documents is None else documents.positions


def _step_compiled(q, k, v, window, theta, state, documents):
    from spectral_window.ops.compiled.window_step import step

    state = empty_of(k, v, window) if state is None else state
    ring, begin = state[:2], state.position
    out, *after = step(q, k, v, window, theta, ring, begin, _positions(documents))
    return out, WindowState(*after)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState | None,
    documents: Documents | None,
) -> tuple[Tensor, WindowState]:
    """Process one token per row from the ring buffer.

    No shape depends on data, so torch.compile makes one graph of it.
    """
    state = empty_of(k, v, window) if state is None else state
    position = state.position if documents is None else documents.positions[:, 0]
    if theta is not None:
        q, k = (rotate(x, position[:, None], theta) for x in (q, k))
    token = position >= 0
    at = torch.where(token, position, state.position)
    slot = torch.arange(2 * window, dtype=torch.int64, device=q.device)
    here = (slot == (at % (2 * window))[:, None])[..., None, None]
    # a slot is visible if it holds one of the last positions of the current document
    slot_position = slot_positions(at, window)
    live = slot_position >= 0
    key = torch.where(here, k, torch.where(live[..., None, None], state.key, 0.0))
    value = torch.where(here, v, torch.where(live[..., None, None], state.value, 0.0))
    mask = live | here[..., 0, 0]
    out = attend(q, key, value, mask[:, None])
    out = torch.where(token[:, None, None, None], out, 0.0)
    # clear the slots that the next query cannot see
    after = slot_positions(at + 1, window)[..., None, None] >= 0
    is_token = token[:, None, None, None]
    return out, WindowState(
        torch.where(is_token, torch.where(after, key, 0.0), state.key),
        torch.where(is_token, torch.where(after, value, 0.0), state.value),
        torch.where(token, at + 1, state.position),
    )


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    state: WindowState | None,
    documents: Documents | None,
) -> tuple[Tensor, WindowState]:
    """Apply the reference to every document separately, with the keys of the state before it."""
    if state is None and documents is None:
        q, k = rotated(q, k, theta, torch.arange(q.shape[1], dtype=torch.int64, device=q.device))
        out = reference.window(q.double(), k.double(), v.double(), window)
        return out.to(v.dtype), last_two_chunks(k, v, window)
    state = empty_of(k, v, window) if state is None else state
    documents = documents_from(state, documents, q)
    documents.check(state.position, wait=True)
    q, k = rotated(q, k, theta, documents.positions)
    tokens, flat = documents.tokens, [x.flatten(0, 1) for x in (q, k, v)]
    out = torch.zeros_like(flat[2])
    for head, place in tokens.each():
        row, first = int(tokens.row[head]), int(tokens.position[head])
        query, key, value = (x[place.to(q.device)] for x in flat)
        if first:
            at = torch.tensor([first], dtype=torch.int64, device="cpu")
            (slot_position,) = slot_positions(at, window)
            slots = slot_position.argsort()
            slots = slots[slot_position[slots] >= 0]
            first = int(slot_position[slots[0]])
            key = torch.cat((state.key[row, slots], key))
            value = torch.cat((state.value[row, slots], value))
        query, key, value = (x[None].double() for x in (query, key, value))
        answer = reference.window(query, key, value, window, first)[0].to(v.dtype)
        out = out.index_copy(0, place.to(q.device), answer)
    return out.view(v.shape), next_state(k, v, window, state, documents)


_HALF_TO_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)
_COMPILED = first_of(numba_on_cpu(torch.float32, torch.bfloat16), not_exported, not_transformed)

enrol(
    "window",
    Method(
        "step_compiled",
        _step_compiled,
        "one token: attention to the ring of 2W keys in compiled code (numba), on a CPU",
        first_of(one_token, _COMPILED, past_the_dispatcher),
    ),
    Method(
        "step",
        _step,
        "one token: attention to the ring of 2W keys in plain torch, constant state and time",
        one_token,
    ),
    Method(
        "tiled",
        _tiled,
        "tiles of 16 queries in compiled code (numba), only what is seen, RoPE inside, O(T W)",
        _COMPILED,
    ),
    Method(
        "triton",
        _triton,
        "tiles of queries in one Triton kernel for a GPU, only what is seen, RoPE inside, O(T W)",
        first_of(triton_on_gpu(*_HALF_TO_FLOAT32), not_transformed),
        not_interpreted,
    ),
    Method("chunked", chunked, "one attention call over all chunks, O(T W), plain torch"),
    Method(
        "reference",
        _reference,
        "dense masked softmax in float64, query by query: the truth for the others",
    ),
)
