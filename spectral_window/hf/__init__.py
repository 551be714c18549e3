"""Everything that knows transformers: configuration, models, cache.

Names are imported when first used, and transformers learns about "swh" without being loaded:
importing all of it takes seconds, which neither `spectral-window --help` nor a script that only
wants an operator should wait for. So three of its modules, and one of ours, are completed right
after they were imported, by whomever:

    the registry of configs   knows SWHConfig
    our config                the model classes follow when the first one is made: the next call
                              may ask an Auto class for its model
    the package's names       `transformers.SWHForCausalLM`, which `transformers serve` and trainers
                              that are given a path ask for
    Trainer                   its default groups decay whatever is not a bias or a norm by its
                              name; our dynamics and gains are neither, and are spared as well
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_window.hf.cache import SWHCacheLayer
    from spectral_window.hf.classification import SWHForSequenceClassification
    from spectral_window.hf.config import SWHConfig
    from spectral_window.hf.model import SWHForCausalLM, SWHModel, match_parameters
    from spectral_window.hf.sharding import shard

_HOMES = {
    "SWHCacheLayer": "cache",
    "SWHConfig": "config",
    "SWHForCausalLM": "model",
    "SWHForSequenceClassification": "classification",
    "SWHModel": "model",
    "match_parameters": "model",
    "shard": "sharding",
}
__all__ = [
    "SWHCacheLayer",
    "SWHConfig",
    "SWHForCausalLM",
    "SWHForSequenceClassification",
    "SWHModel",
    "match_parameters",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_config(registry: ModuleType) -> None:
    from spectral_window.hf.config import MODEL_TYPE, SWHConfig

    registry.AutoConfig.register(MODEL_TYPE, SWHConfig, exist_ok=True)


def _register_models_with_the_first(config: ModuleType) -> None:
    config.when_made.append(_register_models)


@functools.cache  # the first config is enough
def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from spectral_window.hf import classification, config, model

    for auto, found in (
        (AutoModel, model.SWHModel),
        (AutoModelForCausalLM, model.SWHForCausalLM),
        (AutoModelForSequenceClassification, classification.SWHForSequenceClassification),
    ):
        auto.register(config.SWHConfig, found, exist_ok=True)


def _lend_names(lazy: ModuleType) -> None:
    # On the class: transformers replaces its own module object when a model is first imported.
    find = lazy._LazyModule.__getattr__

    @functools.wraps(find)
    def find_ours_too(module: ModuleType, name: str) -> Any:
        if name in _HOMES and name.startswith("SWH") and module.__name__ == "transformers":
            return __getattr__(name)
        return find(module, name)

    lazy._LazyModule.__getattr__ = find_ours_too


def _spare_from_decay(trainer: ModuleType) -> None:
    named = trainer.Trainer.get_decay_parameter_names

    @functools.wraps(named)
    def without_ours(self: Any, model: Any) -> list[str]:
        from spectral_window.hf.model import spared_from_decay

        spared = spared_from_decay(model)
        return [name for name in named(self, model) if name not in spared]

    trainer.Trainer.get_decay_parameter_names = without_ours


class _Completion(MetaPathFinder):
    """Acts on each of some modules once it has been imported; then is gone."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self.actions = actions
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.actions or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_complete(module: ModuleType) -> None:
                execute(module)
                action = self.actions.pop(name, None)
                if not self.actions and self in sys.meta_path:
                    sys.meta_path.remove(self)
                if action is not None:
                    action(module)

            spec.loader.exec_module = execute_and_complete  # type: ignore[method-assign]
        return spec


def _complete(actions: dict[str, Callable[[ModuleType], None]]) -> None:
    waiting = {name: action for name, action in actions.items() if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _Completion(waiting))
    for name in actions.keys() - waiting.keys():
        actions[name](sys.modules[name])  # which may import what waits


_complete(
    {
        "transformers.models.auto.configuration_auto": _register_config,
        "spectral_window.hf.config": _register_models_with_the_first,
        "transformers.utils.import_utils": _lend_names,
        "transformers.trainer": _spare_from_decay,
    }
)
