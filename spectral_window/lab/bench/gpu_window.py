"""Window attention on a GPU: is it right at real sizes, and how fast is it?

    check()     against float64, long rows, more than 2^31 elements, repeats bit by bit, no waiting
    bench()     beside full causal attention (flash), FlexAttention with the same mask, plain chunks
                and a copy of the bytes that must move
    tune()      the kernels with other tiles than theirs

What the kernels must cost stands in `gpu_roofline`.

Each part gives rows of plain values; one that fails has the reason, and the others are still run.
With `quick` all of it runs at toy sizes on a CPU, in Triton's interpreter (TRITON_INTERPRET=1).
Without a limit of time:

    python -m spectral_window.lab.bench.gpu_window --parts check,bench,tune
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.errors import UserError
from spectral_window.lab.bench.timing import clock, graphed, reason, spread, time_on
from spectral_window.lab.jobs import Row
from spectral_window.ops import window_attention
from spectral_window.ops.rotary import angles

THETA = 10000.0
HALVES = (torch.bfloat16, torch.float16)
# At most this many times the error of rounding the exact result: turned rows, weights and their
# gradients are rounded before they are multiplied, as in every flash attention.
HALF_BARS = (2.5, 4.0)
FLOAT32_BAR = 2e-6


def draw(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, count: int = 4
) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(shape, generator=g, device=device, dtype=dtype) for _ in range(count))


def gradients(qkv: tuple[Tensor, ...], grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)"""
    inputs = [x.detach().requires_grad_() for x in qkv]
    out, _ = window_attention(*inputs, rope_theta=THETA, **options)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@contextmanager
def products(how: str) -> Iterator[None]:
    """float32 products by `how` (tl.dot's input_precision)."""
    from spectral_window.ops import triton_window_stream as operators

    before, operators.FLOAT32_PRODUCTS = operators.FLOAT32_PRODUCTS, how
    try:
        yield
    finally:
        operators.FLOAT32_PRODUCTS = before


# ---------------------------------------------------------------- check


def check(device: str = "cuda", quick: bool = False) -> Iterator[Row]:
    """Rows {part, status: "ok" or why not, ...}."""
    time_ = 40 if quick else 4096
    windows = {  # the most telling first: compiling takes most of the time
        torch.bfloat16: (128, 32, 16, 64, 100, 256, 512),
        torch.float32: (128, 16),
        torch.float16: (128,),
    }
    for dtype, sizes in windows.items():
        for window in (4,) if quick else sizes:
            about = {"dtype": str(dtype)[6:], "window": window, "length": time_}
            yield measured("float64", about, _errors, device, dtype, window, time_)
    about = {"dtype": "float32", "products": "tf32x3"}
    yield measured("float64", about, _errors_tf32, device, 4 if quick else 128, time_)
    small = 16 if quick else 64
    for size in (6,) if quick else (32, 80, 128):
        about = {"dtype": "bfloat16", "head size": size}
        yield measured("float64", about, _errors, device, torch.bfloat16, small, time_, size)
    long = 70 if quick else 65_537
    yield measured("long", {"length": long}, _errors, device, torch.bfloat16, small, long)
    yield measured("documents and state", {}, _documents, device, quick)
    yield measured("more than 2^31 elements", {}, _huge, device, quick)
    yield measured("repeats", {}, _repeats, device, quick)
    yield measured("causality", {}, _causality, device, quick)
    yield measured("no waiting", {}, _no_waiting, device, quick)
    yield measured("torch.compile", {}, _compiled, device, quick)


def measured(part: str, about: Row, measure: Callable[..., Row], *inputs: Any) -> Row:
    begin = time.perf_counter()
    try:
        row = {"status": "ok", **measure(*inputs)}
    except Exception as error:  # whatever it is, it stands in the row
        row = {"status": reason(error)}
    return {"part": part, **about, **row, "seconds": round(time.perf_counter() - begin, 2)}


def _errors(
    device: str, dtype: torch.dtype, window: int, length: int, size: int = 64, **documents: Any
) -> Row:
    shape = (1, length, 2, size) if length > 4096 else (2, length, 2, size)
    *qkv, grad = draw(device, shape, dtype)
    options = {"window": window, **documents}
    mine = gradients(tuple(qkv), grad, method="triton", **options)
    exact = [x.double() for x in qkv]
    truth = gradients(tuple(exact), grad.double(), method="chunked", **options)
    return _compared(mine, truth, dtype)


def _compared(mine: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> Row:
    names = ("out", "dq", "dk", "dv")
    errors = [relative(a, b) for a, b in zip(mine, truth, strict=True)]
    row: Row = {name: float(f"{error:.3g}") for name, error in zip(names, errors, strict=True)}
    if dtype in HALVES:
        rounding = relative(truth[0].to(dtype), truth[0])
        bars = [bar * rounding for bar in (HALF_BARS[0], *[HALF_BARS[1]] * 3)]
        row["rounding"] = float(f"{rounding:.3g}")
    else:
        bars = [FLOAT32_BAR] * 4
    wrong = [n for n, e, bar in zip(names, errors, bars, strict=True) if not e <= bar]
    return row | ({"status": f"wrong: {', '.join(wrong)}"} if wrong else {})


def _errors_tf32(device: str, window: int, length: int) -> Row:
    with products("tf32x3"):
        return _errors(device, torch.float32, window, length)


def _documents(device: str, quick: bool) -> Row:
    """Packed and padded rows, and a row cut in two at an odd place."""
    window, length = (4, 40) if quick else (64, 2048)
    place = torch.arange(length, device=device)
    cut = length // 3 + 1
    packed = torch.where(place < cut, place, place - cut)
    padded = torch.where(place < 7, -1, place - 7)
    positions = torch.stack((packed, padded))
    *qkv, grad = draw(device, (2, length, 2, 16), torch.float32)
    grad = grad * (positions >= 0)[..., None, None]
    mine = gradients(tuple(qkv), grad, window=window, method="triton", positions=positions)
    exact = tuple(x.double() for x in qkv)
    truth = gradients(exact, grad.double(), window=window, method="chunked", positions=positions)
    row = _compared(mine, truth, torch.float32)
    attend = partial(window_attention, window=window, rope_theta=THETA, method="triton")
    whole, end = attend(*qkv)
    first, state = attend(*(x[:, :cut] for x in qkv))
    second, after = attend(*(x[:, cut:] for x in qkv), state=state)
    off = relative(torch.cat((first, second), 1), whole.double())
    same = all(torch.equal(a, b) for a, b in zip(after, end, strict=True))
    row["cut"] = float(f"{off:.3g}")
    if off > FLOAT32_BAR or not same:
        row["status"] = f"wrong: cut in two: {off:.1e}, state {'the same' if same else 'differs'}"
    return row


def _huge(device: str, quick: bool) -> Row:
    """The end of a row beyond 2^31 elements, against the same tokens alone: RoPE knows distances
    only."""
    window, heads, size = (4, 2, 8) if quick else (128, 12, 64)
    length = 10 * window + 3 if quick else 2**31 // (heads * size) + 1000
    q, k, v, grad = draw(device, (1, length, heads, size), torch.bfloat16)
    mine = gradients((q, k, v), grad, window=window, method="triton")
    tail = slice((length // window - 6) * window, length)
    few = tuple(x[:, tail].double() for x in (q, k, v))
    truth = gradients(few, grad[:, tail].double(), window=window, method="chunked")
    settled = slice(2 * window, None)  # keys and queries that meet nothing before the tail
    return {"elements": q.numel()} | _compared(
        tuple(x[:, tail][:, settled] for x in mine),
        tuple(x[:, settled] for x in truth),
        torch.bfloat16,
    )


def _repeats(device: str, quick: bool) -> Row:
    window, shape, count = (4, (1, 20, 1, 8), 2) if quick else (128, (4, 4096, 12, 64), 20)
    *qkv, grad = draw(device, shape, torch.bfloat16)
    first = gradients(tuple(qkv), grad, window=window, method="triton")
    for _ in range(count):
        again = gradients(tuple(qkv), grad, window=window, method="triton")
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return {"status": "wrong: another call gave other bits"}
    return {"repeats": count}


def _causality(device: str, quick: bool) -> Row:
    window, length = (4, 40) if quick else (128, 3000)
    q, k, v = draw(device, (1, length, 2, 16), torch.bfloat16, 3)
    attend = partial(window_attention, window=window, rope_theta=THETA, method="triton")
    edge = length // 2 + 1
    out, _ = attend(q, k, v)
    other, _ = attend(*(torch.cat((x[:, :edge], x[:, edge:] * 1e4), 1) for x in (q, k, v)))
    same = torch.equal(out[:, :edge], other[:, :edge])
    return {} if same else {"status": "wrong: the future reached the past"}


def _no_waiting(device: str, quick: bool) -> Row:
    """The host does not wait for the device, with positions and states neither."""
    window, length = (4, 20) if quick else (64, 1000)
    q, k, v = draw(device, (2, length, 2, 16), torch.bfloat16, 3)
    attend = partial(window_attention, q, k, v, window=window, rope_theta=THETA, method="triton")
    _, state = attend()
    positions = torch.arange(length, device=device).expand(2, -1)
    calls = (attend, partial(attend, positions=positions), partial(attend, state=state))
    for call in calls:
        call()
    if device == "cpu":
        return {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def _compiled(device: str, quick: bool) -> Row:
    if quick:
        return {"status": "left out: a compiler is not part of the dry run"}
    q, k, v = draw(device, (2, 1000, 4, 64), torch.bfloat16, 3)
    attend = partial(window_attention, window=64, rope_theta=THETA, method="triton")
    out, state = torch.compile(attend, fullgraph=True)(q, k, v)
    truth, end = attend(q, k, v)
    same = torch.equal(out, truth) and relative(state.key, end.key.double()) < 1e-2
    return {} if same else {"status": "wrong: compiled differs from eager"}


# ---------------------------------------------------------------- bench


def bench(device: str = "cuda", quick: bool = False, seconds: float = 0.5) -> Iterator[Row]:
    """Rows {shape, window, dtype, pass, contestant, status, milliseconds, ratio to "ours", ...}.

    seconds: of rounds in each comparison."""
    shapes = [(1, 40, 1, 8)] if quick else [(8, 4096, 12, 64), (1, 65_536, 12, 64)]
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and shape != shapes[0]:
                continue
            for window in (4,) if quick else (128, 32, 64, 256):
                flex = window in (4, 128) and dtype == torch.bfloat16
                yield from compare(device, shape, dtype, window, flex, quick, seconds)


def compare(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    window: int,
    flex: bool,
    quick: bool,
    seconds: float,
) -> Iterator[Row]:
    """Both passes of all operators at one size, the first being the measure."""
    about: Row = {"shape": list(shape), "window": window, "dtype": str(dtype)[6:]}
    *qkv, grad = draw(device, shape, dtype)
    operators: dict[str, Any] = {
        "ours": lambda q, k, v: _ours(q, k, v, window, "triton"),
        "chunked": lambda q, k, v: _ours(q, k, v, window, "chunked"),
        "full causal, without RoPE": _full,
    }
    if dtype == torch.float32:
        operators["ours, tf32x3"] = lambda q, k, v: _ours(q, k, v, window, "triton")
    if flex:
        try:
            operators["FlexAttention"] = _flex(device, shape, dtype, window, quick)
        except Exception as error:
            yield {**about, "contestant": "FlexAttention", "status": reason(error)}
    for backward in (False, True):
        calls: dict[str, Callable[[], Any]] = {
            name: partial(_call, name, operator, qkv, grad if backward else None)
            for name, operator in operators.items()
        }
        try:
            calls["ours, CUDA graph"] = graphed(calls["ours"], torch.device(device).type)
        except Exception as error:
            yield {**about, "contestant": "ours, CUDA graph", "status": reason(error)}
        calls |= {"copy": _copy(qkv, backward)}
        part: Row = {**about, "pass": "forward + backward" if backward else "forward"}
        yield from time_on(device, calls, seconds=seconds, fewest=2 if quick else 5, **part)


def _call(name: str, operator: Any, qkv: list[Tensor], grad: Tensor | None) -> None:
    inputs = [x.detach().requires_grad_(grad is not None) for x in qkv]
    with products("tf32x3" if "tf32x3" in name else "ieee"):
        out = operator(*inputs)
        if grad is not None:
            torch.autograd.grad(out, inputs, grad)


def _ours(q: Tensor, k: Tensor, v: Tensor, window: int, method: str) -> Tensor:
    return window_attention(q, k, v, window=window, rope_theta=THETA, method=method)[0]


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _copy(qkv: list[Tensor], backward: bool) -> Callable[[], None]:
    """As many bytes as must move: q, k, v in and out out; and in the backward pass q, k, v, out and
    its gradient in, three gradients out."""
    source, into = qkv[0], torch.empty_like(qkv[0])

    def copy() -> None:
        for _ in range(6 if backward else 2):
            into.copy_(source)

    return copy


def _flex(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, window: int, quick: bool
) -> Callable[..., Tensor]:
    """FlexAttention with the same mask, RoPE before it, compiled together."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, size = shape[1], shape[3]
    cos, sin = (x[:, None] for x in angles(torch.arange(length, device=device), size, THETA, dtype))

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key // window >= query // window - 1)

    blocks = create_block_mask(mask, None, None, length, length, device=device, _compile=not quick)

    def turn(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (turn(q), turn(k), v))
        return flex_attention(q, k, v, block_mask=blocks).transpose(1, 2)

    operator: Any = attend if quick else torch.compile(attend, dynamic=False)
    q, k, v = draw(device, shape, dtype, 3)
    mine = _ours(q, k, v, window, "triton").double()
    off = relative(operator(q, k, v), mine)
    if off > 0.03:
        raise UserError(f"wrong: relative difference {off:.1e} from ours")
    return operator


# ---------------------------------------------------------------- tune

TILES = {
    "attend": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
    "attend_queries": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 1)],
    "attend_keys": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 1)],
}


def tune(
    device: str = "cuda", quick: bool = False, windows: tuple[int, ...] = (32, 128, 256)
) -> list[Row]:
    """Rows of the kernel alone by tiles (own, met, warps, stages), in bfloat16; each with its error
    against the tiles in use, since a fast wrong kernel has no time."""
    from spectral_window.ops import triton_window_stream as operators

    shape = (1, 40, 1, 8) if quick else (8, 4096, 12, 64)
    *qkv, grad = draw(device, shape, torch.bfloat16)
    usual, rows = operators.tiles, []
    for window in (4,) if quick else windows:
        truth = gradients(tuple(qkv), grad, window=window, method="triton")
        for kernel, candidates in TILES.items():
            for cut in candidates[:1] if quick else candidates:

                def chosen(name: str, *about: Any, kernel: str = kernel, cut: Any = cut) -> Any:
                    return operators.Tiles(*cut) if name == kernel else usual(name, *about)

                operators.tiles = chosen  # type: ignore[assignment]
                about = {"kernel": kernel, "tiles": list(cut), "window": window}
                try:
                    rows.append(
                        measured("tune", about, _one_kernel, device, kernel, qkv, grad, window)
                    )
                    mine = gradients(tuple(qkv), grad, window=window, method="triton")
                    off = max(relative(a, b.double()) for a, b in zip(mine, truth, strict=True))
                    rows[-1]["difference"] = float(f"{off:.2g}")
                except Exception as error:
                    rows[-1]["status"] = reason(error)
                finally:
                    operators.tiles = usual
    return rows


def _one_kernel(device: str, kernel: str, qkv: list[Tensor], grad: Tensor, window: int) -> Row:
    """Milliseconds of the operator that the kernel belongs to; only this kernel's tiles vary."""
    from spectral_window.ops import triton_window_stream as operators

    call = (*qkv, window, THETA, None, None)
    run: Callable[[], Any] = partial(operators.stream_attention, *call)
    if kernel != "attend":
        saved = operators.stream_attention(*call)
        run = partial(operators.stream_attention_backward, *call, *saved, grad)
    run()
    times = [1000 * clock(run, device, 5) for _ in range(2 if device == "cpu" else 9)]
    return spread("milliseconds", times)


def main() -> None:
    """Print each part's rows as they come, one JSON a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--parts", default="check,bench,tune")
    given = parser.parse_args()
    parts: dict[str, Callable[..., Iterable[Row]]] = {"check": check, "bench": bench, "tune": tune}
    for part in given.parts.split(","):
        for row in parts[part](given.device, given.quick):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
