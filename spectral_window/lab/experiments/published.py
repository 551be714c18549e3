"""The paper's two models as they were timed: the same function as ours, computed the published way.

    attention   scores of every query with every key in memory, [B, H, T, T], then a softmax
    window      scores of every chunk with itself and the chunk before, [B, N, H, W, 2W]
    spectral    one FFT of 2T points a channel, float32; the kernel's angles in float32
    block       the mixer is evaluated twice and the first output dropped, in both models

Nothing here is fused, cut into segments or compiled, and dropping an output changes no number: with
the weights of one of our models the hidden states are that model's, which is checked before any
time is taken. Window and convolution are those that the benches hold our operators against; our
method `fft` would not do, because it also returns a state, which the published code has not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_window.hf.model import SWHLayer, SWHModel
from spectral_window.lab.bench.operators import naive_chunks, paper_fft, turn
from spectral_window.nn.layers import RMSNorm, SwiGLU


class Output(NamedTuple):
    """What `Published` returns, as transformers' models name it."""

    last_hidden_state: Tensor  # [B, T, D]


class Published(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D], with the weights of `model` (shared, not copied)
    as the paper computes them: called as `model` itself, without a cache.

    model:       the paper's layer, or the Transformer; SwiGLU, RoPE's theta 10,000.
    evaluations: how often a block evaluates its mixer; the paper's code does it twice.
    """

    def __init__(self, model: SWHModel, evaluations: int = 2):
        super().__init__()
        self.model = model
        self.config = model.config
        self.evaluations = evaluations
        self.mix = MIX[self.config.mixer]

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Output:
        x = self.model.embed_tokens(input_ids)
        for module in self.model.layers:
            layer = cast(SWHLayer, module)
            normed = normalise(x, layer.mixer_norm)
            for _ in range(self.evaluations):
                mixed = self.mix(layer.mixer, normed)
            x = x + mixed
            x = x + feed_forward(normalise(x, layer.mlp_norm), cast(SwiGLU, layer.mlp))
        return Output(normalise(x, self.model.norm))


def transformer(mixer: Any, x: Tensor) -> Tensor:
    """The Transformer's mixer: x [B, T, D] -> [B, T, D]."""
    return mixer.out_proj(attention(*_projected(mixer, x)).flatten(-2))


def spectral_window(mixer: Any, x: Tensor) -> Tensor:
    """The paper's mixer: x [B, T, D] -> [B, T, D]."""
    attended = naive_chunks(*_projected(mixer, x), window=mixer.window)
    local, kernel = mixer.local_proj(attended.flatten(-2)), mixer.kernel
    spectral = paper_fft(mixer.conv_proj(x), kernel.decay.abs(), kernel.frequency)
    return mixer.out_proj(normalise(spectral, mixer.fusion.norm) + local)


MIX = {"attention": transformer, "spectral_window": spectral_window}  # by the config's mixer


def _projected(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, K]."""
    q, k, v = (
        proj(x).unflatten(-1, (mixer.num_heads, mixer.head_dim))
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with RoPE and all scores in memory; q, k, v and result [B, T, H, K]."""
    time, _, size = q.shape[1:]
    q, k, v = (x.transpose(1, 2) for x in (turn(q), turn(k), v))
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    scores = q @ k.mT * size**-0.5
    scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attention_bytes(heads: int, time: int) -> int:
    """Bytes that `attention` holds at once in matrices of T x T, float32: the scores of every head
    before and after a step (scale, mask, softmax), and the mask."""
    return time * time * (2 * 4 * heads + 1)


def normalise(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm, an operation at a time."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def feed_forward(x: Tensor, mlp: SwiGLU) -> Tensor:
    """SwiGLU, an operation at a time."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
