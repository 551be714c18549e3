"""Taps: kernels of finite length, and their convolution (one FIR filter per channel).

    y_t = sum_{j < L} weights_j u_{t-j}

A kernel with L free entries has no recurrence of two numbers, but its state has a constant size
too: the last L - 1 inputs of the current document, unchanged, so every split of a text gives the
same state to the bit. The cost is L - 1 numbers per channel, where an oscillator needs two, and
inputs L or more tokens back have no effect. The table of methods is at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import NotFiniteError, UserError, UserTypeError
from spectral_window.ops import recorded, reference
from spectral_window.ops.checks import check_input, check_like, check_out, check_state
from spectral_window.ops.documents import Documents, Tokens, anywhere, documents_after
from spectral_window.ops.methods import (
    Method,
    Reason,
    enrol,
    first_of,
    not_recorded,
    numba_on_cpu,
    one_token,
    resolve,
)
from spectral_window.ops.tracing import readable

FEW = 16  # taps; an FFT is faster for more
Convolve = Callable[[Tensor, Tensor], Tensor]


class Taps(NamedTuple):
    """FIR filters of D channels.

    Attributes:
        weights: [D, L] float32 or float64, L >= 1; weights[:, j] multiplies the input j tokens
            back.
    """

    weights: Tensor

    def validated(self, channels: int) -> Taps:
        """Return these taps after checking them for D = `channels`.

        Raises:
            UserTypeError: a dtype below float32.
            UserError: a wrong shape.
            NotFiniteError: NaN or infinity (checked on a CPU, outside torch.compile).
        """
        weights = self.weights
        if weights.dtype not in (torch.float32, torch.float64):
            raise UserTypeError(
                f"weights are {weights.dtype} (taps): keep them in float32 or float64, "
                "lower precision changes the kernel"
            )
        if weights.dim() != 2 or weights.shape[0] != channels or not weights.shape[1]:
            raise UserError(
                f"weights have shape {tuple(weights.shape)} (taps): expected [{channels}, L], L > 0"
            )
        looked_at = weights.device.type == "cpu" and readable(weights)
        if looked_at and not bool(torch.isfinite(weights).all()):
            raise NotFiniteError(
                "weights are not finite (taps): training diverged or a file is corrupt"
            )
        return self

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of a state: [B, L - 1, D], the last inputs, oldest first."""
        channels, length = self.weights.shape
        return batch, length - 1, channels

    def state_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype of a state: that of the inputs, which are stored unchanged."""
        return dtype

    def flops_per_token(self) -> int:
        """Return the operations per token: one multiply-add per tap. An FFT needs fewer."""
        return 2 * self.weights.numel()


def fir_conv(
    u: Tensor,
    taps: Taps,
    *,
    state: Tensor | None = None,
    positions: Tensor | Documents | None = None,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel of `u` causally with a FIR filter, starting from `state`.

    Computed in float32 (float64 for float64 inputs) and rounded once. Differentiable any number of
    times in u, weights and state.

    Args:
        u: [B, T, D] floating; any T >= 0 and B >= 0.
        taps: `Taps` of shape [D, L], float32 or float64.
        state: the last inputs [B, L - 1, D], oldest first, in u's dtype, or None. They precede the
            first document of a row, unless that starts at position 0.
        positions: documents and padding, see `spectral_window.ops`.
        cu_seqlens: the same as offsets.
        method: a name in METHODS["fir"], or "auto".
        out: a tensor that y is written to and that is returned, as in `spectral_conv`.

    Returns:
        y [B, T, D] (0 at padding), and the state after the last token of each row, both in u's
        dtype.

    Raises:
        UserError: a bad argument (a ValueError); raised before any work.
        UserTypeError: an argument of a wrong type or dtype (a TypeError).

    Example:
        >>> u = torch.tensor([[[1.0], [2.0], [4.0]]])
        >>> y, state = fir_conv(u, Taps(torch.tensor([[1.0, 0.5]])))
        >>> y.flatten(), state.flatten()
        (tensor([1.0000, 2.5000, 5.0000]), tensor([4.]))
    """
    check_input(u, "fir_conv")
    if not isinstance(taps, Taps):
        raise UserTypeError(
            f"taps are a {type(taps).__name__} (fir_conv): pass Taps; Modes are for spectral_conv"
        )
    weights = taps.validated(u.shape[2]).weights
    chosen = resolve("fir", method, u, weights)
    check_like(u, "fir_conv", ("weights", weights), ("state", state))
    check_state(state, taps, u, "fir_conv")
    if out is not None:
        others = {"weights": weights, "state": state, "cu_seqlens": cu_seqlens}
        check_out(out, u, "fir_conv", positions, **others)
    documents = documents_after(state, positions, cu_seqlens, u)
    if u.numel():
        before = None if state is None else state.to(u.dtype)
        y, final = chosen.function(u, weights, before, documents)
    else:
        past = u.new_zeros(taps.state_shape(u.shape[0]))
        y, final = u.clone(), past if state is None else state.to(u.dtype)
    return y if out is None else out.copy_(y), final


def _by(convolve: Convolve) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a method that convolves rows by `convolve(x, weights)`.

    `convolve` gets x [B, L - 1 + N, D], the L - 1 earlier inputs and the N inputs of the call, and
    weights [D, L]. It returns [B, N, D] in x's dtype.
    """

    def method(
        u: Tensor, weights: Tensor, before: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        batch, time, channels = u.shape
        past = weights.shape[1] - 1
        if documents is not None and not readable(documents.positions):
            earlier = u.new_zeros(batch, past, channels) if before is None else before
            return recorded.convolve_taps(u, weights, earlier, documents.positions)
        if documents is not None:
            documents.check(None if before is None else anywhere(batch), wait=True)
            return _each_document(u, weights, before, documents, convolve)
        if before is None:  # for a text shorter than the filter only the first T taps matter
            before = u.new_zeros(batch, min(past, time - 1), channels)
        x = torch.cat((before, u), 1)
        return convolve(x, weights[:, : before.shape[1] + 1]), _last(x, past)

    return method


def _last(x: Tensor, past: int) -> Tensor:
    """Return the last `past` inputs of x [B, N, D], padded with zeros in front.

    A copy: a view would keep all of x in memory.
    """
    if x.shape[1] < past:
        return F.pad(x, (0, 0, past - x.shape[1], 0))
    return x[:, x.shape[1] - past :].clone()


class _Group(NamedTuple):
    """Documents of similar length (the same power of two), each in its own row.

    Attributes:
        inputs: [n, reach + longest], indices of their inputs in the pool.
        reach: number of inputs before the first token.
        filled: indices into the n * longest places that hold tokens.
        place: [tokens], where the outputs go, among all B*T.
    """

    inputs: Tensor
    reach: int
    filled: Tensor
    place: Tensor


class _Pool(NamedTuple):
    """A pool of inputs: the tokens, then the inputs in the states, then one row of zeros.

    Attributes:
        token: [n], the tokens among all B*T.
        groups: the number of groups.
        last: [B, L - 1], indices of the inputs that the state of each row holds afterwards.
        alive: [B] bool, rows with any token.
    """

    token: Tensor
    groups: int
    last: Tensor
    alive: Tensor


def _each_document(
    u: Tensor, weights: Tensor, state: Tensor | None, documents: Documents, convolve
) -> tuple[Tensor, Tensor]:
    """Move documents to their own rows, convolve, and move the outputs back.

    Documents of similar length (the same power of two) are grouped, so that the padded rows hold at
    most four times as many tokens.
    """
    batch, time, channels = u.shape
    past = weights.shape[1] - 1
    before = u.new_zeros(batch, past, channels) if state is None else state
    plan = documents.plan(("fir", past), lambda tokens: _pool(tokens, past))
    if not len(plan.token):
        return torch.zeros_like(u), before
    tokens = u.reshape(-1, channels).index_select(0, plan.token)
    pool = torch.cat((tokens, before.reshape(-1, channels), u.new_zeros(1, channels)))

    def inputs(index: Tensor) -> Tensor:
        return pool.index_select(0, index.reshape(-1)).reshape(*index.shape, channels)

    places, parts = [], []
    for n in range(plan.groups):
        group = documents.plan(("fir", past, n), partial(_group, past=past, n=n))
        y = convolve(inputs(group.inputs), weights[:, : group.reach + 1])
        places.append(group.place)
        parts.append(y.reshape(-1, channels).index_select(0, group.filled))
    out = u.new_zeros(batch * time, channels).index_copy(0, torch.cat(places), torch.cat(parts))
    final = inputs(plan.last)
    return out.reshape(u.shape), torch.where(plan.alive[:, None, None], final, before)


def _pool(tokens: Tokens, past: int) -> _Pool:
    last = tokens.last.clamp(min=0)
    alive = tokens.last >= 0
    if not len(tokens.token):
        return _Pool(tokens.token, 0, last[:, None].expand(-1, past), alive)
    document = tokens.document[last]
    back = torch.arange(1 - past, 1, dtype=torch.int64, device="cpu")
    index = _places(tokens, past, document, (last - tokens.head[document])[:, None] + back)
    return _Pool(tokens.token, len(_kinds(tokens).unique()), index, alive)


def _kinds(tokens: Tokens) -> Tensor:
    """Return the group key of every document: [documents]."""
    return 2 * torch.frexp((tokens.length - 1).double()).exponent + tokens.goes_on


def _group(tokens: Tokens, past: int, n: int) -> _Group:
    kinds = _kinds(tokens)
    kind = int(kinds.unique()[n])
    document = torch.nonzero(kinds == kind).squeeze(1)
    length = tokens.length[document]
    longest = int(length.max())
    reach = past if kind % 2 else min(past, longest - 1)
    offset = torch.arange(-reach, longest, dtype=torch.int64, device="cpu").expand(
        len(document), -1
    )
    filled = offset[:, reach:] < length[:, None]
    place = tokens.token[(tokens.head[document, None] + offset[:, reach:])[filled]]
    index = _places(tokens, past, document, offset)
    return _Group(index, reach, torch.nonzero(filled.reshape(-1)).squeeze(1), place)


def _places(tokens: Tokens, past: int, document: Tensor, offset: Tensor) -> Tensor:
    """Return pool indices of the inputs at `offset` [n, N] from the start of `document` [n]."""
    document = document[:, None]
    count, rows = len(tokens.token), len(tokens.last)
    token = tokens.head[document] + offset
    earlier = count + tokens.row[tokens.head][document] * past + past + offset  # in the state
    remembered = tokens.goes_on[document] & (offset < 0) & (offset >= -past)
    inside = (offset >= 0) & (offset < tokens.length[document])
    nothing = count + rows * past
    return torch.where(inside, token, torch.where(remembered, earlier, nothing))


class _Sources(NamedTuple):
    """Documents and padding as compiled code needs them (see `compiled.fir.source`).

    Attributes:
        taps: [n, L], the place of the input of each tap, for each of the n tokens.
        last: [B, L - 1], the place of each input in the state of each row afterwards.
    """

    taps: Tensor
    last: Tensor


def _sources(tokens: Tokens, past: int, nothing: int) -> _Sources:
    pool = _pool(tokens, past)
    rows = len(tokens.last)
    before = torch.arange(-1, -1 - rows * past, -1, dtype=torch.int64, device="cpu")
    place = torch.cat((tokens.token, before, before.new_tensor([nothing])))
    index = torch.arange(len(tokens.token), dtype=torch.int64, device="cpu")
    back = torch.arange(0, -1 - past, -1, dtype=torch.int64, device="cpu")
    offset = (index - tokens.head[tokens.document])[:, None] + back
    taps = place[_places(tokens, past, tokens.document, offset)]
    # a row without tokens keeps its state
    last = torch.where(pool.alive[:, None], place[pool.last], before.view(rows, past))
    return _Sources(taps, last)


def _table(documents: Documents | None, weights: Tensor) -> _Sources | None:
    if documents is None:
        return None
    from spectral_window.ops.compiled.fir import NOTHING

    past = weights.shape[1] - 1
    return documents.plan(("fir", past, "sources"), lambda tokens: _sources(tokens, past, NOTHING))


def sources_of(documents: Documents | None, weights: Tensor) -> Tensor | None:
    """Return where compiled code finds the input of each tap [tokens, L], or None if each row is
    one document."""
    table = _table(documents, weights)
    return None if table is None else table.taps


def _in_one_pass(
    u: Tensor, weights: Tensor, before: Tensor | None, documents: Documents | None
) -> Tensor:
    from spectral_window.ops.compiled import fir

    return fir.convolve(u, weights, before, sources_of(documents, weights))


class _InOnePass(torch.autograd.Function):
    """Second derivatives, and the gradient of the state, are computed by `_shifts`."""

    forward = staticmethod(_in_one_pass)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.documents = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from spectral_window.ops.compiled import fir

        u, weights, before = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or ctx.needs_input_grad[2]:
            with torch.enable_grad():
                # views, because one input may depend on another: a state computed from u
                u, weights, before = (
                    None if x is None else x.view_as(x) for x in (u, weights, before)
                )
                leaves = [x for x in (u, weights, before) if x is not None and x.requires_grad]
                y, _ = _by(_in_float32(_shifts))(u, weights, before, ctx.documents)
                if not y.requires_grad:  # there is padding alone
                    return None, None, None, None
                gradients = iter(torch.autograd.grad(y, leaves, grad, create_graph=again))
            needed = ctx.needs_input_grad[:3]
            return *(next(gradients) if needs else None for needs in needed), None
        sources = sources_of(ctx.documents, weights)
        return *fir.convolve_backward(u, weights, before, sources, grad), None, None


def _compiled(
    u: Tensor, weights: Tensor, before: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    if documents is not None:
        documents.check(None if before is None else anywhere(len(u)), wait=True)
    run = _InOnePass.apply if torch.is_grad_enabled() else _in_one_pass
    return run(u, weights, before, documents), state_after(u, weights, before, documents)


def state_after(
    u: Tensor, weights: Tensor, before: Tensor | None, documents: Documents | None
) -> Tensor:
    """Return the last inputs [B, L - 1, D] after each row of u, which follows `before`."""
    table = _table(documents, weights)
    if table is not None:
        return _inputs_at(table, u, before)
    past, time = weights.shape[1] - 1, u.shape[1]
    if before is not None and time < past:
        return torch.cat((before[:, time:], u), 1)
    return _last(u, past)


def _inputs_at(table: _Sources, u: Tensor, before: Tensor | None) -> Tensor:
    """Return the states [B, L - 1, D] after the last token of each row."""
    at = table.last[..., None]
    after = u.flatten(0, 1)[table.last.clamp(min=0)]
    if before is None:
        return torch.where(at >= 0, after, 0.0)
    flat = before.flatten(0, 1)
    earlier = flat[(-1 - table.last).clamp(0, max(len(flat) - 1, 0))]
    return torch.where(at >= 0, after, torch.where(at >= -len(flat), earlier, 0.0))


def _exact(x: Tensor, weights: Tensor) -> Tensor:
    exact, back = x.double(), weights.shape[1] - 1
    return reference.fir(exact[:, back:], weights.double(), exact[:, :back])[0].to(x.dtype)


def _in_float32(method):
    """Return `method` computed in float32, or in float64 for float64 inputs."""

    def run(x: Tensor, weights: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return method(x.to(dtype), weights.to(dtype)).to(x.dtype)

    return run


def _step(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights.flip(1).T).sum(1, keepdim=True)


def _shifts(x: Tensor, weights: Tensor) -> Tensor:
    count, back = x.shape[1], weights.shape[1] - 1
    y = weights[:, 0] * x[:, back:]
    for j in range(1, back + 1):
        y = torch.addcmul(y, weights[:, j], x[:, back - j : count - j])
    return y


def _fft(x: Tensor, weights: Tensor) -> Tensor:
    """Convolve by FFT.

    A cyclic convolution over all inputs wraps around only into the first L - 1 outputs, which are
    not used.
    """
    count, back = x.shape[1], weights.shape[1] - 1
    if readable(x) and not bool(torch.isfinite(x).all()):
        raise NotFiniteError(
            "u is not finite (fir_conv, method fft): an FFT would spread it over all positions"
        )
    size = fast_size(count)
    spectrum = torch.fft.rfft(x.transpose(1, 2), size) * torch.fft.rfft(weights, size)
    return torch.fft.irfft(spectrum, size)[..., back:count].transpose(1, 2)


def fast_size(count: int) -> int:
    """Return the smallest of 2^k, 5/8 2^k and 3/4 2^k that is at least `count`: fast FFT sizes."""
    power = 1 << max(count - 1, 7).bit_length()
    return next(size for size in (power * 5 // 8, power * 3 // 4, power) if size >= count)


def _few_taps(x: Tensor, weights: Tensor | None = None, *_: object) -> Reason:
    if weights is None or weights.shape[1] <= FEW:
        return None
    return f"an FFT is quicker than more than {FEW} passes over memory"


enrol(
    "fir",
    Method(
        "compiled",
        _compiled,
        "all taps in one pass over memory, compiled by numba, causal to the bit, O(T L), on a CPU",
        first_of(numba_on_cpu(torch.float32, torch.bfloat16), not_recorded),
        _few_taps,
    ),
    Method(
        "step",
        _by(_in_float32(_step)),
        "one token: a weighted sum of the last L inputs, constant state and time",
        one_token,
    ),
    Method(
        "shifts",
        _by(_in_float32(_shifts)),
        "a multiply-add of the whole input for each tap, causal to the bit, O(T L), plain torch",
        None,
        _few_taps,
    ),
    Method("fft", _by(_in_float32(_fft)), "zero-padded FFT in float32, O(T log T)"),
    Method("reference", _by(_exact), "the direct sum in float64, O(T L): the truth for the others"),
)
