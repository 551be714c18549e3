"""No method mixes devices, shown where there is one device alone.

The inputs are fake tensors (torch's FakeTensorMode): they have shapes, dtypes and a device, but no
values, and refuse to meet tensors of another device as those of a GPU do. Their device is "meta",
the only one besides the CPU for which a torch without CUDA computes gradients. Documents have a
copy of their positions on the CPU, from which chunks are planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spectral_window.ops import (
    METHODS,
    Modes,
    Taps,
    WindowState,
    delta_memory,
    fir_conv,
    spectral_conv,
    window_attention,
)
from spectral_window.ops.documents import Documents

BATCH, TIME, HEADS, WINDOW = 2, 9, 2, 4
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
POSITIONS = {
    "a state goes on": None,
    "documents": [[3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, -1, -1, 0, -1, 0, 1]],
    "padding": [[-1] * TIME] * BATCH,
}


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FAKE:
        tensor = torch.empty(*shape, dtype=dtype, device="meta")
    return tensor.requires_grad_(dtype.is_floating_point)


def spectral(time: int, given: bool, decays: bool, **options: Any) -> Any:
    modes = Modes(there(4, 3), there(4, 3), there(4, 3) if decays else None)
    state = there(BATCH, 4, 3, 2, dtype=torch.float64) if given else None
    return spectral_conv(there(BATCH, time, 4), modes, state=state, **options)


def fir(time: int, given: bool, decays: bool, **options: Any) -> Any:
    state = there(BATCH, 4, 4) if given else None
    return fir_conv(there(BATCH, time, 4), Taps(there(4, 5)), state=state, **options)


def window(time: int, given: bool, decays: bool, **options: Any) -> Any:
    q, k, v = (there(BATCH, time, HEADS, 4) for _ in range(3))
    state = None
    if given:
        ring = (there(BATCH, 2 * WINDOW, HEADS, 4) for _ in range(2))
        state = WindowState(*ring, there(BATCH, dtype=torch.int64))
    theta = 1e4 if decays else None
    return window_attention(q, k, v, window=WINDOW, rope_theta=theta, state=state, **options)


def delta(time: int, given: bool, decays: bool, **options: Any) -> Any:
    q, k, v = (there(BATCH, time, HEADS, 4) for _ in range(3))
    state = there(BATCH, HEADS, 4, 4) if given else None
    decay = there(BATCH, time, HEADS) if decays else None
    beta = there(BATCH, time, HEADS)
    return delta_memory(q, k, v, beta, decay=decay, state=state, **options)


OPERATORS: dict[str, Callable[..., Any]] = {
    "spectral": spectral,
    "fir": fir,
    "window": window,
    "delta": delta,
}
PLAIN_TORCH = [
    (op, method)
    for op in OPERATORS
    for method in METHODS[op]
    if method in ("step", "chunked", "shifts", "fft", "reference")
    and (op, method) != ("window", "reference")  # it reads values
]


def leaves(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    else:
        for each in x:
            yield from leaves(each)


def run(op: str, method: str, rows: str, given: bool, decays: bool) -> None:
    time = 1 if method == "step" else TIME
    documents = None
    if POSITIONS[rows] is None:
        given = given and (op, method) != ("window", "chunked")  # it reads where the state ends
    else:
        host = torch.tensor(POSITIONS[rows])[:, :time]
        documents = Documents(there(BATCH, time, dtype=torch.int64), host, checked=True)
    results = list(leaves(OPERATORS[op](time, given, decays, positions=documents, method=method)))
    assert {x.device.type for x in results} == {"meta"}
    sums = [x.double().sum() for x in results if x.requires_grad]
    if sums:  # padding alone has a constant result
        sum(sums).backward()


@pytest.mark.parametrize("rows", POSITIONS)
@pytest.mark.parametrize(("op", "method"), PLAIN_TORCH)
def test_no_method_of_plain_torch_mixes_devices(op: str, method: str, rows: str) -> None:
    for given in (True, False):
        for decays in (True, False):  # the option that adds a term: a decay, a gain, RoPE
            run(op, method, rows, given, decays)


def test_what_mixes_devices_would_show() -> None:
    x, mask = there(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="same device"):
        x.masked_fill(mask, 0.0)
    with pytest.raises(RuntimeError, match="same device"):
        torch.where(mask, x, 0.0)
