"""Baselines: mixers that others use, in this package's block, for comparisons at equal size.

Embedding, norms, MLP (whose width makes the parameters equal), recipe and data are the same for
all, so a difference is the mixer's; `models.py` has whole models.

    conv_attention   attention with a causal convolution of 4 tokens on queries, keys and values
                     each, half of the keys starting one token late
    short_conv       LFM2's gated short convolution
    mamba2           Mamba-2
    rg_lru           RecurrentGemma's gated linear recurrence (Griffin)
    gated_deltanet   Qwen3-Next's gated delta rule
    kimi_delta       Kimi Linear's delta rule with a decay per channel

All but the first are transformers' own modules, made from its configs at the
proportions that those have by default, in plain torch where their kernels are missing. Maps start
as all maps here do (`initializer_range`), everything else as their library starts it. They read
whole rows of one document, and nothing generates with them. Importing this file registers them:

    spectral-window --plugin spectral_window.lab.baselines.mixers train small mixer=gated_deltanet
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_window.errors import UserError
from spectral_window.nn.attention import AttentionMixer
from spectral_window.nn.memory import TAPS, ShortConvolution
from spectral_window.nn.mixers import MIXERS, ROPE_THETA, Mixer, register
from spectral_window.ops.documents import Documents
from spectral_window.ops.methods import resolve
from spectral_window.ops.rotary import rotate


class NoState(NamedTuple):
    """Says that tokens were read and nothing of them is held: nothing [B, 0]."""

    nothing: Tensor


def no_state(x: Tensor) -> NoState:
    return NoState(x.new_zeros(len(x), 0))


def refuse_state(mixer: Mixer, positions: Any, state: Any) -> None:
    """Raise UserError where padding, packed documents or a state would be computed wrongly."""
    if positions is not None or state is not None:
        name = next(name for name, known in MIXERS.items() if known is type(mixer))
        raise UserError(
            f"mixer '{name}' (laboratory): it reads whole rows of one document, without padding "
            "or a state; use one of the package's mixers to pack rows or to generate"
        )


class Baseline(Mixer):
    """A mixer that is trained and scored on whole rows, without a state to continue from."""

    constant_state = False  # long rows are not read in segments

    def forward(
        self, x: Tensor, positions: Tensor | Documents | None = None, state: Any = None
    ) -> tuple[Tensor, NoState]:
        refuse_state(self, positions, state)
        return self.mix(x), no_state(x)

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], from nothing."""
        raise NotImplementedError

    def init_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        return no_state(torch.empty(batch_size, 0, dtype=dtype, device=device))

    def state_numbers(self, context: int) -> int:
        """Numbers that a decoder of this mixer has to hold after `context` tokens."""
        raise NotImplementedError

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """What a decoder of it has to hold for the next token; this one holds nothing."""
        return batch_size * self.state_numbers(context) * dtype.itemsize

    def flops_per_token(self, context: int) -> int:
        """Its maps' alone."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2)


class Borrowed(Baseline):
    """A mixer of transformers: `inner`, made and started by its own library."""

    inner: Any
    inner_config: Any

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.inner, library = self.borrow(self.hidden_size, self.num_heads)
        starter = library.__new__(library)  # of the model, its rule for starting weights alone
        nn.Module.__init__(starter)
        starter.config = self.inner_config
        if not any(p.is_meta for p in self.inner.parameters()):
            for module in self.inner.modules():
                starter._init_weights(module)

    def borrow(self, dim: int, heads: int) -> tuple[nn.Module, type[PreTrainedModel]]:
        """The module, and the class of the models it belongs to; sets `inner_config`."""
        raise NotImplementedError

    def mix(self, x: Tensor) -> Tensor:
        return self.inner(x)


@register("mamba2")
class Mamba2(Borrowed):
    """Mamba-2: twice the width inside, 128 numbers of state per channel."""

    label = "Mamba-2"

    def borrow(self, dim: int, heads: int) -> tuple[nn.Module, type[PreTrainedModel]]:
        from transformers.models.mamba2 import modeling_mamba2 as library

        self.inner_config = library.Mamba2Config(
            hidden_size=dim,
            num_hidden_layers=1,
            head_dim=dim // heads,
            num_heads=2 * heads,
            n_groups=1,
            chunk_size=32,  # of plain torch, whose memory grows with it; the function is the same
        )
        return library.Mamba2Mixer(self.inner_config, 0), library.Mamba2PreTrainedModel

    def state_numbers(self, context: int) -> int:
        inner = self.inner
        recurrent = inner.intermediate_size * inner.ssm_state_size
        return recurrent + (inner.conv_kernel_size - 1) * inner.conv_dim


@register("rg_lru")
class RgLru(Borrowed):
    """RecurrentGemma's recurrent block."""

    label = "RG-LRU (RecurrentGemma)"

    def borrow(self, dim: int, heads: int) -> tuple[nn.Module, type[PreTrainedModel]]:
        from transformers.models.recurrent_gemma import modeling_recurrent_gemma as library

        self.inner_config = library.RecurrentGemmaConfig(
            hidden_size=dim, num_hidden_layers=1, num_attention_heads=heads, lru_width=dim
        )
        block = library.RecurrentGemmaRecurrentBlock(self.inner_config, 0)
        return block, library.RecurrentGemmaPreTrainedModel

    def mix(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)[None]
        positions = positions.expand(x.shape[0], -1)
        return self.inner(x, positions, None, use_cache=False)[0]

    def state_numbers(self, context: int) -> int:
        return self.inner.conv1d_width * self.inner.lru_width


@register("gated_deltanet")
class GatedDeltaNet(Borrowed):
    """Qwen3-Next's linear layer: twice as many values as keys, as there."""

    label = "Gated delta net (Qwen3-Next)"

    def borrow(self, dim: int, heads: int) -> tuple[nn.Module, type[PreTrainedModel]]:
        from transformers.models.qwen3_next import modeling_qwen3_next as library

        self.inner_config = library.Qwen3NextConfig(
            hidden_size=dim,
            num_hidden_layers=1,
            linear_num_key_heads=heads,
            linear_num_value_heads=2 * heads,
            linear_key_head_dim=dim // heads,
            linear_value_head_dim=dim // heads,
            layer_types=["linear_attention"],
        )
        layer = library.Qwen3NextGatedDeltaNet(self.inner_config, 0)
        return layer, library.Qwen3NextPreTrainedModel

    def state_numbers(self, context: int) -> int:
        inner = self.inner
        recurrent = inner.value_dim * inner.head_k_dim
        return recurrent + (inner.conv_kernel_size - 1) * inner.conv_dim


@register("kimi_delta")
class KimiDelta(Borrowed):
    """Kimi Linear's delta attention."""

    label = "Kimi delta attention"

    def borrow(self, dim: int, heads: int) -> tuple[nn.Module, type[PreTrainedModel]]:
        from transformers.models.kimi_linear import modeling_kimi_linear as library

        self.inner_config = library.KimiLinearConfig(
            hidden_size=dim,
            num_hidden_layers=1,
            linear_num_heads=heads,
            linear_head_dim=dim // heads,
            layer_types=["linear_attention"],
        )
        layer = library.KimiLinearDeltaAttention(self.inner_config, 0)
        return layer, library.KimiLinearPreTrainedModel

    def state_numbers(self, context: int) -> int:
        inner = self.inner
        return inner.qkv_dim * inner.head_dim + (inner.conv_kernel_size - 1) * inner.conv_dim


@register("short_conv")
class GatedConvolution(Borrowed):
    """LFM2's gated short convolution."""

    label = "Gated short convolution (LFM2)"

    def borrow(self, dim: int, heads: int) -> tuple[nn.Module, type[PreTrainedModel]]:
        from transformers.models.lfm2 import modeling_lfm2 as library

        self.inner_config = library.Lfm2Config(
            hidden_size=dim, num_hidden_layers=1, layer_types=["conv"]
        )
        return library.Lfm2ShortConv(self.inner_config, 0), library.Lfm2PreTrainedModel

    def state_numbers(self, context: int) -> int:
        return (self.inner.conv_kernel_size - 1) * self.hidden_size


def convolutions(mixer: Mixer) -> list[ShortConvolution]:
    """Of queries, keys and values; half of the keys' heads start one token late."""
    dim = mixer.hidden_size
    late = dim - mixer.num_heads // 2 * mixer.head_dim, dim
    return [ShortConvolution(dim, when) for when in ((0, 0), late, (0, 0))]


@register("conv_attention", ROPE_THETA)
class ConvAttention(Baseline):
    """The Transformer baseline with a short convolution on queries, keys and values each."""

    label = "Transformer, short convolutions"
    visible = AttentionMixer.visible

    def __init__(self, **options: Any):
        super().__init__(**options)
        dim = self.hidden_size
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.q_conv, self.k_conv, self.v_conv = convolutions(self)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        AttentionMixer.check(values)

    def mix(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
        q, k, v = (self._split(self._convolved(each, x)) for each in "qkv")
        q, k = (rotate(each, positions, self.settings["rope_theta"]) for each in (q, k))
        y = resolve("attention", "auto", q).function(q, k, v, None, True)
        return self.out_proj(y.flatten(-2))

    def _convolved(self, each: str, x: Tensor) -> Tensor:
        mapped = getattr(self, f"{each}_proj")(x)
        convolution = getattr(self, f"{each}_conv")
        return convolution.convolve(mapped, state=None, positions=None, method="auto")[0]

    def state_numbers(self, context: int) -> int:
        return (2 * context + 3 * (TAPS - 1)) * self.hidden_size


BASELINES = tuple(name for name, mixer in MIXERS.items() if issubclass(mixer, Baseline))
