"""Small models and measures for the tests of hf/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spectral_window.hf import SWHConfig, SWHForCausalLM

MIXERS = ("spectral_window", "attention", "memory")
VOCAB = 61


def small_config(**fields: Any) -> SWHConfig:
    """W = 5, so a few dozen tokens fill many chunks; weights wide enough that tokens matter. The
    memory has its short convolution, as it is recommended."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "window": 5,
        "initializer_range": 0.2,
        "short_convolution": True,
    }
    return SWHConfig(**{**shape, **fields})


def small_model(seed: int = 0, **fields: Any) -> SWHForCausalLM:
    torch.manual_seed(seed)
    return SWHForCausalLM(small_config(**fields)).eval()


def word_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Words w1 to w60, each the token of its number; 0 pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(1, VOCAB)} | {"<pad>": 0}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", padding_side=padding_side
    )


def tokens(batch: int, time: int, seed: int = 1) -> Tensor:
    """Random tokens [B, T], none of them 0, which pads."""
    return torch.randint(1, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    """Relative rms of the difference."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())
