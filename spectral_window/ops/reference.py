"""The paper's equations, literally, in float64: the oracle. Slow on purpose, never optimised.

Each function takes one document ([B, T, ...], no padding, no packing) and is differentiable, twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.ops.modes import Modes, kernel, powers


def spectral(u: Tensor, modes: Modes, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s <= t} K[t - s] u_s, plus what is left of `state` (paper section 1, spectral
    branch).

    u [B, T, D] float64, modes [D, M], state [B, D, M, 2] -> (y [B, T, D], final state [B, D, M,
    2]), both float64.
    """
    time = u.shape[1]
    K = kernel(modes, time).T  # [T, D]
    table = powers(
        modes, torch.arange(time + 1, dtype=torch.int64, device=u.device)
    )  # z^0 ... z^T: [D, M, T + 1, 2]
    rows = [(K[: t + 1].flip(0) * u[:, : t + 1]).sum(1) for t in range(time)]
    y = torch.stack(rows, 1) if rows else u.clone()
    final = torch.einsum("btd,dmtc->bdmc", u, table[:, :, :time].flip(2))
    if state is not None:
        re, im = state.double().unbind(-1)
        gain = 1.0 if modes.gain is None else modes.gain.double()
        kept_re = (
            re[..., None] * table[..., 0] - im[..., None] * table[..., 1]
        )  # z^n h: [B, D, M, T + 1]
        kept_im = re[..., None] * table[..., 1] + im[..., None] * table[..., 0]
        left = kept_re.movedim(-1, -2) * (gain if modes.gain is None else gain[:, None, :])  # type: ignore[index]
        y = y + left[:, :, 1:].sum(-1).transpose(1, 2)
        final = final + torch.stack((kept_re[..., -1], kept_im[..., -1]), -1)
    return y, final


def taps(u: Tensor, weights: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{j < L} weights_j u_{t-j}: a Toeplitz matrix a channel, row by row.

    u [B, T, D] float64, weights [D, L], state [B, L - 1, D] the inputs before u (or None: zeros) ->
    (y [B, T, D], the last L - 1 inputs).
    """
    length = weights.shape[1]
    if state is None:
        state = u.new_zeros(u.shape[0], length - 1, u.shape[2])
    x = torch.cat((state, u), 1)
    W = weights.flip(1).T  # [L, D], oldest first
    rows = [(W * x[:, t : t + length]).sum(1) for t in range(u.shape[1])]
    return torch.stack(rows, 1) if rows else u.clone(), x[:, x.shape[1] - length + 1 :]


def visible(query: Tensor, key: Tensor, window: int) -> Tensor:
    """THE mask: may the query at position `query` see the key at position `key`? (broadcasts; bool)

    Positions are cut into chunks of W. A query sees its own chunk up to itself, and the whole
    chunk before: (t mod W) + 1 + W keys, or (t mod W) + 1 in the first chunk. With W = 3, rows are
                  queries, columns keys:

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
    """Dense softmax attention under `visible` (paper section 1, window branch); scale K^(-1/2).

    q [B, T, H, K], k [B, S, H, K], v [B, S, H, V] in float64, already rotated; keys are at
    positions first ... first + S - 1 and the queries are the last T of them. Returns [B, T, H, V].
    """
    key = torch.arange(first, first + k.shape[1], dtype=torch.int64, device=k.device)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    seen = visible(key[k.shape[1] - q.shape[1] :, None], key, window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    finite = torch.isfinite(v)
    if finite.all():
        return torch.einsum("bhts,bshv->bthv", weights, v)
    # 0 * NaN is NaN: a value that is not finite reaches those alone that see it
    out = torch.einsum("bhts,bshv->bthv", weights, torch.where(finite, v, 0.0))
    spoilt = torch.einsum("ts,bshv->bthv", seen.to(v.dtype), (~finite).to(v.dtype))
    return out.masked_fill(spoilt > 0, torch.nan)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule with a decay, token by token:

        S <- exp(-decay_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   out_t = S^T q_t

    q, k [B, T, H, K], v [B, T, H, V], beta and decay [B, T, H, 1] in float64, state S [B, H, K, V]
    (or None: zeros) -> (out [B, T, H, V], final S).
    """
    batch, time, heads, size = k.shape
    S = k.new_zeros(batch, heads, size, v.shape[3]) if state is None else state
    rows = []
    for t in range(time):
        if decay is not None:
            S = torch.exp(-decay[:, t, :, :, None]) * S
        held = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t] * (v[:, t] - held))
        rows.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(rows, 1) if rows else v.clone(), S
