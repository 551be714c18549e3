"""Taps: kernels of finite length, and their convolution (a FIR filter a channel).

    y_t = sum_{j < L} weights_j u_{t-j}

A kernel that is free in every entry is no sum of damped oscillators, so it has no recurrence of two
numbers. But its memory ends after L tokens, and that is a state of constant size too: the last
L - 1 inputs of the current document, kept as they came, so that any split of a text gives the same
state to the bit. The price is said honestly: L - 1 numbers a channel, where an oscillator needs
two; and what lies L tokens back is not seen at all.

    shifts     for few taps: y is a sum of L shifted inputs; causal to the bit.
    fft        for many: the product of spectra, padded so that nothing wraps around; float32.
    step       one token: a weighted sum of the last L inputs.
    reference  the direct sum in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import NotFiniteError, UserError, UserTypeError
from spectral_window.ops import recorded, reference
from spectral_window.ops.dispatch import is_recorded, readable
from spectral_window.ops.documents import anywhere, find_documents


class Taps(NamedTuple):
    """weights: [D, L] float32 or float64, L >= 1; weights[:, j] multiplies the input j tokens
    back."""

    weights: Tensor

    def validated(self, channels: int, *, values: bool = True) -> Taps:
        """These taps, or an error that names what is wrong: TypeError for a dtype below float32,
        ValueError for a shape and, on a CPU outside torch.compile, for NaN or infinity (unless not
        `values`)."""
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
        looked_at = values and weights.device.type == "cpu" and readable(weights)
        if looked_at and not bool(torch.isfinite(weights).all()):
            raise NotFiniteError(
                "weights are not finite (taps): training diverged or a file is corrupt"
            )
        return self

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """[B, L - 1, D], the last inputs, oldest first."""
        channels, length = self.weights.shape
        return batch, length - 1, channels

    def state_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The inputs' own dtype: they are kept as they came."""
        return dtype

    def flops_per_token(self) -> int:
        """A multiply-add a tap, as a step does; an FFT over a long text does fewer."""
        return 2 * self.weights.numel()


def tap_conv(
    u: Tensor, taps: Taps, state: Tensor | None, positions: Tensor | None, method: str
) -> tuple[Tensor, Tensor]:
    """`spectral_conv` for checked inputs: u [B, T, D], state [B, L - 1, D] or None, positions
    [B, T] or None, method "reference", "fft", "shifts" or "step" (then T = 1).

    Returns y and the state after it, both in u's dtype. Computed in float32 (float64 for float64)
    and rounded once. Differentiable any number of times in u, taps and state.
    """
    batch, time, channels = u.shape
    weights, kept = taps.weights, taps.weights.shape[1] - 1
    before = None if state is None else state.to(u.dtype)
    if not u.numel():
        return u.clone(), u.new_zeros(batch, kept, channels) if before is None else before
    if positions is not None and is_recorded():
        known = u.new_zeros(batch, kept, channels) if before is None else before
        return recorded.convolve_taps(u, weights, known, positions)
    if positions is not None:
        return _each_document(u, weights, before, positions, method)
    if before is None:  # of a text shorter than the filter, only the first T taps are of any use
        before = u.new_zeros(batch, min(kept, time - 1), channels)
    x = torch.cat((before, u), 1)
    y = _convolve(x, weights[:, : before.shape[1] + 1], method)
    x = F.pad(x, (0, 0, max(kept - x.shape[1], 0), 0))
    return y, x[:, x.shape[1] - kept :].clone()  # a view would keep all of x in memory


def _each_document(
    u: Tensor, weights: Tensor, state: Tensor | None, positions: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    """Move documents to rows of their own, convolve, move back.

    Documents of like length go together (up to a power of two), so that the rows and what they are
    filled with hold at most four times the tokens.
    """
    batch, time, channels = u.shape
    kept = weights.shape[1] - 1
    any_position = None if state is None else anywhere(positions)
    docs = find_documents(positions, any_position)
    before = u.new_zeros(batch, kept, channels) if state is None else state
    count = len(docs.token)
    if not count:
        return torch.zeros_like(u), before
    # one pool of inputs: the tokens, the states' inputs, and a row of zeros for "nothing there"
    tokens = u.reshape(-1, channels).index_select(0, docs.token)
    pool = torch.cat((tokens, before.reshape(-1, channels), u.new_zeros(1, channels)))
    head = docs.head
    length = torch.diff(head, append=head.new_tensor([count]))
    row, continues = docs.row[head], docs.position[head] != 0

    def inputs(document: Tensor, offset: Tensor) -> Tensor:
        """The inputs [n, N, D] at `offset` [n, N] from the begin of each `document` [n]."""
        document = document[:, None]
        token = head[document] + offset
        earlier = count + row[document] * kept + kept + offset  # inside the state
        remembered = continues[document] & (offset < 0) & (offset >= -kept)
        inside = (offset >= 0) & (offset < length[document])
        index = torch.where(inside, token, torch.where(remembered, earlier, len(pool) - 1))
        return pool.index_select(0, index.reshape(-1)).reshape(*index.shape, channels)

    like = 2 * torch.frexp((length - 1).double()).exponent + continues
    places, parts = [], []
    for kind in like.unique().tolist():
        document = torch.nonzero(like == kind).squeeze(1)
        longest = int(length[document].max())
        reach = kept if kind % 2 else min(kept, longest - 1)
        offset = torch.arange(-reach, longest, dtype=torch.int64, device=u.device).expand(
            len(document), -1
        )
        y = _convolve(inputs(document, offset), weights[:, : reach + 1], method)
        filled = offset[:, reach:] < length[document, None]
        places.append(docs.token[(head[document, None] + offset[:, reach:])[filled]])
        parts.append(y[filled])
    out = u.new_zeros(batch * time, channels).index_copy(0, torch.cat(places), torch.cat(parts))

    last = docs.last.clamp(min=0)
    document = docs.document[last]
    back = torch.arange(1 - kept, 1, dtype=torch.int64, device=u.device)
    final = inputs(document, (last - head[document])[:, None] + back)
    return out.reshape(u.shape), torch.where((docs.last >= 0)[:, None, None], final, before)


def _convolve(x: Tensor, weights: Tensor, method: str) -> Tensor:
    """x [B, L - 1 + N, D], the L - 1 inputs before and the N to answer, weights [D, L] -> [B, N, D]
    in x's dtype."""
    count, back = x.shape[1], weights.shape[1] - 1
    if method == "reference":
        exact = x.double()
        return reference.taps(exact[:, back:], weights.double(), exact[:, :back])[0].to(x.dtype)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    given, weights = x.to(dtype), weights.to(dtype)
    if method == "step":
        y = (given * weights.flip(1).T).sum(1, keepdim=True)
    elif method == "shifts":
        y = weights[:, 0] * given[:, back:]
        for j in range(1, back + 1):
            y = torch.addcmul(y, weights[:, j], given[:, back - j : count - j])
    else:
        y = _fft(given, weights)
    return y.to(x.dtype)


def _fft(x: Tensor, weights: Tensor) -> Tensor:
    """`_convolve` by spectra. A cyclic convolution of as many points as there are inputs wraps into
    the first L - 1 outputs alone, and those are not asked for."""
    count, back = x.shape[1], weights.shape[1] - 1
    if readable(x) and not bool(torch.isfinite(x).all()):
        raise NotFiniteError(
            "u is not finite (spectral_conv, method fft): an FFT would spread it over all positions"
        )
    size = fast_size(count)
    spectrum = torch.fft.rfft(x.transpose(1, 2), size) * torch.fft.rfft(weights, size)
    return torch.fft.irfft(spectrum, size)[..., back:count].transpose(1, 2)


def fast_size(count: int) -> int:
    """The smallest of 2^k, 5/8 2^k and 3/4 2^k that is at least `count`: FFTs of such sizes are
    quick."""
    power = 1 << max(count - 1, 7).bit_length()
    return next(size for size in (power * 5 // 8, power * 3 // 4, power) if size >= count)
