"""The roofline: what the hardware needs for the same work, measured, not looked up.

    multiply   exactly a model's matrix products, one after the other, and nothing else
    read       reading as many bytes once

For each product shape several ways are tried (one call or blocks of rows, the weight stored as
[out, in] or [in, out], written into memory at hand) and the fastest is taken; weights differ from
layer to layer, so they come from memory as in the model. For reading, a sum, a dot product and a
matrix-vector product are tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from spectral_window.hf.config import SWHConfig
from spectral_window.lab.bench.timing import Call

Shape = tuple[int, int]  # (in, out)
BLOCKS = (0, 512, 1024)  # rows a call; 0: all


def layer_products(config: SWHConfig) -> list[Shape]:
    """The products of one SWH layer, those with a common input as one: q, k, v and the
    convolution's input; W_local; W_out; gate and up; down."""
    size, hidden = config.hidden_size, int(config.intermediate_size or 0)
    return [(size, 4 * size), (size, size), (size, size), (size, 2 * hidden), (hidden, size)]


def multiply(products: Sequence[Sequence[Shape]], rows: int, dtype: torch.dtype) -> Call:
    """A call that makes the products of every layer (a sequence of shapes each) on `rows` rows."""
    shapes = {shape for layer in products for shape in layer}
    inputs = {size: torch.randn(rows, size, dtype=dtype) for size, _ in shapes}
    outputs = {size: torch.empty(rows, size, dtype=dtype) for _, size in shapes}
    way = {(k, n): _fastest(inputs[k], outputs[n]) for k, n in shapes}
    steps = []
    for layer in products:
        for k, n in layer:
            transposed, block = way[k, n]
            steps.append((inputs[k], _weight(k, n, transposed, dtype), outputs[n], block))

    def call() -> None:
        for x, w, y, block in steps:
            _product(x, w, y, block)

    return call


def _product(x: Tensor, w: Tensor, y: Tensor, block: int) -> None:
    if not block:
        torch.mm(x, w, out=y)
        return
    for begin in range(0, len(x), block):  # into the same rows: they stay in the cache
        part = x[begin : begin + block]
        torch.mm(part, w, out=y[: len(part)])


def _weight(k: int, n: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """[k, n]; transposed: stored as [n, k], as a Linear does."""
    return torch.randn(n, k, dtype=dtype).T if transposed else torch.randn(k, n, dtype=dtype)


def _fastest(x: Tensor, y: Tensor) -> tuple[bool, int]:
    x, y = x[:2048], y[:2048]  # as good as all rows to choose by
    best, chosen = float("inf"), (True, 0)
    for transposed in (True, False):
        w = _weight(x.shape[1], y.shape[1], transposed, x.dtype)
        for block in BLOCKS:
            if block < len(x):
                spent = _shortest(partial(_product, x, w, y, block), 2)
                if spent < best:
                    best, chosen = spent, (transposed, block)
    return chosen


def read(size: int) -> Call:
    """A call that reads `size` bytes of memory once, the fastest way there is."""
    buffer = torch.ones(max(1, size // 4096), 1024)
    vector = torch.ones(1024)
    flat = buffer.view(-1)
    ways: list[Callable[[], Tensor]] = [
        flat.sum,
        lambda: torch.dot(flat, flat),
        lambda: torch.mv(buffer, vector),
    ]
    return min(ways, key=lambda way: _shortest(way, 4))


def _shortest(call: Call, times: int) -> float:
    """Seconds of the shortest of some calls after a first."""
    call()
    spent = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return min(spent)
