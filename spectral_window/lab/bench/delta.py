"""What the memory costs: its operator (`memory_op`), and the layer with it (`memory_layer`).

    memory_op     ours, every other method of the table, and the bound: one float32 matrix product
                  of as many multiply-adds as the recurrence needs (three an entry of the state
                  for each token, three times as many with the backward pass). One token: the two
                  steps, and a plain copy of the state, which a step must read and write
    memory_layer  prefill, decode and training step of the same model with the paper's layer and
                  with the memory beside its window: of 1, 3, 6 and 12 heads, and as recommended

Queries and keys are of length 1, write gates sigmoids of N(0, 1), as in a layer. Before any time is
taken the operators are held to the float64 recurrence, and the models to the same weights in
float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_window.hf.model import SWHForCausalLM
from spectral_window.lab.baselines.models import next_token, remember
from spectral_window.lab.bench.models import (
    TRAIN_LAYERS,
    check,
    check_gradients,
    draw_ids,
    shape,
    train_step,
)
from spectral_window.lab.bench.operators import (
    BARS,
    CHANNELS,
    PASSES,
    TRUTH_LENGTH,
    Operator,
    call_once,
    gate,
    new_timing,
)
from spectral_window.lab.bench.roofline import multiply
from spectral_window.lab.bench.timing import Call, Timing
from spectral_window.nn.memory import recommended
from spectral_window.ops import delta_memory
from spectral_window.ops.methods import resolve, serving

LENGTHS, HEADS = (1024, 4096), (1, 6, 12)
STEP = "one token"
PRODUCT, COPY = "a product of as many multiply-adds", "a copy of the state"
LAYER_HEADS = (1, 3, 6, 12)
RECOMMENDED = "memory, recommended"
LAYER_TRAIN = ((1, 1024), (1, 4096))  # (B, T)
LAYER_PREFILL, LAYER_DECODE, CONTEXT = ((1024, 4), (4096, 2)), 12, 1000  # (T, layers); layers


# --------------------------------------------------------------------------------- the operator


def bench_memory_op(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by heads, length and pass, and of one token."""
    rows: list[dict[str, Any]] = []
    channels = 48 if quick else CHANNELS
    for heads in HEADS[:2] if quick else HEADS:
        wrong = _check_op(channels, heads, dtype)
        for length in (64, 100) if quick else LENGTHS:
            for direction in PASSES:
                timing = new_timing(quick, wrong)
                calls = calls_of(draw(channels, heads, length, dtype), direction != PASSES[0])
                rows += timing.run(calls, heads=heads, length=length, **{"pass": direction})
        with torch.no_grad():
            timed = new_timing(quick, wrong).run(
                steps(draw(channels, heads, 1, dtype)), heads=heads, length=1, **{"pass": STEP}
            )
        rows += timed
    return rows


def draw(channels: int, heads: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [1, T, H, D / H] in `dtype`, beta [1, T, H] float32, as a layer would have them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, channels // heads, generator=g) for _ in range(3))
    beta = torch.sigmoid(torch.randn(1, length, heads, generator=g))
    return *(x.to(dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)), beta


def methods(time: int) -> dict[str, Operator]:
    """ "ours", and every other method for `time` tokens that runs here, but the reference."""

    def by(method: str) -> Operator:
        return lambda *inputs: delta_memory(*inputs, method=method)[0]

    probe = torch.empty(1, time, 1, 2)
    with torch.no_grad():
        first = resolve("delta", "auto", probe).name
        others = [name for name in serving("delta", probe) if name not in (first, "reference")]
    return {"ours": by("auto"), **{f"ours, {name}": by(name) for name in others}}


def calls_of(inputs: tuple[Tensor, ...], backward: bool) -> dict[str, Call]:
    """The methods on these inputs, and the matrix product."""
    inputs = tuple(x.requires_grad_(backward) for x in inputs)
    gradient = torch.ones_like(inputs[2], requires_grad=False) if backward else None
    calls: dict[str, Call] = {
        name: partial(call_once, operator, inputs, gradient)
        for name, operator in methods(inputs[0].shape[1]).items()
    }
    _, time, heads, size = inputs[0].shape
    wide = 3 * size * (3 if backward else 1)
    calls[PRODUCT] = multiply([[(heads * size, wide)]], time, torch.float32)
    return calls


def steps(inputs: tuple[Tensor, ...]) -> dict[str, Call]:
    """One token after a state: "ours", the other step, and a copy of the state."""
    _, _, heads, size = inputs[0].shape
    state = torch.randn(1, heads, size, size)
    into = torch.empty_like(state)
    named = {
        name: operator for name, operator in methods(1).items() if name in ("ours", "ours, step")
    }
    calls: dict[str, Call] = {
        name: partial(
            delta_memory,
            *inputs,
            state=state,
            method="auto" if name == "ours" else "step",
        )
        for name in named
    }
    return calls | {COPY: lambda: into.copy_(state)}


def _check_op(channels: int, heads: int, dtype: torch.dtype) -> dict[str, str]:
    inputs = draw(channels, heads, TRUTH_LENGTH, dtype)
    truth = delta_memory(*(x.double() for x in inputs), method="reference")[0]
    wrong = gate(methods(TRUTH_LENGTH), inputs, truth, BARS[dtype])
    first = draw(channels, heads, 1, dtype)
    with torch.no_grad():
        one = delta_memory(*(x.double() for x in first), method="reference")[0]
        return wrong | gate(methods(1), first, one, BARS[dtype])


# ------------------------------------------------------------------------------------ the layer


def model_name(heads: int) -> str:
    """The name of a model with so many heads of memory."""
    return f"memory, {heads} head{'s' * (heads > 1)}"


def bench_memory_layer(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by part: ratios are to the paper's layer."""
    rows: list[dict[str, Any]] = []
    parts = ("train", _trains), ("prefill", _prefills), ("decode", _decodes)
    wrong: dict[str, str] = {}  # of gradients or logits: such a model takes no part any more
    for part, sized_calls in parts:
        timing = Timing(seconds=0.01 if quick else 10.0, fewest=3, most=40, longest=60.0, out=wrong)
        for calls, tags in sized_calls(dtype, quick, wrong):
            with torch.set_grad_enabled(part == "train"):
                rows += timing.run(calls, part=part, **tags)
    return rows


SizedCalls = Iterator[tuple[dict[str, Call], dict[str, int]]]


def models(layers: int, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """The paper's model, and the same with a memory: in evaluation mode."""
    layers_of: dict[str, dict[str, Any]] = {"SWH": {}}
    for heads in LAYER_HEADS[:1] if quick else LAYER_HEADS:
        layers_of[model_name(heads)] = {"mixer": "memory", "memory_heads": heads}
    layers_of[RECOMMENDED] = recommended(shape(layers, quick).hidden_size)
    built = {}
    for name, more in layers_of.items():
        torch.manual_seed(0)
        built[name] = nn.Module.to(SWHForCausalLM(shape(layers, quick, **more)), dtype).eval()
    return built


def _trains(dtype: torch.dtype, quick: bool, wrong: dict[str, str]) -> SizedCalls:
    built = models(TRAIN_LAYERS, torch.float32, quick)
    config = built["SWH"].config
    for name, model in built.items():
        if why := check_gradients(model, dtype):
            wrong[name] = why["SWH"]
        model.train()
    for batch, time in ((2, 32), (1, 64)) if quick else LAYER_TRAIN:
        ids = draw_ids(config, batch, time)
        calls: dict[str, Call] = {
            name: partial(train_step, model, ids, dtype) for name, model in built.items()
        }
        yield calls, {"batch": batch, "length": time, "layers": config.num_hidden_layers}


def _prefills(dtype: torch.dtype, quick: bool, wrong: dict[str, str]) -> SizedCalls:
    for time, layers in ((64, 3),) if quick else LAYER_PREFILL:
        built = models(layers, dtype, quick)
        for name, model in built.items():
            if why := check(model, dtype):
                wrong[name] = why["SWH"]
        ids = draw_ids(built["SWH"].config, 1, time)
        calls: dict[str, Call] = {
            name: partial(next_token, model, ids) for name, model in built.items()
        }
        yield calls, {"length": time, "layers": layers}


def _decodes(dtype: torch.dtype, quick: bool, _: dict[str, str]) -> SizedCalls:
    built = models(LAYER_DECODE, dtype, quick)
    token = draw_ids(built["SWH"].config, 1, 1)
    calls: dict[str, Call] = {
        name: partial(next_token, model, token, remember(model, CONTEXT)[0])
        for name, model in built.items()
    }
    yield calls, {"context": CONTEXT, "layers": LAYER_DECODE}
