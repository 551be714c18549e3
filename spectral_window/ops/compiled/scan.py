"""The convolution as what it is, a recurrence: one pass over time, compiled by numba, for a CPU.

    h_t = z h_{t-1} + u_t,   y_t = sum_m gain_m Re h_t

The state is float64 and stays in registers over a few rows of time, many channels at once, so the
pass is bound by reading u and writing y. Documents need no rearranging: a position 0 clears the
state. A single token is the same pass with one row.

The gradient of u is the same recurrence backwards in time. With the gradient l_t of h_t,

    l_t = gain g_t + conj(z) l_{t+1},   du_t = Re sum_m l_t.

The gradient of z needs no l but the sensitivity s_t = dh_t / dz, which runs forwards beside h:

    s_t = z s_{t-1} + h_{t-1},   dL/dz = sum_t gain g_t s_t,   dgain = sum_t g_t Re h_t.

The two directions meet in blocks of 64 positions. The forward pass saves the state at the start of
each block, a checkpoint. The backward pass takes the blocks from the last to the first: inside one,
h and s run forwards from the checkpoint and from s = 0; what the block adds to dL/dz through all
later blocks is conj(l) s at its end; then l runs backwards through it. So no state inside a block
is ever stored. A second derivative goes through the chunked method, which is differentiable by
itself.

The kernels are in `scan_loops`; here they are called, and registered with torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_window.ops.chunked_spectral import differentiate_again
from spectral_window.ops.compiled import scan_loops
from spectral_window.ops.compiled.addresses import dense
from spectral_window.ops.compiled.pages import empty
from spectral_window.ops.compiled.scan_loops import BLOCK, LINE
from spectral_window.ops.modes import Modes

_NARROWEST, _WIDEST = 128, 256  # channels of a slice: long reads, but a block stays in the cache
PAST_CACHE = 4 << 20  # bytes of an output that is written past the cache: measured, twice as fast
_FORWARD = {
    torch.float32: scan_loops.forward_float32,
    torch.float64: scan_loops.forward_float64,
    torch.bfloat16: scan_loops.forward_bfloat16,
}
_BACKWARD = {
    torch.float32: scan_loops.backward_float32,
    torch.float64: scan_loops.backward_float64,
    torch.bfloat16: scan_loops.backward_bfloat16,
}


@lru_cache(maxsize=1024)
def _divided(batch: int, time: int, channels: int, threads: int) -> tuple[int, int]:
    """(groups of batch rows, slices of channels): as few slices as keep all threads busy to the
    end."""
    if batch * time * channels < 1 << 15:
        return 1, 1
    fewest = -(-channels // _WIDEST)
    counts = range(fewest, max(channels // _NARROWEST, fewest) + 1)
    slices = min(counts, key=lambda c: (-(-batch * c // threads) / c, c))
    return min(batch, 8 * threads), slices


def _inputs(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    positions: Tensor | None,
    tiles: tuple[int, int],
) -> list[Any]:
    """What both passes are given; the tensors must live until the call returns."""
    double = any(x is not None and x.dtype != torch.float32 for x in (decay, frequency, gain))
    modes = (
        None if x is None else dense(x.double() if double else x) for x in (decay, frequency, gain)
    )
    at = None if positions is None else dense(positions)
    groups, slices = tiles
    return [*modes, at, *u.shape, decay.shape[1], slices, groups]


def _streams(y: Tensor) -> bool:
    """Whether an output is written past the cache: it is large, and every vector lies where
    the instruction needs it."""
    size = y.element_size()
    aligned = y.shape[2] % LINE == 0 and y.data_ptr() % 64 == 0
    return aligned and y.numel() * size >= PAST_CACHE


def run(
    u: Tensor,
    modes: Modes,
    state: Tensor | None,
    positions: Tensor | None,
    *,
    save: bool = False,
    refuse: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`scan` as a plain call, without autograd and dispatch: for one token those take longer than
    the work.

    refuse: return None where a mode is not finite or a decay negative; what `out` holds is lost.
    out:    where y goes, [B, T, D] contiguous in u's dtype.
    """
    batch, time, channels = u.shape
    each = modes.decay.shape[1]
    dtype = u.dtype if u.dtype in _FORWARD else torch.float32
    x = dense(u.to(dtype))
    y = empty(x.shape, dtype) if out is None or out.dtype != dtype else out
    before = None if state is None else dense(state)
    final = x.new_empty((batch, channels, each, 2), dtype=torch.float64)
    checkpoints = None
    if save:
        checkpoints = x.new_empty(
            (batch, -(-time // BLOCK), 2, each, channels), dtype=torch.float64
        )
    refused = x.new_zeros(1, dtype=torch.int64) if refuse else None
    groups, slices = tiles = _divided(batch, time, channels, torch.get_num_threads())
    inputs = _inputs(x, *modes, positions, tiles)
    _FORWARD[dtype](groups * slices, inputs, _streams(y), checkpoints, refused, x, y, before, final)
    if refused is not None and refused[0]:
        return None
    if dtype != u.dtype:
        y = y.to(u.dtype) if out is None else out.copy_(y)
    return y, final, checkpoints


@torch.library.custom_op("spectral_window::scan", mutates_args=(), device_types="cpu")
def scan(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    state: Tensor,
    positions: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, T, D], modes [D, M], state [B, D, M, 2] float64, positions [B, T] or None.

    Returns (y [B, T, D], final state [B, D, M, 2], the checkpoints [B, blocks, 2, M, D], without
    blocks unless `save`).
    """
    y, final, checkpoints = run(u, Modes(decay, frequency, gain), state, positions, save=save)  # type: ignore[misc]
    if checkpoints is None:
        checkpoints = final.new_empty((u.shape[0], 0, 2, decay.shape[1], u.shape[2]))
    return y, final, checkpoints


@scan.register_fake
def _(u, decay, frequency, gain, state, positions, save):
    batch, time, channels = u.shape
    blocks = -(-time // BLOCK) if save else 0
    checkpoints = u.new_empty((batch, blocks, 2, decay.shape[1], channels), dtype=torch.float64)
    return u.new_empty(u.shape), state.new_empty(state.shape), checkpoints


@torch.library.custom_op("spectral_window::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    positions: Tensor | None,
    checkpoints: Tensor,
    grad: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, decay, frequency, gain and the initial state, given those of y and the
    final state."""
    dtype = u.dtype if u.dtype in _BACKWARD else torch.float32
    x, g = dense(u.to(dtype)), dense(grad.to(dtype))
    du = empty(x.shape, dtype)
    end = dense(grad_state)
    begin = torch.empty_like(end)
    groups, slices = tiles = _divided(*u.shape, torch.get_num_threads())
    inputs = _inputs(x, decay, frequency, gain, positions, tiles)
    sums = x.new_empty((groups, 3, *decay.shape), dtype=torch.float64)
    states = dense(checkpoints)
    _BACKWARD[dtype](groups * slices, inputs, _streams(du), states, x, g, du, end, begin, sums)
    d_decay, d_frequency, d_gain = (sums[:, i].sum(0) for i in range(3))  # no shared memory
    return (
        du.to(u.dtype),
        d_decay.to(decay.dtype),
        d_frequency.to(frequency.dtype),
        d_gain.to(decay.dtype),
        begin,
    )


@scan_backward.register_fake
def _(u, decay, frequency, gain, positions, checkpoints, grad, grad_state):
    return (
        u.new_empty(u.shape),
        *(torch.empty_like(x) for x in (decay, frequency, decay)),
        torch.empty_like(grad_state),
    )


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, grad, grad_state, _):
    u, decay, frequency, gain, state, positions, checkpoints = ctx.saved_tensors
    if (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    ):  # a second derivative is wanted
        modes = Modes(decay, frequency, gain)
        return *differentiate_again(u, modes, state, positions, grad, grad_state), None, None
    du, d_decay, d_frequency, d_gain, d_state = scan_backward(
        u,
        decay,
        frequency,
        gain,
        positions,
        checkpoints,
        grad.contiguous(),
        grad_state.contiguous(),
    )
    return du, d_decay, d_frequency, None if gain is None else d_gain, d_state, None, None


scan.register_autograd(_differentiate, setup_context=_save)
