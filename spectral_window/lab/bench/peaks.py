"""Peak memory, each call in a process of its own.

The process imports, builds what it needs, runs the same call at a small size (so that code and
libraries are loaded), draws its inputs, and only then is the kernel's high-water mark reset: the
peak is what one call adds, its output included, weights and inputs not. Freed memory is given back
as the system has it (large blocks at once). Linux only: elsewhere the mark cannot be reset, and
the rows say so.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spectral_window.errors import ResourceError
from spectral_window.lab.baselines.models import next_token
from spectral_window.lab.bench import DTYPES, PRECISION
from spectral_window.lab.bench.models import (
    TRAIN_LAYERS,
    build,
    draw_ids,
    shape,
    train_step,
)
from spectral_window.lab.bench.operators import (
    GIVEN,
    PASSES,
    draw_qkv,
    draw_spectral,
    spectral_calls,
    window_calls,
)
from spectral_window.lab.bench.timing import Call
from spectral_window.lab.jobs import Row, child_environment, rows_of
from spectral_window.training.machine import matmul_precision

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PREFILL_LAYERS = 2


def bench_memory(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by part, length and contestant: peak_bytes that one call adds, held_bytes before it
    (weights, inputs, loaded code); for operators also what is beyond their outputs, in bytes and
    as a multiple of the input u or q."""
    name = next(key for key, value in DTYPES.items() if value is dtype)
    return [row | _in_child(row, name, quick) for row in jobs(quick)]


def jobs(quick: bool) -> list[dict[str, Any]]:
    """What is measured."""
    forward, both = PASSES
    long = 256 if quick else 16_384
    rows: list[dict[str, Any]] = []
    for direction, names in (
        (forward, (GIVEN, "scan", "chunked", "the paper's FFT")),
        (both, ("scan", "chunked", "the paper's FFT")),
    ):
        rows += [_job("spectral", long, name, **{"pass": direction}) for name in names]
    names = ("ours", "naive chunks (the paper's)", "local-attention", "full causal attention")
    rows += [_job("window", long // 4, name, window=32, **{"pass": both}) for name in names]
    for name in ("SWH", "Llama"):
        rows += [
            _job("prefill", time, name, layers=PREFILL_LAYERS)
            for time in ((32, 64) if quick else (4096, 65_536))
        ]
    for name in ("SWH", "Llama"):
        rows.append(_job("train", 64 if quick else 4096, name, layers=TRAIN_LAYERS))
    return [rows[0], rows[-3], rows[-1]] if quick else rows


def _job(part: str, length: int, contestant: str, **more: Any) -> dict[str, Any]:
    return {"part": part, "length": length, "contestant": contestant, **more}


def _in_child(job: dict[str, Any], dtype: str, quick: bool) -> dict[str, Any]:
    if not RESET.exists():
        return {"status": "not here: the peak can be reset on Linux only"}
    task = job | {"dtype": dtype, "quick": quick}
    environment = child_environment(torch.get_num_threads())
    try:
        (row,) = rows_of(measure, task, environment)
    except ResourceError as error:
        return {"status": f"failed: {error}"}
    return {"status": "ok", **row}


def measure(job: Row) -> Iterator[Row]:
    """Measure one job in this process."""
    torch.manual_seed(0)
    start = status("VmRSS")
    parts = {"spectral": _operator, "window": _operator, "prefill": _prefill, "train": _train}
    with matmul_precision(PRECISION, "cpu"):
        prepare, given, output = parts[job["part"]](job, DTYPES[job["dtype"]])
        row = measure_peak(prepare, job["length"], start)
    if given:
        beyond = max(0, row["peak_bytes"] - output)
        row |= {"beyond_output_bytes": beyond, "inputs": round(beyond / given, 3)}
    yield row


def measure_peak(prepare: Callable[[int], Call], length: int, start: int) -> dict[str, Any]:
    """Peak of one call of `prepare(length)` in this process: peak_bytes that it adds, held_bytes
    before it beyond the `start` bytes that the process had. A call at 64 tokens goes before."""
    prepare(64)()
    call = prepare(length)
    _give_back()
    held = status("VmRSS") - start
    return {"peak_bytes": added(call), "held_bytes": held}


def added(call: Call) -> int:
    """Bytes that a call adds to this process at its peak. Linux only: see RESET."""
    _give_back()
    RESET.write_text("5")  # forget the high-water mark
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


Prepared = tuple[Callable[[int], Call], int, int]  # (size -> call, bytes of u or q, of the output)


def _operator(job: dict[str, Any], dtype: torch.dtype) -> Prepared:
    backward = job["pass"] != PASSES[0]

    def prepare(length: int) -> Call:
        if job["part"] == "spectral":
            calls = spectral_calls(*draw_spectral(length, dtype, backward), backward)
        else:
            calls = window_calls(draw_qkv(length, dtype, backward), job["window"], backward)
        return calls[job["contestant"]]

    given = draw_spectral(job["length"], dtype, False)[0].nbytes
    outputs = 0 if job["contestant"] == GIVEN else 1
    if backward:
        outputs += 1 if job["part"] == "spectral" else 3  # gradients of the inputs
    return prepare, given, outputs * given


def _prefill(job: dict[str, Any], dtype: torch.dtype) -> Prepared:
    config = shape(job["layers"], job["quick"])
    model = build(config, (job["contestant"],), dtype)[job["contestant"]]

    def prepare(length: int) -> Call:
        ids = draw_ids(config, 1, length)

        def call() -> None:
            with torch.no_grad():
                next_token(model, ids)

        return call

    return prepare, 0, 0


def _train(job: dict[str, Any], dtype: torch.dtype) -> Prepared:
    config = shape(job["layers"], job["quick"])
    model = build(config, (job["contestant"],), torch.float32)[job["contestant"]].train()

    def prepare(length: int) -> Call:
        ids = draw_ids(config, 1, length)
        return lambda: train_step(model, ids, dtype)

    return prepare, 0, 0


def _give_back() -> None:
    """Return what earlier calls freed, so that the measured call cannot live in it unseen."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def status(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
