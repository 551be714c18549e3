"""`spectral-window bench --device cuda --minutes N`: what only a GPU can show, in bounded time.

    ceilings   what the card reaches: a device copy, a bfloat16 and a float32 matrix product
    spectral   the convolution: right at real sizes, then against a copy and the paper's FFT
    window     the attention: right at real sizes, then against fused full attention
    train      a training step at the paper's shape, against a Transformer

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
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from spectral_window.errors import ResourceError
from spectral_window.files import write_json
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM, match_parameters
from spectral_window.lab.bench import gpu_spectral, gpu_window
from spectral_window.lab.bench.timing import reason, time_on
from spectral_window.lab.jobs import Log, Row, rows_of
from spectral_window.nn.mixers import MIXERS, set_methods
from spectral_window.training.machine import environment

# part -> its share of the time; the function of that name below gives its rows
PARTS = {"ceilings": 0.08, "spectral": 0.34, "window": 0.34, "train": 0.24}
PLAIN = "SWH, plain methods"
GRACE = 60.0  # seconds beyond its share in which a part starts and ends, before it is killed


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
    """Add what a process of its own finds to `rows` and out/PART.json, row by row; "" or why it did
    not end well."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{part}.json"
    path.unlink(missing_ok=True)
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if dry_run else {})
    task = {"part": part, "seconds": seconds, "dry_run": dry_run}
    about: Row = {"part": part, "dry_run": dry_run}
    try:
        for row in rows_of(measure, task, environment, seconds=seconds + GRACE):
            if "environment" in row:
                about |= row
            else:
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
            write_json(path, about | {"rows": rows})
    except ResourceError as error:
        return str(error)
    # a row of a status alone says that time has run out
    return rows[-1]["status"] if rows and list(rows[-1]) == ["status"] else ""


def measure(task: Row) -> Iterator[Row]:
    """What the process of a part finds, until the time is up."""
    source: Callable[..., Iterator[Row]] = globals()[task["part"]]
    device = "cpu" if task["dry_run"] else "cuda"
    torch.set_float32_matmul_precision("highest")
    yield {"environment": environment(device, asked="highest")}
    begin, seconds = time.perf_counter(), task["seconds"]
    for row in source(torch.device(device), task["dry_run"], seconds):
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


def spectral(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    """The convolution, see `gpu_spectral`."""
    yield from gpu_spectral.check(0.4 * seconds / 60, device.type)
    yield from gpu_spectral.bench(0.6 * seconds / 60, device.type)


def window(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    """The window, see `gpu_window`."""
    yield from gpu_window.check(device.type, quick)
    yield from gpu_window.bench(device.type, quick)


def train(device: torch.device, quick: bool, seconds: float) -> Iterator[Row]:
    """A step (forward, backward, AdamW; bfloat16 autocast over float32 weights) at the paper's
    shape and equal parameters: SWH, its plain methods, a Transformer, and with a memory."""
    config = SWHConfig()
    if quick:
        config = SWHConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    for batch, length in ((2, 40),) if quick else ((16, 1024), (2, 8192)):
        calls: dict[str, Callable[[], object]] = {}
        peaks: dict[str, int] = {}
        flops: dict[str, int] = {}
        ids = torch.randint(config.vocab_size, (batch, length), device=device)
        for name, mixer in (
            *((known.label or mixer, mixer) for mixer, known in MIXERS.items()),
            (PLAIN, config.mixer),
        ):
            model = _model(config, mixer, device)
            if name == PLAIN:
                set_methods(model, spectral="chunked", window="chunked")
            calls[name] = _step(model, ids)
            flops[name] = 3 * model.flops_per_token(length)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                try:
                    calls[name]()
                    peaks[name] = torch.cuda.max_memory_allocated() - before
                except Exception as error:
                    print(f"{name}: {reason(error)}", file=sys.stderr)
        for row in time_on(
            device.type, calls, fewest=2 if quick else 5, batch=batch, length=length
        ):
            name = row["contestant"]
            if row["status"] == "ok":
                rate = 1000 * batch * length / row["milliseconds"]
                row["tokens_per_s"] = round(rate)
                row["TFLOP_per_s"] = float(f"{rate * flops[name] / 1e12:.4g}")
                row["peak_bytes_of_a_step"] = peaks.get(name)
            yield row
        calls.clear()


def _model(config: SWHConfig, mixer: str, device: torch.device) -> SWHForCausalLM:
    """A model of `mixer` with as many parameters as the paper's layer gives."""
    torch.manual_seed(0)
    if mixer != config.mixer:
        with torch.device("meta"):
            size = SWHForCausalLM(config).count_parameters()
        config = match_parameters(config.papers_layer(mixer), size)
    model = SWHForCausalLM(config).train()
    return nn.Module.to(model, device)


def _step(model: SWHForCausalLM, ids: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
