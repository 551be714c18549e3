"""The knobs of a recipe beside its model's fields: read from text by their type, and checked, with
one line each."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from spectral_window.errors import UserError
from spectral_window.nn.options import Option

DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
# torch's names for how float32 products may be computed, in the order that "auto" tries them
MATMUL_SETTINGS = ("medium", "high", "highest")
MATMUL_PRECISIONS = ("auto", *MATMUL_SETTINGS)

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
}
_POSITIVE = (
    "parameters",
    "max_bytes",
    "sequence_length",
    "batch_size",
    "micro_batch_size",
    "steps",
    "lr",
    "log_every",
    "eval_every",
    "eval_tokens",
    "save_every",
)
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "clip", "seed", "split_seed")
_CHOICES = {
    "schedule": ("cosine", "constant"),
    "dtype": DTYPES,
    "device": DEVICES,
    "matmul_precision": MATMUL_PRECISIONS,
    "errors": ("strict", "replace"),
    "txt_documents": ("file", "paragraph"),
}


def parse(key: str, text: str, hint: Any) -> Any:
    """`text` as a value of the knob `key`, whose annotation is `hint`.

    Raises UserError naming the knob and what it expects.
    """
    kinds = _kinds(hint)
    (kind,) = kinds - {type(None)}
    return Option(key, kind, None, "", optional=type(None) in kinds).parse(text, "recipe")


def _one_line(value: Any) -> str:
    """An error is one line, whatever was typed."""
    return " ".join(str(value).split())


def check(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise UserError for the first knob whose type or value cannot be."""
    for key, hint in hints.items():
        _check_type(key, values[key], _kinds(hint))

    def require(good: bool, key: str, rule: str) -> None:
        if not good:
            raise UserError(f"{key}={_one_line(values[key])} (recipe): {rule}")

    for key in _POSITIVE:
        require(values[key] is None or values[key] > 0, key, "must be greater than 0")
    for key in _NOT_NEGATIVE:
        require(values[key] is None or values[key] >= 0, key, "must not be negative")
    for key, allowed in _CHOICES.items():
        require(values[key] in allowed, key, f"choose one of {', '.join(allowed)}")
    for key in ("beta1", "beta2"):
        require(0 <= values[key] < 1, key, "must be at least 0 and less than 1")
    require(0 < values["valid_fraction"] < 1, "valid_fraction", "must be between 0 and 1")
    require(0 <= values["lr_min_ratio"] <= 1, "lr_min_ratio", "must be between 0 and 1")
    require(values["keep_checkpoints"] >= 2, "keep_checkpoints", "must be at least 2")
    for seed in ("seed", "split_seed"):
        require(values[seed] < 2**32, seed, "must be less than 2**32")
    require(
        values["warmup_steps"] <= values["steps"],
        "warmup_steps",
        f"must not exceed steps ({values['steps']})",
    )
    require(
        values["batch_size"] % values["micro_batch_size"] == 0,
        "micro_batch_size",
        f"must divide batch_size ({values['batch_size']})",
    )
    require(
        values["steps"] * values["batch_size"] < 2**62,
        "steps",
        f"times batch_size ({values['batch_size']}) must be less than 2**62",
    )
    if not values["data"]:
        raise UserError("data= (recipe): name at least one source, for example data=book.txt")


def _kinds(hint: Any) -> set[type]:
    """The plain types in an annotation: `int | None` -> {int, NoneType}; `tuple[str, ...]` ->
    {tuple}."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {typing.get_origin(part) or part for part in parts}


def _check_type(key: str, value: Any, kinds: set[type]) -> None:
    if value is None:
        good = type(None) in kinds
    elif isinstance(value, bool):  # a bool is an int to Python, and never what a count means
        good = bool in kinds
    elif isinstance(value, int):
        good = int in kinds or float in kinds
    elif isinstance(value, float):
        good = float in kinds and math.isfinite(value)
    elif isinstance(value, tuple):
        good = tuple in kinds and all(isinstance(item, str) for item in value)
    else:
        good = type(value) in kinds
    if not good:
        wanted = " or ".join(name for kind, name in _TYPE_NAMES.items() if kind in kinds)
        none = " or none" if type(None) in kinds else ""
        raise UserError(f"{key}={value!r} (recipe): expected {wanted}{none}")
