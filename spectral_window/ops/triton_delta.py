"""The delta-rule memory on a GPU: chunks of 64 tokens in parallel, and a scan over chunks.

With the notation of `chunked_delta`, what the C tokens of a chunk write at their keys is

    U = (I + A)^-1 diag(beta) (V - diag(e^G) K S)

for the state S before the chunk. Forwards, `prepare` inverts I + A of all chunks in parallel,
`scan` runs blocks of the state's columns (which share nothing) through the chunks and stores S and
U, and `outputs` reads, again in parallel. q, k and v are operands of products as they were given,
never scaled and rounded before: so the differences that matter are taken in float32.

Backwards, `scan` runs again (between the passes only the inverses are kept, one number per token
and token of its chunk), `inflow` brings the gradient from the outputs to U and S, `retreat` runs
that of S from the last chunk to the first, and `gradients` computes the rest in parallel.

Chunks are those of the row and may hold several documents, and nothing is planned on the CPU: a
call has fixed shapes, does not wait for the device and can be captured in a CUDA graph. Sums have a
fixed order, so every call gives the same bits.

Precision. State, inverses and sums are float32. Products of 16-bit inputs round their operands to
the inputs' dtype, except those with the inverse, whose terms cancel: they are TF32 products. Those
of float32 inputs are TF32 products too, three for one under
`torch.set_float32_matmul_precision("highest")`, which are about as exact as float32. Where there
are no such products (AMD, and NVIDIA before Ampere) they are float32 products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectral_window.ops import triton_delta_gradients as backwards
from spectral_window.ops import triton_delta_kernels as forwards
from spectral_window.ops.chunked_delta import differentiate_again
from spectral_window.ops.operators import operator
from spectral_window.ops.triton_launch import launching

CHUNK = 64
ENOUGH = 96  # programs of a scan that keep a large GPU busy
KEY_BLOCKS = (64, 32)  # rows of a tile of the state, for K > 32


class Tiles(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        keys: rows of K per tile.
        columns: columns of V per tile.
        warps: warps per program.
        stages: loads in flight.
    """

    keys: int
    columns: int
    warps: int
    stages: int


def tiles(kernel: str, rows: int, key_dim: int, value_dim: int, wide: bool) -> Tiles:
    """Return the tiles of a kernel; a function of shapes only, as bits depend on it.

    Tests check that no choice spills registers.

    Args:
        kernel: a name in `triton_delta_kernels` or `triton_delta_gradients`.
        rows: B times H.
        key_dim: K.
        value_dim: V.
        wide: whether the inputs are float32.
    """
    columns = min(64, max(16, triton.next_power_of_2(value_dim)))
    keys = key_block(key_dim)
    if kernel in ("scan", "retreat", "inflow") and key_dim > 32:
        keys = 64  # rows of a product, of which tensor cores of Hopper take no fewer
    if kernel in ("scan", "retreat"):
        columns = min(columns, 32)
        few = rows * -(-value_dim // columns) < ENOUGH
        if columns > 16 and (few or (wide and key_dim > 128)):
            columns = 16
        ahead = not wide or (kernel == "scan" and key_dim <= 128)  # what registers allow
        return Tiles(keys, columns, 4, 2 if ahead else 1)
    if kernel == "gradients":
        return Tiles(min(keys, 32), min(columns, 32), 8, 1) if wide else Tiles(keys, columns, 8, 1)
    return Tiles(keys, columns, 8 if wide and kernel != "prepare" else 4, 1)


def key_block(key_dim: int) -> int:
    """Return the rows of a tile of the state: those that pad K least, and the largest of them."""
    if key_dim <= 32:
        return max(16, triton.next_power_of_2(key_dim))
    return min(KEY_BLOCKS, key=lambda block: triton.cdiv(key_dim, block) * block)


def products(x: Tensor) -> tuple[str, str, str]:
    """Return how tl.dot multiplies float32 for inputs like x: all products, those with the
    inverse, and those that make it."""
    device = x.device
    if device.type != "cuda" or torch.version.hip is not None:
        return "ieee", "ieee", "ieee"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "ieee", "ieee", "ieee"
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3", "tf32x3", "tf32x3"
    return "tf32", "tf32", "tf32x3" if x.dtype == torch.float16 else "tf32"


class _Call:
    """One call's tensors and launches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor | None,
        state: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        self.q, self.k, self.v, self.beta = (x.contiguous() for x in (q, k, v, beta))
        self.decay = None if decay is None else decay.contiguous()
        self.state = None if state is None else state.contiguous()
        self.positions = None if positions is None else positions.contiguous()
        self.batch, self.time, self.heads, self.key = q.shape
        self.value = v.shape[3]
        self.chunks = -(-self.time // CHUNK)
        self.gated = decay is not None or positions is not None
        self.docs = positions is not None
        self.product, self.solve, self.invert = products(q)
        self.sizes = {"H": self.heads, "K": self.key, "C": CHUNK}

    def per_chunk(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An empty buffer [B, H, chunks, *shape]."""
        return self.q.new_empty(self.batch, self.heads, self.chunks, *shape, dtype=dtype)

    def launch(self, kernel: Any, *tensors: Tensor | None, across: bool, **more: Any) -> None:
        """Launch a program for each row, head and block of columns; unless `across` all chunks, a
        program for each chunk."""
        name, rows = kernel.fn.__name__, self.batch * self.heads
        cut = tiles(name, rows, self.key, self.value, self.q.dtype == torch.float32)
        if name != "gradients":
            programs = rows * -(-self.value // cut.columns)
        else:
            programs = rows
        kernel[(programs if across else programs * self.chunks,)](
            *tensors,
            self.time,
            self.chunks,
            V=self.value,
            KB=cut.keys,
            VB=cut.columns,
            GATED=self.gated,
            DOCS=self.docs,
            PRECISION=self.product,
            **self.sizes,
            **more,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )

    def prepare(self) -> tuple[Tensor, Tensor | None]:
        """The inverses, and the gates if there are any."""
        solved = self.per_chunk(CHUNK, CHUNK, dtype=torch.float32)
        gates = None
        if self.gated:
            gates = self.per_chunk(forwards.GATES.value, CHUNK, dtype=torch.float32)
        cut = tiles("prepare", 0, self.key, self.value, self.q.dtype == torch.float32)
        forwards.prepare[(self.batch * self.heads * self.chunks,)](
            self.k,
            self.beta,
            self.decay,
            self.positions,
            solved,
            gates,
            self.time,
            self.chunks,
            DECAY=self.decay is not None,
            DOCS=self.docs,
            PRECISION=self.product,
            SOLVE=self.invert,
            KB=cut.keys,
            **self.sizes,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        return solved, gates

    def scan(self, solved: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The states before all chunks, the writes, and the final state."""
        states = self.per_chunk(self.key, self.value, dtype=self.q.dtype)
        writes = self.per_chunk(CHUNK, self.value, dtype=self.q.dtype)
        shape = self.batch, self.heads, self.key, self.value
        final = self.q.new_empty(shape, dtype=torch.float32)
        self.launch(
            forwards.scan,
            *(self.k, self.v, self.beta, self.positions, solved, gates, self.state),
            *(states, writes, final),
            across=True,
            GIVEN=self.state is not None,
            SOLVE=self.solve,
        )
        return states, writes, final


# ---------------------------------------------------------------- operators


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence; the arguments are those of `memory`, with beta and decay [B, T, H].

    Returns:
        out [B, T, H, V], the final state [B, H, K, V], the inverses of the chunks [B, H, chunks, C,
        C], and their gates [B, H, chunks, 5, C] (empty where there are none).
    """
    with launching(q):
        call = _Call(q, k, v, beta, decay, state, positions)
        solved, gates = call.prepare()
        states, writes, final = call.scan(solved, gates)
        out = call.v.new_empty(v.shape)
        tensors = (call.q, call.k, call.positions, gates, states, writes, out)
        call.launch(forwards.outputs, *tensors, across=False)
    return out, final, solved, solved.new_empty(0) if gates is None else gates


def _fake(q, k, v, beta, decay, state, positions):
    batch, time, heads, key = q.shape
    chunks = -(-time // CHUNK)
    final = q.new_empty((batch, heads, key, v.shape[3]), dtype=torch.float32)
    solved = q.new_empty((batch, heads, chunks, CHUNK, CHUNK), dtype=torch.float32)
    shape: tuple[int, ...] = (0,)
    if decay is not None or positions is not None:
        shape = (batch, heads, chunks, forwards.GATES.value, CHUNK)
    return v.new_empty(v.shape), final, solved, solved.new_empty(shape)


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    solved: Tensor,
    gates: Tensor,
    grad: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta, decay and the initial state.

    The gradient of a decay that there is not is empty.
    """
    with launching(q):
        call = _Call(q, k, v, beta, decay, state, positions)
        kept = gates if call.gated else None
        grad = torch.zeros_like(call.v) if grad is None else grad.contiguous()
        end = None if grad_final is None else grad_final.contiguous()
        states, writes, _ = call.scan(solved, kept)
        entering, d_states = torch.empty_like(states), torch.empty_like(states)
        d_writes = torch.empty_like(writes)
        dq, dk, dv, d_beta = (x.new_empty(x.shape) for x in (call.q, call.k, call.v, call.beta))
        d_decay = None if decay is None else decay.new_empty(decay.shape)
        d_first = q.new_empty(states.shape[:2] + states.shape[3:], dtype=torch.float32)
        tensors = (call.q, call.k, call.positions, kept, grad, entering, d_writes)
        call.launch(backwards.inflow, *tensors, across=False)
        call.launch(
            backwards.retreat,
            *(call.k, call.beta, call.positions, solved, kept, end),
            *(entering, d_states, d_writes, dv, d_first),
            across=True,
            GIVEN=end is not None,
            SOLVE=call.solve,
        )
        call.launch(
            backwards.gradients,
            *(call.q, call.k, call.v, call.beta, call.positions, kept, states, writes),
            *(d_states, d_writes, grad, dq, dk, d_beta, d_decay),
            across=False,
            DECAY=decay is not None,
        )
    return dq, dk, dv, d_beta, q.new_empty(0) if d_decay is None else d_decay, d_first


def _fake_backward(q, k, v, beta, decay, state, positions, solved, gates, grad, grad_final):
    like = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    d_decay = q.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return *like, d_decay, q.new_empty(shape, dtype=torch.float32)


delta_rule_backward = operator("triton_delta_backward", _run_backward, _fake_backward)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_final, *_):
    *tensors, positions, solved, gates = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return *differentiate_again(tensors, positions, grad, grad_final), None
    *d_inputs, d_decay, d_first = delta_rule_backward(
        *tensors, positions, solved, gates, grad, grad_final
    )
    decay, state = tensors[4:]
    return (
        *d_inputs,
        None if decay is None else d_decay,
        None if state is None else d_first,
        None,
    )


delta_rule = operator("triton_delta", _run, _fake, _save, _differentiate)


def memory(
    inputs: Sequence[Tensor], state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta_memory` for checked inputs that are not empty.

    Positions are not checked: reading them would make the CPU wait.

    Args:
        inputs: q, k [B, T, H, K], v [B, T, H, V] float32, bfloat16 or float16, K <= 256; beta
            [B, T, H, 1] and optionally decay [B, T, H, 1].
        state: [B, H, K, V] float32, or None for zeros.
        positions: [B, T] int64, or None where every row continues its state.

    Returns:
        out [B, T, H, V] in v's dtype, and the final state [B, H, K, V] float32.
    """
    q, k, v, beta, *decay = inputs
    gates = beta.squeeze(-1), decay[0].squeeze(-1) if decay else None
    out, final, *_ = delta_rule(q, k, v, *gates, state, positions)
    return out, final
