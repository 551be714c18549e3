"""The global branch: causal depth-wise convolution with kernels of damped oscillators.

    y_t = sum_{s <= t} K[t - s] u_s,   K[t] = sum_m gain_m exp(-decay_m t) cos(frequency_m t)

The paper computes it with an FFT. Because K is a sum of powers z^t, it is also a recurrence with
two numbers of state a mode (see `modes`), which gives a linear-time method and a constant-state
step:

    chunked    inside a chunk of C tokens the convolution is a C x C matrix a channel; between
               chunks only the state h travels, by a scan of length T / C. All in float64, rounded
               once at the end.
    scan       the recurrence itself, one pass over memory in compiled code (`numba_spectral`).
    step       one token: h <- z h + u, y = Re(sum gain h).
    fft        the paper's: zero-pad to >= 2T, multiply spectra, crop; float32 whatever the dtype.
    reference  the direct sum in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops import reference
from spectral_window.ops.dispatch import resolve
from spectral_window.ops.documents import chunk_grid, find_documents, given_positions
from spectral_window.ops.modes import Modes, exact_dtype, kernel, powers, times

CHUNK = 32


def spectral_conv(
    u: Tensor,
    modes: Modes,
    *,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal convolution of every channel of `u` with its modes, from `state` (paper section 1).

    u:          [B, T, D] floating; any T >= 0 and B >= 0.
    modes:      `Modes` of [D] or [D, M], float32 or float64.
    state:      [B, D, M, 2] float64, h = (re, im) of every mode after the tokens before; None for
                none. It enters a row's first document unless that begins at position 0.
    positions, cu_seqlens: documents and padding, see `spectral_window.ops`.
    method:     one of `dispatch.METHODS`, or "auto"; then a single token takes the
                recurrence's step.

    Returns y [B, T, D] in u's dtype (0 at padding) and the state after each row's last token.
    Differentiable, twice, in u, state, decay, frequency and gain. Raises ValueError or TypeError
    before any work.
    """
    if u.dim() != 3:
        raise ValueError(
            f"u has shape {tuple(u.shape)} (spectral_conv): expected [batch, time, channels]"
        )
    method, _ = resolve("spectral", method, u)
    if not u.dtype.is_floating_point:
        raise TypeError(f"u is {u.dtype} (spectral_conv): expected a floating dtype")
    modes = modes.validated(u.shape[2])
    if modes.decay.device != u.device:
        raise ValueError(
            f"modes are on {modes.decay.device}, u on {u.device} (spectral_conv): move one"
        )
    shape = (u.shape[0], u.shape[2], modes.decay.shape[1], 2)
    if state is not None and (
        state.shape != shape or state.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"state is {tuple(state.shape)} {state.dtype} (spectral_conv): expected {shape} in "
            "float64, as returned by a call with the same batch and modes"
        )
    # any beginning other than 0 continues the state; the state itself does not know its position
    begin = None if state is None else torch.ones(u.shape[0], dtype=torch.int64, device=u.device)
    positions = given_positions(positions, cu_seqlens, u, begin)
    exact = exact_dtype(u.device)
    if state is None:
        state = u.new_zeros(shape, dtype=exact)
        known = False
    else:
        state = state.to(exact)
        known = True
    if u.numel() == 0:
        return u.clone(), state
    if method == "step":
        return _step(u, modes, state, positions)
    if method == "scan":
        return _scanned(u, modes, state, positions, known)
    if method == "chunked":
        return _chunked(u, modes, state, positions, known)
    whole = _fft if method == "fft" else _reference
    modes = modes.double()  # cast once, so that gradients are summed before they are rounded
    if positions is None:
        return whole(u, modes, state)
    return _each_document(whole, u, modes, state, positions, known)


def _step(
    u: Tensor, modes: Modes, state: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token a row. A padded row keeps its state; a row at position 0 begins afresh."""
    before = state
    if positions is not None:
        before = torch.where((positions == 0)[..., None, None], 0.0, state)
    one = torch.ones(1, device=u.device)
    h = times(powers(modes, one)[..., 0, :], before)
    h = torch.stack((h[..., 0] + u[:, 0, :, None].to(h.dtype), h[..., 1]), dim=-1)
    y = _sum_modes(h[..., 0], modes)
    if positions is not None:
        token = positions >= 0
        h = torch.where(token[..., None, None], h, state)
        y = torch.where(token, y, 0.0)
    return y.to(u.dtype)[:, None], h


def _sum_modes(re: Tensor, modes: Modes) -> Tensor:
    return (re if modes.gain is None else re * modes.gain.to(re.dtype)).sum(-1)


def _scanned(
    u: Tensor, modes: Modes, state: Tensor, positions: Tensor | None, known: bool
) -> tuple[Tensor, Tensor]:
    if u.device.type != "cpu":
        raise ValueError(f"method 'scan' needs a CPU, u is on {u.device}: use 'chunked' or 'auto'")
    from spectral_window.ops.numba_spectral import scan

    if positions is not None and not torch.compiler.is_compiling():
        any_position = torch.full((u.shape[0],), -1) if known else None
        find_documents(positions, any_position)  # raises where positions do not count on
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, *modes, state)
    )
    y, final, _ = scan(u, modes.decay, modes.frequency, modes.gain, state, positions, keep)
    return y, final


def _chunked(
    u: Tensor, modes: Modes, state: Tensor, positions: Tensor | None, known: bool
) -> tuple[Tensor, Tensor]:
    """Move tokens to a grid of chunks [D, G, C], each of one document; convolve; move back."""
    batch, time, channels = u.shape
    if positions is None:
        per_row = -(-time // CHUNK)
        x = (
            F.pad(u, (0, 0, 0, per_row * CHUNK - time))
            .to(state.dtype)
            .reshape(-1, channels)
            .T.contiguous()
        )
        first = torch.arange(batch * per_row, device=u.device) % per_row == 0
        entry_row = torch.arange(batch, device=u.device)
        entry_chunk = entry_row * per_row
        last_chunk = entry_chunk + per_row - 1
        filled = torch.full((batch,), time - (per_row - 1) * CHUNK, device=u.device)
        y, final = _convolve_chunks(
            x, modes, state, first, entry_chunk, entry_row, last_chunk, filled
        )
        y = y.to(u.dtype).reshape(channels, -1).T.reshape(batch, -1, channels)[:, :time]
        return y.contiguous(), final

    docs = find_documents(positions, torch.full((batch,), -1, device=u.device) if known else None)
    index = torch.arange(len(docs.token), device=u.device)
    slot, first = chunk_grid(docs.document, index - docs.head[docs.document], CHUNK)
    continues = docs.head[docs.position[docs.head] != 0]
    alive = docs.last >= 0  # rows with any token
    last = docs.last.clamp(min=0)
    if not len(index):
        return u * 0, state
    x = u.new_zeros(len(first) * CHUNK, channels, dtype=state.dtype)
    tokens = u.reshape(-1, channels).index_select(0, docs.token)
    x = x.index_copy(0, slot, tokens.to(state.dtype)).T.contiguous()
    y, final = _convolve_chunks(
        x,
        modes,
        state,
        first,
        slot[continues] // CHUNK,
        docs.row[continues],
        slot[last] // CHUNK,
        slot[last] % CHUNK + 1,
    )
    y = y.to(u.dtype).reshape(channels, -1).T.index_select(0, slot)
    out = torch.zeros_like(u).reshape(-1, channels).index_copy(0, docs.token, y)
    return out.reshape(u.shape), torch.where(alive[:, None, None, None], final, state)


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
    x = x.view(channels, -1, CHUNK)
    table = powers(modes, torch.arange(CHUNK + 1, device=x.device))  # z^0 ... z^C
    weighted = table if modes.gain is None else table * modes.gain.to(table.dtype)[..., None, None]

    # inside a chunk: y_t = sum_{s <= t} K[t - s] x_s, a Toeplitz matrix made of shifted views of
    # the padded kernel
    padded = F.pad(weighted[:, :, :CHUNK, 0].sum(1), (CHUNK - 1, 0))
    toeplitz = padded.unfold(-1, CHUNK, 1).flip(1)  # [D, s, t] = K[t - s], 0 for t < s
    y = torch.bmm(x, toeplitz)

    # what a chunk leaves behind, as if nothing came before: sum_s z^(C-1-s) x_s
    leave = table[:, :, :CHUNK].flip(2).permute(0, 2, 1, 3).reshape(channels, CHUNK, -1)
    left = torch.bmm(x, leave).view(channels, -1, modes_each, 2)

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
    lag = filled[:, None] - 1 - torch.arange(CHUNK, device=x.device)
    weights = table[:, :, lag.clamp(min=0)] * (lag >= 0)[..., None]  # [D, M, B, C, 2]
    own = torch.einsum("dbc,dmbcr->bdmr", x.index_select(1, last_chunk), weights)
    kept = times(table.index_select(2, filled), before.index_select(1, last_chunk).transpose(1, 2))
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


def _fft(u: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's method. An FFT mixes all positions, so a NaN or infinity anywhere is refused: it
    would reach the past."""
    time = u.shape[1]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(u).all()):
        raise ValueError(
            "u is not finite (spectral_conv, method fft): an FFT would spread it over all positions"
        )
    x = u.to(dtype).transpose(1, 2)
    K = kernel(modes, time).to(dtype)
    size = 2 * time
    y = torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(K, size), size)[..., :time]
    table = powers(modes, torch.arange(time + 1, device=u.device))
    seen = times(table[:, :, 1:], state[:, :, :, None])[..., 0]
    seen = seen if modes.gain is None else seen * modes.gain.to(seen.dtype)[..., None]
    y = y.to(seen.dtype) + seen.sum(2)
    own = torch.einsum("btd,dmtc->bdmc", u.to(table.dtype), table[:, :, :time].flip(2))
    return y.transpose(1, 2).to(u.dtype), own + times(table[:, :, time], state)


def _reference(u: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    y, final = reference.spectral(u.double(), modes, state)
    return y.to(u.dtype), final


def _each_document(
    whole, u: Tensor, modes: Modes, state: Tensor, positions: Tensor, known: bool
) -> tuple[Tensor, Tensor]:
    """Run `whole` on every document alone, in a loop: for the methods that exist to be compared
    with."""
    batch, time, channels = u.shape
    docs = find_documents(positions, torch.full((batch,), -1, device=u.device) if known else None)
    flat = u.reshape(-1, channels)
    out = torch.zeros_like(flat)
    final = list(state.unbind(0))
    for tokens in docs.token.tensor_split(docs.head[1:].cpu()):
        if not len(tokens):
            continue
        row = int(tokens[0]) // time
        fresh = int(positions.reshape(-1)[tokens[0]]) == 0
        begin = torch.zeros_like(state[:1]) if fresh else final[row][None]
        y, end = whole(flat[tokens][None], modes, begin)
        out = out.index_copy(0, tokens, y[0])
        final[row] = end[0]
    return out.reshape(u.shape), torch.stack(final)
