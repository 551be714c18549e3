"""Register "swh" with transformers, without importing transformers.

Importing `spectral_window` makes `AutoConfig` and `AutoModelForCausalLM` load our models. To call
their `register` at once, the package would have to import transformers and torch: `import
spectral_window` would take 4.7 s of processor time instead of 0.09 s (median of 7 on one core).
That is too long for `spectral-window --help` and for a script that uses a single operator. So an
import hook waits for six modules and completes each of them right after its import, wherever that
happens:

    transformers' registry of configs     learns SWHConfig
    spectral_window.hf.config             registers the model classes when the first config is
                                          constructed: an Auto class needs them after that only
    transformers' names by task           learn our classes: Trainer shifts the labels of a smoothed
                                          loss for those alone, and a pipeline warns of others
    transformers' table of lazy names     gets `transformers.SWHForCausalLM`, the name that
                                          `transformers serve` and some trainers look up
    transformers.trainer                  does not decay our dynamics and gains: by default Trainer
                                          decays everything that is not a bias or a norm by its name
    peft.utils.constants                  the linear maps that LoRA adapts where none are named

The hook removes itself when all six have been imported.
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
from typing import Any

from spectral_window.hf.stubs import AUTO_CLASSES

Action = Callable[[ModuleType], None]


def register_on_import() -> None:
    """Complete the six modules now where they are imported already, else on their import."""
    actions: dict[str, Action] = {
        "transformers.models.auto.configuration_auto": _register_config,
        "spectral_window.hf.config": _register_models_with_first_config,
        "transformers.models.auto.modeling_auto": _name_tasks,
        "transformers.utils.import_utils": _add_names,
        "transformers.trainer": _exclude_from_decay,
        "peft.utils.constants": _name_adapted_maps,
    }
    pending = {name: action for name, action in actions.items() if name not in sys.modules}
    if pending:
        sys.meta_path.insert(0, _ImportHook(pending))
    for name in actions.keys() - pending.keys():
        actions[name](sys.modules[name])  # which may import a pending module


class _ImportHook(MetaPathFinder):
    """Calls an action on each of some modules after its import.

    Args:
        actions: module name -> what to do with the module.
    """

    def __init__(self, actions: dict[str, Action]):
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


def _register_config(registry: ModuleType) -> None:
    from spectral_window.hf.config import MODEL_TYPE, SWHConfig

    registry.AutoConfig.register(MODEL_TYPE, SWHConfig, exist_ok=True)


def _name_tasks(registry: ModuleType) -> None:
    from spectral_window.hf.config import MODEL_TYPE

    for name, auto_class in AUTO_CLASSES.items():
        # the table that the Auto class was made from, of names by model type
        getattr(registry, auto_class)._model_mapping._model_mapping[MODEL_TYPE] = name


def _register_models_with_first_config(config: ModuleType) -> None:
    config.after_init.append(_register_models)


@functools.cache  # the first config is enough
def _register_models() -> None:
    import transformers

    hf = importlib.import_module("spectral_window.hf")
    for name, auto_class in AUTO_CLASSES.items():
        register = getattr(transformers, auto_class).register
        register(hf.SWHConfig, getattr(hf, name), exist_ok=True)


def _add_names(lazy: ModuleType) -> None:
    # On the class: transformers replaces its own module object when a model is first imported.
    original = lazy._LazyModule.__getattr__

    @functools.wraps(original)
    def getattr_with_ours(module: ModuleType, name: str) -> Any:
        if name.startswith("SWH") and module.__name__ == "transformers":
            package = importlib.import_module("spectral_window.hf")
            if name in package.__all__:
                return getattr(package, name)
        return original(module, name)

    lazy._LazyModule.__getattr__ = getattr_with_ours


def _exclude_from_decay(trainer: ModuleType) -> None:
    original = trainer.Trainer.get_decay_parameter_names

    @functools.wraps(original)
    def without_ours(self: Any, model: Any) -> list[str]:
        from spectral_window.hf.model import parameters_without_decay

        excluded = parameters_without_decay(model)
        return [name for name in original(self, model) if name not in excluded]

    trainer.Trainer.get_decay_parameter_names = without_ours


def _name_adapted_maps(constants: ModuleType) -> None:
    """Let `LoraConfig()` adapt the maps that mix tokens, as PEFT does for other models.

    PEFT has a table for each method, most of them copies of LoRA's; those learn ours too.
    """
    from spectral_window.hf.config import MODEL_TYPE

    of_lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    for name, table in vars(constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and table.get("llama") == of_lora:
            table.setdefault(MODEL_TYPE, ["q_proj", "v_proj", "conv_proj", "out_proj"])
