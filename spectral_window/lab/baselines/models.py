"""Whole models that others use, at the size of an SWH model: what the benches time.

Each is transformers' own implementation as it runs on this machine, randomly initialised, with the
same vocabulary, width and depth as a given `SWHConfig` and as many parameters beside embedding and
head: Llama and RecurrentGemma by the width of their feed-forward layers, Mamba2, which has none,
by its number of layers. On a CPU the two recurrent ones run in plain torch: their fast kernels
need a GPU.

What differs between these models, SWH among them, is in one `Baseline` each: how it is built, what
its cache is called, and how the cache after a long context is made without running it (`remember`).
The cost of a token depends on how much is remembered, not on what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2Config,
    PretrainedConfig,
    RecurrentGemmaConfig,
)
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from spectral_window.errors import UserError
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.nn.mixers import map_state

Build = Callable[[SWHConfig, int, torch.dtype], nn.Module]


class Baseline(NamedTuple):
    """A kind of model, known by the class of its config.

    build:  (a config to be like, parameters beside embedding and head, dtype) -> the model.
    cache:  the argument and the output of its forward that carry the cache.
    past:   (model, tokens, static) -> (a cache as after so many tokens of one row, the bytes of the
            state in it); None where no cache can be made so.
    """

    config: type[PretrainedConfig]
    build: Build
    cache: str = "past_key_values"
    past: Callable[[Any, int, bool], tuple[Any, int]] | None = None


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
    size = like.head_dim
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


def build_baseline(name: str, like: SWHConfig, parameters: int, dtype: torch.dtype) -> nn.Module:
    """The model `name` of BASELINES, in evaluation mode. It has `parameters` beside embedding and
    head, as near as its width or depth allows."""
    return BASELINES[name].build(like, parameters, dtype).eval()


def _itself(like: SWHConfig, parameters: int, dtype: torch.dtype) -> nn.Module:
    """The model that the others are made equal to."""
    return nn.Module.to(SWHForCausalLM(like), dtype)


def _equal(config_of: Callable[[SWHConfig, int], PretrainedConfig]) -> Build:
    """Build by `config_of(like, size)`, whose parameters grow by as many with every size, a width
    or a number of layers."""

    def build(like: SWHConfig, parameters: int, dtype: torch.dtype) -> nn.Module:
        def count(size: int) -> int:
            with torch.device("meta"):
                return count_inner(AutoModelForCausalLM.from_config(config_of(like, size)))

        step = count(2) - count(1)
        size = max(1, 1 + round((parameters - count(1)) / step))
        return AutoModelForCausalLM.from_config(config_of(like, size), dtype=dtype)

    return build


def build_fla(name: str, like: SWHConfig, parameters: int, **sizes: Any) -> nn.Module:
    """A model of the package `fla`, with all of its fused kernels, for a GPU.

    name: as in fla's config (GatedDeltaNet, KDA, Mamba2). It has `parameters` in all, as near as
    the width of its feed-forward layers allows (Mamba2, which has none: its number of layers).
    sizes: other fields of that config. Raises ImportError where fla is not installed.
    """
    import fla.models as library

    grows = "num_hidden_layers" if name == "Mamba2" else "intermediate_size"

    def config_of(size: int) -> Any:
        fields = {"num_hidden_layers": like.num_hidden_layers, **sizes, grows: size}
        return getattr(library, f"{name}Config")(
            hidden_size=like.hidden_size, vocab_size=like.vocab_size, **fields
        )

    def count(size: int) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(size))
        return sum(p.numel() for p in model.parameters())

    low, high = (1, 2) if name == "Mamba2" else (64, 128)
    each = (count(high) - count(low)) / (high - low)
    size = max(low, low + round((parameters - count(low)) / each))
    if name != "Mamba2":
        size = max(64, size // 8 * 8)  # what tensor cores multiply without padding
    return AutoModelForCausalLM.from_config(config_of(size))


def count_inner(model: Any) -> int:
    """Parameters beside embedding and head."""
    outer = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings())
             for p in m.parameters()}  # fmt: skip
    return sum(p.numel() for p in model.parameters() if id(p) not in outer)


def baseline_of(model: Any) -> Baseline:
    """The record of what `model` is. Raises UserError for a kind that has none."""
    for baseline in BASELINES.values():
        if type(model.config) is baseline.config:
            return baseline
    raise UserError(
        f"no record of {type(model).__name__} (baselines): choose one of {', '.join(BASELINES)}"
    )


def next_token(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """(logits [B, 1, vocab] of the last token, the cache to continue from): what is timed of every
    model here."""
    name = baseline_of(model).cache
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
    return out.logits, out.get(name)  # RecurrentGemma keeps its own


@torch.no_grad()
def remember(model: Any, context: int, *, static: bool = False) -> tuple[Any, int]:
    """(a cache as after `context` tokens of one row, the bytes of the state in it), filled with
    random numbers where it holds keys and values.

    static: Llama's keys and values in memory set aside for them, instead of growing.
    Raises UserError where the model cannot be given a past.
    """
    past = baseline_of(model).past
    if past is None:
        raise UserError(f"{type(model).__name__} (remember): its cache cannot be set to a context")
    return past(model, context, static)


def _keys_and_values(model: Any, context: int, static: bool) -> tuple[Cache, int]:
    config, heads = model.config, model.config.num_attention_heads
    some = torch.randn(1, heads, 1000, config.hidden_size // heads, dtype=model.dtype)
    past = some.repeat(1, 1, -(-context // 1000), 1)[:, :, :context]
    cache: Cache = DynamicCache(config=config)
    if static:
        cache = StaticCache(config=config, max_cache_len=context + 64)
    for layer in range(config.num_hidden_layers):
        cache.update(past, past, layer)  # both kinds copy
    return cache, 2 * config.num_hidden_layers * past.nbytes


def _after_a_few(model: Any) -> Any:
    """The cache after some real tokens."""
    return next_token(model, torch.zeros(1, 130, dtype=torch.int64))[1]


def _any_state(model: Any, context: int, static: bool) -> tuple[Any, int]:
    """A state without positions: that of a few tokens is one of a million."""
    cache = _after_a_few(model)
    states = [s for x in cache.layers for s in (x.conv_states, x.recurrent_states)]
    return cache, sum(tensor.nbytes for state in states for tensor in state.values())


def _shifted(model: Any, context: int, static: bool) -> tuple[Cache, int]:
    """An SWH cache whose row stands at position `context`; the ring's contents stay."""
    cache = copy.copy(_after_a_few(model))
    for layer in cache.layers:
        layer.state = map_state(
            layer.state, lambda t: t if t.is_floating_point() else torch.full_like(t, context)
        )
        layer.seen = context
    return cache, model.state_bytes(context)


BASELINES = {
    "SWH": Baseline(SWHConfig, _itself, past=_shifted),
    "Llama": Baseline(LlamaConfig, _equal(_llama), past=_keys_and_values),
    "Mamba2": Baseline(Mamba2Config, _equal(_mamba2), "cache_params", past=_any_state),
    "RecurrentGemma": Baseline(RecurrentGemmaConfig, _equal(_recurrent_gemma)),
}
