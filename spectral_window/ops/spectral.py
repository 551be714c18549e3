"""The global branch: causal depth-wise convolution with kernels of damped oscillators.

    y_t = sum_{s <= t} K[t - s] u_s,   K[t] = sum_m gain_m exp(-decay_m t) cos(frequency_m t)

The paper computes it with an FFT. Because K is a sum of powers z^t, it is also a recurrence with
two numbers of state a mode (see `modes`), which gives a linear-time method and a constant-state
step:

    chunked    products inside chunks, a scan between them (`chunked_spectral`).
    scan       the recurrence itself, one pass over memory in compiled code, on a CPU (`scan`).
    triton     the recurrence on a GPU, chunks of time in parallel (`triton_spectral`).
    step       one token: h <- z h + u, y = Re(sum gain h).
    fft        the paper's: zero-pad to >= 2T, multiply spectra, crop; float32 whatever the dtype.
    reference  the direct sum in float64.

A kernel that is free in every entry but finite is `Taps`, with methods of its own (`taps`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spectral_window.errors import NotFiniteError, UserError, UserTypeError
from spectral_window.ops import reference
from spectral_window.ops.chunked_spectral import chunked
from spectral_window.ops.dispatch import (
    HAS_NUMBA,
    is_recorded,
    may_bypass,
    readable,
    resolve,
)
from spectral_window.ops.documents import anywhere, find_documents, given_positions
from spectral_window.ops.modes import Modes, exact_dtype, powers, times
from spectral_window.ops.modes import kernel as impulse_response
from spectral_window.ops.taps import Taps, tap_conv


def spectral_conv(
    u: Tensor,
    kernel: Modes | Taps,
    *,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal convolution of every channel of `u` with its kernel, from `state` (paper section 1).

    u:          [B, T, D] floating; any T >= 0 and B >= 0.
    kernel:     `Modes` of [D] or [D, M], or `Taps` of [D, L], float32 or float64.
    state:      what the tokens before left; None for none. For modes [B, D, M, 2] float64, h = (re,
                im) of every mode; for taps [B, L - 1, D], the last inputs, in u's dtype. It enters
                a row's first document unless that begins at position 0.
    positions, cu_seqlens: documents and padding, see `spectral_window.ops`.
    method:     one of `dispatch.METHODS`, or "auto"; then a single token takes the
                recurrence's step. Taps know "fft" and "reference", but no recurrence.
    out:        where y is written (and returned) instead of in fresh memory: [B, T, D] contiguous,
                u's dtype and device, overlapping no input, with no gradient to record.

    Returns y [B, T, D] in u's dtype (0 at padding) and the state after each row's last token.
    Differentiable, twice, in u, state, decay, frequency and gain, or weights. Raises ValueError or
    TypeError before any work.
    """
    if u.dim() != 3:
        raise UserError(
            f"u has shape {tuple(u.shape)} (spectral_conv): expected [batch, time, channels]"
        )
    if not u.dtype.is_floating_point:
        raise UserTypeError(f"u is {u.dtype} (spectral_conv): expected a floating dtype")
    if isinstance(kernel, Taps):
        kernel = kernel.validated(u.shape[2])
        method, _ = resolve("taps", method, u, taps=kernel.weights.shape[1])
        plain = False
    else:
        method, _ = resolve("spectral", method, u)
        # in compiled code that is called directly, the modes' values are checked on the way
        plain = method in ("scan", "step") and HAS_NUMBA and u.is_cpu
        plain = plain and may_bypass(u, *kernel, state)
        kernel = kernel.validated(u.shape[2], values=not plain)
    for name, part in (*zip(kernel._fields, kernel, strict=True), ("state", state)):
        if part is not None and part.device != u.device:
            raise UserError(
                f"{name} is on {part.device}, u on {u.device} (spectral_conv): move one"
            )
    _check_state(state, kernel, u)
    if out is not None:
        inputs = {**kernel._asdict(), "state": state}
        _check_out(out, u, inputs | {"positions": positions, "cu_seqlens": cu_seqlens})
    # any beginning other than 0 continues the state; the state itself does not know its position
    begin = None
    if cu_seqlens is not None and state is not None:
        begin = torch.ones(u.shape[0], dtype=torch.int64, device=u.device)
    positions = given_positions(positions, cu_seqlens, u, begin)
    if method == "step" and state is None and positions is not None and readable(positions):
        _check_documents(positions, known=False)  # nothing goes on from nothing
    if isinstance(kernel, Taps):
        y, final = tap_conv(u, kernel, state, positions, method)
    elif plain and u.numel():
        return _compiled(u, kernel, state, positions, method, out)
    else:
        y, final = _by_method(method, u, kernel, state, positions)
    return y if out is None else out.copy_(y), final


def _check_state(state: Tensor | None, kernel: Modes | Taps, u: Tensor) -> None:
    if state is None:
        return
    shape, dtype = kernel.state_shape(u.shape[0]), kernel.state_dtype(u.dtype, u.device)
    if state.shape != shape or state.dtype not in (torch.float32, torch.float64, dtype):
        raise UserError(
            f"state is {tuple(state.shape)} {state.dtype} (spectral_conv): expected {shape} in "
            f"{dtype}, as returned by a call with the same batch and modes or taps"
        )


def _check_out(out: Tensor, u: Tensor, others: dict[str, Tensor | None]) -> None:
    if out.shape != u.shape or out.dtype != u.dtype or out.device != u.device:
        raise UserError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device} (spectral_conv): expected "
            f"{tuple(u.shape)} {u.dtype} on {u.device}, like u"
        )
    if not out.is_contiguous():
        raise UserError("out is not contiguous (spectral_conv): pass contiguous memory")
    given = {name: x for name, x in ({"u": u} | others).items() if x is not None}
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *given.values())):
        raise UserError(
            "out with a gradient to record (spectral_conv): leave it away, or use torch.no_grad()"
        )
    if not readable(out, *given.values()) or not out.numel():
        return
    if out.is_neg():
        raise UserError("out has its negative bit set (spectral_conv): pass other memory")
    for name, x in given.items():
        distance = out.data_ptr() - x.data_ptr()
        span = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        if x.numel() and -out.nbytes < distance < span * x.element_size():
            raise UserError(f"out overlaps {name} (spectral_conv): pass other memory")


def _forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return not is_recorded() and forward_ad._current_level >= 0


def _compiled(
    u: Tensor,
    modes: Modes,
    state: Tensor | None,
    positions: Tensor | None,
    method: str,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan, or a step as the scan of one token, straight in compiled code."""
    from spectral_window.ops.compiled.scan import run

    if positions is not None and method == "scan":
        _check_documents(positions, state is not None)
    before = None if state is None else state.to(torch.float64)
    done = run(u, modes, before, positions, refuse=True, out=out)
    if done is None:
        modes.validated(u.shape[2])
        raise NotFiniteError("modes are not finite (spectral_conv)")
    return done[:2]


def _check_documents(positions: Tensor, known: bool) -> None:
    """Raise ValueError where positions neither begin a document nor count on."""
    find_documents(positions, anywhere(positions) if known else None)


def _by_method(
    method: str, u: Tensor, modes: Modes, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`method` for checked inputs."""
    known = state is not None  # a state that is known is a caller's
    exact = exact_dtype(u.device)
    if method == "triton" and u.numel() and not _forward_mode():
        return _in_triton(u, modes, None if state is None else state.to(exact), positions)
    shape = modes.state_shape(u.shape[0])
    state = u.new_zeros(shape, dtype=exact) if state is None else state.to(exact)
    if u.numel() == 0:
        return u.clone(), state
    if method == "step":
        return _step(u, modes, state, positions)
    if method == "scan" and not _forward_mode():  # whose tangents the scan does not know
        return _scanned(u, modes, state, positions, known)
    if method in ("chunked", "scan", "triton"):
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
    one = torch.ones(1, dtype=torch.float64, device=u.device)
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
        raise UserError(f"method 'scan' needs a CPU, u is on {u.device}: use 'chunked' or 'auto'")
    from spectral_window.ops.compiled.scan import scan

    if positions is not None and readable(positions):
        _check_documents(positions, known)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, *modes, state)
    )
    y, final, _ = scan(u, modes.decay, modes.frequency, modes.gain, state, positions, keep)
    return y, final


def _in_triton(
    u: Tensor, modes: Modes, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.triton_spectral import convolve

    # on a GPU positions are taken as they are: to look at them would wait for the device
    if positions is not None and u.is_cpu and not torch.compiler.is_compiling():
        _check_documents(positions, state is not None)
    return convolve(u, modes, state, positions)


def _fft(u: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's method. An FFT mixes all positions, so a NaN or infinity anywhere is refused: it
    would reach the past."""
    time = u.shape[1]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    if readable(u) and not bool(torch.isfinite(u).all()):
        raise NotFiniteError(
            "u is not finite (spectral_conv, method fft): an FFT would spread it over all positions"
        )
    x = u.to(dtype).transpose(1, 2)
    K = impulse_response(modes, time).to(dtype)
    size = 2 * time
    y = torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(K, size), size)[..., :time]
    table = powers(modes, torch.arange(time + 1, dtype=torch.int64, device=u.device))
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
    _, time, channels = u.shape
    docs = find_documents(positions, anywhere(positions) if known else None)
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
