"""`spectral-window bench --device cuda --minutes N`: what only a GPU can show, in bounded time.

    check      every operator's kernels at real sizes, against float64: the memory first and alone,
               by one thread; then its calls by several threads; then the others at the same time
    ceilings   what the card reaches: a device copy, a bfloat16 and a float32 matrix product
    spectral   the convolution, against a copy and the paper's FFT
    window     the attention, against FlexAttention and fused full attention
    delta      the memory, against plain torch and the package fla
    decode     a token of the engine at the paper's shape
    train      a training step at the paper's shape, against Transformers and fla's models

Each part is a process of its own with its share of the time, checks come before times, and what a
part has found is written as it goes: a part that fails or is stopped keeps its rows, and the row of
what failed says why. `dry_run` walks every part at toy sizes on a CPU, where Triton's interpreter
stands in for the card; it shows the way, and its numbers mean nothing.

Times are taken as in `timing.py`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from spectral_window.errors import ResourceError
from spectral_window.files import write_json
from spectral_window.lab.bench import gpu_decode, gpu_delta, gpu_spectral, gpu_train, gpu_window
from spectral_window.lab.bench.timing import time_on
from spectral_window.lab.jobs import Log, Row, rows_of
from spectral_window.training.machine import environment

# part -> its share of the time; the function of that name below gives its rows
PARTS = {
    "check": 0.3,
    "ceilings": 0.05,
    "spectral": 0.1,
    "window": 0.1,
    "delta": 0.1,
    "decode": 0.15,
    "train": 0.2,
}
# Processes of the checks, and their shares of that time; those of a line run at the same time. On
# an H100 the memory's calls by four threads ended with an illegal access whose cause is not known:
# what comes first is the answer that is missing, and a process of its own spoils no other.
CHECKS = (
    (("delta",), 0.35),
    (("threads",), 0.15),
    (("spectral", "window"), 0.5),
)
GRACE = 60.0  # seconds beyond its share in which a part starts and ends, before it is killed
AT_ONCE = 4  # contestants that compile at the same time


def run(
    out: Path,
    *,
    minutes: float,
    parts: list[str] | None = None,
    dry_run: bool = False,
    log: Log = print,
) -> list[str]:
    """Measure `parts` (default: all) in about `minutes`, into out/PART.json; returns the parts that
    did not come to their end, each with why."""
    unfinished = []
    for part in parts or PARTS:
        begin = time.perf_counter()
        allowed = 60 * minutes * PARTS[part] / sum(PARTS[p] for p in parts or PARTS)
        rows: list[Row] = []
        why = _measure_part(part, rows, out, allowed, dry_run)
        if why:
            unfinished.append(f"{part}: {why}")
        log(f"{part}: {len(rows)} rows, {time.perf_counter() - begin:.0f} s{', ' * bool(why)}{why}")
    return unfinished


def _measure_part(part: str, rows: list[Row], out: Path, seconds: float, dry_run: bool) -> str:
    """Add what processes of their own find to `rows` and out/PART.json, row by row; "" or why it
    did not end well."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{part}.json"
    path.unlink(missing_ok=True)
    about: Row = {"part": part, "dry_run": dry_run}
    lock = threading.Lock()

    def measure_one(task: Row) -> str:
        begin = time.perf_counter()
        last: Row = {}
        limit = task["seconds"] + GRACE
        try:
            for row in rows_of(measure, task, _environment(dry_run), seconds=limit):
                with lock:
                    if "environment" in row:
                        about.update(row)
                    else:
                        last = {"section": task["name"], **row} if part == "check" else row
                        rows.append(last)
                        print(json.dumps(last), file=sys.stderr, flush=True)
                    about["seconds"] = round(time.perf_counter() - begin, 1)
                    write_json(path, about | {"rows": rows})
        except ResourceError as error:
            return str(error)
        # a row of a status alone says that time has run out
        return last["status"] if set(last) - {"section"} == {"status"} else ""

    groups = [([f"check_{name}" for name in names], share) for names, share in CHECKS]
    if part == "train":
        _warm(seconds, dry_run)
    reasons: list[str] = []
    for names, share in groups if part == "check" else [([part], 1.0)]:
        tasks = [{"name": n, "seconds": share * seconds, "dry_run": dry_run} for n in names]
        with ThreadPoolExecutor(len(tasks)) as threads:
            reasons += threads.map(measure_one, tasks)
    return "; ".join(why for why in reasons if why)


def _environment(dry_run: bool) -> dict[str, str]:
    return dict(os.environ) | ({"TRITON_INTERPRET": "1"} if dry_run else {})


def _warm(seconds: float, dry_run: bool) -> None:
    """Let every contestant of `train` compile in a process of its own, several at a time."""

    def compile_one(name: str) -> None:
        task: Row = {"name": "warm", "contestant": name, "seconds": seconds, "dry_run": dry_run}
        try:
            for row in rows_of(measure, task, _environment(dry_run), seconds=seconds + GRACE):
                if "environment" not in row:
                    print(json.dumps({"warm": row}), file=sys.stderr, flush=True)
        except ResourceError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(compile_one, [] if dry_run else gpu_train.CONTESTANTS))


def measure(task: Row) -> Iterator[Row]:
    """What the process of a part finds, until the time is up."""
    source: Callable[..., Iterator[Row]] = globals()[task["name"]]
    device = "cpu" if task["dry_run"] else "cuda"
    torch.set_float32_matmul_precision("highest")
    yield {"environment": environment(device, asked="highest")}
    begin, seconds = time.perf_counter(), task["seconds"]
    more = {"contestant": task["contestant"]} if "contestant" in task else {}
    for row in source(torch.device(device), task["dry_run"], seconds, **more):
        yield row
        if time.perf_counter() - begin > seconds:
            yield {"status": f"out of time after {seconds:.0f} s: the rest was not measured"}
            return


# ---------------------------------------------------------------------------------- parts


def ceilings(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    """What the card reaches: GB/s of a copy (read and written), TFLOP/s of products."""
    x = torch.randn(1 << (10 if quick else 28), device=device)  # 1 GiB
    y = torch.empty_like(x)
    (row,) = time_on(device.type, {"copy": partial(y.copy_, x)})
    if row["status"] == "ok":
        row["GB_per_s"] = float(f"{2 * x.nbytes / row['milliseconds'] / 1e6:.4g}")
    yield row
    size = 32 if quick else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        (row,) = time_on(device.type, {name: partial(torch.mm, a, b)})
        if row["status"] == "ok":
            row["TFLOP_per_s"] = float(f"{2 * size**3 / row['milliseconds'] / 1e9:.4g}")
        yield row


def check_delta(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_delta.check(device.type, quick)


def check_threads(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_delta.check_threads(device.type, quick)


def check_spectral(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_spectral.check(seconds / 60, device.type)


def check_window(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_window.check(device.type, quick)


def spectral(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_spectral.bench(seconds / 60, device.type)


def window(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_window.bench(device.type, quick)


def delta(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_delta.bench(device.type, quick)


def decode(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    yield from gpu_decode.bench(device, quick)


def train(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    shapes = ((2, 40),) if quick else gpu_train.SHAPES
    names = list(gpu_train.CONTESTANTS)
    yield from gpu_train.bench(device, quick, names, shapes, seconds=seconds)


def warm(device: torch.device, quick: bool, seconds: float, contestant: str) -> Iterator[Row]:
    yield from gpu_train.warm(contestant, device, quick, gpu_train.SHAPES)
