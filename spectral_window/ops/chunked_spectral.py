"""The convolution in chunks: linear time in plain torch, on any device, differentiable any number
of times.

Inside a chunk of C tokens the convolution is a C x C matrix a channel; between chunks only the
state h travels, by a scan over T / C chunks. All in float64, rounded once at the end: batched
products are bound by moving data, so exactness costs little.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops import recorded
from spectral_window.ops.documents import Documents, Tokens, anywhere, chunk_grid, split_finite
from spectral_window.ops.modes import Modes, exact_dtype, powers, times
from spectral_window.ops.tracing import is_exported, is_recorded

CHUNK = 32


class _Grid(NamedTuple):
    """Documents in chunks of C, laid end to end.

    token, slot: [n] the tokens' places among all B*T, and in the grid.
    first:       [G] bool, chunks with no past.
    entry_chunk, entry_row: the chunks into which the states of rows enter, and those rows.
    last_chunk, filled: [B] where each row ends, and after how many places of that chunk.
    alive:       [B] bool, rows with any token.
    """

    token: Tensor
    slot: Tensor
    first: Tensor
    entry_chunk: Tensor
    entry_row: Tensor
    last_chunk: Tensor
    filled: Tensor
    alive: Tensor


def _cut(tokens: Tokens) -> _Grid:
    index = torch.arange(len(tokens.token), dtype=torch.int64, device="cpu")
    slot, first = chunk_grid(tokens.document, index - tokens.head[tokens.document], CHUNK)
    continues = tokens.head[tokens.goes_on]
    last = slot[tokens.last.clamp(min=0)] if len(slot) else tokens.last
    return _Grid(
        tokens.token,
        slot,
        first,
        slot[continues] // CHUNK,
        tokens.row[continues],
        last // CHUNK,
        last % CHUNK + 1,
        tokens.last >= 0,
    )


def chunked(
    u: Tensor, modes: Modes, state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """`spectral_conv` for checked inputs: move tokens to a grid of chunks, convolve, move back.

    u [B, T, D] not empty, modes [D, M], state [B, D, M, 2] or None for zeros.
    """
    batch, time, channels = u.shape
    exact = exact_dtype(u.device)
    known = state is not None
    state = u.new_zeros(modes.state_shape(batch), dtype=exact) if state is None else state.to(exact)
    if is_recorded() and (is_exported() or documents is not None):
        positions = None if documents is None else documents.positions
        return recorded.convolve(u, modes, state, positions)
    if documents is None:
        per_row = -(-time // CHUNK)
        x = (
            F.pad(u, (0, 0, 0, per_row * CHUNK - time))
            .to(state.dtype)
            .reshape(-1, channels)
            .T.contiguous()
        )
        first = torch.arange(batch * per_row, dtype=torch.int64, device=u.device) % per_row == 0
        entry_row = torch.arange(batch, dtype=torch.int64, device=u.device)
        entry_chunk = entry_row * per_row
        last_chunk = entry_chunk + per_row - 1
        end = time - (per_row - 1) * CHUNK
        filled = torch.full((batch,), end, dtype=torch.int64, device=u.device)
        y, final = _convolve_chunks(
            x, modes, state, first, entry_chunk, entry_row, last_chunk, filled
        )
        y = y.to(u.dtype).reshape(channels, -1).T.reshape(batch, -1, channels)[:, :time]
        return y.contiguous(), final

    documents.check(anywhere(batch) if known else None, wait=True)
    grid = documents.plan("chunked_spectral", _cut)
    if not len(grid.token):
        return torch.where(documents.positions[..., None] >= 0, u, 0.0), state  # padding alone
    x = u.new_zeros(len(grid.first) * CHUNK, channels, dtype=state.dtype)
    tokens = u.reshape(-1, channels).index_select(0, grid.token)
    x = x.index_copy(0, grid.slot, tokens.to(state.dtype)).T.contiguous()
    y, final = _convolve_chunks(x, modes, state, *grid[2:7])
    y = y.to(u.dtype).reshape(channels, -1).T.index_select(0, grid.slot)
    out = torch.zeros_like(u).reshape(-1, channels).index_copy(0, grid.token, y)
    return out.reshape(u.shape), torch.where(grid.alive[:, None, None, None], final, state)


def differentiate_again(
    u: Tensor,
    modes: Modes,
    state: Tensor | None,
    positions: Tensor | None,
    grad: Tensor,
    grad_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of u, decay, frequency, gain and state, given those of y and of the final state
    (None: zero), built from operations that can be differentiated themselves: what compiled methods
    answer where a second derivative is wanted."""
    inputs = (u, *modes, state)
    asked = [x for x in inputs if x is not None and x.requires_grad]
    documents = None if positions is None else Documents(positions, checked=True)
    with torch.enable_grad():
        y, final = chunked(u, modes, state, documents)
        grads = (grad, torch.zeros_like(final) if grad_state is None else grad_state)
        found = torch.autograd.grad((y, final), asked, grads, create_graph=True, allow_unused=True)
    by_id = {id(x): d for x, d in zip(asked, found, strict=True)}
    return tuple(None if x is None else by_id.get(id(x)) for x in inputs)


def _convolve_chunks(
    x: Tensor,
    modes: Modes,
    state: Tensor,
    first: Tensor,
    entry_chunk: Tensor,
    entry_row: Tensor,
    last_chunk: Tensor,
    filled: Tensor,
) -> tuple[Tensor, Tensor]:
    """The convolution over G chunks laid end to end.

    x [D, G*C] float64 (zeros in empty places), first [G] marks chunks with no past. `state` of row
    entry_row[i] enters at chunk entry_chunk[i]. The final state of row b is taken in chunk
    last_chunk[b] after filled[b] places.
    Returns (y [D, G, C], final [B, D, M, 2]).
    """
    channels, modes_each = modes.decay.shape
    x, spoilt = split_finite(x.view(channels, -1, CHUNK))
    table = powers(
        modes, torch.arange(CHUNK + 1, dtype=torch.int64, device=x.device)
    )  # z^0 ... z^C
    weighted = table if modes.gain is None else table * modes.gain.to(table.dtype)[..., None, None]

    # inside a chunk: y_t = sum_{s <= t} K[t - s] x_s, a Toeplitz matrix made of shifted views of
    # the padded kernel
    padded = F.pad(weighted[:, :, :CHUNK, 0].sum(1), (CHUNK - 1, 0))
    toeplitz = padded.unfold(-1, CHUNK, 1).flip(1)  # [D, s, t] = K[t - s], 0 for t < s
    # (finite, so that 0 * NaN brings nothing back from the future; the rest is added where it is
    # seen)
    y = torch.bmm(x, toeplitz) + spoilt.cumsum(2)

    # what a chunk leaves behind, as if nothing came before: sum_s z^(C-1-s) x_s
    leave = table[:, :, :CHUNK].flip(2).permute(0, 2, 1, 3).reshape(channels, CHUNK, -1)
    left = torch.bmm(x, leave).view(channels, -1, modes_each, 2)
    left = left + spoilt.sum(2)[..., None, None]

    # between chunks: the state before each chunk
    entry = torch.zeros_like(left).index_copy(
        1, entry_chunk, state.index_select(0, entry_row).transpose(0, 1)
    )
    step = table[:, None, :, CHUNK]
    after = _scan(times(step, entry) + left, step, first)
    before = torch.cat(
        (entry[:, :1], torch.where(first[1:, None, None], entry[:, 1:], after[:, :-1])), 1
    )

    # what came before, seen from inside: y_t += Re(sum gain z^(t+1) h)
    seen = torch.stack((weighted[:, :, 1:, 0], -weighted[:, :, 1:, 1]), 2).reshape(
        channels, -1, CHUNK
    )
    y = torch.baddbmm(y, before.reshape(channels, -1, modes_each * 2), seen)

    # the state after each row's last token, which need not end a chunk: z^r h + sum_{s < r}
    # z^(r-1-s) x_s
    lag = filled[:, None] - 1 - torch.arange(CHUNK, dtype=torch.int64, device=x.device)
    weights = table[:, :, lag.clamp(min=0)] * (lag >= 0)[..., None]  # [D, M, B, C, 2]
    own = torch.einsum("dbc,dmbcr->bdmr", x.index_select(1, last_chunk), weights)
    kept = times(table.index_select(2, filled), before.index_select(1, last_chunk).transpose(1, 2))
    own = own + spoilt.index_select(1, last_chunk).sum(2).T[..., None, None]
    return y, own + kept.permute(2, 0, 1, 3)


def _scan(left: Tensor, step: Tensor, first: Tensor) -> Tensor:
    """h_n = left_n + step h_{n-1}, with h_{n-1} = 0 where first_n: a work-efficient scan in
    log2(G) rounds.

    left [D, G, M, 2], step [D, 1, M, 2], first [G] -> h [D, G, M, 2]. Pairs are merged, the
    half-length sequence is scanned, and the odd places are filled in. `where` and not a product
    with 0, so that a NaN stays in its document.
    """
    count = left.shape[1]
    if count == 1:
        return left
    even, odd = left[:, 0::2], left[:, 1::2]
    pairs = odd.shape[1]
    stop = first[:, None, None]
    ends = _scan(
        odd + torch.where(stop[1::2], 0.0, times(step, even[:, :pairs])),
        times(step, step),
        first[1::2] | first[0 : 2 * pairs : 2],
    )
    more = even.shape[1] - 1  # even places after the first
    filled = even[:, 1:] + torch.where(stop[2::2], 0.0, times(step, ends[:, :more]))
    evens = torch.cat((even[:, :1], filled), 1)
    woven = torch.stack((evens[:, :pairs], ends), 2).flatten(1, 2)
    return woven if count % 2 == 0 else torch.cat((woven, evens[:, -1:]), 1)
