"""Everything that uses transformers: configuration, models, cache, and what a saved folder holds.

Names are imported when first used, and "swh" is registered with transformers when transformers is
imported (`registration.py`), so importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spectral_window.hf.registration import register_on_import

if TYPE_CHECKING:
    from spectral_window.hf.cache import SWHCacheLayer
    from spectral_window.hf.classification import (
        SWHForSequenceClassification,
        SWHForTokenClassification,
    )
    from spectral_window.hf.config import SWHConfig
    from spectral_window.hf.model import SWHForCausalLM, SWHModel, match_parameters
    from spectral_window.hf.sharding import shard

_MODULES = {
    "SWHCacheLayer": "cache",
    "SWHConfig": "config",
    "SWHForCausalLM": "model",
    "SWHForSequenceClassification": "classification",
    "SWHForTokenClassification": "classification",
    "SWHModel": "model",
    "match_parameters": "model",
    "shard": "sharding",
}
__all__ = [
    "SWHCacheLayer",
    "SWHConfig",
    "SWHForCausalLM",
    "SWHForSequenceClassification",
    "SWHForTokenClassification",
    "SWHModel",
    "match_parameters",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_on_import()
