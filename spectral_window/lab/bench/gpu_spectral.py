"""The convolution on a GPU: whether its kernels are right, and what they cost.

    check      right at sizes only a GPU reaches, and the same bits every time
    bench      against a device copy, the paper's FFT and the chunked method, taking turns

Every row stands alone: a failure has its reason and the next row is tried, so that whatever is
measured before time runs out is kept. On a CPU with `TRITON_INTERPRET=1` (set before the first
import of triton) `check` and `bench` walk the same steps at toy sizes. What the kernels must cost
stands in `gpu_roofline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.lab.bench.timing import Call, graphed, reason, time_on
from spectral_window.lab.jobs import Row
from spectral_window.ops import Modes, spectral_conv


def least_bytes(shape: tuple[int, int, int], dtype: torch.dtype, backward: bool) -> int:
    """u in and y out; backwards also u and g in and du out."""
    return shape[0] * shape[1] * shape[2] * dtype.itemsize * (5 if backward else 2)


# ------------------------------------------------------------------------------------ correctness


def _modes(channels: int, device: str, each: int = 1, gain: bool = False, slow: bool = True):
    draw = torch.Generator().manual_seed(0)
    decay = torch.randn(channels, each, generator=draw).abs()
    if slow:
        decay *= 10.0 ** -torch.linspace(0, 6, channels)[:, None]
        decay[0] = 0.0
    frequency = torch.randn(channels, each, generator=draw)
    weight = torch.randn(channels, each, generator=draw) if gain else None
    return Modes(
        decay.to(device), frequency.to(device), None if weight is None else weight.to(device)
    )


def _error(y: Tensor, truth: Tensor) -> float:
    """The worst relative rms error of a channel in a block of 64 positions, the size of a block
    being no less than a hundredth of its channel's."""
    y, truth = y.detach().double(), truth.detach().double()
    batch, length, channels = truth.shape
    blocks = [
        F.pad(x.square(), (0, 0, 0, -length % 64)).view(batch, -1, 64, channels).mean(2).sqrt()
        for x in (y - truth, truth)
    ]
    scale = truth.square().mean(1, keepdim=True).sqrt()
    return float((blocks[0] / torch.maximum(blocks[1], 0.01 * scale).clamp(min=1e-300)).max())


def _relative(x: Tensor, truth: Tensor) -> float:
    x, truth = x.detach().double(), truth.detach().double()
    return float((x - truth).norm() / truth.norm().clamp(min=1e-300))


def _forward_error(time_: int, channels: int, device: str, **more: Any) -> Row:
    modes, u = _modes(channels, device, **more), torch.randn(1, time_, channels, device=device)
    y, final = spectral_conv(u, modes, method="triton")
    truth, end = spectral_conv(u.double(), modes, method="chunked")
    errors = {"error": _error(y, truth), "state_error": _relative(final, end)}
    return errors | {"good": errors["error"] <= 2e-6 and errors["state_error"] <= 1e-10}


def _rounding(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> Row:
    modes, u = _modes(shape[2], device), torch.randn(shape, device=device).to(dtype)
    y, _ = spectral_conv(u, modes, method="triton")
    truth, _ = spectral_conv(u.double(), modes, method="chunked")
    ratio = _relative(y, truth) / _relative(truth.to(dtype), truth)
    return {"of_rounding": ratio, "good": ratio <= (1.25 if device == "cuda" else 2.6)}


def _packed(batch: int, time_: int, device: str) -> Tensor:
    """Documents of growing lengths with a padded token between them."""
    row: list[int] = []
    length = 3
    while len(row) < time_:
        row += [*range(length), -1]
        length = length * 2 % 977 + 1
    return torch.tensor([row[:time_]] * batch, device=device)


def _gradient_error(shape: tuple[int, int, int], each: int, packed: bool, device: str) -> Row:
    batch, time_, channels = shape
    modes = _modes(channels, device, each, gain=each > 1)
    u = torch.randn(shape, device=device)
    before = torch.randn(modes.state_shape(batch), dtype=torch.float64, device=device)
    positions = _packed(batch, time_, device) if packed else None
    gy, gf = torch.randn_like(u), torch.randn_like(before)
    results = []
    for method, dtype in (("triton", torch.float32), ("chunked", torch.float64)):
        given = [None if p is None else p.to(dtype) for p in modes]
        leaves: list[Any] = [None if p is None else p.clone().requires_grad_() for p in given]
        x, state = u.to(dtype).requires_grad_(), before.clone().requires_grad_()
        start = None if packed else state
        y, final = spectral_conv(x, Modes(*leaves), state=start, positions=positions, method=method)
        asked = [p for p in (x, *leaves, start) if p is not None]
        results.append((y, *torch.autograd.grad((y, final), asked, (gy.to(dtype), gf))))
    errors = [_relative(a, b) for a, b in zip(*results, strict=True)]
    return {"errors": [float(f"{e:.2g}") for e in errors], "good": max(errors) <= 2e-6}


def _repeats(shape: tuple[int, int, int], times: int, device: str) -> Row:
    drawn = _modes(shape[2], device)
    modes = Modes(drawn.decay.requires_grad_(), drawn.frequency.requires_grad_())
    u = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    first = None
    for _ in range(times):
        y, final = spectral_conv(u, modes, method="triton")
        got = (y, final, *torch.autograd.grad(y.float().square().sum(), (u, *modes[:2])))
        if first is None:
            first = got
        elif not all(torch.equal(a, b) for a, b in zip(first, got, strict=True)):
            return {"good": False, "why": "different bits"}
    return {"good": True, "times": times}


def _large(elements: int, device: str) -> Row:
    """Rows beyond 2^31 elements are those of a small tensor."""
    channels, time_ = (512, 32_768) if device == "cuda" else (2, 3)
    batch = -(-elements // (channels * time_)) + 1
    modes, row = _modes(channels, device), torch.randn(1, time_, channels, device=device).bfloat16()
    u = row.expand(batch, -1, -1).contiguous()
    y, final = spectral_conv(u, modes, method="triton")
    good = all(torch.equal(y[i], y[0]) for i in (1, batch // 2, batch - 1))
    del u
    alone, _ = spectral_conv(row, modes, method="triton")
    off = _relative(y[-1:], alone)
    return {
        "elements": y.numel(),
        "difference": off,
        "good": good and off <= 4e-3 and bool(torch.isfinite(final).all()),
    }


def check(minutes: float = 1.0, device: str = "cuda") -> Iterator[Row]:
    """A row for each property, `good` or not; none is begun after `minutes`."""
    toy = device == "cpu"
    times = [1, 3] if toy else [1, 65_535, 65_536, 65_537, 1_048_576]
    steps: dict[str, Callable[[], Row]] = {
        f"T={n}": partial(_forward_error, n, 2 if toy else 24, device) for n in times
    }
    small = (1, 3, 2)
    steps |= {
        "modes and gain": partial(
            _forward_error, 3 if toy else 5_000, 3, device, each=3, gain=True
        ),
        "bfloat16": partial(_rounding, torch.bfloat16, small if toy else (2, 4096, 768), device),
        "float16": partial(_rounding, torch.float16, small if toy else (2, 4096, 768), device),
        "gradients": partial(_gradient_error, small if toy else (2, 4097, 768), 1, False, device),
        "gradients, 3 modes": partial(
            _gradient_error, small if toy else (2, 1030, 100), 3, False, device
        ),
        "gradients, documents": partial(
            _gradient_error, small if toy else (2, 4097, 768), 1, True, device
        ),
        "gradients, far": partial(
            _gradient_error, small if toy else (1, 262_144, 32), 1, False, device
        ),
        "same bits": partial(_repeats, small if toy else (4, 2048, 768), 2 if toy else 20, device),
        "beyond 2^31": partial(_large, 12 if toy else 2**31, device),
    }
    yield from _walk(steps, minutes, device)


def _walk(steps: dict[str, Callable[[], Row]], minutes: float, device: str) -> Iterator[Row]:
    begin = time.perf_counter()
    for name, step in steps.items():
        row: Row = {"section": "spectral check", "what": name}
        if time.perf_counter() - begin > 60 * minutes:
            yield row | {"good": None, "why": "no time left"}
            continue
        start = time.perf_counter()
        try:
            torch.manual_seed(0)
            row |= step()
        except Exception as error:  # whatever it is, it stands in the row
            row |= {"good": False, "why": reason(error)}
        if device == "cuda":
            torch.cuda.empty_cache()
        yield row | {"seconds": round(time.perf_counter() - start, 2)}


# ------------------------------------------------------------------------------------------ speed

SHAPES = [(8, 4096, 768), (1, 65_536, 768), (32, 1024, 768)]


def _calls(
    shape: tuple[int, int, int], dtype: torch.dtype, backward: bool, device: str
) -> dict[str, Callable[[], object]]:
    """The calls: a copy that moves the least bytes, and every way to convolve."""
    modes = _modes(shape[2], device, slow=False)
    u = torch.randn(shape, device=device).to(dtype)
    moved = least_bytes(shape, dtype, backward) // 2
    source = torch.zeros(moved, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    leaves = [p.clone().requires_grad_(backward) for p in modes[:2]]
    x = u.clone().requires_grad_(backward)
    g = torch.randn_like(u)

    def convolve(method: str) -> object:
        if not backward:
            with torch.no_grad():
                return spectral_conv(u, modes, method=method)
        y, _ = spectral_conv(x, Modes(*leaves), method=method)
        return torch.autograd.grad(y, (x, *leaves), g)

    def published() -> object:
        """As the paper's code does: float32, zero-padded to twice the length."""
        length = 2 * shape[1]
        t = torch.arange(shape[1], device=device, dtype=torch.float32)
        decay, frequency = (p[:, 0, None] for p in leaves)
        kernel = torch.exp(-decay * t) * torch.cos(frequency * t)
        spectrum = torch.fft.rfft(x.float().transpose(1, 2), length) * torch.fft.rfft(
            kernel, length
        )
        y = torch.fft.irfft(spectrum, length)[..., : shape[1]].transpose(1, 2).to(dtype)
        return torch.autograd.grad(y, (x, *leaves), g) if backward else y

    return {
        "device copy": lambda: target.copy_(source),
        "triton": lambda: convolve("triton"),
        "fft as published": published,
        "chunked": lambda: convolve("chunked"),
    }


def _measure(
    calls: dict[str, Call], rounds: int, moved: int, device: str, **tags: Any
) -> list[Row]:
    """`time_on`, with the rate at which the least bytes would have moved."""
    about = {"section": "spectral bench", **tags}
    rows = time_on(device, calls, seconds=0.0, fewest=rounds, **about)
    for row in rows:
        if row["status"] == "ok":
            row["GB_per_second_of_least_bytes"] = round(moved / row["milliseconds"] / 1e6, 1)
    return rows


def bench(minutes: float = 1.0, device: str = "cuda") -> Iterator[Row]:
    """Rows of every shape, dtype and direction; none is begun after `minutes`."""
    toy = device == "cpu"
    begin = time.perf_counter()
    for shape in [(1, 3, 2)] if toy else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for backward in (False, True):
                tags = {
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "direction": "both" if backward else "forward",
                }
                if time.perf_counter() - begin > 60 * minutes:
                    yield {"section": "spectral bench", **tags, "status": "no time left"}
                    continue
                try:
                    yield from _one(shape, dtype, backward, device, tags)
                except Exception as error:
                    yield {"section": "spectral bench", **tags, "status": reason(error)}
                if device == "cuda":
                    torch.cuda.empty_cache()


def _lost(error: Exception) -> None:
    raise error


def _one(shape, dtype, backward: bool, device: str, tags: Row) -> list[Row]:
    torch.manual_seed(0)
    calls = _calls(shape, dtype, backward, device)
    try:  # a graph takes the host's part away, which many launches hide
        calls["triton, CUDA graph"] = graphed(calls["triton"], device)
    except Exception as error:
        calls["triton, CUDA graph"] = partial(_lost, error)
    moved = least_bytes(shape, dtype, backward)
    return _measure(calls, 1 if device == "cpu" else 9, moved, device, **tags)


def sweep(minutes: float = 0.7, device: str = "cuda") -> list[Row]:
    """The plan's free choices at [8, 4096, 768] and [1, 65536, 768] in bfloat16: rows asked for
    together, groups on their way, programs that count as enough. For who sets the defaults."""
    from spectral_window.ops import triton_spectral as ts

    begin, rows = time.perf_counter(), []
    plans, enough = dict(ts.PLANS), ts.ENOUGH
    dtype = torch.bfloat16
    choices = [
        (stages, count, many)
        for many in (768, 1536)
        for stages, count in ((3, 8), (1, 8), (1, 16), (3, 4), (2, 8))
    ]
    try:
        for stages, count, many in choices[:1] if device == "cpu" else choices:
            if time.perf_counter() - begin > 60 * minutes:
                break
            ts.PLANS[dtype] = plans[dtype]._replace(stages=stages, rows=count)
            ts.ENOUGH = many
            for shape in [(1, 3, 2)] if device == "cpu" else SHAPES[:2]:
                tags = {"shape": list(shape), "stages": stages, "rows": count, "enough": many}
                try:
                    calls = _calls(shape, dtype, False, device)
                    both = _calls(shape, dtype, True, device)
                    chosen = {name: calls[name] for name in ("device copy", "triton")}
                    chosen["triton, forward and backward"] = both["triton"]
                    moved = least_bytes(shape, dtype, False)
                    timed = _measure(chosen, 1 if device == "cpu" else 5, moved, device, **tags)
                    rows += [{**row, "section": "spectral sweep"} for row in timed]
                except Exception as error:
                    rows.append({"section": "spectral sweep", **tags, "status": reason(error)})
    finally:
        ts.PLANS.update(plans)
        ts.ENOUGH = enough
    return rows
