"""What the child processes of `efficiency.py` measure.

time    both models take turns at every length
count   the published counter: one process, the Transformer at all lengths, then SWH, and after
        each forward pass the process's peak so far
peak    what one call adds to the process of one model, at every length
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHModel, count_parameters, match_parameters
from spectral_window.lab.bench import PRECISION
from spectral_window.lab.bench.models import BARS, draw_ids, in_float64
from spectral_window.lab.bench.peaks import RESET, measure_peak, status
from spectral_window.lab.bench.timing import Timing, disqualified, relative_error
from spectral_window.lab.experiments.published import Published, attention_bytes
from spectral_window.lab.jobs import Row
from spectral_window.training.machine import (
    environment,
    keep_memory,
    matmul_precision,
    peak_memory,
)

MODELS = {"transformer": "Transformer", "swh": "SWH"}  # the order the paper measured them in
DOES_NOT_FIT = "does not fit"

Model = SWHModel | Published


def measure(task: Row) -> Iterator[Row]:
    """What the task asks for, a row for each thing measured."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    with matmul_precision(PRECISION, "cpu"):
        yield from {"time": _time, "count": _count, "peak": _peak}[task["task"]](task)


def _time(task: Row) -> Iterator[Row]:
    allocator = keep_memory()
    yield {"environment": environment("cpu", asked=PRECISION) | {"allocator": allocator}}
    timing = Timing(seconds=0.05 if task["quick"] else 2.0, always=tuple(MODELS))
    models: dict[str, Model] = {}
    for length, layers in task["lengths"]:
        if not models or layers != models["swh"].config.num_hidden_layers:
            models.clear()  # before the next are built
            gc.collect()
            models |= {name: build(task, name, layers) for name in MODELS}
            wrong = {name: why for name, model in models.items() if (why := check(model))}
        config = models["swh"].config
        timing.out = dict(wrong)
        if task["form"] == "published" and (why := too_large(config, length)):
            timing.out["transformer"] = why
        ids = draw_ids(config, 1, length)
        calls = {name: partial(hidden_states, model, ids) for name, model in models.items()}
        for row in timing.run(calls, form=task["form"], length=length, layers=layers):
            size = sum(p.numel() for p in models[row["contestant"]].parameters())
            spread = {key: row.pop(f"milliseconds_{key}", None) for key in ("p10", "p90")}
            row |= {key: value for key, value in spread.items() if value is not None}
            yield row | {"parameters": size}


def _count(task: Row) -> Iterator[Row]:
    for name in MODELS:
        model: Model | None = None
        for length, layers in task["sizes"][name]:
            model = model or build(task, name, layers)  # as many layers at every length
            hidden_states(model, draw_ids(model.config, 1, length))
            about = {"form": task["form"], "contestant": name, "length": length}
            yield about | {"peak_bytes": peak_memory("cpu"), "peak_status": "ok"}


def _peak(task: Row) -> Iterator[Row]:
    start = status("VmRSS") if RESET.exists() else 0
    model = build(task, task["contestant"], task["layers"])

    def prepare(length: int) -> Callable[[], Tensor]:
        return partial(hidden_states, model, draw_ids(model.config, 1, length))

    for length in task["lengths"]:
        about = {"form": task["form"], "contestant": task["contestant"], "length": length}
        if RESET.exists():
            peak = measure_peak(prepare, length, start) | {"peak_status": "ok"}
            yield about | peak | {"peak_layers": task["layers"]}
        else:
            why = "not here: the peak can be reset on Linux only"
            yield about | {"peak_bytes": None, "peak_status": why}


def build(task: Row, name: str, layers: int) -> Model:
    """The model of the task's form and shape, in evaluation mode. Well-posed, the Transformer's
    feed-forward layers are as wide as makes both equally large."""
    config = SWHConfig.preset("paper", size=task["shape"], num_hidden_layers=layers)
    if name == "transformer":
        size = count_parameters(config)
        config = SWHConfig.preset(
            "paper", size=task["shape"], num_hidden_layers=layers, mixer="attention"
        )
        if task["form"] == "posed":
            config = match_parameters(config, size)
    model = SWHModel(config).eval()
    return Published(model) if task["form"] == "published" else model


@torch.no_grad()
def hidden_states(model: Model, ids: Tensor) -> Tensor:
    """Token ids [B, T] -> [B, T, D]."""
    return model(input_ids=ids, use_cache=False).last_hidden_state


def check(model: Model) -> str | None:
    """Why `model` gets no time: its hidden states are not those of the same weights in float64 by
    the reference methods. None if they are."""
    ids = draw_ids(model.config, 2, 3 * model.config.window + 4)

    def error() -> float:
        exact: Any = in_float64(cast(Any, model.model if isinstance(model, Published) else model))
        return relative_error(hidden_states(model, ids), hidden_states(exact, ids))

    return disqualified(error, BARS[torch.float32])


def too_large(config: SWHConfig, length: int, free: int | None = None) -> str | None:
    """Why the published Transformer cannot run at `length`: its matrices need more than the `free`
    bytes (None: as there are now). None if it can."""
    free = psutil.virtual_memory().available if free is None else free
    needed = attention_bytes(cast(int, config.num_attention_heads), length)
    return f"{DOES_NOT_FIT}: needs {needed / 1e9:,.3g} GB" if needed > free else None
