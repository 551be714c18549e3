"""The models people would take instead, at the size of an SWH model, for comparisons.

Each is transformers' own implementation as it runs on this machine, randomly initialised, with the
same vocabulary, width and depth as a given `SWHConfig` and as many parameters beside embedding and
head: Llama and RecurrentGemma by the width of their feed-forward layers, Mamba2, which has none,
by its number of layers. On a CPU the two recurrent ones run in plain torch: their fast kernels
need a GPU.

`remember` gives a model a cache as after a long context without running it: the cost of a token
depends on how much is remembered, not on what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, RecurrentGemmaConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from spectral_window.errors import UserError
from spectral_window.hf.cache import SWHCacheLayer
from spectral_window.hf.config import SWHConfig
from spectral_window.nn.mixers import map_state

Build = Callable[[SWHConfig, int], Any]


def _llama(like: SWHConfig, width: int) -> LlamaConfig:
    return LlamaConfig(
        **_common(like),
        **_attention(like),
        intermediate_size=width,
        max_position_embeddings=1 << 20,
    )


def _recurrent_gemma(like: SWHConfig, width: int) -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        **_common(like),
        **_attention(like),
        intermediate_size=2 * width,  # gate and up together
    )


def _mamba2(like: SWHConfig, layers: int) -> Mamba2Config:
    size = like.hidden_size // like.num_attention_heads
    return Mamba2Config(
        **_common(like),
        num_hidden_layers=layers,
        head_dim=size,
        num_heads=2 * like.hidden_size // size,
        n_groups=1,
    )


def _common(like: SWHConfig) -> dict[str, Any]:
    return {
        "vocab_size": like.vocab_size,
        "hidden_size": like.hidden_size,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _attention(like: SWHConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": like.num_hidden_layers,
        "num_attention_heads": like.num_attention_heads,
        "attn_implementation": "sdpa",
    }


PEERS: dict[str, Build] = {
    "Llama": _llama,
    "Mamba2": _mamba2,
    "RecurrentGemma": _recurrent_gemma,
}


def build_peer(name: str, like: SWHConfig, parameters: int, dtype: torch.dtype) -> nn.Module:
    """The peer `name` (a key of PEERS) with `parameters` beside embedding and head, as near as its
    width or depth allows; in evaluation mode."""
    build = PEERS[name]

    def count(size: int) -> int:
        with torch.device("meta"):
            return count_inner(AutoModelForCausalLM.from_config(build(like, size)))

    step = count(2) - count(1)
    size = max(1, 1 + round((parameters - count(1)) / step))
    return AutoModelForCausalLM.from_config(build(like, size), dtype=dtype).eval()


def count_inner(model: Any) -> int:
    """Parameters beside embedding and head."""
    outer = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings())
             for p in m.parameters()}  # fmt: skip
    return sum(p.numel() for p in model.parameters() if id(p) not in outer)


def next_token(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """(logits [B, 1, vocab] of the last token, the cache to go on from): what every model here is
    timed at."""
    word = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{word: cache})
    return out.logits, out.get(word)  # RecurrentGemma keeps its own


@torch.no_grad()
def remember(model: Any, context: int, *, static: bool = False) -> tuple[Any, int]:
    """(a cache as after `context` tokens of one row, its bytes), filled with random numbers where
    it holds keys and values.

    static: Llama's keys and values in memory set aside for them, instead of growing.
    Raises ValueError where the model cannot be given a past.
    """
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)
    if config.model_type == "llama":
        size = config.hidden_size // heads
        past = torch.randn(1, heads, 1000, size, dtype=model.dtype)
        shape = (1, heads, context, size)
        past = past.repeat(1, 1, -(-context // 1000), 1)[:, :, :context]
        assert past.shape == shape
        cache: Cache = DynamicCache(config=config)
        if static:
            cache = StaticCache(config=config, max_cache_len=context + 64)
        for layer in range(config.num_hidden_layers):
            cache.update(past, past, layer)  # both kinds copy
        return cache, 2 * config.num_hidden_layers * past.nbytes
    start = torch.zeros(1, 130, dtype=torch.int64)
    cache = next_token(model, start)[1]
    if config.model_type == SWHConfig.model_type:
        return _shifted(cache, context), model.state_bytes(context)
    if config.model_type == "mamba2":  # no positions: a state of 130 tokens is one of a million
        return cache, sum(_bytes(layer) for layer in cache.layers)
    raise UserError(f"{config.model_type} (remember): its cache cannot be set to a context")


def _shifted(cache: Cache, context: int) -> Cache:
    """An SWH cache whose rows stand at position `context`; the ring's contents stay."""
    cache = copy.copy(cache)
    for layer in cache.layers:
        assert isinstance(layer, SWHCacheLayer)
        layer.state = map_state(
            layer.state, lambda t: t if t.is_floating_point() else torch.full_like(t, context)
        )
        layer.seen = context
    return cache


def _bytes(layer: Any) -> int:
    found = 0
    for states in (layer.conv_states, layer.recurrent_states):
        found += sum(tensor.nbytes for tensor in states.values())
    return found
