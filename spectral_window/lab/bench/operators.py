"""The two operators against their alternatives: `spectral` and `window`.

    spectral   the scan (into given memory, and allocating), chunked, the paper's FFT; and a plain
               copy: nothing that reads u and writes y can be faster than that. Scan and copy also
               into fresh memory, which the system clears page by page at the first touch: what an
               output beyond 32 MB costs a process that does not keep freed memory
    window     ours, plain chunking as the paper's code does it, the package `local-attention`,
               and full causal attention by PyTorch's fused kernel

What computes the operator is first compared with float64 on a short sequence. All window operators
rotate q and k by RoPE inside the measured time; only full attention, which
sees more, computes another function. `local-attention` sees the same keys as ours (window_size=W,
causal, look_backward=1) and pairs channel i with i + K/2 where the paper pairs 2i with 2i + 1: the
gate hands it permuted channels.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.lab.bench.timing import Call, Timing, disqualified, reason, relative_error
from spectral_window.ops import Modes, spectral_conv, window_attention
from spectral_window.ops.methods import resolve, serving
from spectral_window.ops.modes import kernel
from spectral_window.ops.rotary import angles

CHANNELS, HEADS, THETA = 768, 12, 10000.0
SPECTRAL_LENGTHS = (512, 1024, 4096, 16_384, 65_536)
WINDOWS, WINDOW_LENGTH = (32, 64, 128, 256), 4096
SLOW, SLOW_TO = ("chunked", "the paper's FFT"), 16_384  # beyond, only their seconds grow
TRUTH_LENGTH = 300
# The tests hold our methods to 2e-6 in float32; the paper's FFT gets room for its own accuracy, and
# bfloat16 for the rounding of inputs, scores and output.
BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FULL = "full causal attention"
GIVEN = "scan, into given memory"
FRESH, FRESH_COPY = "scan, into fresh memory", "copy, into fresh memory"
PASSES = ("forward", "forward + backward")
Operator = Callable[..., Tensor]


# ------------------------------------------------------------------------------------- spectral


def bench_spectral(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by length and pass, and of the error at T = 1,048,576 without damping (float32)."""
    rows: list[dict[str, Any]] = []
    wrong = _check_spectral(dtype)
    for direction in PASSES:
        backward = direction != PASSES[0]
        timing = new_timing(quick, wrong)
        for length in (64, 128) if quick else SPECTRAL_LENGTHS:
            u, modes = draw_spectral(length, dtype, backward)
            calls = spectral_calls(u, modes, backward)
            if length > SLOW_TO:
                calls = {name: call for name, call in calls.items() if name not in SLOW}
            rows += timing.run(calls, length=length, **{"pass": direction})
    if dtype == torch.float32:
        rows += far_errors(4096 if quick else 1 << 20, 8 if quick else 96)
    return rows


def spectral_calls(u: Tensor, modes: Modes, backward: bool) -> dict[str, Call]:
    """The calls on u [B, T, D]; without `backward` the first writes into given memory."""
    y = torch.ones_like(u, requires_grad=False)
    gradient = y if backward else None
    source = u.detach()
    calls: dict[str, Call] = {
        name: partial(call_once, operator, (u, *modes[:2]), gradient)
        for name, operator in spectral_operators().items()
    }
    into = torch.ones_like(y)
    copies: dict[str, Call] = {
        "copy": lambda: into.copy_(source),
        "clone": lambda: source.clone(),
    }
    if not backward:

        def scan(out: Tensor) -> None:
            spectral_conv(u, modes, method="scan", out=out)

        calls = {GIVEN: lambda: scan(y), FRESH: lambda: scan(fresh_like(y)), **calls}
        copies[FRESH_COPY] = lambda: fresh_like(y).copy_(source)
    return calls | copies


def fresh_like(x: Tensor) -> Tensor:
    """Memory that was never touched, in huge pages where the system has them; given back when the
    tensor is no longer held."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.frombuffer(mmap.mmap(-1, x.nbytes), dtype=x.dtype).view(x.shape)
    memory = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice: a system without them refuses it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


def draw_spectral(length: int, dtype: torch.dtype, backward: bool) -> tuple[Tensor, Modes]:
    """u [1, T, D] ~ N(0, 1) and the paper's initial modes, both N(0, 1)."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(1, length, CHANNELS, generator=g).to(dtype).requires_grad_(backward)
    decay, frequency = (torch.randn(CHANNELS, generator=g) for _ in range(2))
    return u, Modes(decay.abs().requires_grad_(backward), frequency.requires_grad_(backward))


def _by(method: str) -> Operator:
    def operator(u: Tensor, decay: Tensor, frequency: Tensor) -> Tensor:
        return spectral_conv(u, Modes(decay, frequency), method=method)[0]

    return operator


def paper_fft(u: Tensor, decay: Tensor, frequency: Tensor) -> Tensor:
    """As published: signal to [B, D, T], float32 whatever the dtype, spectra of 2T points, crop."""
    time = u.shape[1]
    t = torch.arange(time, dtype=torch.float32)
    K = torch.exp(-decay[:, None] * t) * torch.cos(frequency[:, None] * t)
    signal = u.transpose(1, 2).float()
    spectrum = torch.fft.rfft(signal, n=2 * time) * torch.fft.rfft(K, n=2 * time)
    return torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2).to(u.dtype)


SPECTRAL: dict[str, Operator] = {"the paper's FFT": paper_fft}  # what others use


def spectral_operators() -> dict[str, Operator]:
    """Our linear-time methods that run here, as the table has them, and the others."""
    served = serving("spectral", torch.empty(1, 2, 2))
    ours = [name for name in served if name not in ("fft", "reference")]
    return {**{name: _by(name) for name in ours}, **SPECTRAL}


def _check_spectral(dtype: torch.dtype) -> dict[str, str]:
    u, modes = draw_spectral(TRUTH_LENGTH, dtype, False)
    truth = spectral_conv(u.double(), modes, method="reference")[0]

    def into(memory: Callable[[Tensor], Tensor]) -> Operator:
        def operator(u: Tensor, decay: Tensor, frequency: Tensor) -> Tensor:
            y = memory(u).fill_(torch.nan)
            spectral_conv(u, Modes(decay, frequency), method="scan", out=y)
            return y

        return operator

    operators = {**spectral_operators(), GIVEN: into(torch.empty_like), FRESH: into(fresh_like)}
    return gate(operators, (u, *modes[:2]), truth, BARS[dtype])


def far_errors(time: int, channels: int) -> list[dict[str, Any]]:
    """Without damping an oscillator sums everything since the start: the error there, per
    channel and block of 64 positions (the worst), against the direct float64 sum for 8 channels in
    3 blocks."""
    g = torch.Generator().manual_seed(1)
    u = torch.randn(1, time, channels, generator=g)
    frequency = torch.randn(channels, generator=g)
    decay = torch.zeros(channels)
    starts = (0, time // 2, time - 64)
    probe = slice(0, 8)
    few = (u[..., probe].contiguous(), decay[probe], frequency[probe])
    truth = direct_blocks(*few, starts)

    def error(operator: Operator) -> dict[str, Any]:
        try:
            # the FFT takes each channel alone: eight are enough, and need a tenth of the memory
            y = operator(*few) if operator is paper_fft else operator(u, decay, frequency)
        except Exception as failure:
            return {"status": reason(failure)}
        got = torch.stack([y[0, s : s + 64, probe] for s in starts]).double()
        off = (got - truth).square().mean(1).sqrt() / truth.square().mean(1).sqrt()
        return {"status": "ok", "error": float(f"{float(off.max()):.3g}")}

    about = {"length": time, "pass": "error, no damping", "channels": channels}
    operators = spectral_operators().items()
    return [{**about, "contestant": name, **error(operator)} for name, operator in operators]


def direct_blocks(
    u: Tensor, decay: Tensor, frequency: Tensor, starts: tuple[int, ...], length: int = 64
) -> Tensor:
    """The convolution of row 0 as a direct float64 sum, at a few blocks: [blocks, length, D]."""
    modes = Modes(decay, frequency).double().validated(len(decay))
    K = kernel(modes, u.shape[1]).flip(1).contiguous()  # newest last, as the sum meets it
    x = u[0].T.double().contiguous()
    at = torch.tensor([[s + i for i in range(length)] for s in starts])
    y = x.new_empty(*at.shape, len(x))
    for d in range(len(x)):
        for block, t in ((b, int(t)) for b in range(len(starts)) for t in at[b]):
            y[block, t - starts[block], d] = torch.dot(x[d, : t + 1], K[d, len(K[d]) - t - 1 :])
    return y


# --------------------------------------------------------------------------------------- window


def bench_window(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by window and pass at T = 4096."""
    rows: list[dict[str, Any]] = []
    length = 128 if quick else WINDOW_LENGTH
    for window in WINDOWS[:1] if quick else WINDOWS:
        wrong = _check_window(window, dtype)
        for direction in PASSES:
            backward = direction != PASSES[0]
            timing = new_timing(quick, wrong)
            calls = window_calls(draw_qkv(length, dtype, backward), window, backward)
            if window != WINDOWS[0]:
                del calls[FULL]  # it knows no window
            rows += timing.run(calls, length=length, window=window, **{"pass": direction})
    return rows


def window_calls(qkv: tuple[Tensor, ...], window: int, backward: bool) -> dict[str, Call]:
    """The calls on q, k, v [B, T, H, K]."""
    gradient = torch.ones_like(qkv[2], requires_grad=False) if backward else None
    operators = {**window_operators(window), FULL: full}
    return {
        name: partial(call_once, operator, qkv, gradient) for name, operator in operators.items()
    }


def draw_qkv(length: int, dtype: torch.dtype, backward: bool) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, CHANNELS // HEADS)
    return tuple(
        torch.randn(shape, generator=g).to(dtype).requires_grad_(backward) for _ in range(3)
    )


def window_operators(window: int) -> dict[str, Operator]:
    """Name -> (q, k, v) -> out, those that compute the window's own function."""

    def ours(method: str) -> Operator:
        def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, window=window, rope_theta=THETA, method=method)[0]

        return operator

    probe = torch.empty(1, 2, 1, 2)
    taken = ("reference", resolve("window", "auto", probe).name)
    others = [name for name in serving("window", probe) if name not in taken]
    return {
        "ours": ours("auto"),
        **{f"ours, {name}": ours(name) for name in others},
        "naive chunks (the paper's)": partial(naive_chunks, window=window),
        "local-attention": local_attention(window),
    }


def turn(x: Tensor) -> Tensor:
    """RoPE of [B, T, H, K], interleaved pairs, by a table in x's dtype that a model would keep."""
    cos, sin = _table(x.shape[1], x.shape[3], x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _table(length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    key = (length, size, dtype)
    if key not in _TABLES:
        table = angles(torch.arange(length), size, THETA, dtype)
        _TABLES[key] = tuple(part[:, None] for part in table)
    return _TABLES[key]


_TABLES: dict[Any, Any] = {}


def naive_chunks(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """As published: turn, pad, cut, concatenate each chunk with the one before, mask, softmax."""
    batch, time, heads, size = q.shape
    chunks = -(-time // window)
    q, k = turn(q), turn(k)

    def cut(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * window - time))
        return x.view(batch, chunks, window, heads, size).transpose(2, 3)  # [B, N, H, W, K]

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x), 3)

    q, k, v = cut(q), with_previous(cut(k)), with_previous(cut(v))
    scores = q @ k.transpose(-1, -2) * size**-0.5
    hidden = torch.ones(window, 2 * window, dtype=torch.bool).triu(window + 1)
    mask = hidden.expand(chunks, 1, -1, -1).clone()
    mask[0, ..., :window] = True
    out = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
    return out.transpose(2, 3).reshape(batch, chunks * window, heads, size)[:, :time]


def local_attention(window: int) -> Operator:
    """The PyPI package on the same keys. It turns in float32, so v goes there as well."""

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from local_attention import LocalAttention  # optional: the extra "bench"

        attend = LocalAttention(window, causal=True, look_backward=1, dim=q.shape[3], autopad=True)
        heads_first = (x.transpose(1, 2) for x in (q, k, v.float()))
        return attend(*heads_first).transpose(1, 2).to(q.dtype)

    return operator


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention, PyTorch's fused kernel."""
    q, k, v = (x.transpose(1, 2) for x in (turn(q), turn(k), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _check_window(window: int, dtype: torch.dtype) -> dict[str, str]:
    time = TRUTH_LENGTH + window
    q, k, v = draw_qkv(time, dtype, False)
    truth = window_attention(
        q.double(), k.double(), v.double(), window=window, rope_theta=THETA, method="reference"
    )[0]
    operators = window_operators(window)
    halves = [torch.cat((x[..., 0::2], x[..., 1::2]), -1) for x in (q, k)]
    halved = {"local-attention": operators.pop("local-attention")}
    bar = BARS[dtype]
    return gate(operators, (q, k, v), truth, bar) | gate(halved, (*halves, v), truth, bar)


# --------------------------------------------------------------------------------------- common


def new_timing(quick: bool, wrong: dict[str, str]) -> Timing:
    """For an operator's calls, without those that are `wrong`."""
    if quick:
        return Timing(seconds=0.01, out=dict(wrong))
    return Timing(seconds=1.0, most=100, longest=10.0, out=dict(wrong))


def call_once(operator: Operator, inputs: tuple[Tensor, ...], gradient: Tensor | None) -> None:
    """The forward pass and, with a gradient of the output, the backward pass."""
    y = operator(*inputs)
    if gradient is not None:
        y.backward(gradient)
        for x in inputs:
            x.grad = None


def gate(
    operators: dict[str, Operator], inputs: tuple[Tensor, ...], truth: Tensor, bar: float
) -> dict[str, str]:
    """Name -> why it is not timed."""
    reasons = {
        name: disqualified(lambda: relative_error(operator(*inputs), truth), bar)  # noqa: B023
        for name, operator in operators.items()
    }
    return {name: why for name, why in reasons.items() if why}
