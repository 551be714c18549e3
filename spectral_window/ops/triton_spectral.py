"""The convolution on a GPU: the recurrence in Triton kernels, chunks of time in parallel.

    h_t = z h_{t-1} + u_t,   y_t = sum_m gain_m Re h_t

The forward pass has three kernels. `ends` runs every chunk from a zero state and stores its final
state. `carry` computes from these the state before each chunk, h_n = z^C h_{n-1} + left_n.
`outputs` runs every chunk again from there and writes y. Memory is read twice and written once, and
nothing is stored per token.

The backward pass runs the same kernels from the end, l_t = conj(z) (l_{t+1} + gain g_t), to get the
gradient that reaches each chunk from later ones. Inside a chunk the gradient of z does not need l
but the sensitivity s = dh/dz, which runs forwards together with h (see `compiled.scan` for the
derivation); then l runs backwards and writes du. The sums of all chunks are added in a fixed order,
so every call gives the same bits.

Precision. States between chunks, z and its powers are float64, so the error does not grow with T.
`ends` computes in float64 too, and with it the final state: 4 float64 operations per token take
less time on an H100 (half the float32 rate) than reading the token. `outputs` and the backward pass
compute in the dtype of `PLANS`. Largest errors of 4,096 channels in a block of 64, at |z| = 1:

    C = 128, z in float32                     6e-6
    C = 128, z as a sum of two float32        1.3e-6    for float32: the limit is 2e-6
    C = 256, z in float32                     2e-5      for 16-bit inputs, which round to 2e-3

float64 inputs are computed in float64 throughout. Where float64 is slow (consumer GPUs: 1/64),
`ends` takes about 1.3 times as long as reading u; the other kernels are not affected.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_window.ops import triton_spectral_gradients as backwards
from spectral_window.ops import triton_spectral_kernels as forwards
from spectral_window.ops.chunked_spectral import differentiate_again
from spectral_window.ops.modes import Modes
from spectral_window.ops.operators import operator
from spectral_window.ops.triton_launch import launching

LANES = 32
ENOUGH = 768  # programs that fill a large GPU: 6 for each of 132 multiprocessors
SHORTEST = 16  # tokens of a chunk
CARRIED = 16  # chunks whose states are loaded together
SUMMED = (128, 8)  # parts and channels per step of the last sum


class Plan(NamedTuple):
    """How inputs of a dtype are computed.

    Attributes:
        lanes: channels per lane: 16 bytes of a row.
        chunk: largest number of tokens per chunk.
        rows: rows of time that are loaded together in the forward pass.
        rows_back: the same in the kernel of the gradients.
        stages: number of such groups in flight.
        dtype: of the state in `outputs` and in the backward pass.
        pair: whether z is a sum of two numbers there.
    """

    lanes: int
    chunk: int
    rows: int
    rows_back: int
    stages: int
    dtype: Any
    pair: bool


PLANS = {
    torch.bfloat16: Plan(8, 256, 8, 4, 3, tl.float32, False),
    torch.float16: Plan(8, 256, 8, 4, 3, tl.float32, False),
    torch.float32: Plan(4, 128, 8, 4, 3, tl.float32, True),
    torch.float64: Plan(2, 128, 8, 4, 3, tl.float64, False),
}


class Layout(NamedTuple):
    """How inputs are divided: the kernels' constants, and programs per chunk and row."""

    modes: int
    padded: int  # modes, a power of two
    block: int  # channels of a program
    blocks: int
    chunk: int
    chunks: int


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    power = 1
    while power < n:  # n.bit_length() does not exist for a symbolic size under torch.compile
        power *= 2
    return power


def layout(batch: int, time: int, channels: int, modes: int, dtype: torch.dtype) -> Layout:
    """Divide inputs: chunks as long as the plan allows, but enough of them to fill a large GPU.

    A function of shapes only, so that every GPU computes the same bits.
    """
    plan = PLANS[dtype]
    padded = _power_of_two(modes)
    block = max(LANES, LANES * plan.lanes // padded)
    block = min(block, max(_power_of_two(channels), 16))
    blocks = -(-channels // block)
    chunk = plan.chunk
    while chunk > SHORTEST and batch * -(-time // chunk) * blocks < ENOUGH:
        chunk //= 2
    return Layout(modes, padded, block, blocks, chunk, -(-time // chunk))


def _in_memory(x: Tensor) -> Tensor:
    """Return x as kernels read memory: contiguous, without a lazy negation."""
    return x.resolve_neg().contiguous()


def constants(plan: Plan, cut: Layout, channels: int, dtype: Any, rows: int) -> dict[str, Any]:
    """Return the compile-time constants that the streaming kernels share."""
    return {
        "MODES": cut.modes,
        "PADDED": cut.padded,
        "BLOCK": cut.block,
        "CHUNK": cut.chunk,
        "ROWS": rows,
        "STAGES": plan.stages,
        "MASKED": channels % cut.block != 0,
        "PAIR": plan.pair and dtype == tl.float32,
        "DTYPE": dtype,
    }


class _Call:
    """One call's launches: what the kernels share."""

    def __init__(
        self, x: Tensor, decay: Tensor, frequency: Tensor, gain: Tensor | None, positions
    ) -> None:
        self.plan = PLANS[x.dtype]
        self.batch, self.time, self.channels = x.shape
        self.cut = layout(self.batch, self.time, self.channels, decay.shape[1], x.dtype)
        self.gain = None if gain is None else _in_memory(gain)
        self.positions = None if positions is None else _in_memory(positions)
        self.z = torch.empty((*decay.shape, 2), dtype=torch.float64, device=x.device)
        self.bits = self.cut.chunk.bit_length()
        count = decay.numel()
        forwards.dynamics[(triton.cdiv(count, 128),)](
            _in_memory(decay), _in_memory(frequency), self.z, count, BLOCK=128
        )

    def borders(self, parts: int = 2) -> Tensor:
        """A buffer of `parts` planes for every chunk."""
        shape = (self.batch, self.cut.chunks, parts, self.cut.modes, self.channels)
        return self.z.new_empty(shape)

    def streamed(self, kernel, *tensors: Tensor | None, dtype: Any, rows: int, **more: Any) -> None:
        """Launch a kernel that has one program for each row, chunk and block of channels."""
        cut = self.cut
        more |= {"GAIN": self.gain is not None, "DOCUMENTS": self.positions is not None}
        kernel[(self.batch * cut.chunks * cut.blocks,)](
            *tensors,
            self.time,
            self.channels,
            cut.chunks,
            **constants(self.plan, cut, self.channels, dtype, rows),
            **more,
            num_warps=1,
        )

    def carried(
        self, x: Tensor, first: Tensor | None, reverse: bool, dtype: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before all chunks of x (behind them, for `reverse`), and the last state."""
        cut = self.cut
        states = self.borders()
        steps = None if self.positions is None else self.borders()
        self.streamed(
            forwards.ends,
            *(x, self.z, self.gain, self.positions, states, steps),
            dtype=dtype,
            rows=self.plan.rows,
            REVERSE=reverse,
            BITS=self.bits,
        )
        last = self.z.new_empty((self.batch, self.channels, cut.modes, 2))
        blocks = triton.cdiv(cut.modes * self.channels, LANES)
        forwards.carry[(self.batch * blocks,)](
            *(states, self.z, steps, first, last, self.time, self.channels, cut.chunks),
            MODES=cut.modes,
            BLOCK=LANES,
            CHUNK=cut.chunk,
            BITS=self.bits,
            ROWS=CARRIED,
            REVERSE=reverse,
            DOCUMENTS=self.positions is not None,
            GIVEN=first is not None,
            num_warps=1,
        )
        return states, last


def _run(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence.

    Args:
        u: [B, T, D], not empty.
        decay: [D, M].
        frequency: [D, M].
        gain: [D, M], or None for 1.
        state: [B, D, M, 2] float64, or None for zeros.
        positions: [B, T], or None.

    Returns:
        y [B, T, D], the final state [B, D, M, 2], and the states before all chunks
        [B, chunks, 2, M, D].
    """
    x = _in_memory(u)
    y = torch.empty_like(x)
    before = None if state is None else _in_memory(state)
    with launching(u):
        call = _Call(x, decay, frequency, gain, positions)
        starts, final = call.carried(x, before, False, tl.float64)
        call.streamed(
            forwards.outputs,
            *(x, call.z, call.gain, call.positions, starts, y),
            dtype=call.plan.dtype,
            rows=call.plan.rows,
        )
    return y, final, starts


def _fake(u, decay, frequency, gain, state, positions):
    batch, time, channels = u.shape
    modes = decay.shape[1]
    chunks = layout(batch, time, channels, modes, u.dtype).chunks
    final = decay.new_empty((batch, channels, modes, 2), dtype=torch.float64)
    kept = decay.new_empty((batch, chunks, 2, modes, channels), dtype=torch.float64)
    return u.new_empty(u.shape), final, kept


def _run_backward(
    u: Tensor,
    decay: Tensor,
    frequency: Tensor,
    gain: Tensor | None,
    positions: Tensor | None,
    starts: Tensor,
    grad: Tensor,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, decay, frequency, gain and the initial state.

    grad and grad_state are the gradients of y and of the final state.
    """
    x, g = _in_memory(u), _in_memory(grad.to(u.dtype))
    du = torch.empty_like(x)
    end = None if grad_state is None else _in_memory(grad_state)
    grads = [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        for p in (decay, frequency, decay if gain is None else gain)
    ]
    with launching(u):
        call = _Call(x, decay, frequency, gain, positions)
        tails, begin = call.carried(g, end, True, call.plan.dtype)
        sums = call.borders(3)
        call.streamed(
            backwards.gradients,
            *(x, g, call.z, call.gain, call.positions, starts.contiguous(), tails, du, sums),
            dtype=call.plan.dtype,
            rows=call.plan.rows_back,
        )
        parts, block = SUMMED
        backwards.finish[(triton.cdiv(decay.numel(), block),)](
            *(sums, call.z, *grads, call.batch * call.cut.chunks, call.channels),
            MODES=call.cut.modes,
            BLOCK=block,
            ROWS=parts,
        )
    return du, *grads, begin  # type: ignore[return-value]


def _fake_backward(u, decay, frequency, gain, positions, starts, grad, grad_state):
    batch, _, channels = u.shape
    begin = decay.new_empty((batch, channels, decay.shape[1], 2), dtype=torch.float64)
    modes = (decay, frequency, decay if gain is None else gain)
    return u.new_empty(u.shape), *(p.new_empty(p.shape) for p in modes), begin


scan_backward = operator("triton_scan_backward", _run_backward, _fake_backward)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_state, grad_starts):
    *inputs, starts = ctx.saved_tensors
    u, decay, frequency, gain, state, positions = inputs
    if grad is None:
        grad = torch.zeros_like(u)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        again = differentiate_again(
            u, Modes(decay, frequency, gain), state, positions, grad, grad_state
        )
        return *again, None  # a second derivative is wanted
    du, d_decay, d_frequency, d_gain, d_state = scan_backward(
        u, decay, frequency, gain, positions, starts, grad, grad_state
    )
    return (
        *(du, d_decay, d_frequency),
        None if gain is None else d_gain,
        None if state is None else d_state,
        None,
    )


scan = operator("triton_scan", _run, _fake, _save, _differentiate)


def convolve(
    u: Tensor, modes: Modes, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`spectral_conv` for checked inputs: u [B, T, D] not empty, modes [D, M]."""
    y, final, _ = scan(u, *modes, state, positions)
    return y, final
