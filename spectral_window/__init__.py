"""Spectral-Window Hybrid sequence models: linear time, constant state, for transformers.

    from spectral_window import SWHConfig, SWHForCausalLM

    model = SWHForCausalLM(SWHConfig.preset("memory", size="tiny"))
    model = AutoModelForCausalLM.from_pretrained("runs/mine/model")  # from transformers

Importing this package registers "swh" with transformers' Auto classes and is fast: names are
imported when first used, and transformers is not imported (`hf/registration.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectral_window import hf
from spectral_window.errors import UserError

if TYPE_CHECKING:
    from spectral_window.hf import (
        SWHConfig,
        SWHForCausalLM,
        SWHForSequenceClassification,
        SWHForTokenClassification,
        SWHModel,
        match_parameters,
    )

__version__ = "0.1.0"
__all__ = [
    "SWHConfig",
    "SWHForCausalLM",
    "SWHForSequenceClassification",
    "SWHForTokenClassification",
    "SWHModel",
    "UserError",
    "__version__",
    "match_parameters",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(hf, name)
    raise AttributeError(f"module 'spectral_window' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
