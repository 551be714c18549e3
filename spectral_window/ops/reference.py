"""The equations of the paper, literally, in float64: what all methods are tested against.

Never optimised. Each function takes one document per row ([B, T, ...], no padding, no packing) and
is twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.ops.modes import Modes


def spectral(u: Tensor, modes: Modes, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The convolution of the spectral branch (paper section 1) as a recurrence.

        h_t = z h_{t-1} + u_t        y_t = Re(sum_m gain_m h_t)        z = exp(-decay + i frequency)

    Args:
        u: [B, T, D] float64.
        modes: modes of shape [D, M].
        state: h [B, D, M, 2] as pairs (re, im), or None for zeros.

    Returns:
        y [B, T, D] and the final h, both float64.
    """
    z = torch.exp(torch.complex(-modes.decay.double(), modes.frequency.double()))
    gain = torch.ones_like(modes.decay) if modes.gain is None else modes.gain
    if state is None:
        state = u.new_zeros(modes.state_shape(u.shape[0]))
    h = torch.view_as_complex(state.double().contiguous())
    y = []
    for t in range(u.shape[1]):
        h = z * h + u[:, t, :, None]
        y.append((gain.double() * h.real).sum(-1))
    return torch.stack(y, 1) if y else u.clone(), torch.view_as_real(h)


def fir(u: Tensor, weights: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The FIR filter y_t = sum_{j < L} weights_j u_{t-j}.

    Args:
        u: [B, T, D] float64.
        weights: [D, L].
        state: [B, L - 1, D], the inputs before u, or None for zeros.

    Returns:
        y [B, T, D] and the last L - 1 inputs.
    """
    length = weights.shape[1]
    if state is None:
        state = u.new_zeros(u.shape[0], length - 1, u.shape[2])
    x = torch.cat((state, u), 1)
    W = weights.flip(1).T  # [L, D], oldest first
    y = []
    for t in range(u.shape[1]):
        y.append((W * x[:, t : t + length]).sum(1))
    return torch.stack(y, 1) if y else u.clone(), x[:, u.shape[1] :]


def visible(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Return whether the query at position `query` sees the key at position `key`.

    Broadcasts; bool. Positions are cut into chunks of W. A query sees its own chunk up to itself,
    and the whole chunk before: (t mod W) + 1 + W keys, or (t mod W) + 1 in the first chunk. With
    W = 3 (rows are queries, columns are keys):

        0 1 2 | 3 4 5 | 6 7 8
        x . . | . . . | . . .
        x x . | . . . | . . .
        x x x | . . . | . . .
        x x x | x . . | . . .
        x x x | x x . | . . .
        x x x | x x x | . . .
        . . . | x x x | x . .
        . . . | x x x | x x .
        . . . | x x x | x x x
    """
    return (key <= query) & (key // window >= query // window - 1)


def window(q: Tensor, k: Tensor, v: Tensor, window: int, first: int = 0) -> Tensor:
    """softmax(q k^T K^(-1/2)) v over the visible keys of every query (paper section 1).

    Args:
        q: [B, T, H, K] float64, rotated already.
        k: [B, S, H, K]; the keys are at positions first ... first + S - 1, and the queries are at
            the last T of them.
        v: [B, S, H, V].
        window: W.
        first: the position of the first key.

    Returns:
        [B, T, H, V].
    """
    key = torch.arange(first, first + k.shape[1], dtype=torch.int64, device=k.device)
    out = []
    for t in range(q.shape[1]):
        seen = visible(key[k.shape[1] - q.shape[1] + t], key, window)
        scores = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, seen]) * q.shape[-1] ** -0.5
        out.append(torch.einsum("bhs,bshv->bhv", scores.softmax(-1), v[:, seen]))
    return torch.stack(out, 1) if out else v[:, :0]


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule with decay, token by token.

        S <- exp(-decay_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   out_t = S^T q_t

    Args:
        q: [B, T, H, K] float64.
        k: [B, T, H, K].
        v: [B, T, H, V].
        beta: [B, T, H, 1].
        decay: [B, T, H, 1], or None for no decay.
        state: S [B, H, K, V], or None for zeros.

    Returns:
        out [B, T, H, V] and the final S.
    """
    batch, _, heads, size = k.shape
    S = k.new_zeros(batch, heads, size, v.shape[3]) if state is None else state
    out = []
    for t in range(k.shape[1]):
        if decay is not None:
            S = torch.exp(-decay[:, t, :, :, None]) * S
        old = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t] * (v[:, t] - old))
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1) if out else v.clone(), S
