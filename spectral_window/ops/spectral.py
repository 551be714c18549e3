"""The global branch: causal depth-wise convolution with kernels of damped oscillators.

    y_t = sum_{s <= t} K[t - s] u_s,   K[t] = sum_m gain_m exp(-decay_m t) cos(frequency_m t)

The paper computes it with an FFT. Because K is a sum of powers z^t, it is also a recurrence with
two numbers of state a mode (see `modes`), which gives a linear-time method and a constant-state
step:

    chunked    products inside chunks, a scan between them (`chunked_spectral`).
    scan       the recurrence itself, one pass over memory in compiled code (`numba_spectral`).
    step       one token: h <- z h + u, y = Re(sum gain h).
    fft        the paper's: zero-pad to >= 2T, multiply spectra, crop; float32 whatever the dtype.
    reference  the direct sum in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.ops import reference
from spectral_window.ops.chunked_spectral import chunked
from spectral_window.ops.dispatch import resolve
from spectral_window.ops.documents import find_documents, given_positions
from spectral_window.ops.modes import Modes, exact_dtype, kernel, powers, times


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
        return chunked(u, modes, state, positions, known)
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
