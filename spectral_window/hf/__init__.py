"""Everything that knows transformers: configuration, model, cache.

Names are imported when first used, and the Auto classes learn about "swh" without being loaded:
importing all of transformers takes seconds, which neither `spectral-window --help` nor a script
that only wants an operator should wait for. So the config class is registered right after
transformers' own registry is imported, by whomever; and the model classes when the first config
is made, which is before any Auto class can ask for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_window.hf.cache import SWHCacheLayer
    from spectral_window.hf.config import SWHConfig
    from spectral_window.hf.model import SWHForCausalLM, SWHModel, match_parameters

_HOMES = {
    "SWHCacheLayer": "cache",
    "SWHConfig": "config",
    "SWHForCausalLM": "model",
    "SWHModel": "model",
    "match_parameters": "model",
}
__all__ = ["SWHCacheLayer", "SWHConfig", "SWHForCausalLM", "SWHModel", "match_parameters"]

_REGISTRY = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register(registry: ModuleType) -> None:
    from spectral_window.hf.config import MODEL_TYPE, SWHConfig

    registry.AutoConfig.register(MODEL_TYPE, SWHConfig, exist_ok=True)


class _RegisterAfterImport(MetaPathFinder):
    """Once `_REGISTRY` has been imported, register; then be gone."""

    searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _REGISTRY or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _REGISTRY in sys.modules:
    _register(sys.modules[_REGISTRY])
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
