"""Window attention in compiled code (numba), for float32 and bfloat16 on a CPU: its operators.

The kernels are in `window_loops`, and in `window_step` for a single token; here they are called,
and registered with torch. Kernels want the tokens of a document side by side, so rows with padding
inside are sorted first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_window.ops.chunked_window import chunked
from spectral_window.ops.compiled.addresses import dense
from spectral_window.ops.compiled.window_loops import (
    ANCHOR,
    SEGMENT,
    Call,
    attend,
    attend_backward,
    find_rotations,
    remember,
)
from spectral_window.ops.documents import Documents
from spectral_window.ops.tracing import may_bypass
from spectral_window.ops.window_state import WindowState


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    ring: tuple[Tensor, Tensor] | None,
    begin: Tensor | None,
    positions: Tensor | None,
    checked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], not rotated yet, T >= 1; float32 or bfloat16 on a CPU.

    ring: keys and values of the state [B, 2W, H, *]; begin [B] int64: the position of its next
    token. positions: [B, T] int64; None where all rows are one document without padding. checked:
    they are known to count on.

    Returns (out [B, T, H, V], key, value [B, 2W, H, *], position [B]): the last three are the state
    after each row's last token.
    """
    key, value = ring or (None, None)
    call = (q, k, v, window, theta, key, value, begin, positions, checked)
    # torch's dispatcher takes as long as a short call
    return (_forward if may_bypass(q, k, v, key, value) else window_attention)(*call)


def _call(q, k, v, window, theta, key, value, begin, positions):
    """What both passes are given; finds RoPE's rotations."""
    call = Call.of(q, k, v, window, theta, (key, value), begin, positions)
    if call.rotations is not None:
        find_rotations(call.rotations.shape[0] * -(-q.shape[1] // ANCHOR), call)
    return call


def _order(positions: Tensor | None, begin: Tensor | None, checked: bool) -> Tensor | None:
    """The order of the B*T tokens in which those of a document lie side by side and a continued one
    starts in column 0, as the kernels want it; None where it is so already. Raises ValueError where
    positions do not count on."""
    if positions is None:
        return None
    Documents(positions, checked=checked).check(begin)
    if not bool(((positions[:, 1:] > 0) & (positions[:, 1:] != positions[:, :-1] + 1)).any()):
        return None
    order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)  # tokens, then padding
    batch, time = order.shape
    row = torch.arange(batch, dtype=torch.int64, device=positions.device)
    return (order + row[:, None] * time).flatten()


def _gathered(order: Tensor, *tensors: Any) -> list[Tensor]:
    return [x.flatten(0, 1).index_select(0, order).view(x.shape) for x in tensors]


def _spread(order: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x).flatten(0, 1).index_copy_(0, order, x.flatten(0, 1)).view(x.shape)


def _forward(q, k, v, window, theta, ring_key, ring_value, begin, positions, checked):
    order = _order(positions, begin, checked)
    if order is not None:
        q, k, v, positions = _gathered(order, q, k, v, positions)
    batch, time, heads, key_dim = q.shape
    out = q.new_empty(v.shape)
    new_key = q.new_empty(batch, 2 * window, heads, key_dim)
    new_value = q.new_empty(batch, 2 * window, heads, v.shape[3])
    new_position = q.new_zeros(batch, dtype=torch.int64) if begin is None else dense(begin).clone()
    call = _call(q, k, v, window, theta, ring_key, ring_value, begin, positions)
    attend(batch * -(-time // SEGMENT) * heads, call, out)
    remember(batch * heads, call, new_key, new_value, new_position)
    return out if order is None else _spread(order, out), new_key, new_value, new_position


@torch.library.custom_op("spectral_window::window_attention", mutates_args=(), device_types="cpu")
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    ring_key: Tensor | None,
    ring_value: Tensor | None,
    begin: Tensor | None,
    positions: Tensor | None,
    checked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `attention`."""
    return _forward(q, k, v, window, theta, ring_key, ring_value, begin, positions, checked)


@window_attention.register_fake
def _(q, k, v, window, theta, ring_key, ring_value, begin, positions, checked):
    batch, _, heads, key_dim = q.shape
    key = q.new_empty(batch, 2 * window, heads, key_dim)
    value = q.new_empty(batch, 2 * window, heads, v.shape[3])
    return q.new_empty(v.shape), key, value, q.new_empty(batch, dtype=torch.int64)


@torch.library.custom_op(
    "spectral_window::window_attention_backward", mutates_args=(), device_types="cpu"
)
def window_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    ring_key: Tensor | None,
    ring_value: Tensor | None,
    begin: Tensor | None,
    positions: Tensor | None,
    grad: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and of the ring (empty where there is none), given those of the
    output and, unless None, of the new ring."""
    order = _order(positions, begin, True)
    if order is not None:
        q, k, v, grad, positions = _gathered(order, q, k, v, grad, positions)
    call = _call(q, k, v, window, theta, ring_key, ring_value, begin, positions)
    fresh = q.new_empty if positions is None else q.new_zeros  # padding is not written
    dq, dk, dv = (fresh(x.shape) for x in (q, k, v))
    d_key, d_value = (q.new_zeros(0 if x is None else x.shape) for x in (ring_key, ring_value))
    given = [x if x is None else dense(x) for x in (grad, grad_key, grad_value)]
    attend_backward(q.shape[0] * q.shape[2], call, *given, dq, dk, dv, d_key, d_value)
    if order is not None:
        dq, dk, dv = (_spread(order, x) for x in (dq, dk, dv))
    return dq, dk, dv, d_key, d_value


@window_attention_backward.register_fake
def _(q, k, v, window, theta, ring_key, ring_value, begin, positions, grad, grad_key, grad_value):
    like = [x.new_empty(x.shape) for x in (q, k, v)]
    return *like, *(q.new_empty(0 if x is None else x.shape) for x in (ring_key, ring_value))


def _save(ctx, inputs, output):
    q, k, v, ctx.window, ctx.theta, *rest, _ = inputs
    ctx.save_for_backward(q, k, v, *rest)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_key, grad_value, _):
    q, k, v, ring_key, ring_value, begin, positions = ctx.saved_tensors
    call = (q, k, v, ctx.window, ctx.theta, ring_key, ring_value, begin, positions)
    slots = (q.shape[0], 2 * ctx.window, q.shape[2])
    if grad is None:
        grad = torch.zeros_like(v)
    if grad_key is None and grad_value is not None:
        grad_key = q.new_zeros(*slots, q.shape[3])
    if grad_value is None and grad_key is not None:
        grad_value = v.new_zeros(*slots, v.shape[3])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiate_again(*call, grad, grad_key, grad_value)
    *d_qkv, d_key, d_value = window_attention_backward(*call, grad, grad_key, grad_value)
    d_ring = (None, None) if ring_key is None else (d_key, d_value)
    return *d_qkv, None, None, *d_ring, None, None, None


def _differentiate_again(
    q, k, v, window, theta, ring_key, ring_value, begin, positions, grad, grad_key, grad_value
):
    """The same gradients by operations that can be differentiated themselves."""
    leaves = [x for x in (q, k, v, ring_key, ring_value) if x is not None and x.requires_grad]
    documents = None if positions is None else Documents(positions, checked=True)
    with torch.enable_grad():
        state = None if ring_key is None else WindowState(ring_key, ring_value, begin)
        out, after = chunked(q, k, v, window, theta, state, documents)
        given = [
            (y, g)
            for y, g in ((out, grad), (after.key, grad_key), (after.value, grad_value))
            if g is not None and y.requires_grad
        ]
        outputs, gradients = zip(*given, strict=True)
        derivatives = torch.autograd.grad(
            outputs, leaves, gradients, create_graph=True, allow_unused=True
        )
    by_id = {id(x): d for x, d in zip(leaves, derivatives, strict=True)}
    d_q, d_k, d_v, d_key, d_value = (by_id.get(id(x)) for x in (q, k, v, ring_key, ring_value))
    return d_q, d_k, d_v, None, None, d_key, d_value, None, None, None


window_attention.register_autograd(_differentiate, setup_context=_save)
