"""The delta-rule memory on a GPU: is it right at real sizes, and how fast is it?

    check()          against float64 at lengths around the chunk, documents, equal keys, repeats bit
                     by bit, no waiting, a CUDA graph; by one thread
    check_threads()  calls by one thread, then by two and by four at once
    bench()          beside plain chunks, the delta rule of the package `fla`, and a copy of the
                     bytes that must move

Each part gives rows of plain values; one that fails has the reason, and the others are still run.
With `quick` all of it runs at toy sizes on a CPU, in Triton's interpreter (TRITON_INTERPRET=1).
Without a limit of time:

    python -m spectral_window.lab.bench.gpu_delta --parts check,threads,bench
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.lab.bench.gpu_window import measured
from spectral_window.lab.bench.timing import graphed, reason, relative_error, time_on
from spectral_window.lab.jobs import Row
from spectral_window.ops import delta_memory

NAMES = ("out", "state", "dq", "dk", "dv", "dbeta", "ddecay", "dstate")
FLOAT32_BARS = (3e-6, 1e-5)  # of outputs, and of gradients
# At most this many times the error of rounding the exact result: writes and states are rounded
# before they are multiplied.
HALF_BARS = (4.0, 8.0)
TF32_BARS = (1e-2, 2e-2)
Shape = tuple[int, int, int, int, int]  # B, T, H, K, V
WIDE: Shape = (16, 1024, 6, 128, 128)
LONG: Shape = (2, 8192, 6, 128, 128)
SMALL: Shape = (8, 512, 1, 192, 192)
TOY: Shape = (1, 70, 1, 6, 5)


def draw(
    device: str,
    shape: Shape,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    agree: float = 0.0,
    full: bool = False,
) -> list[Tensor | None]:
    """[q, k, v, beta, decay, state], the last two None unless `gated`.

    agree: how near keys are to one another; full: beta is 1.
    """
    batch, time, heads, key, value = shape
    g = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=g, device=device)
    common = agree * normal(batch, 1, heads, key)
    q, k = (F.normalize(normal(batch, time, heads, key) + common, dim=-1) for _ in range(2))
    v = normal(batch, time, heads, value)
    beta = torch.rand(batch, time, heads, generator=g, device=device)
    decay = torch.rand(batch, time, heads, generator=g, device=device).square() if gated else None
    state = normal(batch, heads, key, value) if gated else None
    return [
        *(x.to(dtype) for x in (q, k, v)),
        torch.ones_like(beta) if full else beta,
        decay,
        state,
    ]


def differentiated(
    inputs: Sequence[Tensor | None], grads: Sequence[Tensor], method: str, **documents: Any
) -> dict[str, Tensor]:
    """Outputs and gradients by name; `grads` are those of the output and of the final state."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    q, k, v, beta, decay, state = leaves
    outputs = delta_memory(q, k, v, beta, decay=decay, state=state, method=method, **documents)  # type: ignore[arg-type]
    asked = [x for x in leaves if x is not None]
    given = [x.to(y.dtype) for x, y in zip(grads, outputs, strict=False)]
    gradients = iter(torch.autograd.grad(outputs[: len(given)], asked, given))
    values = [
        *(x.detach() for x in outputs),
        *(None if x is None else next(gradients) for x in leaves),
    ]
    return {name: x for name, x in zip(NAMES, values, strict=True) if x is not None}


def upstream(inputs: Sequence[Tensor | None], state: bool = True) -> list[Tensor]:
    """Gradients of the output, and of the final state if `state`."""
    q, v = inputs[0], inputs[2]
    assert q is not None
    assert v is not None
    g = torch.Generator(v.device).manual_seed(1)
    shapes = [v.shape, (q.shape[0], q.shape[2], q.shape[3], v.shape[3])][: 1 + state]
    grads = [torch.randn(shape, generator=g, device=v.device) for shape in shapes]
    return [grads[0].to(v.dtype), *grads[1:]]


def exactly(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """float32 products by `name` (torch.set_float32_matmul_precision)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- check


def check(device: str = "cuda", quick: bool = False) -> Iterator[Row]:
    """Rows {part, status: "ok" or why not, ...}."""
    torch.set_float32_matmul_precision("highest")
    base = TOY if quick else (4, 4097, *WIDE[2:])
    small = TOY if quick else SMALL
    full, half = torch.float32, torch.bfloat16
    for name, call in short_calls(device, quick).items():
        yield measured("short", {"call": name}, _finite, call)
    for dtype in (full, half):
        about: Row = {"dtype": str(dtype)[6:], "shape": list(base)}
        yield measured("float64", about, _errors, device, base, dtype)
    yield measured(
        "documents and state", {}, _documents, device, (base[0], 40 if quick else 1000, *base[2:])
    )
    for agree, all_ in ((3.0, False), (1e4, True)):
        about = {"agree": agree, "beta": 1 if all_ else "drawn"}
        shape = base if quick else (4, 1024, *base[2:])
        yield measured("equal keys", about, _errors, device, shape, full, agree, all_)
    yield measured("repeats", {}, _repeats, device, base if quick else WIDE, 2 if quick else 20)
    for length in (1, 3) if quick else (1, 63, 64, 65, 4095):
        shape = (base[0], length, *base[2:])
        yield measured(
            "float64", {"dtype": "float32", "shape": list(shape)}, _errors, device, shape, full
        )
    about = {"dtype": "float32", "shape": list(small)}
    yield measured("float64", about, _errors, device, small, full)
    yield measured("no waiting", {}, _no_waiting, device, base)
    yield measured("CUDA graph", {}, _captured, device, base)
    about = {"dtype": "float32", "products": "tf32", "shape": list(base)}
    yield measured("float64", about, _errors_tf32, device, base)


def short_calls(device: str, quick: bool) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The calls, forwards and backwards, of which four at once ended with an illegal access."""
    wide, narrow = (TOY, TOY) if quick else ((4, 65, *WIDE[2:]), (8, 65, *SMALL[2:]))
    shapes = {
        "float32": (wide, torch.float32),
        "bfloat16": (wide, torch.bfloat16),
        "float32, one head of 192": (narrow, torch.float32),
    }

    def calls(inputs: list[Tensor | None], **documents: Any) -> Callable[[], dict[str, Tensor]]:
        return partial(differentiated, inputs, upstream(inputs), "triton", **documents)

    found = {name: calls(draw(device, *about)) for name, about in shapes.items()}
    packed = (wide[0], 70 if quick else 130, *wide[2:])
    place = torch.arange(packed[1], device=device)
    positions = torch.where(place < 40, place, place - 40).expand(packed[0], -1).contiguous()
    inputs = draw(device, packed, torch.float32, gated=True)
    return found | {"documents": calls(inputs, positions=positions)}


def _finite(call: Callable[[], dict[str, Tensor]]) -> Row:
    wrong = [name for name, x in call().items() if not bool(x.isfinite().all())]
    return {"status": f"wrong: not finite: {', '.join(wrong)}"} if wrong else {}


def check_threads(device: str = "cuda", quick: bool = False) -> Iterator[Row]:
    """Rows {part, threads, status}: the short calls give the same bits by one thread and several.

    The first row of several threads finds every kernel compiled, the second ("anew") none, as in
    the session on an H100 that failed.
    """
    torch.set_float32_matmul_precision("highest")
    calls = short_calls(device, quick)
    alone: dict[str, dict[str, Tensor]] = {}
    times = 1 if quick else 5

    def one_thread() -> Row:
        alone.update({name: call() for name, call in calls.items()})
        return {}

    yield measured("threads", {"threads": 1}, one_thread)
    for count in (2, 4):
        yield measured("threads", {"threads": count}, _together, calls, alone, count, times)
    forget_kernels()
    about = {"threads": 4, "kernels": "compiled anew"}
    yield measured("threads", about, _together, calls, alone, 4, times)


def forget_kernels() -> None:
    """Let the next call of each kernel find it compiled by none."""
    from spectral_window.ops import triton_delta_gradients, triton_delta_kernels

    for file in (triton_delta_kernels, triton_delta_gradients):
        for kernel in vars(file).values():
            getattr(kernel, "device_caches", {}).clear()


def _together(
    calls: dict[str, Callable[[], dict[str, Tensor]]],
    alone: dict[str, dict[str, Tensor]],
    count: int,
    times: int,
) -> Row:
    """All calls, `times` times, by `count` threads."""
    names = times * list(calls)
    with ThreadPoolExecutor(count) as threads:
        for name, found in zip(names, threads.map(lambda n: calls[n](), names), strict=True):
            if not all(torch.equal(x, alone[name][key]) for key, x in found.items()):
                return {"status": f"wrong: {name}: other bits than by one thread"}
    return {"calls": len(names)}


def _errors(
    device: str, shape: Shape, dtype: torch.dtype, agree: float = 0.0, full: bool = False
) -> Row:
    inputs = draw(device, shape, dtype, agree=agree, full=full)
    grads = upstream(inputs)
    mine = differentiated(inputs, grads, "triton")
    truth = differentiated(exactly(inputs), grads, "chunked")
    return _compared(mine, truth, dtype, loose=agree > 0)


def _compared(
    mine: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype, loose: bool = False
) -> Row:
    """Errors by name; gradients of nearly equal keys (`loose`) may have ten times the error."""
    errors = {name: relative_error(x, truth[name]) for name, x in mine.items()}
    row: Row = {name: float(f"{error:.3g}") for name, error in errors.items()}
    bars = FLOAT32_BARS
    if torch.get_float32_matmul_precision() != "highest":
        bars = TF32_BARS
    if dtype != torch.float32:
        rounding = relative_error(truth["out"].to(dtype), truth["out"])
        bars = (HALF_BARS[0] * rounding, HALF_BARS[1] * rounding)
        row["rounding"] = float(f"{rounding:.3g}")
    allowed = {
        n: bars[0] if n in ("out", "state") else bars[1] * (10 if loose else 1) for n in errors
    }
    wrong = [name for name, error in errors.items() if not error <= allowed[name]]
    return row | ({"status": f"wrong: {', '.join(wrong)}"} if wrong else {})


def _errors_tf32(device: str, shape: Shape) -> Row:
    with precision("high"):
        return _errors(device, shape, torch.float32)


def _documents(device: str, shape: Shape) -> Row:
    """Packed and padded rows with a decay and a state, a NaN in one document, and a row cut in
    two."""
    batch, length = shape[:2]
    place = torch.arange(length, device=device)
    cut = length // 3 + 1
    packed = torch.where(place < cut, place + 5, place - cut)
    padded = torch.where((place < 7) | (place >= length - 3), -1, place - 7)
    rows = [packed if b % 2 == 0 else padded for b in range(batch)]
    positions = torch.stack(rows)
    inputs = draw(device, shape, torch.float32, gated=True)
    grads = upstream(inputs)
    mine = differentiated(inputs, grads, "triton", positions=positions)
    truth = differentiated(exactly(inputs), grads, "chunked", positions=positions)
    row = _compared(mine, truth, torch.float32)
    q, k, v, beta, decay, state = inputs
    assert k is not None
    spoiled = k.clone()
    spoiled[0, cut - 2] = torch.nan
    options = {"decay": decay, "state": state, "positions": positions, "method": "triton"}
    out, _ = delta_memory(q, spoiled, v, beta, **options)  # type: ignore[arg-type]
    lost = ~out[0].isfinite().all(-1).all(-1)
    if not bool((lost == ((place >= cut - 2) & (place < cut))).all()):
        row["status"] = f"wrong: a NaN reached {int(lost.sum())} tokens, expected 2"
    parts, after = [], state
    for piece in (slice(0, cut), slice(cut, length)):
        given = [None if x is None else x[:, piece] for x in inputs[:5]]
        y, after = delta_memory(*given[:4], decay=given[4], state=after, method="triton")  # type: ignore[arg-type,misc]
        parts.append(y)
    whole, end = delta_memory(q, k, v, beta, decay=decay, state=state, method="triton")  # type: ignore[arg-type]
    off = max(
        relative_error(torch.cat(parts, 1), whole.double()), relative_error(after, end.double())
    )  # type: ignore[arg-type]
    row["cut"] = float(f"{off:.3g}")
    return row | ({"status": f"wrong: cut in two: {off:.1e}"} if off > FLOAT32_BARS[0] else {})


def _repeats(device: str, shape: Shape, count: int) -> Row:
    inputs = draw(device, shape, torch.bfloat16)
    grads = upstream(inputs)
    first = differentiated(inputs, grads, "triton")
    for _ in range(count):
        again = differentiated(inputs, grads, "triton")
        if not all(torch.equal(first[name], x) for name, x in again.items()):
            return {"status": "wrong: another call gave other bits"}
    return {"repeats": count}


def _no_waiting(device: str, shape: Shape) -> Row:
    """The host does not wait for the device."""
    inputs = draw(device, shape, torch.float32)
    grads = upstream(inputs)
    call = partial(differentiated, inputs, grads, "triton")
    call()
    if device == "cpu":
        return {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def _captured(device: str, shape: Shape) -> Row:
    if device == "cpu":
        return {"status": "left out: a CPU has no CUDA graphs"}
    inputs = draw(device, shape, torch.float32)
    call = partial(differentiated, inputs, upstream(inputs), "triton")
    truth = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(x, result[name]) for name, x in truth.items())
    return {} if same else {"status": "wrong: the graph gives other bits"}


# ---------------------------------------------------------------- bench


def bench(device: str = "cuda", quick: bool = False, seconds: float = 0.3) -> Iterator[Row]:
    """Rows {shape, dtype, pass, contestant, status, milliseconds, ratio to "ours", ...}.

    seconds: of rounds in each comparison."""
    torch.set_float32_matmul_precision("highest")
    shapes = [TOY] if quick else [WIDE, LONG]
    cases = [(shape, dtype) for shape in shapes for dtype in (torch.bfloat16, torch.float32)]
    if not quick:
        cases.append((SMALL, torch.float32))
    for shape, dtype in cases:
        yield from compare(device, shape, dtype, quick, seconds)


def compare(
    device: str, shape: Shape, dtype: torch.dtype, quick: bool, seconds: float
) -> Iterator[Row]:
    """Both passes of all operators at one size, the first being the measure."""
    inputs = draw(device, shape, dtype)
    for backward in (False, True):
        calls: dict[str, Callable[[], Any]] = {"ours": partial(_call, _ours, inputs, backward)}
        if dtype == torch.float32:
            if shape != LONG:
                calls["ours, tf32"] = partial(_tf32, inputs, backward)
            calls["chunked"] = partial(_call, _chunked, inputs, backward)
        else:
            calls["fla"] = partial(_call, _fla, inputs, backward)
        calls["copy"] = _copy(inputs, backward)
        about: Row = {"shape": list(shape), "dtype": str(dtype)[6:]}
        about["pass"] = "forward + backward" if backward else "forward"
        try:  # a graph takes the host's part away, which is most of a small model's
            calls["ours, CUDA graph"] = graphed(calls["ours"], torch.device(device).type)
        except Exception as error:
            yield {**about, "contestant": "ours, CUDA graph", "status": reason(error)}
        fewest = 2 if quick else 5
        yield from time_on(device, calls, seconds=seconds, fewest=fewest, **about)


def _call(operator: Callable[..., Tensor], inputs: Sequence[Tensor | None], backward: bool) -> None:
    leaves = [x.detach().requires_grad_(backward) for x in inputs if x is not None]
    out = operator(*leaves)
    if backward:
        torch.autograd.grad(out, leaves, leaves[2])


def _ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return delta_memory(q, k, v, beta, method="triton")[0]


def _tf32(inputs: Sequence[Tensor | None], backward: bool) -> None:
    with precision("high"):
        _call(_ours, inputs, backward)


def _chunked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return delta_memory(q, k, v, beta, method="chunked")[0]


def _fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta.to(q.dtype), scale=1.0)[0]


def _copy(inputs: Sequence[Tensor | None], backward: bool) -> Callable[[], None]:
    """As many bytes as must move: q, k, v in and out out; and in the backward pass q, k, v and the
    gradient of out in, three gradients out."""
    sources = [x for x in inputs[:3] if x is not None]
    pairs = [(x, torch.empty_like(x)) for x in sources]
    moved = 4 + 7 * backward  # tensors that are read or written; a copy does both

    def copy() -> None:
        for n in range(-(-moved // 2)):
            source, into = pairs[n % len(pairs)]
            into.copy_(source)

    return copy


def main() -> None:
    """Print each part's rows as they come, one JSON a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--parts", default="check,threads,bench")
    given = parser.parse_args()
    parts: dict[str, Callable[..., Iterable[Row]]] = {
        "check": check,
        "threads": check_threads,
        "bench": bench,
    }
    for part in given.parts.split(","):
        for row in parts[part](given.device, given.quick):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
