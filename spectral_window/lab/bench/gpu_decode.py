"""A token on a GPU: the engine's step at the paper's shape, in bfloat16.

    as called     each kernel is launched from Python
    graph         a token of all rows is a CUDA graph (`ops.cuda_graphs`), as the engine runs it
    compiled      the layers by torch.compile, then a graph

The least time of a token is that of reading all weights once, which `of_weight_bandwidth` compares
with. States have a constant size, so the time does not depend on the context.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from spectral_window.generation.decoding import Sampling
from spectral_window.generation.engine import Engine
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.lab.bench.gpu_train import CONTESTANTS, compile_layers, config_for
from spectral_window.lab.bench.timing import reason
from spectral_window.lab.jobs import Row

GREEDY = Sampling(temperature=0)
NAMES = ("SWH", "SWH with memory", "Transformer")


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    """Rows {contestant, way, batch, context, milliseconds, ...}."""
    config = config_for(quick)
    contexts = (24,) if quick else (1024, 65_536)
    copied = _bandwidth(device, quick)
    for name in NAMES:
        for way in ("as called", "graph", "compiled"):
            for batch in (1, 4 if quick else 64):
                for context in contexts:
                    if context != contexts[0] and (batch > 1 or way == "compiled"):
                        continue
                    if quick and way == "compiled" and (name, batch) != (NAMES[0], 1):
                        continue  # a dry run compiles once
                    if name == "Transformer" and way != "as called":
                        continue  # its state grows: every token has another shape
                    row: Row = {
                        "contestant": name, "way": way, "batch": batch, "context": context,
                        "status": "ok",
                    }  # fmt: skip
                    try:
                        row |= _time(name, way, batch, context, config, device, quick, copied)
                    except Exception as error:
                        row["status"] = reason(error)
                    gc.collect()
                    yield row


def _time(
    name: str, way: str, batch: int, context: int, config: SWHConfig, device: torch.device,
    quick: bool, copied: float,
) -> Row:  # fmt: skip
    torch.manual_seed(0)
    model: Any = CONTESTANTS[name].build(config)
    assert isinstance(model, SWHForCausalLM)
    model = torch.nn.Module.to(model, device, torch.float32 if quick else torch.bfloat16).eval()
    if way == "compiled":
        compile_layers(model, device)
    engine = Engine(model)
    if way == "as called":
        engine._tokens = None
    first = engine.add(torch.randint(config.vocab_size, (context,)).tolist(), GREEDY, seed=0)
    while engine.prefill(first, 16_384):
        pass
    rows = [first, *(engine.copy(first) for _ in range(batch - 1))]
    times = []
    for _ in range(12 if quick else 60):
        begin = time.perf_counter()
        engine.step(rows)  # the logits come to the CPU: the device has ended
        times.append(time.perf_counter() - begin)
        for row, token in zip(rows, engine.sample(rows), strict=True):
            engine.extend(row, [token])
    spent = median(times[len(times) // 3 :])
    weights = sum(p.nbytes for p in model.parameters())
    weights -= model.model.embed_tokens.weight.nbytes
    return {
        "milliseconds": float(f"{1000 * spent:.4g}"),
        "tokens_per_s": round(batch / spent),
        "state_bytes": model.state_bytes(context, batch_size=batch),
        "of_weight_bandwidth": float(f"{weights / copied / spent:.3g}"),
    }


def _bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes per second that a copy moves (read and written)."""
    x = torch.ones(1 << (10 if quick else 28), device=device)
    y = torch.empty_like(x)
    spent = []
    for _ in range(5):
        y.copy_(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        y.copy_(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begin)
    return 2 * x.nbytes / median(spent)
