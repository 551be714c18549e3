"""The global branch: causal depth-wise convolution with kernels of damped oscillators.

    y_t = sum_{s <= t} K[t - s] u_s,   K[t] = sum_m gain_m exp(-decay_m t) cos(frequency_m t)

The paper computes it with an FFT. Because K is a sum of powers z^t, it is also a recurrence with
two numbers of state per mode (see `modes`): h <- z h + u, y = Re(sum gain h). That gives methods of
linear time, and a step of constant time and memory. The table of methods is at the end of this
file. For finite kernels without this form see `fir`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_window.errors import NotFiniteError, UserTypeError
from spectral_window.ops import reference
from spectral_window.ops.checks import check_input, check_like, check_out, check_state
from spectral_window.ops.chunked_spectral import chunked
from spectral_window.ops.documents import Documents, anywhere, documents_after, each_document
from spectral_window.ops.methods import (
    Method,
    Reason,
    enrol,
    first_of,
    not_exported,
    not_interpreted,
    not_transformed,
    numba_on_cpu,
    one_token,
    past_the_dispatcher,
    resolve,
    triton_on_gpu,
)
from spectral_window.ops.modes import Modes, exact_dtype, powers, times
from spectral_window.ops.modes import kernel as impulse_response
from spectral_window.ops.tracing import may_bypass, readable, takes_tangents


def spectral_conv(
    u: Tensor,
    kernel: Modes,
    *,
    state: Tensor | None = None,
    positions: Tensor | Documents | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel of `u` causally with its kernel, starting from `state`.

    Paper section 1. Twice differentiable in u, state, decay, frequency and gain.

    Args:
        u: [B, T, D] floating; any T >= 0 and B >= 0.
        kernel: `Modes` of shape [D] or [D, M], float32 or float64.
        state: [B, D, M, 2] float64, h = (re, im) of every mode after the earlier tokens, or None.
            It continues the first document of a row, unless that starts at position 0.
        positions: documents and padding, see `spectral_window.ops`.
        cu_seqlens: the same as offsets.
        method: a name in METHODS["spectral"], or "auto".
        out: a tensor that y is written to and that is returned: [B, T, D], contiguous, with u's
            dtype and device. It must not overlap an input, and no gradient can be recorded.

    Returns:
        y [B, T, D] in u's dtype (0 at padding), and the state after the last token of each row.

    Raises:
        UserError: a bad argument (a ValueError); raised before any work.
        UserTypeError: an argument of a wrong type or dtype (a TypeError).

    Example:
        The state after the first part of a text continues it exactly:

        >>> kernel = Modes(decay=torch.tensor([0.1]), frequency=torch.tensor([0.5]))
        >>> u = torch.randn(2, 6, 1)
        >>> y, _ = spectral_conv(u, kernel)
        >>> first, state = spectral_conv(u[:, :4], kernel)
        >>> second, state = spectral_conv(u[:, 4:], kernel, state=state)
        >>> torch.allclose(torch.cat((first, second), 1), y, atol=1e-6)
        True
        >>> state.shape
        torch.Size([2, 1, 1, 2])
    """
    check_input(u, "spectral_conv")
    if not isinstance(kernel, Modes):
        raise UserTypeError(
            f"kernel is a {type(kernel).__name__} (spectral_conv): pass Modes, or call fir_conv"
        )
    chosen = resolve("spectral", method, u, *kernel, state)
    modes = kernel.shaped(u.shape[2])
    check_like(u, "spectral_conv", *modes.named(), ("state", state))
    check_state(state, modes, u, "spectral_conv")
    if out is not None:
        others = {"state": state, "cu_seqlens": cu_seqlens, **dict(modes.named())}
        check_out(out, u, "spectral_conv", positions, **others)
    documents = documents_after(state, positions, cu_seqlens, u)
    if not u.numel():
        modes.check_values()
        empty = modes.state_shape(u.shape[0])
        final = u.new_zeros(empty, dtype=exact_dtype(u.device)) if state is None else state
        return (u.clone() if out is None else out), final.to(exact_dtype(u.device))
    return chosen.function(u, modes, state, documents, out)


# ------------------------------------------------------------------------------ the methods
#
# Each is called with u [B, T, D] (not empty), modes [D, M] (values not checked yet), state or None,
# documents or None, and `out` or None.


def _bare_scan(
    u: Tensor,
    modes: Modes,
    state: Tensor | None,
    documents: Documents | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the compiled scan directly; it checks the values of the modes itself."""
    from spectral_window.ops.compiled.scan import run

    before = None if state is None else state.to(torch.float64)
    positions = None if documents is None else documents.positions
    done = run(u, modes, before, positions, refuse=True, out=out)
    if done is None:
        modes.check_values()
        raise NotFiniteError("modes are not finite (spectral_conv)")
    return done[:2]


def _scan(
    u: Tensor,
    modes: Modes,
    state: Tensor | None,
    documents: Documents | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if may_bypass(u, *modes, state):
        return _bare_scan(u, modes, state, documents, out)
    from spectral_window.ops.compiled.scan import scan

    modes.check_values()
    before = u.new_zeros(modes.state_shape(u.shape[0]), dtype=torch.float64)
    before = before if state is None else state.to(torch.float64)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, *modes, before)
    )
    positions = None if documents is None else documents.positions
    y, final, _ = scan(u, modes.decay, modes.frequency, modes.gain, before, positions, keep)
    return y if out is None else out.copy_(y), final


def _checked(method):
    """Adapt `method(u, modes, state, documents) -> (y, state)` to the table: check, and `out`."""

    def run(u, modes, state, documents, out):
        modes.check_values()
        y, final = method(u, modes, state, documents)
        return y if out is None else out.copy_(y), final

    return run


def _triton(
    u: Tensor, modes: Modes, state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    from spectral_window.ops.triton_spectral import convolve

    before = None if state is None else state.to(exact_dtype(u.device))
    # on a GPU positions are not checked: reading them would wait for the device
    return convolve(u, modes, before, None if documents is None else documents.positions)


def _step(
    u: Tensor, modes: Modes, state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Process one token per row. A padded row keeps its state; position 0 resets it."""
    exact = exact_dtype(u.device)
    shape = modes.state_shape(u.shape[0])
    state = u.new_zeros(shape, dtype=exact) if state is None else state.to(exact)
    positions = None if documents is None else documents.positions
    before = state
    if positions is not None:
        before = torch.where((positions == 0)[..., None, None], 0.0, state)
    one = torch.ones(1, dtype=torch.int64, device=u.device)
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


def _exactly(whole):
    """Apply `whole(u, modes, state)` in float64 to every document separately."""

    def run(u, modes, state, documents):
        exact = modes.double()  # cast once, so that gradients are summed before they are rounded
        if state is None:
            shape = modes.state_shape(u.shape[0])
            begin = u.new_zeros(shape, dtype=exact_dtype(u.device))
        else:
            begin = state.to(exact_dtype(u.device))
        if documents is None:
            return whole(u, exact, begin)
        documents.check(None if state is None else anywhere(u.shape[0]), wait=True)
        return each_document(lambda x, before: whole(x, exact, before), [u], begin, documents, u)

    return run


def _fft(u: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's method. NaN and infinity are refused: an FFT would spread them to the past."""
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
    from_state = times(table[:, :, 1:], state[:, :, :, None])[..., 0]
    from_state = (
        from_state
        if modes.gain is None
        else from_state * modes.gain.to(from_state.dtype)[..., None]
    )
    y = y.to(from_state.dtype) + from_state.sum(2)
    own = torch.einsum("btd,dmtc->bdmc", u.to(table.dtype), table[:, :, :time].flip(2))
    return y.transpose(1, 2).to(u.dtype), own + times(table[:, :, time], state)


def _reference(u: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    y, final = reference.spectral(u.double(), modes, state)
    return y.to(u.dtype), final


def _without_tangents(*_: object) -> Reason:
    if takes_tangents():
        return "it has no forward-mode derivatives"
    return None


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

enrol(
    "spectral",
    Method(
        "step_compiled",
        _bare_scan,
        "one token: the recurrence in compiled code (numba), constant state and time, on a CPU",
        first_of(one_token, numba_on_cpu(), past_the_dispatcher),
    ),
    Method(
        "step",
        _checked(_step),
        "one token: the recurrence in plain torch, constant state and time",
        one_token,
    ),
    Method(
        "scan",
        _scan,
        "the recurrence in one pass over memory, compiled by numba for this CPU, O(T)",
        first_of(numba_on_cpu(), _without_tangents),
        not_exported,
    ),
    Method(
        "triton",
        _checked(_triton),
        "the recurrence in few passes over memory, Triton kernels for a GPU, O(T)",
        first_of(triton_on_gpu(*FLOATS), _without_tangents),
        first_of(not_interpreted, not_transformed),
    ),
    Method(
        "chunked",
        _checked(chunked),
        "products inside chunks (float64 on a CPU) and a scan between them, O(T), plain torch",
    ),
    Method(
        "fft",
        _checked(_exactly(_fft)),
        "the paper's zero-padded FFT in float32, O(T log T)",
    ),
    Method(
        "reference",
        _checked(_exactly(_reference)),
        "the recurrence in float64, token by token: the truth for the others",
    ),
)
