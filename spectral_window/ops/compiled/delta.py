"""The delta-rule memory in compiled code (numba), for float32 and bfloat16 on a CPU.

A row is cut into chunks (`delta_loops.plan`), and the chunks are taken in segments, which bounds
the scratch memory. For each segment the systems of its chunks are found, then the states run
through it. The kernels are in `delta_loops`, and in `delta_step` for a single token.

The forward pass saves the state at the start of every chunk that continues a document, a
checkpoint: at most one for 64 tokens. The backward pass takes the segments from the last to the
first. A second derivative goes through the chunked method, which is differentiable by itself.

Everything is float32, and no setting of torch touches it. Relative to the float64 recurrence, per
channel and block of 64 positions, outputs, states and gradients are within 2e-6 for keys of length
1 and beta <= 1. Two gradients need more. Where all keys nearly agree (at 0.9 of one another), what
is written is a small difference of large numbers: outputs and states stay within 2e-6, single
blocks of gradients reach 4e-6. And where a document has forgotten the state that entered it before
its first chunk ends, that state's gradient is as exact as those of the tokens, not as itself.

Bits do not depend on the number of threads, on the other rows of a batch, or on whether a call is
split after a multiple of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops.chunked_delta import differentiate_again
from spectral_window.ops.compiled import delta_loops
from spectral_window.ops.compiled.addresses import dense
from spectral_window.ops.compiled.delta_loops import CHUNK, SYSTEM, Call
from spectral_window.ops.compiled.pages import empty
from spectral_window.ops.compiled.simd import LANES, padded
from spectral_window.ops.documents import Documents, anywhere
from spectral_window.ops.tracing import may_bypass

_WIDEST, _NARROWEST = 8, 2  # vectors of a block of columns
_SEGMENT = 16  # chunks, where the scratch memory allows
_SCRATCH = 64 << 20  # bytes
_CACHED = 2 << 20  # bytes of scratch memory that a core's cache still holds


def _call(q, k, v, beta, decay, positions) -> Call:
    """Laid out for the kernels."""
    batch, time = q.shape[:2]
    positions = None if positions is None else dense(positions)
    most = -(-time // CHUNK)
    if positions is not None:
        most += int((positions == 0).sum(1).max())
    order = torch.empty(batch, time, dtype=torch.int64, device="cpu")
    chunks = order.new_empty(batch, most, 3)
    lengths = order.new_empty(batch)
    delta_loops.plan(batch, time, most, positions, order, chunks, lengths)
    q, k, v, beta = (dense(x) for x in (q, k, v, beta.float()))
    decay = None if decay is None else dense(decay.float())
    return Call(q, k, v, beta, decay, order, chunks, lengths)


def _segments(call: Call, numbers: int) -> tuple[int, list[int]]:
    """(chunks of a segment, the first chunk of each), so that `numbers` float32 numbers a chunk and
    head fit into the scratch memory.

    On one thread they fit into its cache. A team waits for its last thread after each kernel, and
    longer the busier the machine is, so it gets few segments and large ones.
    """
    chunks = int(call.lengths.max())
    memory = _CACHED if torch.get_num_threads() == 1 else _SCRATCH
    size = max(1, min(_SEGMENT, chunks, memory // (4 * call.heads * numbers)))
    return size, list(range(0, chunks, size))


def _width(call: Call) -> int:
    """Vectors of a block of columns: narrower where threads would have nothing to do."""
    width = min(_WIDEST, padded(call.v.shape[3]) // LANES)
    while width > _NARROWEST:
        if (
            call.heads * delta_loops.column_blocks(call.v.shape[3], width)
            >= 2 * torch.get_num_threads()
        ):
            break
        width = -(-width // 2)
    return width


def _panels(state: Tensor) -> Tensor:
    """A state [B, H, K, V] in panels [B, H, V / 16, K, 16], padded with zeros; new memory."""
    *_, key_dim, value_dim = state.shape
    more = (0, padded(value_dim) - value_dim, 0, padded(key_dim) - key_dim)
    panels = F.pad(state.float(), more).unflatten(3, (-1, LANES)).transpose(2, 3)
    return panels.clone(memory_format=torch.contiguous_format)


def _matrix(panels: Tensor, state: Tensor) -> Tensor:
    """The reverse: as `state` is shaped."""
    key_dim, value_dim = state.shape[2:]
    return panels.transpose(2, 3).flatten(3)[:, :, :key_dim, :value_dim].contiguous()


def _checkpoints_shape(q: Tensor, v: Tensor, save: bool) -> tuple[int, ...]:
    """Of the checkpoints: the states before chunks that are not their document's first; none
    unless `save`."""
    batch, time, heads, key_dim = q.shape
    slots = (time - 1) // CHUNK if save else 0
    return batch, slots, heads, padded(v.shape[3]) // LANES, padded(key_dim), LANES


def _scratch(chunks: int, numbers: int) -> Tensor:
    return empty((chunks * numbers,), torch.float32)


def memory(
    inputs: Sequence[Tensor], state: Tensor, positions: Tensor | None, checked: bool
) -> tuple[Tensor, Tensor]:
    """`delta_memory` for checked inputs that are not empty, on a CPU.

    inputs: q, k [B, T, H, K], v [B, T, H, V] float32 or bfloat16, beta [B, T, H, 1] and, where
            there is one, decay [B, T, H, 1]; state [B, H, K, V], positions [B, T] int64 or None.
    checked: the positions are known to count on.

    Returns out [B, T, H, V] in v's dtype and the final state [B, H, K, V] float32.
    """
    q, k, v, beta, *decay = inputs
    call = (q, k, v, beta.squeeze(-1), decay[0].squeeze(-1) if decay else None, state.float())
    if may_bypass(*call):
        return _forward(*call, positions, checked, False)[:2]
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call)
    return delta_rule(*call, positions, checked, learns)[:2]


def _forward(q, k, v, beta, decay, state, positions, checked, save):
    if positions is not None:
        Documents(positions, checked=checked).check(anywhere(len(positions)))
    call = _call(q, k, v, beta, decay, positions)
    out = empty(v.shape, v.dtype) if positions is None else v.new_zeros(v.shape)
    panels = _panels(state)
    shape = _checkpoints_shape(q, v, save)  # documents may need fewer
    checkpoints = empty(shape, torch.float32) if positions is None else state.new_zeros(shape)
    width, (count, firsts) = _width(call), _segments(call, SYSTEM)
    systems = _scratch(call.heads * count, SYSTEM)
    tiles = call.heads * delta_loops.column_blocks(v.shape[3], width)
    for first in firsts:
        delta_loops.find_systems(call.heads * count, call, first, count, systems)
        segment = call, first, count, systems, width, panels, checkpoints if save else None, out
        delta_loops.advance(tiles, *segment)
    return out, _matrix(panels, state), checkpoints


@torch.library.custom_op("spectral_window::delta_rule", mutates_args=(), device_types="cpu")
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor,
    positions: Tensor | None,
    checked: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `memory`; beta and decay [B, T, H], state float32.

    Returns (out, final state, the checkpoints in panels [B, chunks, H, V / 16, K, 16], without
    chunks unless `save`).
    """
    return _forward(q, k, v, beta, decay, state, positions, checked, save)


@delta_rule.register_fake
def _(q, k, v, beta, decay, state, positions, checked, save):
    return (
        v.new_empty(v.shape),
        state.new_empty(state.shape),
        state.new_empty(_checkpoints_shape(q, v, save)),
    )


@torch.library.custom_op(
    "spectral_window::delta_rule_backward", mutates_args=(), device_types="cpu"
)
def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor,
    positions: Tensor | None,
    checkpoints: Tensor,
    grad: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, beta, decay (empty where there is none) and state, given those of
    the output and of the final state."""
    call = _call(q, k, v, beta, decay, positions)
    fresh = torch.empty if positions is None else torch.zeros  # padding is not written
    dq, dk, dv = (fresh(x.shape, dtype=x.dtype, device="cpu") for x in (q, k, v))
    d_beta = fresh(beta.shape, dtype=torch.float32, device="cpu")
    d_decay = None if decay is None else torch.zeros_like(d_beta)
    before, d_state = _panels(state), _panels(grad_state)
    values = CHUNK * padded(v.shape[3])
    count, firsts = _segments(call, SYSTEM + call.state + 2 * values)
    chunks, width = call.heads * count, _width(call)
    systems = _scratch(chunks, SYSTEM)
    scratch = _scratch(chunks, call.state), _scratch(chunks, values), _scratch(chunks, values)
    gradients = dv, dq, dk, d_beta, d_decay, d_state
    tiles = call.heads * delta_loops.column_blocks(v.shape[3], width)
    given, states = dense(grad), dense(checkpoints)
    for first in reversed(firsts):
        delta_loops.find_systems(chunks, call, first, count, systems)
        segment = call, first, count, systems, width, before, states, given, gradients, scratch
        delta_loops.retreat(tiles, *segment)
        delta_loops.collect(chunks, *segment)
    if decay is None or d_decay is None:
        d_decay = q.new_empty(0)
    else:
        d_decay = d_decay.to(decay.dtype)
    return dq, dk, dv, d_beta.to(beta.dtype), d_decay, _matrix(d_state, state)


@delta_rule_backward.register_fake
def _(q, k, v, beta, decay, state, positions, checkpoints, grad, grad_state):
    like = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    d_decay = q.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    return *like, d_decay, state.new_empty(state.shape)


def _save(ctx, inputs, output):
    *tensors, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # nobody differentiates the checkpoints: large zeros


def _differentiate(ctx, grad, grad_state, _):
    *tensors, positions, checkpoints = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(tensors[2])
    if grad_state is None:
        grad_state = torch.zeros_like(tensors[5])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return *differentiate_again(tensors, positions, grad, grad_state), *[None] * 3
    *d_inputs, d_decay, d_state = delta_rule_backward(
        *tensors, positions, checkpoints, grad, grad_state
    )
    return *d_inputs, None if tensors[4] is None else d_decay, d_state, *[None] * 3


delta_rule.register_autograd(_differentiate, setup_context=_save)
