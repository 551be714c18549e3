"""How fast is every path here, beside what a user would take instead, and beside the hardware?

    spectral, window            the operators         operators.py
    prefill, decode, train      whole models          models.py
    scaling                     time against T        models.py
    memory                      peaks, a process each peaks.py
    memory_op, memory_layer     the delta-rule memory delta.py
    roofline.py  what the hardware needs for the same products and bytes
    timing.py    the measurement: interleaved, median and spread of ratios
    targets.py   what is to be reached, computed from the rows
    figures.py   a picture of each bench

A fast wrong answer has no time: every contestant that computes our function is first held to the
float64 truth. What failed says why; nothing is filled in. Each number of threads runs in a fresh
process, since the libraries underneath read it once when they start. All contestants share the
process, the threads, the precision of float32 products and the setting of the memory allocator, and
all four stand in the results.

Results lie in a folder named by the processor, rows by (threads, dtype): a later run of one part
replaces that part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from spectral_window.errors import ResourceError, UserError, unknown
from spectral_window.files import write_json
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
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What is about shape and not about speed is measured once: with all threads, in float32.
ONCE = ("scaling", "memory")
PRECISION = "auto"  # of float32 products: the fastest that is float32 on this processor

Rows = list[dict[str, Any]]


def chosen(names: list[str]) -> list[str]:
    """The benches meant by `names`; none, or "all": all of them. Raises UserError otherwise."""
    for name in names:
        if name not in BENCHES and name != "all":
            raise unknown("bench", name, [*BENCHES, "all"])
    return list(BENCHES) if not names or "all" in names else list(dict.fromkeys(names))


def thread_counts() -> list[int]:
    """One, and as many as this process may use."""
    cores = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count()
    return sorted({1, cores or 1})


def measure(name: str, dtype: str, quick: bool = False) -> Rows:
    """Run the bench `name` in this process as torch is set now: its rows."""
    module = import_module(f"spectral_window.lab.bench.{BENCHES[name]}")
    bench: Callable[[torch.dtype, bool], Rows] = getattr(module, f"bench_{name}")
    with matmul_precision(PRECISION, "cpu"):
        return bench(DTYPES[dtype], quick)


def measure_in_child(name: str, threads: int, dtypes: list[str], quick: bool) -> Rows:
    """`measure` in a fresh process of `threads` threads: a group for each dtype, with its rows and
    what they were measured on. Raises ResourceError if the process fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "groups.json")
        job = {"name": name, "dtypes": dtypes, "quick": quick, "result": str(result)}
        command = [sys.executable, "-m", "spectral_window.lab.bench", json.dumps(job)]
        done = subprocess.run(command, env=child_environment(threads), check=False)
        if not result.exists():
            raise ResourceError(
                f"its process ended with {done.returncode} (bench {name}, {threads} threads): see "
                "above; -9 means out of memory"
            )
        return json.loads(result.read_text(encoding="utf-8"))


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a process that computes with `threads` threads."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}


def child(job: dict[str, Any]) -> None:
    """What the fresh process does."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    allocator = keep_memory()
    groups = []
    for dtype in job["dtypes"]:
        begin = time.perf_counter()
        rows = measure(job["name"], dtype, job["quick"])
        with matmul_precision(PRECISION, "cpu"):
            about = environment("cpu", asked=PRECISION, dtype=dtype)
        groups.append(
            {
                "threads": torch.get_num_threads(),
                "dtype": dtype,
                "quick": job["quick"],
                "seconds": round(time.perf_counter() - begin, 1),
                "environment": about | {"caches": _caches(), "allocator": allocator},
                "rows": rows,
            }
        )
    write_json(Path(job["result"]), groups)


def _caches() -> str:
    """The first core's caches and what shares them, as Linux tells: 'L1d 48K, L2 1024K, ...'."""
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / x).read_text().strip() for x in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found) or "unknown"


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
    """The groups of the bench `name` kept in `folder`; none if it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")).get("groups", []) if path.exists() else []


def keep(folder: Path, name: str, groups: Rows) -> None:
    """Write `groups`, beside those of other threads and dtypes that are there already.

    Raises UserError rather than replacing measurements by a trial.
    """
    before = load(folder, name)
    if any(not old["quick"] for old in before) and any(new["quick"] for new in groups):
        raise UserError(f"{folder / name}.json holds measurements: give --quick another --out")
    new = {(group["threads"], group["dtype"]) for group in groups}
    kept = [
        old
        for old in before
        if (old["threads"], old["dtype"]) not in new and old["quick"] == groups[0]["quick"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted([*kept, *groups], key=lambda g: (g["threads"], list(DTYPES).index(g["dtype"])))
    write_json(folder / f"{name}.json", {"bench": name, "groups": ordered})
