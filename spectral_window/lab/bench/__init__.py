"""How fast is every path here, compared with its alternatives and with what the hardware allows?

    spectral, window            the operators         operators.py
    prefill, decode, train      whole models          models.py
    scaling                     time against T        models.py
    memory                      peaks, a process each peaks.py
    memory_op, memory_layer     the delta-rule memory delta.py
    serve                       many texts at once    serve.py
    data                        text to tokens        data.py
    sharded                     several processes     sharded.py
    roofline.py  what the hardware needs for the same products and bytes
    gpu_roofline.py  what a GPU must move and compute: counted, not measured
    timing.py    the measurement: interleaved, median and spread of ratios
    targets.py   what is to be reached, computed from the rows
    figures.py   a picture of each bench

Numbers come before time: everything that computes our function is first compared with float64. A
row that failed has the reason; nothing is filled in. Each number of threads runs in a fresh
process, since the libraries underneath read it once when they start. All of them share the
process, the threads, the precision of float32 products and the setting of the memory allocator, and
all four stand in the results.

Results lie in a folder named by the processor, rows by (threads, dtype): a later run of one part
replaces that part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spectral_window.errors import ResourceError, unknown
from spectral_window.lab import results
from spectral_window.lab.jobs import Row, child_environment, rows_of
from spectral_window.training.machine import (
    environment,
    folder_name,
    keep_memory,
    matmul_precision,
    processor,
)

BENCHES = {
    "spectral": "operators",
    "window": "operators",
    "prefill": "models",
    "decode": "models",
    "train": "models",
    "scaling": "models",
    "memory": "peaks",
    "memory_op": "delta",
    "memory_layer": "delta",
    "serve": "serve",
    "data": "data",
    "sharded": "sharded",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What is about shape and not about speed, or has processes of its own, is measured once: with all
# threads, in float32.
ONCE = ("scaling", "memory", "data", "sharded")
PRECISION = "auto"  # of float32 products: the fastest that is float32 on this processor

Rows = list[dict[str, Any]]


def chosen(names: list[str]) -> list[str]:
    """The benches meant by `names`; none, or "all": all of them. Raises UserError otherwise."""
    for name in names:
        if name not in BENCHES and name != "all":
            raise unknown("bench", name, [*BENCHES, "all"])
    return list(BENCHES) if not names or "all" in names else list(dict.fromkeys(names))


def measure(name: str, dtype: str, quick: bool = False) -> Rows:
    """Run the bench `name` in this process as torch is set now: its rows."""
    module = import_module(f"spectral_window.lab.bench.{BENCHES[name]}")
    bench: Callable[[torch.dtype, bool], Rows] = getattr(module, f"bench_{name}")
    with matmul_precision(PRECISION, "cpu"):
        return bench(DTYPES[dtype], quick)


def measure_in_child(name: str, threads: int, dtypes: list[str], quick: bool) -> Rows:
    """`measure` in a fresh process of `threads` threads: a group for each dtype, with its rows and
    what they were measured on. Raises ResourceError if the process fails."""
    task = {"name": name, "dtypes": dtypes, "quick": quick}
    try:
        return list(rows_of(measure_groups, task, child_environment(threads)))
    except ResourceError as error:
        raise ResourceError(f"{error} (bench {name}, {threads} threads)") from error


def measure_groups(task: Row) -> Iterator[Row]:
    """What the fresh process finds: a group for each dtype."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    allocator = keep_memory()
    for dtype in task["dtypes"]:
        begin = time.perf_counter()
        rows = measure(task["name"], dtype, task["quick"])
        with matmul_precision(PRECISION, "cpu"):
            about = environment("cpu", asked=PRECISION, dtype=dtype)
        yield {
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "quick": task["quick"],
            "seconds": round(time.perf_counter() - begin, 1),
            "environment": about | {"caches": _caches(), "allocator": allocator},
            "rows": rows,
        }


def _caches() -> str:
    """The first core's caches and what shares them, from Linux: 'L1d 48K, L2 1024K, ...'."""
    caches = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / x).read_text().strip() for x in ("level", "type", "size"))
        if kind != "Instruction":
            caches.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(caches) or "unknown"


def header(group: dict[str, Any]) -> str:
    """What a group was measured on, in two lines."""
    about = group["environment"]
    threads = group["threads"]
    return (
        f"{about['processor']}, {threads} thread{'s' * (threads > 1)}, {group['dtype']}, caches "
        f"{about['caches']}, torch {about['torch']}, transformers {about['transformers']}\n"
        f"matmul_precision {about['matmul_precision']}, relative error of a float32 product "
        f"{about['matmul_error']:.1e}; {about['allocator']}"
        + ("; QUICK: a trial, not a measurement" if group["quick"] else "")
    )


# ------------------------------------------------------------------------------- results on disk


def place(out: Path) -> Path:
    """The folder in `out` for what is measured here: speeds hold for one processor."""
    return out / folder_name(processor())


def load(folder: Path, name: str) -> Rows:
    """The groups of the bench `name` in `folder`; none if it was not run."""
    return (results.load(folder, name, "groups") or {"groups": []})["groups"]


def save(folder: Path, name: str, groups: Rows) -> None:
    """Write `groups`, beside those of other threads and dtypes that are there already.

    Raises UserError rather than replace measurements by a trial.
    """
    new = {(group["threads"], group["dtype"]) for group in groups}
    others = [
        old
        for old in load(folder, name)
        if (old["threads"], old["dtype"]) not in new and old["quick"] == groups[0]["quick"]
    ]
    ordered = sorted(
        [*others, *groups], key=lambda g: (g["threads"], list(DTYPES).index(g["dtype"]))
    )
    results.save(folder, name, {"bench": name, "groups": ordered})
