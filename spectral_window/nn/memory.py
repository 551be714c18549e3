"""The mixer `memory`: the paper's layer with a key-value memory beside its window.

Neither branch of the paper's layer can choose *which* token to store: the convolution mixes each
channel separately, and the window has an end. A key-value memory with the delta rule
(`ops.delta_memory`) can, in linear time and with a constant state. It has no projections of its
own: it reads with the window's query, stores the window's value, and its key is the query of the
token before. So it stores what followed a token, and a query reads what followed similar tokens: an
induction head, from the first training step.

    a       = WindowAttention(rope(q), rope(k), v)                 as in the paper
    p_t     = normalise(q_t)                                       without positions
    kappa_t = normalise(sum_{i < 4} lag_i * q_{t-i})               lag starts at 0 1 0 0
    b_t     = sigmoid(x_t . w_write + write_bias); with write_gate=closing
              tanh(max(x_t . w_write + write_bias, 0)), with write_gate=reflecting 2 sigmoid(...)
    S_t     = S_{t-1} + b_t kappa_t (v_t - S_{t-1}^T kappa_t)^T
    m_t     = sigmoid(x_t . w_read + read_bias) * scale * (S_t^T p_t)
    Y       = (RMSNorm(Y_spec) + (a + m) W_local) W_out            m is added before W_local

With `short_convolution` q, k and v, before all of this, are weighted sums of themselves and of the
three tokens before, each channel with weights of its own. A query, and with it a key of the memory,
then stands for several tokens in a row.

Every write weakens earlier ones. A sigmoid gate writes a little of every token, and after 32,768
tokens half of the needles are lost, unless training has shown long sequences, from which it learns
what to leave out. A closing gate can write nothing of tokens that training has shown to be noise:
it finds 0.8 to 0.9 of the needles there, and costs 0.01 to 0.02 nats per token on text
(results/memory).

A write of 1 replaces what was stored under a key, a write of 2 mirrors it: S is multiplied by
I - 2 kappa kappa^T. Products of mirrors can count (arXiv 2411.12537), so a reflecting gate learns
parity, which no other gate does, and two hops better. It recalls farther too: all of 32,768 tokens
after training at up to 4,096. On text it costs nothing, so it is the recommended one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectral_window.errors import UserError
from spectral_window.nn.kernels import Filter, float32_parameter, initialize
from spectral_window.nn.mixers import register
from spectral_window.nn.options import Option
from spectral_window.nn.spectral_window import SpectralWindowMixer
from spectral_window.ops import memory_step
from spectral_window.ops.context_parallel import SpanDocuments
from spectral_window.ops.delta_memory import delta_memory, state_dtype
from spectral_window.ops.documents import Documents
from spectral_window.ops.fir import Taps, fir_conv
from spectral_window.ops.lagged_units import lagged_units
from spectral_window.ops.memory_step import WRITE_GATES, Parameters
from spectral_window.ops.methods import resolve
from spectral_window.ops.pointwise import gated_add
from spectral_window.ops.spans import Share, delta_map, last_inputs, read_from
from spectral_window.ops.window import WindowState

TAPS = 4  # tokens of the short convolution
LAG = 4  # a key is a mix of this many queries: that of the token and of the three before
SHORTEST = 1e-4  # queries and keys shorter than this are divided by it and not by their length


class MemoryState(NamedTuple):
    """The state of a `MemoryMixer`.

    Attributes:
        spectral: as in `SpectralWindowState`.
        window: as in `SpectralWindowState`.
        memory: S [B, H, D / H, D / H] in at least float32.
        queries: the last three queries [B, 3, D] in the model's dtype, oldest first.
        inputs: the last three inputs [B, 3, 3 D] of the short convolution in the model's dtype,
            oldest first; None without it.
    """

    spectral: Tensor | None
    window: WindowState | None
    memory: Tensor
    queries: Tensor
    inputs: Tensor | None = None


class Memory(Filter):
    """The memory's parameters, apart from the linear map of its gates.

    Like those of a kernel they stay in float32, and get no weight decay.

    - lag [D, 4]: the filter that makes keys of queries; starts as the query of the token before.
    - scale [D]: factor of the memory's output; starts at 1.
    - write_bias [H]: starts at the argument of this name.
    - read_bias [H]: starts at 0.

    Args:
        channels: D.
        heads: H, heads of the memory.
        write_bias: initial value.
    """

    def __init__(self, channels: int, heads: int, write_bias: float = 0.0):
        super().__init__(channels)
        self.first_bias = write_bias
        self.lag = float32_parameter(channels, LAG)
        self.scale = float32_parameter(channels)
        self.write_bias = float32_parameter(heads)
        self.read_bias = float32_parameter(heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize(self.lag, torch.eye(LAG)[1].expand_as(self.lag))
        nn.init.ones_(self.scale)
        nn.init.constant_(self.write_bias, self.first_bias)
        nn.init.zeros_(self.read_bias)

    def forward(self) -> Taps:
        return Taps(self.lag)


class ShortConvolution(Filter):
    """A causal convolution of four tokens per channel, apart from the kernels of the layer.

    weights [D, 4] stay in float32 and get no weight decay. They start as the token itself, those of
    some channels as the token before.

    Args:
        channels: D.
        late: the first channel that starts one token late, and the one after the last.
    """

    def __init__(self, channels: int, late: tuple[int, int] = (0, 0)):
        super().__init__(channels)
        self.late = late
        self.weights = float32_parameter(channels, TAPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        first = torch.eye(TAPS)[0].repeat(self.channels, 1)
        first[slice(*self.late)] = torch.eye(TAPS)[1]
        initialize(self.weights, first)

    def forward(self) -> Taps:
        return Taps(self.weights)


HEADS = Option(
    "memory_heads", int, 1, help="heads of the memory; its state has D^2 / heads numbers"
)
BIASES = dict(zip(WRITE_GATES, (0.0, 0.5, 0.0), strict=True))  # of the write gate, at first
WRITE_GATE = Option(
    "write_gate",
    str,
    "sigmoid",
    choices=WRITE_GATES,
    decides="function",
    help="how much is written: sigmoid(x); closing, tanh(max(x, 0)), which can be exactly 0; or "
    "reflecting, 2 sigmoid(x), which can turn what is stored around",
)
SHORT_CONVOLUTION = Option(
    "short_convolution", bool, False, help="queries, keys and values are convolved over 4 tokens"
)


def recommended(hidden_size: int) -> dict[str, Any]:
    """Return the options of the recommended layer at a width.

    The short convolution and the wider window are worth 0.05 to 0.1 nats per token of text after 20
    million tokens, where the reflecting gate costs nothing; it recalls farther and can count
    (results/memory). One memory head per 128 channels: a single head over all channels would make a
    training step of a wide model 1.5 times as long.
    """
    return {
        "mixer": "memory",
        "memory_heads": max(1, hidden_size // 128),
        "write_gate": "reflecting",
        "short_convolution": True,
        "window": 128,
    }


@register("memory", HEADS, WRITE_GATE, SHORT_CONVOLUTION)
class MemoryMixer(SpectralWindowMixer):
    """The paper's layer with a delta-rule memory that is added to the window's output.

    The module's docstring has the equations. The window must be on: the memory reads with its
    queries and stores its values. The layer has 5 D + 2 H (D + 1) parameters more than the paper's,
    for H memory heads, and 12 D for the short convolution.

    Example:
        >>> layer = MemoryMixer(hidden_size=16, num_heads=2, window=4, memory_heads=2)
        >>> y, state = layer(torch.randn(1, 9, 16))
        >>> y.shape, state.memory.shape
        (torch.Size([1, 9, 16]), torch.Size([1, 2, 8, 8]))
    """

    label = "SWH with memory"
    in_spans = True
    state_type = MemoryState

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.memory_heads = self.settings["memory_heads"]
        self.write_gate = self.settings["write_gate"]
        self.memory = Memory(self.hidden_size, self.memory_heads, BIASES[self.write_gate])
        # w_write, then w_read, in one map: a product with a single row of weights would round
        # differently when a file is loaded at another memory alignment
        self.gate_proj = nn.Linear(self.hidden_size, 2 * self.memory_heads, bias=False)
        self.short_convolution = None
        if self.settings["short_convolution"]:
            dim = self.hidden_size
            late = 2 * dim - self.num_heads // 2 * self.head_dim, 2 * dim  # half of the keys' heads
            self.short_convolution = ShortConvolution(3 * dim, late)

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

    def _convolve_first(
        self, projected: list[Tensor], documents: Documents | None, state: MemoryState | None
    ) -> tuple[Tensor | None]:
        convolution = self.short_convolution
        if convolution is None:
            return (None,)
        weights, method = convolution().weights, self.method(convolution.operator)
        before = None if state is None else state.inputs
        together, alone = projected[:3], not isinstance(documents, SpanDocuments)
        steps = alone and memory_step.convolves(self.methods, together, weights, before)
        if steps and before is not None:
            *projected[:3], after = memory_step.convolve(together, weights, before, documents)
            return (after,)
        if alone and resolve("fir", method, projected[0], weights).name == "compiled":
            # as one tensor they would be copied before and after a single pass over memory
            parts: list[Any] = [None] * 3 if before is None else [*before.chunk(3, -1)]
            each = zip(together, weights.chunk(3), parts, strict=True)
            found = [
                fir_conv(x, Taps(own), state=part, positions=documents, method=method)
                for x, own, part in each
            ]
            projected[:3] = [y for y, _ in found]
            return (torch.cat([after for _, after in found], -1),)
        inputs = torch.cat(together, -1)
        if isinstance(documents, SpanDocuments):
            share = convolution.share(inputs, documents, method)
            inputs, (before,) = documents.receive(inputs, [share])
        convolved, after = convolution.convolve(
            inputs, state=before, positions=documents, method=method
        )
        projected[:3] = convolved.split(self.hidden_size, -1)
        return (after,)

    def _local(
        self, projected: list[Tensor], documents: Documents | None, state: MemoryState | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        q, k, v, gates = projected
        attended, states = super()._local([q, k, v], documents, state)
        own = self.memory
        if state is not None and state.memory is not None:
            past = state.memory, state.queries
            inputs = q, v, attended, gates
            parameters = Parameters(
                own.lag, own.write_bias, own.read_bias, own.scale, SHORTEST, self.write_gate
            )
            if memory_step.serves(self.methods, inputs, past, parameters):
                y, *after = memory_step.step(inputs, past, parameters, documents)
                return y, (*states, *after)
        write, read = gates.to(state_dtype(q.dtype)).chunk(2, -1)
        vector, key, queries = self._vectors(q, documents, state)
        # on a GPU 16-bit values stay so: they are the operands of tensor cores, and sums float32
        exact = v.dtype if v.is_cuda else write.dtype
        inputs = (
            vector.to(exact),
            key.to(exact),
            self._heads(v).to(exact),
            self._amount(write + own.write_bias),
        )
        if isinstance(documents, SpanDocuments):
            read_values, memory = self._in_span(inputs, documents)
        else:
            read_values, memory = delta_memory(
                *inputs,
                state=None if state is None else state.memory,
                positions=documents,
                method=self.method("delta"),
            )
        gate = torch.sigmoid(read + own.read_bias)
        return gated_add(attended, read_values, gate, own.scale), (*states, memory, queries)

    def _in_span(
        self, inputs: tuple[Tensor, ...], documents: SpanDocuments
    ) -> tuple[Tensor, Tensor]:
        """Return what the memory reads in this span, and its state after it.

        A second exchange: the keys of the span's first tokens are of the queries received before.
        """
        span = delta_map(*inputs, documents=documents, method=self.method("delta"))
        out, (before,) = documents.receive(span.out, [span.share])
        after = span.share.after(before, span.share.own, documents.spans[documents.context.rank])
        return read_from(span._replace(out=out), before, documents), after

    def _shares(self, projected: list[Tensor], documents: SpanDocuments) -> dict[str, Share]:
        queries = last_inputs(projected[0], LAG - 1, documents)
        return {**super()._shares(projected, documents), "queries": queries}

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        own = (
            [self.memory]
            if self.short_convolution is None
            else [self.memory, self.short_convolution]
        )
        return [*super().operators(), *((x.operator, tuple(x())) for x in own), ("delta", ())]

    def _amount(self, logit: Tensor) -> Tensor:
        """Return the fraction of a value that is written: 0 to 1, reflecting 0 to 2."""
        if self.write_gate == "closing":
            return torch.tanh(torch.relu(logit))
        amount = torch.sigmoid(logit)
        return 2 * amount if self.write_gate == "reflecting" else amount

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.memory_heads, -1))

    def _vectors(
        self, q: Tensor, documents: Documents | None, state: MemoryState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the memory reads with and stores under, and the last queries of each row."""
        return lagged_units(
            q,
            self.memory(),
            self.memory_heads,
            SHORTEST,
            state=None if state is None else state.queries,
            positions=documents,
            method=self.method(self.memory.operator),
        )

    def init_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        paper = super().init_state(batch_size, dtype=dtype, device=device)
        heads, size = self.memory_heads, self.hidden_size // self.memory_heads
        return MemoryState(
            paper.spectral,
            paper.window,
            torch.zeros(batch_size, heads, size, size, dtype=state_dtype(dtype), device=device),
            torch.zeros(batch_size, LAG - 1, self.hidden_size, dtype=dtype, device=device),
            None
            if self.short_convolution is None
            else torch.zeros(
                self.short_convolution().state_shape(batch_size), dtype=dtype, device=device
            ),
        )

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        size = self.hidden_size // self.memory_heads
        matrix = self.hidden_size * size * state_dtype(dtype).itemsize
        own = matrix + (LAG - 1) * self.hidden_size * dtype.itemsize
        if self.short_convolution is not None:
            own += math.prod(self.short_convolution().state_shape(1)) * dtype.itemsize
        return super().state_bytes(context, batch_size=batch_size, dtype=dtype) + batch_size * own

    def flops_per_token(self, context: int) -> int:
        """As in the base class, and three multiply-adds per entry of S.

        They are: read at the key, write, read at the query. Gates and lag are counted by the base
        class as linear maps.
        """
        size = self.hidden_size // self.memory_heads
        return super().flops_per_token(context) + 6 * self.hidden_size * size
