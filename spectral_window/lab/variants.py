"""Variants of the memory, a thing changed by an option each, for `ablate memory`.

spectral-window --plugin spectral_window.lab.variants train small mixer=memory_variant
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectral_window.lab.baselines.mixers import no_state, refuse_state
from spectral_window.nn.memory import SHORTEST, MemoryMixer
from spectral_window.nn.mixers import register
from spectral_window.nn.options import Option
from spectral_window.nn.spectral_window import SpectralWindowMixer, SpectralWindowState
from spectral_window.ops.delta_memory import delta_memory
from spectral_window.ops.documents import Documents
from spectral_window.ops.pointwise import unit

# what a memory's key is: the query of the token before, mixed with its neighbours by learned
# weights or not, or the window's own key
KEYS = ("lagged", "before", "window")
LAYERS = ("every", "first", "others")
VARIANT = (
    Option("memory_key", str, KEYS[0], choices=KEYS, help="what the memory's key is made of"),
    Option("memory_query", bool, False, help="the memory has a query projection of its own"),
    Option("memory_value", bool, False, help="the memory has a value projection of its own"),
    Option("read_gate", bool, True, help="what is read passes a gate"),
    Option("memory_decay", bool, False, help="the memory forgets, by a gate a head and token"),
    Option("delta_rule", bool, True, help="a value replaces what its key held, or is added to it"),
    Option("memory_in", str, LAYERS[0], choices=LAYERS, help="the layers that have a memory"),
)


@register("memory_variant", *VARIANT)
class MemoryVariant(MemoryMixer):
    """`nn.memory` with what its options change, on whole rows without padding or a state."""

    label = "SWH with a memory's variant"
    constant_state = False
    state_type = SpectralWindowState  # type: ignore[assignment]

    def __init__(self, **options: Any):
        super().__init__(**options)
        dim, heads = self.hidden_size, self.memory_heads
        own = {"memory_query": dim, "memory_value": dim, "memory_decay": heads}
        self.own = nn.ModuleDict(
            {name: nn.Linear(dim, out, bias=False) for name, out in own.items()
             if self.settings[name]}
        )  # fmt: skip
        chosen = self.settings["memory_in"]
        self.remembers = chosen == "every" or (chosen == "first") == (self.layer == 0)
        if not self.remembers:
            self.own = nn.ModuleDict()
            del self.memory, self.gate_proj

    def _local_maps(self) -> list[nn.Linear]:
        return super()._local_maps() if self.remembers else SpectralWindowMixer._local_maps(self)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        return super().operators() if self.remembers else SpectralWindowMixer.operators(self)

    def flops_per_token(self, context: int) -> int:
        if self.remembers:
            return super().flops_per_token(context)
        return SpectralWindowMixer.flops_per_token(self, context)

    def forward(
        self, x: Tensor, positions: Tensor | Documents | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        refuse_state(self, positions, state)
        self._x = x  # for projections of its own
        y, _ = super().forward(x)
        return y, no_state(x)

    def _convolve_first(
        self, projected: list[Tensor], documents: Documents | None, state: Any
    ) -> tuple[Any, ...]:
        super()._convolve_first(projected, documents, state)
        return ()

    def _local(
        self, projected: list[Tensor], documents: Documents | None, state: Any
    ) -> tuple[Tensor, tuple[Any, ...]]:
        q, k, v, *gates = projected
        attended, states = SpectralWindowMixer._local(self, [q, k, v], documents, None)
        if not self.remembers:
            return attended, states
        chosen, own, x = self.settings, self.memory, self._x
        if chosen["memory_query"]:
            q = self.own["memory_query"](x)
        if chosen["memory_value"]:
            v = self.own["memory_value"](x)
        if chosen["memory_key"] == "window":
            key = k
        elif chosen["memory_key"] == "before":
            key = nn.functional.pad(q, (0, 0, 1, -1))
        else:
            key, _ = own.convolve(q, state=None, positions=None, method="auto")
        write, read = gates[0].float().chunk(2, -1)
        beta = self._amount(write + own.write_bias)
        query, key = (unit(self._heads(part), SHORTEST) for part in (q, key))
        value = self._heads(v).float()
        decay = None
        if chosen["memory_decay"]:  # starts near 1: half of it is gone after some 80 tokens
            decay = torch.sigmoid(self.own["memory_decay"](x).float() + 4.75)
        if chosen["delta_rule"]:
            answer, _ = delta_memory(query, key, value, beta, decay=decay)
        else:
            answer = added(query, key, value * beta[..., None])
        if chosen["read_gate"]:
            answer = answer * torch.sigmoid(read + own.read_bias)[..., None]
        return attended + (own.scale * answer.flatten(-2)).to(attended.dtype), states


def added(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention: [B, T, H, N] three times -> the sum of the values up to each token, each
    weighted by its key's product with the query. All pairs at once: for short rows."""
    weight = torch.einsum("bthn,bshn->bhts", query, key).tril()
    return torch.einsum("bhts,bshn->bthn", weight, value)
