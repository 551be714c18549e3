"""What a model is: `SWHConfig`, a closed and checked set of fields.

A config is *closed*: a key that is not a field is an error that names the nearest field, because
a misspelt `windw=64` that trains a window of 32 is found a week later. It is *checked* when it is
made, when it is saved, and when a model is built from it, so no wrong value reaches a tensor.
Choices of speed (which method computes an operator) are not fields: they do not change the
function.

What other libraries set on a config is theirs and stays in memory: a file holds what loads again.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import numbers
import warnings
from collections.abc import Iterable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from spectral_window.errors import UserError, UserTypeError, unknown
from spectral_window.hf.limits import check_size

MODEL_TYPE = "swh"
STATE_LAYER_TYPE = "spectral_window_state"  # how transformers finds our cache layer
BRANCHES = ("spectral", "window")
_LARGEST = 2**31 - 1
UNLIMITED = _LARGEST  # tokens; a number, since evaluation harnesses compute with it
_TRAINED_AT = "max_position_embeddings"  # how config.json said `training_length` at first

# Keys that transformers itself writes to config.json or hands to a config, beyond its own fields.
_ACCEPTED = {
    "_name_or_path",
    "name_or_path",
    "torch_dtype",
    "num_labels",
    "output_attentions",
    _TRAINED_AT,
    "attn_implementation",
    "experts_implementation",
    "quantization_config",
}
# Keys of foreign config files that must have no effect: no code is imported, nothing is switched.
_IGNORED = {
    "auto_map",
    "trust_remote_code",
    "_commit_hash",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
}


def _shape(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


# The paper's architecture at several sizes. 125m is the paper's own; the others have the shapes
# usual at that size. A narrow model needs wider initial weights: 0.02 at 128 channels stalls a
# Transformer.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "tiny": _shape(128, 4, 4, vocab_size=4096, initializer_range=0.05),
        "small": _shape(384, 6, 6, vocab_size=4096, initializer_range=0.03),
        "125m": _shape(768, 12, 12),
        "350m": _shape(1024, 24, 16),
        "760m": _shape(1536, 24, 24),
        "1.3b": _shape(2048, 24, 32),
    },
}


class SWHConfig(PreTrainedConfig):
    """Configuration of `SWHModel` and `SWHForCausalLM`; keywords only, errors are `UserError`.

    vocab_size:            number of tokens.
    hidden_size:           D, channels of the residual stream.
    num_hidden_layers:     blocks.
    num_attention_heads:   H; divides hidden_size, and rotary positions need an even head size.
    intermediate_size:     width of the MLP; None: int(8 D / 3) for swiglu, 4 D for gelu.
    window:                W, tokens in a chunk; a token sees its chunk and the whole one before it.
    kernel, fusion, mixer: names in `spectral_window.nn`'s registries; mixer "attention" is the
                           Transformer baseline.
    branches:              the mixer's branches, a non-empty part of ("spectral", "window").
    mlp:                   "swiglu" or "gelu".
    rope_theta:            base of the rotary angles of the window branch and of attention.
    rms_norm_eps:          added under the root of every RMSNorm.
    initializer_range:     std of Linear and Embedding weights; None: PyTorch's own initialisation.
    training_length:       tokens of a row in training; informative.
    tie_word_embeddings:   one matrix for embedding and head.
    use_cache:             return a state to continue from, unless asked otherwise.

    `max_position_embeddings`, which evaluation harnesses and `generate` take as the longest
    context, follows: `training_length` for the Transformer baseline, `UNLIMITED` where the state
    has a constant size and a token costs the same at any length. Given, it is taken as the training
    length.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    window: int = 32
    kernel: str = "damped_oscillator"
    fusion: str = "norm_add"
    mixer: str = "spectral_window"
    branches: tuple[str, ...] = BRANCHES
    mlp: str = "swiglu"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = 0.02
    training_length: int = 1024
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        for key in (*_IGNORED, "model_type"):
            kwargs.pop(key, None)
        if _TRAINED_AT in kwargs:
            self.max_position_embeddings = kwargs.pop(_TRAINED_AT)
        if isinstance(self.branches, Iterable) and not isinstance(self.branches, str):
            self.branches = tuple(self.branches)
        self.validate()
        self.branches = tuple(name for name in BRANCHES if name in self.branches)
        super().__post_init__(**kwargs)
        # Whoever has a config may ask an Auto class for its model next: registering happens there.
        importlib.import_module("spectral_window.hf.classification")

    @classmethod
    def preset(cls, name: str = "paper", *, size: str = "125m", **overrides: Any) -> SWHConfig:
        """A named architecture at a size: `SWHConfig.preset("paper", size="125m", window=64)`."""
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        if size not in PRESETS[name]:
            raise unknown("size", size, PRESETS[name])
        return cls(**{**PRESETS[name][size], **overrides})

    @property
    def layer_types(self) -> list[str]:
        """One cache layer type a block. Read-only: stored, the name would break resuming."""
        return [STATE_LAYER_TYPE] * self.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        """The longest context in tokens, as other libraries ask for it."""
        from spectral_window.nn.mixers import MIXERS

        return UNLIMITED if MIXERS[self.mixer].constant_state else self.training_length

    @max_position_embeddings.setter
    def max_position_embeddings(self, length: int) -> None:
        _positive_int(_TRAINED_AT, length)
        if length != UNLIMITED:
            self.training_length = length

    @property
    def auto_map(self) -> dict[str, str]:
        """Empty: no code comes with a model. Other libraries look here before they import some."""
        return {}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Refused: the file that it copies into a model's folder cannot be loaded by itself."""
        raise code_stays_here(cls)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write config.json; attributes that are no fields are left out, with a warning."""
        foreign = sorted(key for key in super().to_diff_dict() if not self._loads(key))
        if foreign:
            hints = "; ".join(str(unknown("config key", key, self._names())) for key in foreign)
            warnings.warn(f"not saved with the config: {hints}", stacklevel=2)
        super().save_pretrained(*args, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: fields that differ from transformers' own defaults."""
        return {key: value for key, value in super().to_diff_dict().items() if self._loads(key)}

    @property
    def head_dim(self) -> int:
        """K, channels of one head."""
        return self.hidden_size // self.num_attention_heads

    def validate(self) -> None:
        """Raise `UserError` for the first field whose value cannot make a model.

        An intermediate_size of None is filled in.
        """
        from spectral_window.nn.fusions import FUSIONS
        from spectral_window.nn.kernels import KERNELS
        from spectral_window.nn.layers import MLPS
        from spectral_window.nn.mixers import MIXERS

        names: dict[str, Any] = {
            "kernel": KERNELS,
            "fusion": FUSIONS,
            "mixer": MIXERS,
            "mlp": MLPS,
        }
        for field, known in names.items():
            value = getattr(self, field)
            if not isinstance(value, str) or value not in known:
                raise unknown(field, value, known)
        _positive_int("hidden_size", self.hidden_size)
        if self.intermediate_size is None:
            self.intermediate_size = MLPS[self.mlp].default_hidden(self.hidden_size)
        for field in (
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "window",
            "training_length",
        ):
            _positive_int(field, getattr(self, field))
        check_size(self)
        for field in ("tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"{field} is {getattr(self, field)!r} (config): use true or false")
        _finite(self, "rms_norm_eps", above=0.0)
        _finite(self, "rope_theta", above=0.0)
        _finite(self, "initializer_range", at_least=0.0, optional=True)
        if not isinstance(self.branches, tuple) or not self.branches:
            known_branches = ", ".join(BRANCHES)
            raise UserError(
                f"branches is {self.branches!r} (config): name some of {known_branches}"
            )
        for branch in self.branches:
            if branch not in BRANCHES:
                raise unknown("branch", branch, BRANCHES)
        if len(set(self.branches)) != len(self.branches):
            raise UserError(f"branches {self.branches!r} (config): name each branch once")
        self._check_heads()
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if not _is_int(token) or not 0 <= token < self.vocab_size:
                    raise UserError(
                        f"{field} is {token!r} (config): "
                        f"use a token id, 0 to {self.vocab_size - 1}, or null"
                    )

    def _check_heads(self) -> None:
        size, heads = self.hidden_size, self.num_attention_heads
        if size % heads:
            near = next(  # outwards from `heads`, for there may be two thousand million below
                n
                for distance in range(1, max(heads, size))
                for n in (heads - distance, heads + distance)
                if 0 < n <= size and size % n == 0
            )
            raise UserError(
                f"hidden_size {size} does not divide into num_attention_heads {heads} (config): "
                f"use {near} heads, or hidden_size {max(1, round(size / heads)) * heads}"
            )
        rotary = self.mixer != "spectral_window" or "window" in self.branches
        if rotary and self.head_dim % 2:
            raise UserError(
                f"head size {self.head_dim} is odd (config: hidden_size {size} / "
                f"num_attention_heads {heads}): rotary positions turn pairs of channels; "
                "make it even"
            )

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        model_type = kwargs.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise UserError(
                f"model_type is {model_type!r} (config): this is a config of '{MODEL_TYPE}' models"
            )
        for key in kwargs:
            if not self._loads(key):
                raise unknown("config key", key, self._names())

    @classmethod
    def _names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")]

    @classmethod
    def _loads(cls, key: str) -> bool:
        """Whether a config.json may hold `key`."""
        known = {f.name for f in dataclasses.fields(cls)}
        return key in known | _ACCEPTED | _IGNORED | {"model_type"}


def code_stays_here(cls: type) -> TypeError:
    """The answer to `register_for_auto_class`, of the config and of the models."""
    return UserTypeError(
        f"{cls.__name__} cannot travel in a model's folder (register_for_auto_class): "
        "`import spectral_window` makes it known to the Auto classes"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _positive_int(field: str, value: Any) -> None:
    if not _is_int(value) or not 1 <= value <= _LARGEST:
        raise UserError(f"{field} is {value!r} (config): use a whole number, 1 to {_LARGEST}")


def _finite(
    config: SWHConfig,
    field: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    optional: bool = False,
) -> None:
    value = getattr(config, field)
    if value is None and optional:
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= above or value < at_least:
        bound = f"above {above:g}" if above > -math.inf else f"of at least {at_least:g}"
        null = ", or null" if optional else ""
        raise UserError(f"{field} is {value!r} (config): use a finite number {bound}{null}")
