"""The mixer `attention`: the Transformer baseline, full causal attention with RoPE.

With `shifted_keys` every key is mixed with that of the token before, before its rotation:

    k_t <- shift_0 * k_t + shift_1 * k_{t-1}          shift [D, 2], learned

It starts as the token's own key in the first half of the heads, and as the key of the token before
in the others. A query then finds what followed similar tokens in one layer, where plain attention
needs two. The keys of the memory have the same property (`nn/memory.py`); with this option the
baseline has it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_window.nn.kernels import Filter, float32_parameter, initialize
from spectral_window.nn.layers import project
from spectral_window.nn.mixers import ROPE_THETA, Mixer, check_rotary, register
from spectral_window.nn.options import Option
from spectral_window.ops.documents import Documents, given_documents
from spectral_window.ops.fir import Taps
from spectral_window.ops.methods import Method, enrol, resolve
from spectral_window.ops.rotary import rotate


class AttentionState(NamedTuple):
    """The state of an `AttentionMixer`; S grows with every call.

    Attributes:
        key: [B, S, H, K] in the model's dtype, rotated already.
        value: [B, S, H, K].
        position: [B, S] int64, -1 where a key is padding or of a document that has ended.
        last: the key of the last token [B, 1, D] before its rotation; None without shifted keys.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    last: Tensor | None = None


class KeyShift(Filter):
    """Mixes every key with that of the token before, by a filter of two taps.

    shift [D, 2] stays in float32 and gets no weight decay, like the parameters of a kernel.

    Args:
        channels: D.
        own: the number of channels that start with the token's own key.
    """

    def __init__(self, channels: int, own: int):
        super().__init__(channels)
        self.own = own
        self.shift = float32_parameter(channels, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        before = (
            torch.arange(self.channels, dtype=torch.int64, device=self.shift.device) >= self.own
        )
        initialize(self.shift, torch.stack((~before, before), -1).float())

    def forward(self) -> Taps:
        return Taps(self.shift)


SHIFTED_KEYS = Option(
    "shifted_keys", bool, False, help="keys are mixed with those of the token before"
)


@register("attention", ROPE_THETA, SHIFTED_KEYS)
class AttentionMixer(Mixer):
    """The Transformer baseline: full causal attention with RoPE, by PyTorch's fused kernel.

    Without biases. Its state grows with every token.

    Example:
        >>> layer = AttentionMixer(hidden_size=16, num_heads=2)
        >>> y, state = layer(torch.randn(1, 9, 16))
        >>> y.shape, state.key.shape
        (torch.Size([1, 9, 16]), torch.Size([1, 9, 2, 8]))
    """

    label = "Transformer"
    constant_state = False
    visible = "itself and all tokens before it"

    def __init__(self, **options: Any):
        super().__init__(**options)
        dim = self.hidden_size
        self.rope_theta = self.settings["rope_theta"]
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        own = (self.num_heads + 1) // 2 * self.head_dim
        self.shift = KeyShift(dim, own) if self.settings["shifted_keys"] else None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        super().check(values)
        check_rotary(values)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        shift = [] if self.shift is None else [(self.shift.operator, tuple(self.shift()))]
        return [("attention", ()), *shift]

    def forward(
        self,
        x: Tensor,
        positions: Tensor | Documents | None = None,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, AttentionState]:
        batch, time = x.shape[:2]
        documents = given_documents(positions, None, x)
        if documents is not None:
            documents.check(None if state is None else self._next(state))
        positions = None if documents is None else documents.positions
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        last = None
        if self.shift is not None:
            k, last = self.shift.convolve(
                k,
                state=None if state is None else state.last,
                positions=documents,
                method=self.method(self.shift.operator),
            )
        q, k, v = map(self._split, (q, k, v))
        past = 0 if state is None else state.key.shape[1]
        # where every row is one document without padding, no mask is built and the fused causal
        # kernel is used
        plain = positions is None
        if positions is None:
            begin = x.new_zeros(batch, dtype=torch.int64) if state is None else self._next(state)
            positions = begin[:, None] + torch.arange(time, dtype=torch.int64, device=x.device)
        q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        if state is not None:
            k, v = torch.cat((state.key, k), 1), torch.cat((state.value, v), 1)
        key_position = positions if state is None else torch.cat((state.position, positions), 1)
        mask = None
        if not plain or past:
            mask, key_position = self._mask(positions, key_position)
        attend = resolve("attention", self.method("attention"), q).function
        y = attend(q, k, v, mask, mask is None and past == 0)
        if not plain:
            y = torch.where((positions >= 0)[..., None, None], y, 0.0)
        return project(y.flatten(-2), self.out_proj)[0], AttentionState(k, v, key_position, last)

    @staticmethod
    def _next(state: AttentionState) -> Tensor:
        if not state.position.shape[1]:
            return state.position.new_zeros(state.position.shape[0])
        return state.position.amax(1) + 1

    @staticmethod
    def _mask(positions: Tensor, key_position: Tensor) -> tuple[Tensor, Tensor]:
        """Return which keys a query sees [B, T, S], and the keys' positions.

        The positions of keys of ended documents are set to -1.
        """
        past = key_position.shape[1] - positions.shape[1]
        token = key_position >= 0
        begins = (key_position == 0) & (
            torch.arange(key_position.shape[1], dtype=torch.int64, device=token.device) >= past
        )
        document = begins.cumsum(1)
        query = document[:, past:]
        mask = (
            (query[..., None] == document[:, None])
            & (key_position[:, None] <= positions[..., None])
            & token[:, None]
        )
        itself = torch.arange(
            key_position.shape[1], dtype=torch.int64, device=token.device
        ) == past + torch.arange(
            positions.shape[1], dtype=torch.int64, device=token.device
        ).unsqueeze(-1)
        # padding attends to itself, so that no row of the mask is empty
        mask = mask | (itself & (positions < 0)[..., None])
        return mask, torch.where(document == document[:, -1:], key_position, -1)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> AttentionState:
        empty = torch.zeros(
            batch_size, 0, self.num_heads, self.head_dim, dtype=dtype, device=device
        )
        position = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        last = torch.zeros(batch_size, 1, self.hidden_size, dtype=dtype, device=device)
        return AttentionState(empty, empty, position, None if self.shift is None else last)

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        last = 0 if self.shift is None else self.hidden_size * dtype.itemsize
        return batch_size * (context * (2 * self.hidden_size * dtype.itemsize + 8) + last)

    def flops_per_token(self, context: int) -> int:
        return 2 * sum(p.numel() for p in self.parameters()) + 2 * self.hidden_size * (context + 1)

    def count_visible(self, positions: Tensor, window: int) -> Tensor:
        return positions + 1


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attend: q [B, T, H, K], k and v [B, S, H, K], mask [B, T, S] or None -> [B, T, H, K]."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=causal,
    ).transpose(1, 2)


enrol(
    "attention",
    Method("sdpa", _sdpa, "PyTorch's fused scaled_dot_product_attention, over every earlier key"),
)
