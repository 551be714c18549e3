"""Forward passes, measured: what the fresh processes of `efficiency.py` do.

    race    both contestants take turns at every length
    count   the published counter: one process, the Transformer at all lengths, then SWH, and after
            each pass the process's peak so far
    peak    what one call adds to the process of one contestant, at every length

A job comes as JSON, the only argument; what is found goes to stdout, a line of JSON each.
"""

from __future__ import annotations

import gc
import json
import os
import sys
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
from spectral_window.lab.bench.timing import Race, disqualified, relative_error
from spectral_window.lab.experiments.published import Published, attention_bytes
from spectral_window.training.machine import (
    environment,
    keep_memory,
    matmul_precision,
    peak_memory,
)

CONTESTANTS = {"transformer": "Transformer", "swh": "SWH"}  # the order the paper measured them in
DOES_NOT_FIT = "does not fit"

Job = dict[str, Any]
Row = dict[str, Any]
Model = SWHModel | Published


def main(job: Job) -> None:
    """Do one job in this process: a line of JSON on stdout for each thing found."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    with matmul_precision(PRECISION, "cpu"):
        for found in {"race": _race, "count": _count, "peak": _peak}[job["task"]](job):
            print(json.dumps(found), flush=True)


def _race(job: Job) -> Iterator[Row]:
    allocator = keep_memory()
    yield {"environment": environment("cpu", asked=PRECISION) | {"allocator": allocator}}
    race = Race(seconds=0.05 if job["quick"] else 2.0, always=tuple(CONTESTANTS))
    models: dict[str, Model] = {}
    for length, layers in job["lengths"]:
        if not models or layers != models["swh"].config.num_hidden_layers:
            models.clear()  # before the next are built
            gc.collect()
            models |= {name: build(job, name, layers) for name in CONTESTANTS}
            wrong = {name: why for name, model in models.items() if (why := check(model))}
        config = models["swh"].config
        race.out = dict(wrong)
        if job["form"] == "published" and (why := too_large(config, length)):
            race.out["transformer"] = why
        ids = draw_ids(config, 1, length)
        lineup = {name: partial(hidden_states, model, ids) for name, model in models.items()}
        for row in race.run(lineup, form=job["form"], length=length, layers=layers):
            size = sum(p.numel() for p in models[row["contestant"]].parameters())
            spread = {key: row.pop(f"milliseconds_{key}", None) for key in ("p10", "p90")}
            row |= {key: value for key, value in spread.items() if value is not None}
            yield row | {"parameters": size}


def _count(job: Job) -> Iterator[Row]:
    for contestant in CONTESTANTS:
        model: Model | None = None
        for length, layers in job["passes"][contestant]:
            model = model or build(job, contestant, layers)  # as many layers at every length
            hidden_states(model, draw_ids(model.config, 1, length))
            about = {"form": job["form"], "contestant": contestant, "length": length}
            yield about | {"peak_bytes": peak_memory("cpu"), "peak_status": "ok"}


def _peak(job: Job) -> Iterator[Row]:
    start = status("VmRSS") if RESET.exists() else 0
    model = build(job, job["contestant"], job["layers"])

    def prepare(length: int) -> Callable[[], Tensor]:
        return partial(hidden_states, model, draw_ids(model.config, 1, length))

    for length in job["lengths"]:
        about = {"form": job["form"], "contestant": job["contestant"], "length": length}
        if RESET.exists():
            found = measure_peak(prepare, length, start) | {"peak_status": "ok"}
            yield about | found | {"peak_layers": job["layers"]}
        else:
            why = "not here: the peak can be reset on Linux only"
            yield about | {"peak_bytes": None, "peak_status": why}


def build(job: Job, contestant: str, layers: int) -> Model:
    """The contestant of the job's form and shape, in evaluation mode. Well-posed, the Transformer's
    feed-forward layers are as wide as makes both equally large."""
    config = SWHConfig.preset("paper", size=job["shape"], num_hidden_layers=layers)
    if contestant == "transformer":
        size = count_parameters(config)
        config = SWHConfig.preset(
            "paper", size=job["shape"], num_hidden_layers=layers, mixer="attention"
        )
        if job["form"] == "posed":
            config = match_parameters(config, size)
    model = SWHModel(config).eval()
    return Published(model) if job["form"] == "published" else model


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
    needed = attention_bytes(config.num_attention_heads, length)
    return f"{DOES_NOT_FIT}: needs {needed / 1e9:,.3g} GB" if needed > free else None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
