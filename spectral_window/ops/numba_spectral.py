"""The convolution as what it is, a recurrence: one pass over time, compiled by numba, for a CPU.

    h_t = z h_{t-1} + u_t,   y_t = sum_m gain_m Re h_t

The inner loop runs over a row of contiguous channels and becomes vector instructions; the state is
float64 and stays in cache, so the pass is bound by reading u and writing y. Documents need no
rearranging: a position 0 clears the state.

Backwards in time, with the adjoint l_t = gain g_t + conj(z) l_{t+1}:

    du_t = Re sum_m l_t,   dz = sum_t conj(h_{t-1}) l_t,   dgain = sum_t g_t Re h_t

The forward pass keeps the state at every block of 64 positions; the backward pass recomputes the
block's states into a small buffer. A second derivative goes through the chunked method, which is
differentiable by itself.

Threads are Python threads over rows and, where there are fewer rows than threads, over halves of
the channels: the compiled code releases the interpreter's lock, and there is no second thread pool
beside torch's setting.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from spectral_window.ops.chunked_spectral import chunked
from spectral_window.ops.modes import Modes, powers

BLOCK = 64
# fused multiply-adds, but NaN and infinity keep their meaning
_jit = numba.njit(fastmath={"contract"}, error_model="numpy", nogil=True, cache=True)


@_jit
def _advance(u, zr, zi, hr, hi):
    """h <- z h + u over a row of channels."""
    for j in range(u.shape[0]):
        re = zr[j] * hr[j] - zi[j] * hi[j] + u[j]
        hi[j] = zi[j] * hr[j] + zr[j] * hi[j]
        hr[j] = re


@_jit
def _advance_and_read(u, zr, zi, hr, hi, y):
    """The same with y = Re h: the whole work of a channel with one mode and no gain."""
    for j in range(u.shape[0]):
        re = zr[j] * hr[j] - zi[j] * hi[j] + u[j]
        hi[j] = zi[j] * hr[j] + zr[j] * hi[j]
        hr[j] = re
        y[j] = re


@_jit
def _follow(u, zr, zi, pr, pi, hr, hi):
    """h = z p + u: the state after a position from the one before it."""
    for j in range(u.shape[0]):
        hr[j] = zr[j] * pr[j] - zi[j] * pi[j] + u[j]
        hi[j] = zi[j] * pr[j] + zr[j] * pi[j]


@_jit
def _add_scaled(y, gain, hr):
    for j in range(y.shape[0]):
        y[j] += gain[j] * hr[j]


@_jit
def _forward(u, positions, zr, zi, gain, plain, hr, hi, y, kept_r, kept_i, acc):
    """One row of the batch. u, y [T, D]; positions [T] or empty; zr, zi, gain, hr, hi [M, D]; kept
    [blocks, M, D].

    `plain` says one mode and no gain. hr, hi hold the initial state and end as the final one.
    """
    documents = positions.shape[0] > 0
    keep = kept_r.shape[0] > 0
    modes = zr.shape[0]
    for t in range(u.shape[0]):
        if keep and t % BLOCK == 0:
            kept_r[t // BLOCK] = hr
            kept_i[t // BLOCK] = hi
        if documents:
            if positions[t] < 0:
                y[t] = 0
                continue
            if positions[t] == 0:
                hr[:] = 0
                hi[:] = 0
        if plain:
            _advance_and_read(u[t], zr[0], zi[0], hr[0], hi[0], y[t])
        else:
            acc[:] = 0
            for m in range(modes):
                _advance(u[t], zr[m], zi[m], hr[m], hi[m])
                _add_scaled(acc, gain[m], hr[m])
            y[t] = acc


@_jit
def _retreat(g, gain, zr, zi, lr, li, pr, pi, hr, qr, qi, gg, du):
    """One position backwards in time for one mode.

    l holds conj(z) l_{t+1} and ends as conj(z) l_t; p is h_{t-1}, h is h_t; q and gg accumulate.
    """
    for j in range(g.shape[0]):
        re = lr[j] + gain[j] * g[j]
        im = li[j]
        du[j] += re
        qr[j] += pr[j] * re + pi[j] * im
        qi[j] += pr[j] * im - pi[j] * re
        gg[j] += g[j] * hr[j]
        lr[j] = zr[j] * re + zi[j] * im
        li[j] = zr[j] * im - zi[j] * re


@_jit
def _backward(u, positions, zr, zi, gain, kept_r, kept_i, g, lr, li, du, qr, qi, gg, br, bi, acc):
    """One row of the batch. l [M, D] enters as the final state's gradient (of h_{T-1}) and ends as
    the initial one's.

    br, bi [BLOCK + 1, M, D] are room for a block's states; slot i holds the state before position
    i of the block.
    """
    documents = positions.shape[0] > 0
    modes = zr.shape[0]
    time = u.shape[0]
    zero = np.zeros_like(acc)
    # `l` must hold conj(z) l_{t+1}; the final gradient comes without the factor, so it is added
    # below instead
    end_r = lr.copy()
    end_i = li.copy()
    lr[:] = 0
    li[:] = 0
    fresh_end = True
    for block in range((time - 1) // BLOCK, -1, -1):
        begin = block * BLOCK
        count = min(BLOCK, time - begin)
        br[0] = kept_r[block]
        bi[0] = kept_i[block]
        for i in range(count):
            t = begin + i
            if documents and positions[t] < 0:
                br[i + 1] = br[i]
                bi[i + 1] = bi[i]
                continue
            begins = documents and positions[t] == 0
            for m in range(modes):
                past_r, past_i = (zero, zero) if begins else (br[i, m], bi[i, m])
                _follow(u[t], zr[m], zi[m], past_r, past_i, br[i + 1, m], bi[i + 1, m])
        for i in range(count - 1, -1, -1):
            t = begin + i
            if documents and positions[t] < 0:
                du[t] = 0
                continue
            if fresh_end:  # the last token: its l also receives the final state's gradient
                lr += end_r
                li += end_i
                fresh_end = False
            acc[:] = 0
            begins = documents and positions[t] == 0  # its past is an empty state
            for m in range(modes):
                past_r, past_i = (zero, zero) if begins else (br[i, m], bi[i, m])
                _retreat(
                    g[t],
                    gain[m],
                    zr[m],
                    zi[m],
                    lr[m],
                    li[m],
                    past_r,
                    past_i,
                    br[i + 1, m],
                    qr[m],
                    qi[m],
                    gg[m],
                    acc,
                )
            du[t] = acc
            if begins:
                lr[:] = 0
                li[:] = 0
    if fresh_end:  # no token at all: the state passed through
        lr += end_r
        li += end_i


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="spectral-scan")


def _run(tasks: list) -> None:
    """Call every task, on as many threads as torch is set to use."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        for task in tasks:
            task()
        return
    for done in [_pool(os.getpid(), torch.get_num_threads()).submit(task) for task in tasks]:
        done.result()


def _parts(batch: int, channels: int) -> list[tuple[int, slice]]:
    """(row, channels) of every task: whole rows, cut only where there are fewer rows than
    threads."""
    threads = max(torch.get_num_threads(), 1)
    cuts = max(min(-(-threads // max(batch, 1)), channels // 64), 1)
    edges = [channels * i // cuts for i in range(cuts + 1)]
    return [(b, slice(edges[i], edges[i + 1])) for b in range(batch) for i in range(cuts)]


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _planes(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[..., D, M, 2] -> the real and imaginary planes, [..., M, D] each, float64 and contiguous."""
    pair = x.detach().double().movedim(-1, 0).transpose(-1, -2).contiguous().numpy()
    return pair[0], pair[1]


def _prepare(
    u: Tensor, decay: Tensor, frequency: Tensor, gain: Tensor | None, positions: Tensor | None
):
    """(u as float32 or float64, z planes, gain [M, D], positions [B, T or 0]) as numpy arrays."""
    x = _array(u if u.dtype in (torch.float32, torch.float64) else u.float())
    one = torch.ones(1)
    zr, zi = _planes(powers(Modes(decay, frequency), one)[..., 0, :])
    weight = _array((torch.ones_like(decay) if gain is None else gain).double().T)
    at = np.empty((u.shape[0], 0), np.int64) if positions is None else _array(positions)
    return x, zr, zi, weight, at


@torch.library.custom_op("spectral_window::scan", mutates_args=(), device_types="cpu")
def scan(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    state: Tensor,
    positions: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, T, D], modes [D, M], state [B, D, M, 2] float64, positions [B, T] or None.

    Returns (y [B, T, D], final state [B, D, M, 2], the states at the beginning of every block [B,
    blocks, 2, M, D], without blocks unless `keep`).
    """
    batch, time, channels = u.shape
    x, zr, zi, weight, at = _prepare(u, decay, frequency, gain, positions)
    hr, hi = (plane.copy() for plane in _planes(state))
    y = np.empty_like(x)
    modes = zr.shape[0]
    blocks = -(-time // BLOCK) if keep else 0
    kept = np.empty((batch, blocks, 2, modes, channels))
    plain = gain is None and modes == 1

    def task(b, c):
        h = hr[b][:, c].copy(), hi[b][:, c].copy()
        kr, ki = np.empty((blocks, modes, h[0].shape[1])), np.empty((blocks, modes, h[0].shape[1]))
        z = zr[:, c].copy(), zi[:, c].copy()
        acc = np.empty(h[0].shape[1])
        _forward(x[b][:, c], at[b], *z, weight[:, c].copy(), plain, *h, y[b][:, c], kr, ki, acc)
        hr[b][:, c], hi[b][:, c] = h
        kept[b, :, 0, :, c], kept[b, :, 1, :, c] = kr, ki

    _run([lambda b=b, c=c: task(b, c) for b, c in _parts(batch, channels)])
    final = torch.from_numpy(np.stack((hr, hi), -1)).transpose(1, 2).contiguous()
    return torch.from_numpy(y).to(u.dtype), final, torch.from_numpy(kept)


@scan.register_fake
def _(u, decay, frequency, gain, state, positions, keep):
    batch, time, channels = u.shape
    blocks = -(-time // BLOCK) if keep else 0
    kept = u.new_empty((batch, blocks, 2, decay.shape[1], channels), dtype=torch.float64)
    return u.new_empty(u.shape), state.new_empty(state.shape), kept


@torch.library.custom_op("spectral_window::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    positions: Tensor | None,
    kept: Tensor,
    grad: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, decay, frequency, gain and the initial state, given those of y and the
    final state."""
    batch, _, channels = u.shape
    x, zr, zi, weight, at = _prepare(u, decay, frequency, gain, positions)
    g = _array(grad.to(torch.float32) if x.dtype == np.float32 else grad.to(torch.float64))
    lr, li = (plane.copy() for plane in _planes(grad_state))
    states = _array(kept)
    du = np.empty_like(x)
    sums = np.zeros((batch, 3, *zr.shape))  # dz (re, im) and dgain of every row

    def task(b, c):
        room = np.empty((2, BLOCK + 1, zr.shape[0], c.stop - c.start))
        l = lr[b][:, c].copy(), li[b][:, c].copy()
        k = states[b, :, 0][:, :, c].copy(), states[b, :, 1][:, :, c].copy()
        total = np.zeros((3, zr.shape[0], c.stop - c.start))
        z = zr[:, c].copy(), zi[:, c].copy()
        acc = np.empty(c.stop - c.start)
        _backward(
            x[b][:, c],
            at[b],
            *z,
            weight[:, c].copy(),
            *k,
            g[b][:, c],
            *l,
            du[b][:, c],
            *total,
            room[0],
            room[1],
            acc,
        )
        lr[b][:, c], li[b][:, c] = l
        sums[b][:, :, c] = total

    _run([lambda b=b, c=c: task(b, c) for b, c in _parts(batch, channels)])
    qr, qi, gg = torch.from_numpy(sums.sum(0)).transpose(-1, -2).contiguous()  # [D, M] each
    z_re, z_im = torch.from_numpy(zr.T.copy()), torch.from_numpy(zi.T.copy())
    # conj(q) z, with dz/d(decay) = -z and dz/d(frequency) = i z
    d_decay = -(qr * z_re + qi * z_im)
    d_frequency = qi * z_re - qr * z_im
    d_state = torch.from_numpy(np.stack((lr, li), -1)).transpose(1, 2).contiguous()
    return (
        torch.from_numpy(du).to(u.dtype),
        d_decay.to(decay.dtype),
        d_frequency.to(frequency.dtype),
        gg.to(decay.dtype).contiguous(),
        d_state,
    )


@scan_backward.register_fake
def _(u, decay, frequency, gain, positions, kept, grad, grad_state):
    like = torch.empty_like
    return like(u), like(decay), like(frequency), like(decay), like(grad_state)


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, grad, grad_state, grad_kept):
    u, decay, frequency, gain, state, positions, kept = ctx.saved_tensors
    if (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    ):  # a second derivative is wanted
        return _differentiate_again(u, decay, frequency, gain, state, positions, grad, grad_state)
    du, d_decay, d_frequency, d_gain, d_state = scan_backward(
        u, decay, frequency, gain, positions, kept, grad.contiguous(), grad_state.contiguous()
    )
    return du, d_decay, d_frequency, None if gain is None else d_gain, d_state, None, None


def _differentiate_again(u, decay, frequency, gain, state, positions, grad, grad_state):
    """The same gradients, built from operations that can be differentiated themselves."""
    inputs = [x for x in (u, decay, frequency, gain, state) if x is not None]
    asked = [x for x in inputs if x.requires_grad]
    with torch.enable_grad():
        outputs = chunked(u, Modes(decay, frequency, gain), state, positions, known=True)
        found = torch.autograd.grad(
            outputs, asked, (grad, grad_state), create_graph=True, allow_unused=True
        )
    by_id = {id(x): d for x, d in zip(asked, found, strict=True)}
    ordered = [None if x is None else by_id.get(id(x)) for x in (u, decay, frequency, gain, state)]
    return (*ordered, None, None)


scan.register_autograd(_differentiate, setup_context=_save)
