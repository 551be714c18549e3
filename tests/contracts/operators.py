"""The properties of every method of an operator, as functions that also take broken methods.

conv(u, modes, state=None, **documents) -> (y, state); with taps for `fir`
attend(q, k, v, window=..., state=None, **documents)
memory(q, k, v, beta, decay=None, state=None, **documents)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops import Modes, Taps, reference
from spectral_window.ops.modes import kernel
from tests.contracts.measure import BLOCK, block_error, relative

BARS = {torch.float64: 1e-11, torch.float32: 2e-6}


def draw_modes(
    channels: int, each: int = 1, *, dtype=torch.float64, gain: bool = False, slow: bool = False
) -> Modes:
    """The paper's N(0, 1) modes, or slow ones that reach across a million tokens."""
    decay = torch.randn(channels, each, dtype=torch.float64).abs()
    frequency = torch.randn(channels, each, dtype=torch.float64)
    if slow:
        decay = decay * 10.0 ** -torch.linspace(2, 6, channels, dtype=torch.float64)[:, None]
        decay[0] = 0.0
    weight = torch.randn(channels, each, dtype=dtype) if gain else None
    return Modes(decay.to(dtype), frequency.to(dtype), weight)


def at_blocks(u: Tensor, modes: Modes, starts: list[int], length: int = 64) -> Tensor:
    """The direct float64 sum at a few blocks of positions of a long sequence: [B, blocks * length,
    D].

    O(T) a position with the kernel built in float64: the truth at lengths where all positions
    would take hours.
    """
    K = kernel(
        Modes(*(None if p is None else p.double().reshape(p.shape[0], -1) for p in modes)),
        u.shape[1],
    )
    x = u.double()
    parts = []
    for start in starts:
        for t in range(start, start + length):
            parts.append((x[:, : t + 1] * K[:, : t + 1].flip(1).T).sum(1))
    return torch.stack(parts, 1)


# --- spectral_conv ------------------------------------------------------------------------------


def conv_equals_the_direct_sum(
    conv: Callable, dtype=torch.float32, times=(1, 2, 31, 32, 33, 100, 257)
) -> None:
    for time in times:
        for each, gain in ((1, False), (3, True)):
            modes = draw_modes(4, each, dtype=dtype, gain=gain)
            u = torch.randn(2, time, 4, dtype=dtype)
            state = torch.randn(2, 4, each, 2, dtype=torch.float64)
            for before in (None, state):
                y, final = conv(u, modes, state=before)
                truth, end = reference.spectral(u.double(), modes.validated(4), before)
                assert y.dtype == dtype
                assert block_error(y, truth) <= BARS[dtype]
                assert relative(final, end) <= 1e-10


def conv_of_an_impulse_is_the_kernel(conv: Callable) -> None:
    modes = draw_modes(8, 2, dtype=torch.float32, gain=True)
    u = torch.zeros(1, 90, 8)
    u[:, 0] = 1
    y, _ = conv(u, modes)
    assert block_error(y, kernel(modes, 90).T[None]) <= 2e-6


def conv_carries_its_state(conv: Callable) -> None:
    modes = draw_modes(6, dtype=torch.float32, slow=True)
    u = torch.randn(2, 150, 6)
    whole, end = conv(u, modes)
    state, parts = None, []
    for part in u.split([1, 40, 1, 1, 64, 43], 1):
        y, state = conv(part, modes, state=state)
        parts.append(y)
    assert block_error(torch.cat(parts, 1), whole) <= 2e-6
    assert relative(state, end) <= 1e-10


def conv_is_exact_far_away(conv: Callable, time: int = 65_536) -> None:
    """No damping, or hardly any: what an angle rounded to float32 gets wrong."""
    modes = draw_modes(6, dtype=torch.float32, slow=True)
    u = torch.randn(1, time, 6)
    y, _ = conv(u, modes)
    assert y.shape == u.shape, f"shape {tuple(y.shape)}, expected {tuple(u.shape)}"
    starts = [0, time // 2, time - 64]
    got = torch.cat([y[:, s : s + 64] for s in starts], 1)
    assert block_error(got, at_blocks(u, modes, starts)) <= 2e-6


CONV_CONTRACT = [
    conv_equals_the_direct_sum,
    conv_of_an_impulse_is_the_kernel,
    conv_carries_its_state,
    conv_is_exact_far_away,
]

# --- fir_conv -----------------------------------------------------------------------------------


def draw_taps(channels: int, length: int, dtype: torch.dtype = torch.float32) -> Taps:
    return Taps(torch.randn(channels, length, dtype=torch.float64).to(dtype) / length**0.5)


def fir_is_the_sum_over_the_last_inputs(conv: Callable, dtype=torch.float32) -> None:
    for length in (1, 2, 4, 16, 17, 40):
        for time in (1, 3, length, length + 1, 100):
            taps, u = draw_taps(5, length, dtype), torch.randn(2, time, 5, dtype=dtype)
            y, state = conv(u, taps)
            truth = torch.zeros_like(u, dtype=torch.float64)
            for t in range(time):
                for j in range(min(t + 1, length)):
                    truth[:, t] += taps.weights[:, j].double() * u[:, t - j].double()
            assert y.dtype == dtype
            assert block_error(y, truth) <= BARS[dtype]
            assert state.shape == (2, length - 1, 5)


def fir_carries_its_state_to_the_bit(conv: Callable) -> None:
    for length in (1, 4, 40):
        taps, u = draw_taps(5, length), torch.randn(3, 90, 5)
        whole, end = conv(u, taps)
        for sizes in ([40, 1, 1, 30, 18], [3, 87]):
            state, parts = None, []
            for part in u.split(sizes, 1):
                y, state = conv(part, taps, state=state)
                parts.append(y)
            assert relative(torch.cat(parts, 1), whole) <= 2e-6
            assert torch.equal(state, end)


FIR_CONTRACT = [fir_is_the_sum_over_the_last_inputs, fir_carries_its_state_to_the_bit]

# --- linear_maps --------------------------------------------------------------------------------


def maps_equal_the_exact_products(maps: Callable) -> None:
    with torch.no_grad():
        for size in (1, 3, 60, 63, 200):
            x = torch.randn(2, 1, size)
            weights = [torch.randn(rows, size) for rows in (1, 2, 61)]
            biases = [None, torch.randn(2), torch.randn(61)]
            for y, w, b in zip(maps(x, weights, biases), weights, biases, strict=True):
                exact = x.double() @ w.double().T + (0 if b is None else b.double())
                assert y.shape == exact.shape
                assert relative(y, exact) <= BARS[torch.float32]


LINEAR_CONTRACT = [maps_equal_the_exact_products]

# --- window_attention ---------------------------------------------------------------------------


def draw_qkv(
    batch: int, time: int, heads: int = 2, key_dim: int = 4, value_dim: int = 4, dtype=torch.float32
):
    shape = (batch, time, heads)
    return (
        torch.randn(*shape, key_dim, dtype=dtype),
        torch.randn(*shape, key_dim, dtype=dtype),
        torch.randn(*shape, value_dim, dtype=dtype),
    )


def attention_equals_dense_softmax(
    attend: Callable, dtype=torch.float32, windows=(1, 2, 5, 8)
) -> None:
    for window in windows:
        for time in sorted(
            {1, window - 1, window, window + 1, 2 * window, 2 * window + 1, 5 * window} - {0}
        ):
            q, k, v = draw_qkv(2, time, key_dim=6, dtype=dtype)
            out, _ = attend(q, k, v, window=window)
            truth = reference.window(q.double(), k.double(), v.double(), window)
            assert out.dtype == dtype
            assert block_error(out.flatten(2), truth.flatten(2)) <= BARS[dtype]


def attention_sees_exactly_its_window(attend: Callable) -> None:
    """t mod W + 1 + W keys (t + 1 in the first chunk): counted by which values reach the output."""
    for window in (1, 3, 4):
        time = 4 * window + 1
        q, k, _ = draw_qkv(1, time, heads=1)
        v = torch.eye(time)[None, :, None]  # value s says "s was seen", with its weight
        out, _ = attend(q, k, v, window=window)
        seen = (out[0, :, 0] > 0).sum(1).tolist()
        expected = [t % window + 1 + (window if t >= window else 0) for t in range(time)]
        assert seen == expected, f"W={window}: {seen}, expected {expected}"


def attention_carries_its_state(attend: Callable) -> None:
    for window in (1, 4, 7):
        q, k, v = draw_qkv(2, 40)
        whole, end = attend(q, k, v, window=window)
        state, parts, at = None, [], 0
        for size in (1, 1, 6, 1, 13, 18):
            cut = slice(at, at + size)
            out, state = attend(q[:, cut], k[:, cut], v[:, cut], window=window, state=state)
            parts.append(out)
            at += size
        assert relative(torch.cat(parts, 1), whole) <= 2e-6
        assert all(torch.equal(a, b) for a, b in zip(state, end, strict=True))


ATTENTION_CONTRACT = [
    attention_equals_dense_softmax,
    attention_sees_exactly_its_window,
    attention_carries_its_state,
]

# --- delta_memory -------------------------------------------------------------------------------


def draw_memory(
    batch: int,
    time: int,
    heads: int = 2,
    key_dim: int = 6,
    value_dim: int = 5,
    *,
    dtype=torch.float32,
    agree: float = 0.0,
) -> list[torch.Tensor]:
    """q and k of length 1 (the larger `agree`, the nearer to one another), v, beta and decay."""
    shape = (batch, time, heads)
    common = agree * torch.randn(batch, 1, heads, key_dim, dtype=torch.float64)
    q, k = (torch.randn(*shape, key_dim, dtype=torch.float64) + common for _ in range(2))
    v = torch.randn(*shape, value_dim, dtype=dtype)
    q, k = (F.normalize(x, dim=-1).to(dtype) for x in (q, k))
    decay = torch.rand(shape, dtype=torch.float64).square()
    return [q, k, v, torch.rand(shape, dtype=torch.float64).to(dtype), decay.to(dtype)]


def memory_equals_the_recurrence(
    memory: Callable, dtype=torch.float32, times=(1, 2, 63, 64, 65, 200), bar: float | None = None
) -> None:
    """Per channel and block where a block is full: one output may cancel, and float32 shows it."""
    bar = bar or BARS[dtype]
    for time, agree in itertools.product(times, (0.0, 3.0)):
        *given, decay = draw_memory(2, time, dtype=dtype, agree=agree)
        state = torch.randn(2, 2, 6, 5, dtype=dtype)
        q, k, v, beta, less = (x.double() for x in (*given, decay))
        for forget, before in itertools.product((None, decay), (None, state)):
            out, end = memory(*given, decay=forget, state=before)
            truth, final = reference.delta(
                q,
                k,
                v,
                beta[..., None],
                None if forget is None else less[..., None],
                state=None if before is None else before.double(),
            )
            assert out.dtype == dtype
            assert relative(out, truth) <= bar
            full = slice(time // BLOCK * BLOCK)
            assert block_error(out[:, full].flatten(2), truth[:, full].flatten(2)) <= bar
            assert relative(end, final) <= bar


def memory_recalls_what_was_written_last(memory: Callable) -> None:
    """Orthogonal keys written in full: each gives back its last value exactly, however often it was
    written before, and a key that was never written gives nothing."""
    keys = torch.eye(8)[None, :, None]
    order = torch.tensor([0, 3, 1, 3, 3, 2, 0])
    k = keys[:, order]
    v = torch.randn(1, len(order), 1, 4)
    beta = torch.ones(1, len(order), 1)
    _, state = memory(torch.zeros_like(k), k, v, beta)
    out, _ = memory(
        keys, torch.zeros_like(keys), torch.zeros(1, 8, 1, 4), torch.zeros(1, 8, 1), state=state
    )
    for key, last in ((0, 6), (1, 2), (2, 5), (3, 4)):
        assert relative(out[0, key], v[0, last]) <= 1e-6
    assert not out[0, 4:].any()


def memory_carries_its_state(memory: Callable) -> None:
    *given, decay = draw_memory(2, 150)
    for forget in (None, decay):
        whole, end = memory(*given, decay=forget)
        state, parts, at = None, [], 0
        for size in (1, 40, 1, 1, 64, 43):
            cut = [x[:, at : at + size] for x in given]
            less = None if forget is None else forget[:, at : at + size]
            out, state = memory(*cut, decay=less, state=state)
            parts.append(out)
            at += size
        assert block_error(torch.cat(parts, 1).flatten(2), whole.flatten(2)) <= 2e-6
        assert relative(state, end) <= 2e-6


MEMORY_CONTRACT = [
    memory_equals_the_recurrence,
    memory_recalls_what_was_written_last,
    memory_carries_its_state,
]
