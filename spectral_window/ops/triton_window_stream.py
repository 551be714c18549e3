"""Attention to a stream of keys on a GPU, where every query sees one interval.

These operators launch the kernels of `triton_window_kernels`, forward and backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from spectral_window.ops import triton_window_kernels as kernels
from spectral_window.ops.operators import operator
from spectral_window.ops.rotary import rotate
from spectral_window.ops.triton_launch import launching

FLOAT32_PRODUCTS = "ieee"  # of tl.dot; "tf32" would exceed the limit of 2e-6 by far


class Tiles(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        own: rows of a program.
        met: rows that it processes against them at a time.
        warps: warps per program.
        stages: loads in flight.
    """

    own: int
    met: int
    warps: int
    stages: int


def tiles(
    kernel: str, window: int, key_dim: int, value_dim: int, dtype: torch.dtype, groups: bool
) -> Tiles:
    """Return the tiles of a kernel.

    For small windows tiles are small: the part of a tile beyond the window is computed in vain.
    Tests check that no choice spills registers.

    Args:
        kernel: "attend", "attend_queries" or "attend_keys".
        window: W.
        key_dim: K, padded to a power of two.
        value_dim: V, padded to a power of two.
        dtype: of the inputs.
        groups: whether the GPU multiplies by whole warp groups (64 rows at once, from NVIDIA's
            Hopper on). Others hold the operands in registers, where less fits.
    """
    wide = max(key_dim, value_dim)
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if wide <= 64 else Tiles(16, 16, 8, 1)
    if kernel == "attend" and (groups or wide <= 64):
        return Tiles(64, 64 if groups and wide <= 64 <= window else 32, 4, 2)
    if not groups or wide > 64:
        return Tiles(32, 32, 4 if wide <= 64 or kernel == "attend" else 8, 1)
    return Tiles(64, 64 if window >= 64 else 32, 4, 1)


def _multiplies_by_groups(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


# ---------------------------------------------------------------- operators


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    low: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend from T queries to a stream of S = P + T keys, of which they are the last T.

    Args:
        q: [B, T, H, K], not rotated, T >= 1; float32, bfloat16 or float16.
        k: [B, S, H, K], not rotated.
        v: [B, S, H, V].
        window: W; a query sees at most 2W - 1 places back.
        theta: base of the rotary embedding, or None.
        low: [B, T] int32; query number i of a row sees the places low[i] ... P + i.
        order: [B, T] int32; query number i, and place P + i, is the token in column order[i].
            low and order are None if P = 0 and each row is one document from place 0.

    Returns:
        out [B, T, H, V], 0 for queries that see nothing, and log2 of the sums of the softmax
        [B, H, T].
    """
    q, k, v = map(rows_of, (q, k, v))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    call = _Call(q, k, v, window, theta, low, order, lse)
    with launching(q):
        call.launch("attend", (q, k, v, out, lse, *call.tables), (q, k, v), (call.scale,))
    return out, lse


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    low: Tensor | None,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `grad` is that of `out`."""
    q, k, v, grad = map(rows_of, (q, k, v, grad))
    out = out.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    call = _Call(q, k, v, window, theta, low, order, lse)
    rows, scales = (q, k, v, grad), (call.scale, q.shape[3] ** -0.5)
    with launching(q):
        tensors = (q, k, v, out, grad, lse, delta, *call.tables, dq)
        call.launch("attend_queries", tensors, rows, scales)
        tensors = (q, k, v, grad, lse, delta, *call.tables, dk, dv)
        call.launch("attend_keys", tensors, rows, scales)
    return dq, dk, dv


def find_turns(
    x: Tensor, theta: float, key_dim: int, rows: int, near: int, step: int, start: int = 0
) -> Tensor:
    """Return cos and sin of the angles that the kernel of this name describes, on x's device.

    [2, rows, half of the padded head size] float32.
    """
    half = padded(key_dim) // 2
    turns = x.new_empty(2, rows, half, dtype=torch.float32)
    sizes = {"LOG_THETA": math.log(theta), "K": key_dim, "KH": half, "R": 8}
    with launching(x):
        kernels.find_turns[(triton.cdiv(rows, 8),)](turns, rows, near, step, start, **sizes)
    return turns


def padded(size: int) -> int:
    """Return the head size of a tile: a power of two that tl.dot supports."""
    return max(16, triton.next_power_of_2(size))


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(self, q, k, v, window, theta, low, order, lse):
        self.q, self.k, self.v, self.window, self.theta = q, k, v, window, theta
        self.documents = low is not None
        self.key, self.value = padded(q.shape[3]), padded(v.shape[3])
        names = ("attend", "attend_queries", "attend_keys")
        about = (window, self.key, self.value, q.dtype, _multiplies_by_groups(q.device))
        self.cut = {name: tiles(name, *about) for name in names}
        sizes = [size for cut in self.cut.values() for size in cut[:2]]
        self.near, self.step = max(sizes), min(sizes)
        self.rows = self.near + k.shape[1] // self.step + self.near // self.step
        self.scale = q.shape[3] ** -0.5 * math.log2(math.e)
        # a pointer that is never followed must be one all the same
        self.tables = [lse if x is None else x.contiguous() for x in (low, order, self._turns())]

    def _turns(self) -> Tensor | None:
        if self.theta is None:
            return None
        key = self.q.shape[3]
        return find_turns(self.q, self.theta, key, self.rows, self.near, self.step)

    def launch(self, name: str, tensors, strided, scales) -> None:
        batch, time, heads, key = self.q.shape
        stream, cut = self.k.shape[1], self.cut[name]
        before = 0 if name == "attend_keys" else (stream - time) // cut.own
        parts = triton.cdiv(stream, cut.own) - before
        strides = [x.stride(i) for x in strided for i in range(3)]
        sizes = (heads, time, stream, parts, self.window, self.rows, self.near, self.step)
        getattr(kernels, name)[(batch * heads * parts,)](
            *tensors,
            *strides,
            *sizes,
            *scales,
            K=key,
            KP=self.key,
            V=self.v.shape[3],
            VP=self.value,
            M=cut.own,
            N=cut.met,
            ROPE=self.theta is not None,
            DOCS=self.documents,
            GUARD=self.documents,
            PRECISION=FLOAT32_PRODUCTS if self.q.dtype == torch.float32 else "ieee",
            num_warps=cut.warps,
            num_stages=cut.stages,
        )


def rows_of(x: Tensor) -> Tensor:
    """Return x, or a copy in which the elements of a row are adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake(q, k, v, window, theta, low, order):
    batch, time, heads, _ = q.shape
    out = q.new_empty(batch, time, heads, v.shape[3])
    return out, q.new_empty(batch, heads, time, dtype=torch.float32)


def _fake_backward(q, k, v, window, theta, low, order, out, lse, grad):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


stream_attention_backward = operator("triton_window_backward", _run_backward, _fake_backward)


def _save(ctx, inputs, output):
    q, k, v, ctx.window, ctx.theta, low, order = inputs
    ctx.save_for_backward(q, k, v, low, order, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    q, k, v, low, order, out, lse = ctx.saved_tensors
    call = (q, k, v, ctx.window, ctx.theta, low, order)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        leaves = [x for x in (q, k, v) if x.requires_grad]
        with torch.enable_grad():
            grads = torch.autograd.grad(stream_products(*call), leaves, grad, create_graph=True)
        by_id = {id(x): d for x, d in zip(leaves, grads, strict=True)}
        return *(by_id.get(id(x)) for x in (q, k, v)), None, None, None, None
    return *stream_attention_backward(*call, out, lse, grad), None, None, None, None


stream_attention = operator("triton_window", _run, _fake, _save, _differentiate)


def stream_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    theta: float | None,
    low: Tensor | None,
    order: Tensor | None,
    block: int = 128,
) -> Tensor:
    """`stream_attention` in plain torch, for second derivatives.

    Differentiable any number of times, in at least float32. It computes a block of queries against
    the keys they can see at a time.
    """
    time, prefix = q.shape[1], k.shape[1] - q.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    place = torch.arange(k.shape[1], dtype=torch.int64, device=q.device)
    if low is None or order is None:
        low, order = ((place // window - 1).clamp(min=0) * window)[None], place[None]
    order = order.long().expand(q.shape[0], -1)

    def in_order(x: Tensor) -> Tensor:
        return x.take_along_dim(order[..., None, None], 1)

    def keys(x: Tensor) -> Tensor:
        return torch.cat((x[:, :prefix], in_order(x[:, prefix:])), 1).to(exact)

    query, key, value = in_order(q).to(exact), keys(k), keys(v)
    if theta is not None:
        query, key = rotate(query, place[prefix:], theta), rotate(key, place, theta)
    parts = []
    for start in range(0, time, block):
        own = slice(start, min(start + block, time))
        reach = slice(max(prefix + start - 2 * window + 1, 0), prefix + own.stop)
        at, seen = place[reach], low[:, own, None]
        visible = (at >= seen) & (at <= place[prefix:][own][:, None])
        scores = torch.einsum("bthk,bshk->bhts", query[:, own], key[:, reach])
        scores = scores * q.shape[-1] ** -0.5
        # a query that sees nothing would be NaN; its output is zero
        empty = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~(visible | empty)[:, None], -torch.inf)
        weights = scores.softmax(-1).masked_fill(empty[:, None], 0.0)
        parts.append(torch.einsum("bhts,bshv->bthv", weights, value[:, reach]))
    out = torch.cat(parts, 1).to(v.dtype)
    back = torch.zeros_like(order).scatter(1, order, place[: order.shape[1]].expand_as(order))
    return out.take_along_dim(back[..., None, None], 1)
