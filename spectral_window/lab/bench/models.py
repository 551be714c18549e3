"""Whole models against the baselines: `prefill`, `decode`, `train`, `scaling`.

All have the paper's shape (768 channels, 12 heads, 12 layers unless a row says otherwise), random
weights, the same number of parameters, and a vocabulary of 4096, so that embedding and head do not
dominate. Llama attends by PyTorch's fused kernel (SDPA); Mamba2 and RecurrentGemma run as
transformers runs them on a CPU, in plain torch, and are left out where they take too long.

    prefill   tokens in; the last token's logits and the cache out
    decode    one token more at a given context; caches of that size are filled with noise
    train     forward, loss and backward of 4096 tokens, no optimiser; bfloat16 is autocast over
              float32 weights
    scaling   the operators and a one-layer model against T, for the slope

Two bounds run beside them: the matrix products of the SWH model alone, each in the fastest way
found, and reading the bytes that a decode step of the SWH model must read. "SWH, plain methods" is
the same model by the FFT and plain chunks. Before any time is taken SWH's logits after a prefill
and after a few single tokens, and its gradients, are compared with the same weights in float64 by
the reference methods.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.lab.baselines.models import (
    BASELINES,
    build_baseline,
    count_inner,
    next_token,
    remember,
)
from spectral_window.lab.bench.operators import (
    draw_qkv,
    draw_spectral,
    spectral_calls,
    window_calls,
)
from spectral_window.lab.bench.roofline import layer_products, multiply, read
from spectral_window.lab.bench.timing import Call, Timing, disqualified, relative_error
from spectral_window.nn.mixers import set_methods

# (T, layers): all layers are equal, so long prompts take fewer of them, not other ones
PREFILL = ((512, 12), (1024, 12), (4096, 6), (16_384, 2))
CONTEXTS = (1_000, 8_000, 32_000)
FAR = 1_000_000
TRAIN, TRAIN_LAYERS = ((4, 1024), (1, 4096)), 2
SCALING = tuple(512 << k for k in range(10))
# Relative errors over all logits, or all gradients. In bfloat16 a dozen layers of rounding show.
BARS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
GEMMS, READING = "its matrix products alone", "reading its bytes"


def shape(layers: int, quick: bool = False, **more: Any) -> SWHConfig:
    """The model every other one is made equal to; `more` fields of it."""
    if quick:
        more |= {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "window": 8}
        return SWHConfig(num_hidden_layers=3, **more)
    return SWHConfig(vocab_size=4096, num_hidden_layers=layers, **more)


def build(config: SWHConfig, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The named models, equally large, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device("meta"):
        size = count_inner(SWHForCausalLM(config))
    return {name: build_baseline(name, config, size, dtype) for name in names}


def draw_ids(config: SWHConfig, batch: int, time: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, time), generator=g)


# -------------------------------------------------------------------------------------- prefill


@torch.no_grad()
def bench_prefill(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by length: SWH, its baselines, its plain methods, its matrix products."""
    rows: list[dict[str, Any]] = []
    timing = Timing(seconds=0.01 if quick else 2.0, longest=0.5, always=("SWH", "Llama", GEMMS))
    built: dict[int, dict[str, Any]] = {}
    for time, layers in ((64, 3), (96, 3)) if quick else PREFILL:
        config = shape(layers, quick)
        if layers not in built:
            built.clear()  # before the next is built: two sets of models are a lot of memory
            gc.collect()
            built[layers] = build(config, tuple(BASELINES), dtype)
            timing.out |= check(built[layers]["SWH"], dtype)
        models = built[layers]
        ids = draw_ids(config, 1, time)
        calls: dict[str, Call] = {
            name: partial(next_token, model, ids) for name, model in models.items()
        }
        calls["SWH, plain methods"] = partial(plainly, models["SWH"], ids)
        head = [[(config.hidden_size, config.vocab_size)]]
        calls[GEMMS] = _in_turn(
            multiply([layer_products(config)] * config.num_hidden_layers, time, dtype),
            multiply(head, 1, dtype),
        )
        rows += _with_sizes(timing.run(calls, length=time, layers=layers), models)
    return rows


def plainly(model: SWHForCausalLM, ids: Tensor) -> None:
    """The same prefill by the paper's FFT and chunks in plain torch."""
    set_methods(model, spectral="fft", window="chunked")
    try:
        next_token(model, ids)
    finally:
        set_methods(model)


def _in_turn(*calls: Call) -> Call:
    def call() -> None:
        for one in calls:
            one()

    return call


def _with_sizes(rows: list[dict[str, Any]], models: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = {name: count_inner(model) for name, model in models.items()}
    for row in rows:
        name = row["contestant"].split(",")[0]
        if name in sizes:
            row["parameters"] = sizes[name]
    return rows


# --------------------------------------------------------------------------------------- decode


@torch.no_grad()
def bench_decode(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by context. SWH at a million tokens is timed beside the shortest context, so its ratio
    is to SWH there."""
    config = shape(12, quick)
    models = build(config, ("SWH", "Llama", "Mamba2"), dtype)
    token = draw_ids(config, 1, 1)
    wrong = check(models["SWH"], dtype)
    if wrong:
        wrong["SWH, far"] = wrong["SWH"]
    weights = {name: _weights(model) for name, model in models.items()}
    must = weights["SWH"] + models["SWH"].state_bytes(FAR)
    reading = read(must)
    rows: list[dict[str, Any]] = []
    contexts = (100, 200) if quick else CONTEXTS
    for context in contexts:
        timing = Timing(seconds=0.01 if quick else 2.5, most=40, out=dict(wrong))
        calls: dict[str, Call] = {}
        size: dict[str, int] = {}
        far = {"SWH, far": ("SWH", FAR, False)} if context == contexts[0] else {}
        for name, (model, past, static) in {
            "SWH": ("SWH", context, False),
            **far,
            "Llama, DynamicCache": ("Llama", context, False),
            "Llama, StaticCache": ("Llama", context, True),
            "Mamba2": ("Mamba2", context, False),
        }.items():
            cache, state = remember(models[model], past, static=static)
            calls[name] = partial(next_token, models[model], token, cache)
            size[name] = state
        calls[READING] = reading
        timed = _with_sizes(timing.run(calls, context=context), models)
        for row in timed:
            name = row["contestant"]
            if name == READING:
                row["bytes"] = must
            else:
                row["state_bytes"] = size[name]
                row["bytes"] = weights[name.split(",")[0]] + size[name]
            if row["status"] == "ok":
                row["GB_per_s"] = round(row["bytes"] / row["milliseconds"] / 1e6, 2)
            if name == "SWH, far":
                row |= {"contestant": "SWH", "context": FAR, "against": context}
        rows += timed
    return rows


def _weights(model: Any) -> int:
    """Bytes a step reads: all parameters but the embedding, of which it reads one row."""
    total = sum(p.nbytes for p in model.parameters())
    return total - model.get_input_embeddings().weight.nbytes


# ---------------------------------------------------------------------------------------- train


def bench_train(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by batch and length; the matrix products are the forward pass's, a third of all."""
    config = shape(TRAIN_LAYERS, quick)
    models = build(config, ("SWH", "Llama"), torch.float32)
    timing = Timing(
        seconds=0.01 if quick else 3.0,
        longest=60.0,
        out=check_gradients(models["SWH"], dtype),
    )
    rows: list[dict[str, Any]] = []
    for model in models.values():
        train_step(model.train(), draw_ids(config, 1, 64), dtype)
    timing.warm |= {*models, GEMMS}
    for batch, time in ((2, 32), (1, 64)) if quick else TRAIN:
        ids = draw_ids(config, batch, time)
        calls: dict[str, Call] = {
            name: partial(train_step, model, ids, dtype) for name, model in models.items()
        }
        head = [(config.hidden_size, config.vocab_size)]
        layers = [layer_products(config)] * config.num_hidden_layers
        calls[GEMMS] = multiply([*layers, head], batch * time, dtype)
        timed = timing.run(calls, batch=batch, length=time, layers=config.num_hidden_layers)
        rows += _with_sizes(timed, models)
    return rows


def train_step(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    """Forward, loss and backward; bfloat16 by autocast."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


# -------------------------------------------------------------------------------------- scaling


def bench_scaling(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Time against T, and the slope of log time over log T past 4096."""
    lengths = (64, 128, 256) if quick else SCALING
    rows: list[dict[str, Any]] = []
    begin = lengths[0] if quick else 4096
    for part, sized_calls in (
        ("spectral", _spectral_sizes(lengths, dtype)),
        ("window", _window_sizes(lengths, dtype)),
        ("prefill", _prefill_sizes(lengths, dtype, quick)),
    ):
        timing = Timing(seconds=0.01 if quick else 0.5, fewest=1, longest=6.0)
        timing.always = ("SWH", "scan", "ours")
        timed = []
        with torch.no_grad():
            for time, calls in sized_calls:
                timed += timing.run(calls, part=part, length=time)
        rows += timed + _slopes(timed, part, begin)
    return rows


def _spectral_sizes(
    lengths: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, Call]]]:
    for time in lengths:
        calls = spectral_calls(*draw_spectral(time, dtype, False), False)
        yield time, {name: calls[name] for name in ("scan", "copy")}


def _window_sizes(
    lengths: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, Call]]]:
    for time in lengths:
        yield time, {"ours": window_calls(draw_qkv(time, dtype, False), 32, False)["ours"]}


def _prefill_sizes(
    lengths: tuple[int, ...], dtype: torch.dtype, quick: bool
) -> Iterator[tuple[int, dict[str, Call]]]:
    config = shape(1, quick)
    models = build(config, ("SWH", "Llama"), dtype)
    for time in lengths:
        ids = draw_ids(config, 1, time)
        yield time, {name: partial(next_token, model, ids) for name, model in models.items()}


def _slopes(rows: list[dict[str, Any]], part: str, begin: int) -> list[dict[str, Any]]:
    slopes = []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        points = [
            (row["length"], row["milliseconds"])
            for row in rows
            if row["contestant"] == name and row["status"] == "ok" and row["length"] >= begin
        ]
        if len(points) > 1:
            x, y = np.log(np.array(points)).T
            slope = float(np.polyfit(x, y, 1)[0])
            slopes.append(
                {"part": part, "contestant": name, "status": "ok", "slope": round(slope, 3)}
                | {"from": points[0][0], "to": points[-1][0]}
            )
    return slopes


# ------------------------------------------------------------------------------------- the gate


def in_float64(model: SWHForCausalLM) -> SWHForCausalLM:
    """The same weights in float64 by the reference methods. (A memory's would keep a state for each
    token in a backward pass; in float64 `chunked` is the recurrence to 1e-11.)"""
    truth = copy.deepcopy(model).double()
    set_methods(truth, spectral="reference", window="reference", delta="chunked")
    return truth


@torch.no_grad()
def check(model: SWHForCausalLM, dtype: torch.dtype) -> dict[str, str]:
    """Why SWH may not run: its logits after a prefill, or after ten single tokens, are wrong."""
    ids = draw_ids(model.config, 1, 110)

    def error() -> float:
        truth = in_float64(model)(ids, use_cache=False).logits
        logits, cache = next_token(model, ids[:, :100])
        off = relative_error(logits, truth[:, 99:100])
        for at in range(100, 110):
            logits, cache = next_token(model, ids[:, at : at + 1], cache)
        return max(off, relative_error(logits, truth[:, 109:]))

    why = disqualified(error, BARS[dtype])
    return {"SWH": why} if why else {}


def check_gradients(model: SWHForCausalLM, dtype: torch.dtype) -> dict[str, str]:
    """Why SWH may not train: its gradients, all parameters together, are wrong."""
    ids = draw_ids(model.config, 1, 100)

    def error() -> float:
        truth = in_float64(model)
        train_step(truth, ids, torch.float64)
        train_step(model, ids, dtype)
        return relative_error(_gradients(model), _gradients(truth))

    why = disqualified(error, BARS[dtype])
    model.zero_grad(set_to_none=True)
    return {"SWH": why} if why else {}


def _gradients(model: SWHForCausalLM) -> Tensor:
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)
