"""What a saved folder needs to load by `trust_remote_code=True` where nobody imported this package.

transformers finds the classes of a model that is not its own by `auto_map` in config.json: a Python
file of the folder, and a name in it. The files written here contain no model. They import this
package, which has to be installed, and say so in one line where it is not. So a folder carries no
copy of the code that could differ from what is installed, and is read once by anybody who wants to
know what he trusts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from spectral_window.files import write_text

CONFIG_CLASS = "SWHConfig"
# the Auto class of transformers that loads each model, and what the Hub calls its task
AUTO_CLASSES = {
    "SWHModel": "AutoModel",
    "SWHForCausalLM": "AutoModelForCausalLM",
    "SWHForSequenceClassification": "AutoModelForSequenceClassification",
    "SWHForTokenClassification": "AutoModelForTokenClassification",
}
INSTALL = "`pip install .` in a checkout of its repository"
# transformers reads these files as text and looks for imports: those of a `try` it leaves to us
_STUB = '''"""transformers loads this folder by these names; the code is in spectral-window."""

try:
    from spectral_window.hf import (
        {names},
    )
except ModuleNotFoundError as error:
    if error.name != "spectral_window":
        raise
    raise ImportError(
        "this model needs the Python package spectral-window: "
        "{install}"
    ) from None

__all__ = [
    {quoted},
]
'''
_MODULES = {
    "configuration_spectral_window": [CONFIG_CLASS],
    "modeling_spectral_window": list(AUTO_CLASSES),
}


def auto_map() -> dict[str, str]:
    """Return `auto_map` of config.json: an Auto class -> a file of the folder, a class in it."""
    configuration, modeling = _MODULES
    models = {auto: f"{modeling}.{name}" for name, auto in AUTO_CLASSES.items()}
    return {"AutoConfig": f"{configuration}.{CONFIG_CLASS}"} | models


def write_stubs(folder: str | os.PathLike[str]) -> None:
    """Write the files that `auto_map` names, and `auto_map` into the config.json of `folder`."""
    for module, names in _MODULES.items():
        text = _STUB.format(
            names=",\n        ".join(names),
            quoted=",\n    ".join(f'"{name}"' for name in names),
            install=INSTALL,
        )
        write_text(Path(folder) / f"{module}.py", text)
    config = Path(folder) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": auto_map()}
    write_text(config, json.dumps(values, indent=2, sort_keys=True) + "\n")
