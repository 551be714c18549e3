"""The configuration of a model: `SWHConfig`, a closed and checked set of fields.

Fields of every model are declared here, one per line; options of parts are declared next to their
classes (`nn.options`). Code that needs a set of fields (the identity of a cache, a recipe, a table)
selects them by what they decide, and has no list of names.

A config is *closed*: a key that is not a field is an error that suggests the nearest field.
Otherwise a typo such as `windw=64`, which trains a window of 32, would be noticed too late. It is
*checked* when it is constructed, when it is saved, and when a model is built from it, so no bad
value reaches a tensor. Choices of speed (the methods of operators) are not fields: they do not
change what a model computes.

Attributes that other libraries set on a config stay in memory and are not written to files.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig

from spectral_window.errors import UserError, unknown
from spectral_window.hf.limits import check_size
from spectral_window.hf.stubs import write_stubs
from spectral_window.nn.layers import MLPS
from spectral_window.nn.memory import recommended
from spectral_window.nn.mixers import MIXERS
from spectral_window.nn.options import (
    LARGEST,
    Option,
    PartRegistry,
    all_options,
    chosen,
    recorded,
    reserve,
)

MODEL_TYPE = "swh"
STATE_LAYER_TYPE = "spectral_window_state"  # how transformers finds our cache layer
UNLIMITED = LARGEST  # tokens; a number, because evaluation harnesses compute with it
_TRAINED_AT = "max_position_embeddings"  # the old name of `training_length` in config.json

# Keys that transformers writes to config.json or passes to a config, beyond its own fields.
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
# Keys of foreign config files that must have no effect: no code is imported, no setting changes.
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


# The paper's architecture at several sizes. 125m is the paper's; the others have shapes that are
# usual at their size. A narrow model needs larger initial weights: with 0.02 at 128 channels a
# Transformer does not learn.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "tiny": _shape(128, 4, 4, vocab_size=4096, initializer_range=0.05),
        "small": _shape(384, 6, 6, vocab_size=4096, initializer_range=0.03),
        "125m": _shape(768, 12, 12),
        "350m": _shape(1024, 24, 16),
        "760m": _shape(1536, 24, 24),
        "1.3b": _shape(2048, 24, 32),
        "7b": _shape(4096, 32, 32),
    },
}
# the recommended model
PRESETS["memory"] = {
    size: shape | recommended(shape["hidden_size"]) for size, shape in PRESETS["paper"].items()
}


def _field(kind: type, default: Any, help: str, **more: Any) -> Any:
    """Declare a field of every config; its `Option` has the name that it is assigned to."""
    about = {"kind": kind, "help": help, "always": True} | more
    return dataclasses.field(default=default, metadata={"option": about})


class SWHConfig(PreTrainedConfig):
    """Configuration of `SWHModel` and `SWHForCausalLM`; keywords only.

    Its fields are those below, and the options of all registered parts. Options of parts that are
    not chosen have no effect, and are written to a file only if they are not at their default.
    `SWHConfig.fields()` returns an `Option` for each field.

    `max_position_embeddings`, which evaluation harnesses and `generate` read as the longest
    context, is derived: `training_length` for the Transformer baseline, and `UNLIMITED` for mixers
    with a state of constant size, where a token costs the same at any length. As an argument it
    sets `training_length`.

    Raises:
        UserError: an unknown field, or a bad value.

    Example:
        >>> config = SWHConfig(hidden_size=64, num_attention_heads=4, window=16)
        >>> config.head_dim, config.window, config.kernel
        (16, 16, 'damped_oscillator')
        >>> SWHConfig(windw=16)
        Traceback (most recent call last):
        spectral_window.errors.UserError: unknown config key 'windw': did you mean 'window'?
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = _field(int, 50304, "number of tokens", decides="function")
    hidden_size: int = _field(int, 768, "D, channels of the residual stream")
    num_hidden_layers: int = _field(int, 12, "blocks")
    num_attention_heads: int | None = _field(
        int, None, "H, heads; divides hidden_size; null: heads of 64 channels", optional=True
    )
    intermediate_size: int | None = _field(
        int, None, "width of the mlp; null: the mlp's own (8 D / 3, or 4 D for gelu)",
        optional=True, decides="function",
    )  # fmt: skip
    mixer: str = _field(
        str, "spectral_window", 'lets tokens see one another; "attention" is a Transformer\'s',
        choices=MIXERS,
    )  # fmt: skip
    mlp: str = _field(str, "swiglu", "the feed-forward layer", choices=MLPS, decides="function")
    rms_norm_eps: float = _field(
        float, 1e-6, "added under the root of every RMSNorm",
        above=0.0, decides="function", in_recipes=False,
    )  # fmt: skip
    initializer_range: float | None = _field(
        float, 0.02, "std of Linear and Embedding weights; null: PyTorch's own initialisation",
        at_least=0.0, optional=True, decides="weights",
    )  # fmt: skip
    training_length: int = _field(
        int, 1024, "tokens of a row in training", decides="use", in_recipes=False
    )
    tie_word_embeddings: bool = _field(
        bool, False, "one matrix for embedding and head", decides="function"
    )
    use_cache: bool = _field(
        bool, True, "return a state to continue from, unless asked otherwise",
        decides="use", in_recipes=False,
    )  # fmt: skip
    bos_token_id: int | None = _field(
        object, None, "token that begins a text", decides="tokens", in_recipes=False
    )
    eos_token_id: int | list[int] | None = _field(
        object, None, "token, or tokens, that end one", decides="tokens", in_recipes=False
    )
    pad_token_id: int | None = _field(
        object, None, "token that fills rows", decides="tokens", in_recipes=False
    )

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        for key in (*_IGNORED, "model_type"):
            kwargs.pop(key, None)
        if _TRAINED_AT in kwargs:
            self.max_position_embeddings = kwargs.pop(_TRAINED_AT)
        fields = self.fields()
        for name in [name for name in kwargs if name in fields]:
            setattr(self, name, kwargs.pop(name))
        self.validate()
        self._settle()
        super().__post_init__(**kwargs)
        for hook in after_init:
            hook()

    @classmethod
    def fields(cls) -> Mapping[str, Option]:
        """Return every field by name: those of every model, then those of registered parts."""
        return all_options(CORE)

    if TYPE_CHECKING:  # options are keywords and attributes, and can be registered at any time

        def __init__(self, **fields: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    else:

        def __getattr__(self, name):
            """Return the default of an option that was not set."""
            option = None if name.startswith("_") else all_options(CORE).get(name)
            if option is None:
                raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
            return option.default

    def recorded(self) -> dict[str, Any]:
        """Return the fields that a file contains, with values (see `nn.options.recorded`)."""
        return {o.name: o.normal(getattr(self, o.name)) for o in recorded(CORE, vars(self))}

    def deciding(self, *what: str) -> dict[str, Any]:
        """Return the recorded fields that decide one of `what` (see `Option`), with values."""
        fields = self.fields()
        return {k: v for k, v in self.recorded().items() if fields[k].decides in what}

    def _settle(self) -> None:
        """Keep the fields that a file would contain, so that equal models have equal configs."""
        fields = self.recorded()
        for name in self.fields():
            vars(self).pop(name, None)
        vars(self).update(fields)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by name, which `from_dict` takes: the recorded fields, and those of
        transformers. Attributes that other libraries have set are left out."""
        values = super().to_dict()
        theirs = {k: v for k, v in values.items() if self._loads(k) and k not in self.fields()}
        ours = self.recorded().items()
        return theirs | {k: list(v) if isinstance(v, tuple) else v for k, v in ours}

    def papers_layer(self, mixer: str = "spectral_window") -> SWHConfig:
        """Return a config of the same sizes whose `mixer` has its default options.

        It is the baseline to compare a variant of a layer with, at equal size.
        """
        of_mlp = [o for o in all_options([_OPTIONS["mlp"]]).values() if o.name in vars(self)]
        fields = {option.name: getattr(self, option.name) for option in (*CORE, *of_mlp)}
        return type(self)(**fields | {"mixer": mixer})

    @classmethod
    def preset(cls, name: str = "paper", *, size: str = "125m", **overrides: Any) -> SWHConfig:
        """Return a named architecture at a size.

        Args:
            name: "paper" or "memory".
            size: a key of `PRESETS[name]`, such as "tiny" or "125m".
            overrides: fields that differ.

        Raises:
            UserError: an unknown name, size or field.

        Example:
            >>> SWHConfig.preset("memory", size="tiny", window=64).hidden_size
            128
        """
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        if size not in PRESETS[name]:
            raise unknown("size", size, PRESETS[name])
        return cls(**{**PRESETS[name][size], **overrides})

    @property
    def layer_types(self) -> list[str]:
        """The cache layer type of each block. Read-only: a stored name would break resuming."""
        return [STATE_LAYER_TYPE] * self.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        """The longest context in tokens, for other libraries."""
        return UNLIMITED if MIXERS[self.mixer].constant_state else self.training_length

    @max_position_embeddings.setter
    def max_position_embeddings(self, length: int) -> None:
        dataclasses.replace(_OPTIONS["training_length"], name=_TRAINED_AT).check(length, "config")
        if length != UNLIMITED:
            self.training_length = length

    @property
    def auto_map(self) -> dict[str, str]:
        """Empty, whatever a file says: in memory the classes are this package's own. Libraries
        import what they find here; what a file says is in `stubs.py`."""
        return {}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: every saved folder can be loaded by trust_remote_code (`stubs.py`).

        transformers calls this after loading a class that way.
        """

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json and the files by which `trust_remote_code=True` finds this package.

        Attributes that are not fields are left out, with a warning.

        Args:
            save_directory: the folder, which is made.
            push_to_hub: upload the config too, to the repository `repo_id` (default: the folder's
                name).
            kwargs: repo_id, and those of `push_to_hub`.

        Raises:
            UserError: a field has a bad value.
        """
        foreign = sorted(key for key in super().to_dict() if not self._loads(key))
        if foreign:
            hints = "; ".join(str(unknown("config key", key, self._names())) for key in foreign)
            warnings.warn(f"not saved with the config: {hints}", stacklevel=2)
        super().save_pretrained(save_directory)
        write_stubs(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @property
    def head_dim(self) -> int:
        """K, channels of one head."""
        return self.hidden_size // cast(int, self.num_attention_heads)

    def validate(self) -> None:
        """Check all fields, and fill in an intermediate_size and num_attention_heads of None.

        Raises:
            UserError: the first bad value.
        """
        for name, option in self.fields().items():
            if name in vars(self):
                option.check(option.normal(getattr(self, name)), "config")
        if self.intermediate_size is None:
            self.intermediate_size = MLPS[self.mlp].default_hidden(self.hidden_size)
        if self.num_attention_heads is None:  # heads of 64 channels, or of fewer that divide them
            self.num_attention_heads = self.hidden_size // math.gcd(self.hidden_size, 64)
        values = self.recorded()
        check_size(values)
        for option in chosen(CORE, vars(self)):
            if isinstance(option.choices, PartRegistry):
                option.choices[values[option.name]].check(values)
        for name, value in self.deciding("tokens").items():
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if not _is_int(token) or not 0 <= token < self.vocab_size:
                    raise UserError(
                        f"{name} is {token!r} (config): "
                        f"use a token id, 0 to {self.vocab_size - 1}, or null"
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
        own = [f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")]
        return [*own, *cls.fields()]

    @classmethod
    def _loads(cls, key: str) -> bool:
        """Return whether a config.json may contain `key`."""
        theirs = {f.name for f in dataclasses.fields(cls)}
        return key in theirs | _ACCEPTED | _IGNORED | {"model_type"} | set(cls.fields())


# The options of every model; `all_options(CORE)` adds those of registered parts.
CORE = tuple(
    Option(name=field.name, default=field.default, **field.metadata["option"])
    for field in dataclasses.fields(SWHConfig)
    if "option" in field.metadata
)
_OPTIONS = {option.name: option for option in CORE}
reserve(dir(SWHConfig), "an attribute of every config")
reserve(GenerationConfig().to_dict(), "a setting of transformers' generate()")
# Called after every construction of a config.
after_init: list[Callable[[], None]] = []


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
