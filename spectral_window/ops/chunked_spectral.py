"""The convolution in chunks: linear time in plain torch, on any device.

Differentiable any number of times. Inside a chunk of C tokens the convolution is a C x C matrix per
channel; between chunks only the state h is passed on, by a scan over T / C chunks.

Precision. On a CPU all is computed in float64 and rounded once at the end: batched products are
limited by memory bandwidth, so exactness costs little. On other devices, where float64 is slow, the
product inside chunks, nine tenths of the work, is float32 (under the setting of
`torch.set_float32_matmul_precision`); what enters and leaves a chunk stays float64, since re and im
of a slow oscillation may cancel. It is computed on the CPU for a device without float64 (Apple's
MPS), whose states are rounded to float32 between calls. At T = 65,536 and |z| = 1 the worst error
of a block of 64 outputs is 5.0e-7.
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
EXACT = ("cpu",)  # devices with products in float64, see the module's docstring


class _Grid(NamedTuple):
    """Documents in chunks of C, one after the other.

    Attributes:
        token: [n], the tokens' places among all B*T.
        slot: [n], their places in the grid.
        first: [G] bool, the first chunks of documents.
        entry_chunk: the chunks that continue the state of a row.
        entry_row: those rows.
        last_chunk: [B], the chunk in which each row ends.
        filled: [B], the number of its tokens in that chunk.
        alive: [B] bool, rows with any token.
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

    Args:
        u: [B, T, D], not empty.
        modes: modes of shape [D, M].
        state: [B, D, M, 2], or None for zeros.
        documents: documents and padding, or None where every row continues its state.

    Returns:
        y [B, T, D] in u's dtype, and the final state.
    """
    batch, time, channels = u.shape
    exact = exact_dtype(u.device)
    in_float64 = u.device.type in EXACT or u.dtype == torch.float64
    products = exact if in_float64 else torch.float32
    has_state = state is not None
    state = u.new_zeros(modes.state_shape(batch), dtype=exact) if state is None else state.to(exact)
    if is_recorded() and (is_exported() or documents is not None):
        positions = None if documents is None else documents.positions
        return recorded.convolve(u, modes, state, positions)
    if documents is None:
        per_row = -(-time // CHUNK)
        padded = F.pad(u, (0, 0, 0, per_row * CHUNK - time))
        x = padded.to(products).reshape(-1, channels).T.contiguous()
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

    documents.check(anywhere(batch) if has_state else None, wait=True)
    grid = documents.plan("chunked_spectral", _cut)
    if not len(grid.token):
        return torch.where(documents.positions[..., None] >= 0, u, 0.0), state  # padding alone
    x = u.new_zeros(len(grid.first) * CHUNK, channels, dtype=products)
    tokens = u.reshape(-1, channels).index_select(0, grid.token)
    x = x.index_copy(0, grid.slot, tokens.to(products)).T.contiguous()
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
    """Compute gradients by differentiable operations, for second derivatives of compiled methods.

    Args:
        u, modes, state, positions: the inputs.
        grad: the gradient of y.
        grad_state: the gradient of the final state; None for zero.

    Returns:
        The gradients of u, decay, frequency, gain and state.
    """
    inputs = (u, *modes, state)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    documents = None if positions is None else Documents(positions, checked=True)
    with torch.enable_grad():
        y, final = chunked(u, modes, state, documents)
        grads = (grad, torch.zeros_like(final) if grad_state is None else grad_state)
        results = torch.autograd.grad(
            (y, final), leaves, grads, create_graph=True, allow_unused=True
        )
    by_id = {id(x): d for x, d in zip(leaves, results, strict=True)}
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
    """Convolve G chunks that stand one after the other.

    Args:
        x: [D, G*C] in the dtype of the product inside chunks, with zeros in empty places.
        modes: modes of shape [D, M].
        state: [B, D, M, 2].
        first: [G], chunks with nothing before them.
        entry_chunk: chunk entry_chunk[i] continues the state of row entry_row[i].
        entry_row: see entry_chunk.
        last_chunk: the final state of row b is that of chunk last_chunk[b] ...
        filled: ... after filled[b] places.

    Returns:
        y [D, G, C] in x's dtype, and the final state [B, D, M, 2] in that of the state.
    """
    channels, modes_each = modes.decay.shape
    whole, spoilt = split_finite(x.view(channels, -1, CHUNK))

    # what enters and leaves chunks is computed in float64, where there is float64
    home = x.device if exact_dtype(x.device) is torch.float64 else torch.device("cpu")
    modes = Modes(*(None if p is None else p.to(home) for p in modes))  # type: ignore[arg-type]
    x, lost = whole.to(home).double(), spoilt.to(home).double()
    first, entry_chunk, entry_row = first.to(home), entry_chunk.to(home), entry_row.to(home)
    last_chunk, filled, before_all = last_chunk.to(home), filled.to(home), state.to(home).double()
    table = powers(modes, torch.arange(CHUNK + 1, dtype=torch.int64, device=home))  # z^0 ... z^C
    weighted = table if modes.gain is None else table * modes.gain.to(table.dtype)[..., None, None]

    # inside a chunk: y_t = sum_{s <= t} K[t - s] x_s, a Toeplitz matrix of shifted views of the
    # padded kernel
    inside = weighted[:, :, :CHUNK, 0].sum(1).to(whole.dtype).to(whole.device)
    padded = F.pad(inside, (CHUNK - 1, 0))
    toeplitz = padded.unfold(-1, CHUNK, 1).flip(1)  # [D, s, t] = K[t - s], 0 for t < s
    # (of finite values: 0 * NaN would reach earlier tokens; other values are added where they are
    # visible)
    y = torch.bmm(whole, toeplitz) + spoilt.cumsum(2)

    # the state that each chunk adds: sum_s z^(C-1-s) x_s
    leave = table[:, :, :CHUNK].flip(2).permute(0, 2, 1, 3).reshape(channels, CHUNK, -1)
    left = torch.bmm(x, leave).view(channels, -1, modes_each, 2)
    left = left + lost.sum(2)[..., None, None]

    # between chunks: the state before each chunk
    entry = torch.zeros_like(left).index_copy(
        1, entry_chunk, before_all.index_select(0, entry_row).transpose(0, 1)
    )
    step = table[:, None, :, CHUNK]
    after = _scan(times(step, entry) + left, modes, CHUNK, first)
    before = torch.cat(
        (entry[:, :1], torch.where(first[1:, None, None], entry[:, 1:], after[:, :-1])), 1
    )

    # the effect of the state before a chunk: y_t += Re(sum gain z^(t+1) h)
    from_state = torch.stack((weighted[:, :, 1:, 0], -weighted[:, :, 1:, 1]), 2).reshape(
        channels, -1, CHUNK
    )
    entered = torch.bmm(before.reshape(channels, -1, modes_each * 2), from_state)
    y = y + entered.to(y.dtype).to(y.device)

    # the state after the last token of each row, which may be inside a chunk:
    # z^r h + sum_{s < r} z^(r-1-s) x_s
    lag = filled[:, None] - 1 - torch.arange(CHUNK, dtype=torch.int64, device=x.device)
    weights = table[:, :, lag.clamp(min=0)] * (lag >= 0)[..., None]  # [D, M, B, C, 2]
    own = torch.einsum("dbc,dmbcr->bdmr", x.index_select(1, last_chunk), weights)
    carried = times(
        table.index_select(2, filled), before.index_select(1, last_chunk).transpose(1, 2)
    )
    own = own + lost.index_select(1, last_chunk).sum(2).T[..., None, None]
    return y, (own + carried.permute(2, 0, 1, 3)).to(state.dtype).to(state.device)


def _scan(left: Tensor, modes: Modes, steps: int, first: Tensor) -> Tensor:
    """Scan h_n = left_n + z^steps h_{n-1}, with h_{n-1} = 0 where first_n, in log2(G) rounds.

    Pairs are merged, the sequence of half the length is scanned, and the other places are filled
    in. It uses `where` and not a product with 0, so that a NaN stays in its document. Every round
    takes its power of z anew: that of a product of powers would double its error.

    Args:
        left: [D, G, M, 2].
        modes: modes of shape [D, M].
        steps: tokens between n - 1 and n.
        first: [G].

    Returns:
        h [D, G, M, 2].
    """
    count = left.shape[1]
    if count == 1:
        return left
    exponent = torch.full((1,), steps, dtype=torch.int64, device=left.device)
    step = powers(modes, exponent)[:, None, :, 0]
    even, odd = left[:, 0::2], left[:, 1::2]
    pairs = odd.shape[1]
    stop = first[:, None, None]
    ends = _scan(
        odd + torch.where(stop[1::2], 0.0, times(step, even[:, :pairs])),
        modes,
        2 * steps,
        first[1::2] | first[0 : 2 * pairs : 2],
    )
    more = even.shape[1] - 1  # even places after the first
    filled = even[:, 1:] + torch.where(stop[2::2], 0.0, times(step, ends[:, :more]))
    evens = torch.cat((even[:, :1], filled), 1)
    woven = torch.stack((evens[:, :pairs], ends), 2).flatten(1, 2)
    return woven if count % 2 == 0 else torch.cat((woven, evens[:, -1:]), 1)
