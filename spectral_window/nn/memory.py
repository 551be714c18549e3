"""The mixer `memory`: the paper's layer, and beside its window a memory of what followed what.

Both branches of the paper are blind to *which* token to keep: the convolution mixes each channel
alone, and the window ends. A key-value memory with the delta rule (`ops.delta_memory`) can tell,
in linear time and with a constant state. It has no projections of its own: it reads with the
window's query, stores the window's value, and its key is the query of the token before. So it
stores "what followed a token like this", and a query finds what followed its like: an induction
head from the start.

    a       = WindowAttention(rope(q), rope(k), v)                 the paper's, unchanged
    p_t     = normalise(q_t)                                       without positions
    kappa_t = normalise(sum_{i < 4} lag_i * q_{t-i})               lag starts at 0 1 0 0
    b_t     = sigmoid(x_t . w_write + write_bias), or with write_gate=closing
              tanh(max(x_t . w_write + write_bias, 0))
    S_t     = S_{t-1} + b_t kappa_t (v_t - S_{t-1}^T kappa_t)^T
    m_t     = sigmoid(x_t . w_read + read_bias) * scale * (S_t^T p_t)
    Y       = (RMSNorm(Y_spec) + (a + m) W_local) W_out            m joins before W_local

What is written wears out what was there: a sigmoid writes a little of every token, and after 32,768
of them half of the needles are gone. A gate that closes writes none of what training has shown to
be noise: of needles 0.94 are found there, at some 0.02 nats per token on text (results/memory).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectral_window.errors import UserError
from spectral_window.nn.kernels import Filter, _begin_at, _parameter
from spectral_window.nn.mixers import register
from spectral_window.nn.options import Option
from spectral_window.nn.spectral_window import SpectralWindowMixer
from spectral_window.ops import memory_step
from spectral_window.ops.delta_memory import delta_memory, state_dtype
from spectral_window.ops.documents import Documents
from spectral_window.ops.fir import Taps
from spectral_window.ops.memory_step import Parameters
from spectral_window.ops.pointwise import gated_add, unit
from spectral_window.ops.window import WindowState

LAG = 4  # queries that make a key: the token's own and the three before
SHORTEST = 1e-4  # a query or key that is shorter is divided by this and not by its length


class MemoryState(NamedTuple):
    """spectral, window: as in `SpectralWindowState`; memory: S [B, H, D / H, D / H] in at least
    float32; queries: the last three [B, 3, D] in the model's dtype, oldest first."""

    spectral: Tensor | None
    window: WindowState | None
    memory: Tensor
    queries: Tensor


class Memory(Filter):
    """The memory's own parameters, beside the maps of its gates. Like a kernel's they are kept in
    float32, and take no weight decay.

    lag [D, 4], the taps that make keys of queries, starts as "the token before"; scale [D], of what
    is read, starts at 1; write_bias [H] starts at the number given, read_bias [H] at 0.
    """

    def __init__(self, channels: int, heads: int, write_bias: float = 0.0):
        super().__init__(channels)
        self.first_bias = write_bias
        self.lag = _parameter(channels, LAG)
        self.scale = _parameter(channels)
        self.write_bias = _parameter(heads)
        self.read_bias = _parameter(heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _begin_at(self.lag, torch.eye(LAG)[1].expand_as(self.lag))
        nn.init.ones_(self.scale)
        nn.init.constant_(self.write_bias, self.first_bias)
        nn.init.zeros_(self.read_bias)

    def forward(self) -> Taps:
        return Taps(self.lag)


HEADS = Option(
    "memory_heads", int, 1, help="heads of the memory; its state has D^2 / heads numbers"
)
WRITE_GATES = {"sigmoid": 0.0, "closing": 0.5}  # name -> the bias that it starts with
WRITE_GATE = Option(
    "write_gate",
    str,
    "sigmoid",
    choices=WRITE_GATES,
    decides="function",
    help="how much is written: sigmoid(x), or closing, tanh(max(x, 0)), which can be exactly 0",
)


def recommended(hidden_size: int) -> dict[str, Any]:
    """The options of the layer that we recommend at a width: a head for each 128 channels (one of
    all channels would cost a wide model half a training step more)."""
    return {"mixer": "memory", "memory_heads": max(1, hidden_size // 128)}


@register("memory", HEADS, WRITE_GATE)
class MemoryMixer(SpectralWindowMixer):
    """The paper's layer with a delta-rule memory that joins the window's output (see the module).

    The window must be on: the memory reads with its queries and stores its values. Beside the
    paper's parameters there are 5 D + 2 H (D + 1), H memory heads.
    """

    label = "SWH with memory"
    state_type = MemoryState

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.memory_heads = self.settings["memory_heads"]
        self.closes = self.settings["write_gate"] == "closing"
        bias = WRITE_GATES[self.settings["write_gate"]]
        self.memory = Memory(self.hidden_size, self.memory_heads, bias)
        # w_write, then w_read: one map, for a product with a single row of weights rounds
        # differently where a file has put them at another alignment
        self.gate_proj = nn.Linear(self.hidden_size, 2 * self.memory_heads, bias=False)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        super().check(values)
        if "window" not in values["branches"]:
            raise UserError(
                f"mixer 'memory' with branches {values['branches']} (config): it uses the window's "
                "queries and values; add 'window', or take mixer 'spectral_window'"
            )
        if values["hidden_size"] % values["memory_heads"]:
            raise UserError(
                f"memory_heads {values['memory_heads']} does not divide hidden_size "
                f"{values['hidden_size']} (config): use 1 or another divisor"
            )

    def _local_maps(self) -> list[nn.Linear]:
        return [*super()._local_maps(), self.gate_proj]

    def _local(
        self, projected: list[Tensor], documents: Documents | None, state: MemoryState | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        q, k, v, gates = projected
        attended, states = super()._local([q, k, v], documents, state)
        own = self.memory
        if state is not None:
            past = state.memory, state.queries
            given = q, v, attended, gates
            parameters = Parameters(
                own.lag, own.write_bias, own.read_bias, own.scale, SHORTEST, self.closes
            )
            if memory_step.serves(self.methods, given, past, parameters):
                y, *after = memory_step.step(given, past, parameters, documents)
                return y, (*states, *after)
        write, read = gates.to(state_dtype(q.dtype)).chunk(2, -1)
        lagged, queries = own.convolve(
            q,
            state=None if state is None else state.queries,
            positions=documents,
            method=self.method(own.operator),
        )
        found, memory = delta_memory(
            self._unit(q),
            self._unit(lagged),
            self._heads(v).to(write.dtype),
            self._amount(write + own.write_bias),
            state=None if state is None else state.memory,
            positions=documents,
            method=self.method("delta"),
        )
        gate = torch.sigmoid(read + own.read_bias)
        return gated_add(attended, found, gate, own.scale), (*states, memory, queries)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [*super().operators(), (self.memory.operator, tuple(self.memory())), ("delta", ())]

    def _amount(self, logit: Tensor) -> Tensor:
        """How much of a value is written, 0 to 1."""
        return torch.tanh(torch.relu(logit)) if self.closes else torch.sigmoid(logit)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.memory_heads, -1))

    def _unit(self, x: Tensor) -> Tensor:
        """x [B, T, D] of length 1 in each memory head, in at least float32."""
        return unit(self._heads(x), SHORTEST)

    def init_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        paper = super().init_state(batch_size, dtype=dtype, device=device)
        heads, size = self.memory_heads, self.hidden_size // self.memory_heads
        return MemoryState(
            paper.spectral,
            paper.window,
            torch.zeros(batch_size, heads, size, size, dtype=state_dtype(dtype), device=device),
            torch.zeros(batch_size, LAG - 1, self.hidden_size, dtype=dtype, device=device),
        )

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        size = self.hidden_size // self.memory_heads
        matrix = self.hidden_size * size * state_dtype(dtype).itemsize
        own = matrix + (LAG - 1) * self.hidden_size * dtype.itemsize
        return super().state_bytes(context, batch_size=batch_size, dtype=dtype) + batch_size * own

    def flops_per_token(self, context: int) -> int:
        """The paper layer's, the gates' and the lag's (which count as maps), and three
        multiply-adds an entry of S: read at the key, write, read at the query."""
        size = self.hidden_size // self.memory_heads
        return super().flops_per_token(context) + 6 * self.hidden_size * size
