"""One token of a layer's memory in a single compiled call, its short convolution in another.

For one token the work is so small that five calls (filter, normalisation, gates, recurrence, sum)
would cost more than the work itself. This call computes the same as `nn.memory` by those operators.
It is used where they would run compiled code: where `resolve` chooses "step_compiled" for the
recurrence, and no other method was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_window.ops.documents import Documents
from spectral_window.ops.methods import resolve
from spectral_window.ops.tracing import is_recorded, may_bypass

# how much of a value is written: sigmoid(x), tanh(max(x, 0)), 2 sigmoid(x)
WRITE_GATES = ("sigmoid", "closing", "reflecting")


class Parameters(NamedTuple):
    """Parameters of a memory.

    Attributes:
        lag: [D, L], the FIR filter that makes keys of queries.
        write_bias: [H].
        read_bias: [H].
        scale: [D].
        shortest: vectors shorter than this are divided by it and not by their length.
        write_gate: one of WRITE_GATES.
    """

    lag: Tensor
    write_bias: Tensor
    read_bias: Tensor
    scale: Tensor
    shortest: float
    write_gate: str = "sigmoid"


def convolves(
    methods: Mapping[str, str], inputs: Sequence[Tensor], weights: Tensor, before: Tensor | None
) -> bool:
    """Return whether `convolve` can be called.

    Args:
        methods: the methods asked for, by operator.
        inputs, weights, before: as for `convolve`; a state may be missing.
    """
    if is_recorded() or before is None:  # a graph must not depend on sizes
        return False
    q = inputs[0]
    if q.dim() != 3 or q.shape[1] != 1 or not q.numel() or methods.get("fir", "auto") != "auto":
        return False
    batch, _, channels = q.shape
    wide, taps = weights.shape
    if wide != 3 * channels or before.shape != (batch, taps - 1, wide):
        return False
    if any(x.shape != q.shape or x.dtype != q.dtype for x in inputs) or before.dtype != q.dtype:
        return False
    if weights.dtype != torch.float32 or not may_bypass(*inputs, weights, before):
        return False
    return resolve("fir", "auto", q, weights).name == "compiled"


def convolve(
    inputs: Sequence[Tensor], weights: Tensor, before: Tensor, documents: Documents | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve one token per row.

    Args:
        inputs: q, k and v, each [B, 1, D].
        weights: FIR filters of their channels, one after the other: [3 D, L] float32.
        before: their last values [B, L - 1, 3 D], oldest first.
        documents: documents and padding, or None.

    Returns:
        q, k and v [B, 1, D] (0 at padding), and their last values after the token.
    """
    from spectral_window.ops.compiled import memory_step

    positions = None if documents is None else documents.positions
    return memory_step.convolve(inputs, weights, before, positions)


def serves(
    methods: Mapping[str, str],
    inputs: tuple[Tensor, ...],
    state: tuple[Tensor, Tensor],
    own: Parameters,
) -> bool:
    """Return whether `step` can be called.

    Args:
        methods: the methods asked for, by operator.
        inputs, state, own: as for `step`.
    """
    if is_recorded():  # a graph must not depend on sizes
        return False
    q, (memory, queries), parameters = inputs[0], state, own[:4]
    if q.dim() != 3 or q.shape[1] != 1 or not q.numel() or methods.get("fir", "auto") != "auto":
        return False
    batch, _, channels = q.shape
    heads, taps = len(own.write_bias), own.lag.shape[-1]
    each = batch, 1, channels
    shapes = [x.shape for x in (*inputs, memory, queries, *parameters)]
    size = channels // heads
    if shapes != [
        *(each, each, each, (batch, 1, 2 * heads)),
        *((batch, heads, size, size), (batch, taps - 1, channels)),
        *((channels, taps), (heads,), (heads,), (channels,)),
    ]:
        return False
    one_dtype = all(x.dtype == q.dtype for x in (*inputs, queries))
    if not one_dtype or any(x.dtype != torch.float32 for x in (memory, *parameters)):
        return False
    method = methods.get("delta", "auto")
    chosen = resolve("delta", method, *inputs, *state, *parameters)
    return chosen.name == "step_compiled"


def step(
    inputs: tuple[Tensor, ...],
    state: tuple[Tensor, Tensor],
    own: Parameters,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Process one token per row.

    Args:
        inputs: q, v and the window's output, each [B, 1, D], and the logits of the gates
            [B, 1, 2 H].
        state: the memory [B, H, D / H, D / H] float32, and the last queries [B, L - 1, D], oldest
            first.
        own: the parameters.
        documents: documents and padding, or None.

    Returns:
        The sum of the window's and the memory's output [B, 1, D], and both parts of the state
        after the token.
    """
    from spectral_window.ops.compiled import memory_step

    positions = None if documents is None else documents.positions
    q, v, attended, gates = inputs
    gate = WRITE_GATES.index(own.write_gate)
    return memory_step.step(attended, q, v, gates, own[:4], own.shortest, gate, state, positions)
