"""The cache of transformers' `generate()`: one mixer state per layer, for any mixer.

transformers builds a `DynamicCache` from `config.layer_types`, and finds `SWHCacheLayer` by its
`_layer_type`. A cache layer stores the state that its mixer returned: for the spectral-window mixer
a constant number of bytes, for attention all keys and values. This file does not depend on which.

Removing tokens. Assisted decoding and prompt lookup guess several tokens and remove the wrong ones
(`crop`). A recurrent state cannot be cut like a list of keys. So when transformers asks for it
(`activate_past_recording`), a cache layer stores the state before each forward pass and its inputs,
and recomputes the state of the tokens that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from spectral_window.errors import UserError, UserTypeError
from spectral_window.hf.config import STATE_LAYER_TYPE, SWHConfig
from spectral_window.hf.inputs import next_start
from spectral_window.nn.mixers import map_state
from spectral_window.ops.documents import Documents

RECORDED_TOKENS = 1024  # a recording layer can remove at least this many tokens


class Layer(Protocol):
    """A block of the model, as far as the cache uses it."""

    config: SWHConfig

    def __call__(self, x: Tensor, documents: Documents | None, state: Any, /) -> tuple[Tensor, Any]:
        """Return the output and the state after x."""

    def next_state(self, x: Tensor, documents: Documents | None, state: Any) -> Any:
        """Return the state after x, without computing the output."""


class _Step(NamedTuple):
    """A forward pass that can be undone: its inputs, and the state before it."""

    layer: Layer
    x: Tensor
    documents: Documents | None
    state: Any
    start: Tensor | None


class SWHCacheLayer(CacheLayerMixin):
    """The state of one mixer, and the number of tokens it has seen.

    Attributes:
        state: the mixer's NamedTuple, batch first in every tensor; None before the first token.
        seen: tokens per row so far, including padding.
        start: [B] int64, the next position of each row; None if that is `seen`, that is, if there
            was no padding and no second document.
    """

    _layer_type = STATE_LAYER_TYPE
    is_sliding = False
    is_compileable = False  # with True generate() would build 4-D masks, which we do not accept
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Clear the state: the next token is the first."""
        self.state: Any = None
        self.seen = 0
        self.start: Tensor | None = None
        self.owner: dict[str, Any] = {}
        self.batch_size = -1
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.is_initialized = False
        self._past: list[_Step] = []

    def advance(
        self, layer: Layer, x: Tensor, documents: Documents | None, start: Tensor | None
    ) -> Tensor:
        """Run `layer` on x [B, T, D] from the stored state, and store the state after it."""
        y, state = layer(x, documents, self.state)
        if self.record_past:
            self._record(_Step(layer, x.detach(), documents, self.state, self.start))
        self.state = state
        self.seen = self.seen + x.shape[1]
        self.start = start
        if not self.is_initialized:
            self.batch_size, self.dtype, self.device = x.shape[0], x.dtype, x.device
            self.owner = state_identity(layer.config)
            self.is_initialized = True
        return y

    def _record(self, step: _Step) -> None:
        self._past.append(step)
        while sum(past.x.shape[1] for past in self._past[1:]) >= RECORDED_TOKENS:
            self._past.pop(0)

    # The interface that transformers calls:

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, and discard the record of earlier ones.

        Raises:
            UserError: the tokens were not recorded (see `activate_past_recording`).
        """
        remove = -tokens_to_remove
        recorded = sum(step.x.shape[1] for step in self._past)
        if remove < 0:
            raise UserError(
                f"crop({tokens_to_remove}) (cache): pass minus the number of tokens to take back"
            )
        if remove > recorded:
            raise UserError(
                f"crop({tokens_to_remove}) (cache): {recorded} tokens can be taken back; "
                "call cache.activate_past_recording() before the tokens that may be"
            )
        while remove > 0:
            step = self._past.pop()
            length = step.x.shape[1]
            keep = max(length - remove, 0)
            self.state, self.start, self.seen = step.state, step.start, self.seen - length
            if keep:
                self._replay(step, keep)
            remove -= length - keep
        self._past.clear()

    @torch.no_grad()
    def _replay(self, step: _Step, keep: int) -> None:
        documents = None if step.documents is None else step.documents.columns(slice(0, keep))
        self.state = step.layer.next_state(step.x[:, :keep], documents, step.state)
        self.start = next_start(documents, step.start, self.seen, keep)
        self.seen += keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices, ...])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, which may change the first dimension, to every stored tensor."""
        if not self.is_initialized:
            return

        def over(state: Any) -> Any:
            return None if state is None else map_state(state, fn)

        def on(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else fn(tensor)

        def rows(documents: Documents | None) -> Documents | None:
            return None if documents is None else documents.rows(fn)

        self.state, self.start = over(self.state), on(self.start)
        self._past = [
            _Step(step.layer, fn(step.x), rows(step.documents), over(step.state), on(step.start))
            for step in self._past
        ]
        self.batch_size = fn(torch.empty(self.batch_size, device=self.device)).shape[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not supported: this cache has no keys and values. The model calls `advance`."""
        raise UserTypeError(
            "this cache holds mixer states, not keys and values: for SWH models only"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise UserTypeError(
            "this cache holds mixer states, not keys and values: for SWH models only"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file has the state but not the model, so it cannot remove tokens.
        return {**self.__dict__, "_past": []}


# A static cache is chosen for constant memory; our state has that already.
cache_utils.STATIC_LAYER_TYPE_MAPPING[STATE_LAYER_TYPE] = SWHCacheLayer


def state_identity(config: SWHConfig) -> dict[str, Any]:
    """Return the config fields, with values, that two models must share to exchange states."""
    return config.deciding("state")


def _check_owner(owner: dict[str, Any], config: SWHConfig) -> None:
    """Raise UserError, with the fields that differ, if a state belongs to another model.

    A field that only one of two models records depends on another field that differs, or has its
    default in the other model.
    """
    differ = [
        f"{name} {value!r} and not {getattr(config, name, None)!r}"
        for name, value in owner.items()
        if value != getattr(config, name, None)
    ]
    if differ:
        raise UserError(
            f"past_key_values was made by a model of {', '.join(differ)} (cache): "
            "build it with this model"
        )


def open_cache(cache: Cache, config: SWHConfig, x: Tensor) -> list[SWHCacheLayer]:
    """Return the layers of `cache` for a forward pass on x [B, T, D].

    An empty cache that was made without a config is filled with our layers.

    Raises:
        UserError: a cache of another model, batch, dtype or device, or one that an exception left
            half-written.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UserError(
            f"past_key_values is a {type(cache).__name__} (cache): "
            "pass DynamicCache(config=model.config)"
        )
    if not cache.layers:
        cache.layers = [SWHCacheLayer() for _ in range(config.num_hidden_layers)]
        cache.layer_class_to_replicate = None
    layers = [layer for layer in cache.layers if isinstance(layer, SWHCacheLayer)]
    if not layers and cache.get_seq_length():
        raise UserError(
            "past_key_values holds keys and values (cache): this model goes on from states; pass "
            "what it returned, and for an adapter choose prompt tuning instead of prefix tuning"
        )
    if len(layers) != len(cache.layers) or len(layers) != config.num_hidden_layers:
        raise UserError(
            f"past_key_values has {len(cache.layers)} layers, {len(layers)} of ours (cache): "
            f"this model needs {config.num_hidden_layers} of its own; "
            "pass DynamicCache(config=model.config)"
        )
    first = layers[0]
    if any(layer.seen != first.seen for layer in layers):
        raise UserError(
            "past_key_values is half-written (cache): a forward was interrupted; build it again"
        )
    if not first.is_initialized:
        return layers
    _check_owner(first.owner, config)
    if first.batch_size != x.shape[0]:
        raise UserError(
            f"past_key_values holds {first.batch_size} rows, the input {x.shape[0]} (cache): "
            "use cache.batch_repeat_interleave or batch_select_indices, or build it again"
        )
    if first.dtype != x.dtype or first.device != x.device:
        raise UserError(
            f"past_key_values is {first.dtype} on {first.device} (cache): "
            f"the input is {x.dtype} on {x.device}; build it with the model as it is now"
        )
    return layers
