"""Documents in recorded graphs: both branches in fixed shapes.

In graphs of torch.compile, torch.export and torch.jit.trace no shape may depend on where a document
starts. Eager methods move tokens to a grid of one document per chunk, whose size depends on the
positions. Here every row keeps its length: its tokens come first, in order, then its padding, so
that the tokens of a document are adjacent. What precedes a document is masked with `where`; a
factor of 0 would let a NaN pass.

The convolution's state is computed by doubling: after k rounds it covers the last 2^k tokens. Five
rounds cover the tokens of a chunk of 32, further rounds combine chunks. Where the length is known
only when the graph runs, the number of further rounds is ROUNDS, enough for 33 million tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from spectral_window.ops.modes import Modes, powers, times
from spectral_window.ops.tracing import is_exporting
from spectral_window.ops.window_state import WindowState, slot_positions

CHUNK = 32
ROUNDS = 20


class Rows(NamedTuple):
    """The tokens of each row, then its padding.

    Attributes:
        order: [B, T], the column of each place.
        position: [B, T], its position, -1 for padding.
        head: [B, T], the place where its document starts; 0 for one that continues a state.
        tokens: [B], the number of tokens of each row.
    """

    order: Tensor
    position: Tensor
    head: Tensor
    tokens: Tensor

    @property
    def continues(self) -> Tensor:
        """Whether the first document of each row continues its state: [B] bool."""
        return self.position[:, 0] > 0

    def gather(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] in this order, with zeros for padding."""
        x = x.gather(1, _like(self.order, x).expand_as(x))
        return torch.where(_like(self.position, x) >= 0, x, 0.0)

    def scatter(self, y: Tensor) -> Tensor:
        """Return y in the order of the call: the inverse of `gather`."""
        y = torch.where(_like(self.position, y) >= 0, y, 0.0)
        return torch.zeros_like(y).scatter(1, _like(self.order, y).expand_as(y), y)


def tokens_first(positions: Tensor) -> Rows:
    """Return the rows of `positions` [B, T] (see `spectral_window.ops`)."""
    # sums and a scatter in place of a stable sort and a running maximum, which ONNX lacks
    token = positions >= 0
    ordinal, tokens = token.cumsum(1), token.sum(1)
    index = _count(positions.shape[1], positions)
    place = torch.where(token, ordinal - 1, tokens[:, None] + index - ordinal)
    order = torch.zeros_like(place).scatter(1, place, index.expand_as(place))
    position = positions.gather(1, order)
    head = (index - position.clamp(min=0)).clamp(min=0)
    last = head.gather(1, (tokens - 1).clamp(min=0)[:, None])
    head = torch.where(position >= 0, head, last)
    return Rows(order, position, head, tokens)


def _count(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, dtype=torch.int64, device=like.device)


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Return x [B, N] with trailing dimensions of size 1, as many dimensions as y."""
    return x.reshape(*x.shape, *[1] * (y.dim() - 2))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Return x[b, index[b, i]] for x [B, S, ...] and index [B, N]."""
    return x.gather(1, _like(index, x).expand(*index.shape, *x.shape[2:]))


def since_head(marked: Tensor, head: Tensor) -> Tensor:
    """Return whether any token from the start of the document up to each token is `marked`.

    Both [B, T].
    """
    count = marked.to(torch.int64).cumsum(1)
    before = torch.where(head > 0, count.gather(1, (head - 1).clamp(min=0)), 0)
    return count > before


# ---------------------------------------------------------------- the convolutions


def _delayed(x: Tensor, by: int) -> Tensor:
    """Return x [B, N, ...] delayed by `by`; the first `by` entries are arbitrary."""
    return x.index_select(1, (_count(x.shape[1], x) - by).clamp(min=0))


def convolve(
    u: Tensor, modes: Modes, state: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`spectral_conv` for checked inputs.

    Args:
        u: [B, T, D], T > 0.
        modes: modes of shape [D, M].
        state: [B, D, M, 2] float64.
        positions: [B, T], or None.

    Returns:
        y in u's dtype, and the state after the last token of each row.
    """
    time = u.shape[1]
    rows = None if positions is None else tokens_first(positions)
    index = _count(time, u)
    head = torch.zeros_like(index)[None] if rows is None else rows.head
    x = (u if rows is None else rows.gather(u)).to(state.dtype)[..., None, None]
    enters = times(_power(modes, 1), state)  # z h: [B, D, M, 2]
    if rows is not None:
        enters = torch.where(rows.continues[:, None, None, None], enters, 0.0)
    h = F.pad(x.expand(*x.shape[:3], modes.decay.shape[1], 1), (0, 1))
    h = h + torch.where(_like((index == 0)[None], h), enters[:, None], 0.0)

    begin = index // CHUNK * CHUNK
    for k in range(CHUNK.bit_length() - 1):
        seen = index - (1 << k) >= torch.maximum(head, begin)
        h = h + torch.where(_like(seen, h), times(_power(modes, 1 << k), _delayed(h, 1 << k)), 0.0)

    # the state at the end of each chunk, and the chunk in which its document starts; one or two
    # more chunks than there are, so that their number is never 1
    ends = torch.arange(CHUNK - 1, time + 3 * CHUNK, CHUNK, dtype=torch.int64, device=u.device)
    chunk, at = ends // CHUNK, ends.clamp(max=time - 1)
    carry, since = h.index_select(1, at), head.index_select(1, at) // CHUNK
    if is_exporting():  # of any length
        enters, over = since < chunk, _power(modes, CHUNK)

        def pass_on(state: Tensor, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            own, goes_on = part
            state = own + torch.where(goes_on[:, None, None, None], times(over, state), 0.0)
            return state, state.clone()

        goes_on = enters.expand(carry.shape[:2])
        nothing = torch.zeros_like(carry[:, 0])
        _, carry = scan(pass_on, nothing, (carry.movedim(1, 0), goes_on.movedim(1, 0)))
        carry = carry.movedim(0, 1)
    else:
        rounds = ROUNDS if type(time) is not int else max(-(-time // CHUNK) - 1, 1).bit_length()
        for k in range(rounds):
            seen = chunk - (1 << k) >= since
            before = times(_power(modes, CHUNK << k), _delayed(carry, 1 << k))
            carry = carry + torch.where(_like(seen, carry), before, 0.0)
    before = carry.index_select(1, (index // CHUNK - 1).clamp(min=0))
    decayed = powers(modes, _count(CHUNK, u) + 1).movedim(2, 0)  # z, z^2, ...: [C, D, M, 2]
    before = times(decayed.index_select(0, index % CHUNK), before)
    h = h + torch.where(_like((head < begin) & (begin > 0), h), before, 0.0)

    y = h[..., 0] if modes.gain is None else h[..., 0] * modes.gain.to(h.dtype)
    y = y.sum(-1).to(u.dtype)
    if rows is None:
        return y, h[:, -1]
    last = _pick(h, (rows.tokens - 1).clamp(min=0)[:, None])[:, 0]
    return rows.scatter(y), torch.where((rows.tokens > 0)[:, None, None, None], last, state)


def _power(modes: Modes, steps: int) -> Tensor:
    """Return z^steps: [D, M, 2]."""
    one = modes.decay.new_full((1,), steps, dtype=torch.int64)
    return powers(modes, one)[..., 0, :]


def convolve_taps(
    u: Tensor, weights: Tensor, state: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """`fir_conv` for documents: u [B, T, D], weights [D, L], state [B, L - 1, D]."""
    past = weights.shape[1] - 1
    rows = tokens_first(positions)
    inputs = torch.cat((state, rows.gather(u)), 1)
    # a document that continues sees the inputs of the state, others only their own
    oldest = torch.where((rows.head == 0) & rows.continues[:, None], -past, rows.head)
    index = _count(u.shape[1], u)
    back = _count(past + 1, u)
    seen = index[:, None] - back >= oldest[..., None]  # [B, T, L]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    at = (index[:, None] + past - back).flatten()  # newest first
    windows = inputs.to(dtype).index_select(1, at).unflatten(1, (-1, past + 1))  # [B, T, L, D]
    windows = torch.where(seen[..., None], windows, 0.0)
    y = (windows * weights.to(dtype).T).sum(2).to(u.dtype)
    last = (rows.tokens - 1).clamp(min=0)[:, None]
    before = last - _count(past, u).flip(0)  # the tokens that a state holds, oldest first
    final = _pick(inputs, before + past)
    final = torch.where((before >= oldest.gather(1, last))[..., None], final, 0.0)
    return rows.scatter(y), torch.where((rows.tokens > 0)[:, None, None], final, state)


# ---------------------------------------------------------------- the window


class Blocks(NamedTuple):
    """Queries in blocks of W, each with the last 3W tokens up to its end.

    Attributes:
        query: [B, N, W, H, K].
        key: [B, N, 3W, H, K].
        value: [B, N, 3W, H, V].
        mask: [B, N, W, 3W], whether a query sees a key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor


class Context(NamedTuple):
    """Rows, preceded by the keys and values of the state.

    Attributes:
        rows: the rows.
        key: [B, 2W + T, H, K].
        value: [B, 2W + T, H, V].
        reach: [B, T], how many tokens back each query sees.
    """

    rows: Rows
    key: Tensor
    value: Tensor
    reach: Tensor


def with_state(k: Tensor, v: Tensor, window: int, state: WindowState, positions: Tensor) -> Context:
    """Return the context of keys and values [B, T, H, *] after `state`."""
    rows = tokens_first(positions)
    slots = 2 * window
    slot = (rows.position[:, :1] - slots + _count(slots, k)) % slots
    goes_on = rows.continues[:, None, None, None]
    key, value = (torch.where(goes_on, _pick(x, slot), 0.0) for x in state[:2])
    position = rows.position.clamp(min=0)
    reach = position - (position // window - 1).clamp(min=0) * window
    reach = torch.where(rows.position >= 0, reach, 0)
    return Context(
        rows, torch.cat((key, rows.gather(k)), 1), torch.cat((value, rows.gather(v)), 1), reach
    )


def reachable(q: Tensor, context: Context, window: int) -> Blocks:
    """Return q [B, T, H, K] and its context in blocks of W queries."""
    time = q.shape[1]
    # one or two more blocks than there are, so that their number is never 1
    start = torch.arange(0, time + 2 * window, window, dtype=torch.int64, device=q.device)

    def blocks(x: Tensor, size: int, end: int) -> Tensor:
        index = (start[:, None] + _count(size, q)).clamp(max=end - 1)
        return x.index_select(1, index.flatten()).unflatten(1, (-1, size))

    lag = _count(window, q)[:, None] + 2 * window - _count(3 * window, q)  # [W, 3W]
    reach = blocks(context.reach, window, time)
    finite = torch.where(torch.isfinite(context.value), context.value, 0.0)
    return Blocks(
        blocks(context.rows.gather(q), window, time),
        blocks(context.key, 3 * window, time + 2 * window),
        blocks(finite, 3 * window, time + 2 * window),
        (lag >= 0) & (lag <= reach[..., None]),
    )


def from_blocks(out: Tensor, context: Context, window: int) -> Tensor:
    """Return the outputs [B, N, W, H, V] of blocks in the order of the call: [B, T, H, V].

    NaN where a query sees a value that is not finite.
    """
    time = context.reach.shape[1]
    spoilt = (~torch.isfinite(context.value)).to(torch.int32).cumsum(1)
    out = out.flatten(1, 2).index_select(1, _count(time, out))
    end = _count(time, out) + 2 * window
    before = end - context.reach - 1
    since = torch.where(_like(before, spoilt) >= 0, _pick(spoilt, before.clamp(min=0)), 0)
    seen = spoilt.index_select(1, end) - since
    return context.rows.scatter(out.masked_fill(seen > 0, torch.nan))


def next_state(context: Context, window: int, state: WindowState) -> WindowState:
    """Return the state after the last token of each row; rows without tokens keep theirs."""
    tokens = context.rows.tokens
    last = _pick(context.rows.position, (tokens - 1).clamp(min=0)[:, None])[:, 0]
    after = torch.where(tokens > 0, last + 1, state.position)
    slot_position = slot_positions(after, window)  # [B, 2W]
    index = (tokens[:, None] + 2 * window - (after[:, None] - slot_position)).clamp(min=0)

    def renewed(x: Tensor, old: Tensor) -> Tensor:
        new = torch.where(_like(slot_position, x) >= 0, _pick(x, index), 0.0)
        return torch.where((tokens > 0)[:, None, None, None], new, old)

    return WindowState(renewed(context.key, state.key), renewed(context.value, state.value), after)
