"""The window's GPU kernels with other tiles than theirs: which are fastest on this card?

    python -m spectral_window.lab.bench.tune_window --parts check,bench,tune

runs the parts of `gpu_window` and this one, without a limit of time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectral_window.lab.bench.gpu_window import (
    THETA,
    bench,
    check,
    draw,
    gradients,
    measured,
    relative,
)
from spectral_window.lab.bench.on_device import Row, clock, spread
from spectral_window.lab.bench.timing import reason

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
