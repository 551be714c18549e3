"""A training step on a GPU at the paper's shape: tokens per second at equal parameters.

A step is forward, backward and AdamW, in bfloat16 autocast over float32 weights. It runs

    as called     each kernel is launched from Python
    graph         the whole step is a CUDA graph
    compiled      layers and loss by torch.compile, then the whole step as a graph

Contestants are this package's models (SWH, the recommended layer with a memory, the Transformer by
fused attention), which share everything but the mixer; transformers' Llama; and, where the package
`fla` is installed, its gated DeltaNet, KDA and Mamba-2 with all of its fused kernels. `warm`
compiles a contestant in a process of its own: what it leaves in the compiler's cache makes the
measuring process start at once.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM, match_parameters
from spectral_window.lab.baselines.models import BASELINES, build_fla
from spectral_window.lab.bench.timing import Call, graphed, reason, time_on
from spectral_window.lab.jobs import Row
from spectral_window.nn.memory import recommended
from spectral_window.nn.mixers import set_methods

SHAPES = ((16, 1024), (4, 4096), (1, 16_384), (1, 65_536))
WAYS = ("as called", "graph", "compiled")


class Contestant(NamedTuple):
    """How a model is made (config -> model, on the CPU), and the ways in which it runs."""

    build: Callable[[SWHConfig], nn.Module]
    ways: tuple[str, ...]


def _ours(mixer: str) -> Callable[[SWHConfig], nn.Module]:
    def build(config: SWHConfig) -> nn.Module:
        if mixer == config.mixer:
            return SWHForCausalLM(config)
        other = config.papers_layer(mixer)
        if mixer == "memory":
            other = SWHConfig(**other.recorded() | recommended(config.hidden_size))
        return SWHForCausalLM(match_parameters(other, count(config)))

    return build


def count(config: SWHConfig) -> int:
    """Parameters of a model of this config."""
    with torch.device("meta"):
        return SWHForCausalLM(config).count_parameters()


def _plain(config: SWHConfig) -> nn.Module:
    model = SWHForCausalLM(config)
    set_methods(model, spectral="chunked", window="chunked")
    return model


def _llama(config: SWHConfig) -> nn.Module:
    inner = count(config) - 2 * config.vocab_size * config.hidden_size
    return BASELINES["Llama"].build(config, inner, torch.float32)


def _fla(name: str, **sizes: Any) -> Callable[[SWHConfig], nn.Module]:
    def build(config: SWHConfig) -> nn.Module:
        return build_fla(name, config, count(config), **sizes)

    return build


CONTESTANTS = {
    "SWH": Contestant(_ours("spectral_window"), WAYS),
    "SWH with memory": Contestant(_ours("memory"), WAYS),
    "Transformer": Contestant(_ours("attention"), WAYS),
    "Llama (transformers)": Contestant(_llama, ("compiled",)),
    "gated DeltaNet (fla)": Contestant(
        _fla("GatedDeltaNet", num_heads=6, head_dim=96), ("as called", "graph")
    ),
    "KDA (fla)": Contestant(_fla("KDA", num_heads=6, head_dim=128), ("as called", "graph")),
    "Mamba-2 (fla)": Contestant(_fla("Mamba2", num_heads=24, head_dim=64), ("as called", "graph")),
    "SWH, plain methods": Contestant(_plain, ("as called",)),
}


def config_for(quick: bool) -> SWHConfig:
    """The paper's shape, or a toy's."""
    if quick:
        return SWHConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return SWHConfig()


def prepared(
    name: str, way: str, ids: torch.Tensor, config: SWHConfig, pool: Any = None
) -> tuple[Call, nn.Module]:
    """A step of contestant `name` on `ids`, that has run at least once, and its model."""
    torch.manual_seed(0)
    device = ids.device
    model: Any = nn.Module.to(CONTESTANTS[name].build(config), device).train()
    if way == "compiled":
        compile_layers(model, device)
        if isinstance(model, SWHForCausalLM):
            model.compile_loss()
        else:
            model.loss_function = torch.compile(model.loss_function)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, fused=True, capturable=device.type == "cuda"
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()

    step()
    return (step if way == "as called" else graphed(step, device.type, pool=pool)), model


def compile_layers(model: Any, device: torch.device) -> None:
    """torch.compile for each layer, at fixed shapes; on a CPU the tracing alone, for a dry run."""
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend="eager" if device.type == "cpu" else "inductor")


def warm(name: str, device: torch.device, quick: bool, shapes: Any) -> Iterator[Row]:
    """Compile contestant `name` at `shapes`; a row with the seconds of each."""
    config = config_for(quick)
    for batch, length in shapes:
        begin = time.perf_counter()
        row: Row = {"contestant": name, "batch": batch, "length": length, "status": "ok"}
        try:
            ids = torch.randint(config.vocab_size, (batch, length), device=device)
            way = CONTESTANTS[name].ways[-1]
            prepared(name, "compiled" if way == "compiled" else "as called", ids, config)
        except Exception as error:
            row["status"] = reason(error)
        yield row | {"seconds": round(time.perf_counter() - begin, 1)}


def bench(
    device: torch.device,
    quick: bool,
    names: list[str],
    shapes: Any,
    ways: tuple[str, ...] = WAYS,
    seconds: float = math.inf,
) -> Iterator[Row]:
    """Rows of every shape, contestant and way; ratios are to the first contestant that runs.

    seconds: of all. What is not prepared after two thirds of them is left out, so that what is
    prepared is timed.
    """
    config, late = config_for(quick), time.perf_counter() + seconds * 2 / 3
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for batch, length in shapes:
        ids = torch.randint(config.vocab_size, (batch, length), device=device)
        calls: dict[str, Call] = {}
        flops: dict[str, int] = {}
        windows: dict[str, int] = {}
        sizes: dict[str, int] = {}
        peaks: dict[str, int] = {}
        models: list[nn.Module] = []
        for name in names:
            for way in CONTESTANTS[name].ways:
                if way not in ways or (way != "compiled" and length > 16_384):
                    continue
                if quick and way == "compiled" and name != names[0]:
                    continue  # a dry run compiles once
                key = f"{name}, {way}"
                if calls and time.perf_counter() > late:
                    left = {"contestant": key, "status": "left out: no time to prepare it"}
                    yield {"batch": batch, "length": length, **left}
                    continue
                try:
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    calls[key], model = prepared(name, way, ids, config, pool)
                    models.append(model)
                    if device.type == "cuda":
                        peaks[key] = torch.cuda.max_memory_allocated() - before
                    sizes[key] = sum(p.numel() for p in model.parameters())
                    if isinstance(model, SWHForCausalLM):
                        flops[key] = 3 * model.flops_per_token(length)
                        windows[key] = model.config.window
                except Exception as error:
                    calls.pop(key, None)
                    failed = {"contestant": key, "status": reason(error)}
                    yield {"batch": batch, "length": length, **failed}
        for row in time_on(
            device.type, calls, seconds=0.0, fewest=2 if quick else 7, batch=batch, length=length
        ):
            key = row["contestant"]
            if row["status"] == "ok":
                rate = 1000 * batch * length / row["milliseconds"]
                row["tokens_per_s"] = round(rate)
                row["parameters"] = sizes.get(key)
                row["peak_bytes_of_a_step"] = peaks.get(key)
                if key in flops:
                    row["TFLOP_per_s"] = float(f"{rate * flops[key] / 1e12:.4g}")
                    row["window"] = windows[key]
            yield row
        calls.clear()
        models.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
