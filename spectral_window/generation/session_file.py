"""The file that holds a session: safetensors for its tensors, JSON in their header for the rest, a
SHA-256 over both.

Nothing is pickled. The hash finds damage (safetensors alone does not see a flipped bit); the
fingerprints of model and tokenizer tie the file to the model that made it, because a state means
nothing to another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import check_name, remove_leftovers, write_bytes

SCHEMA, HEADER = 1, "spectral-window session"
# What transformers adds to a config and no function depends on.
_NO_FUNCTION = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}


def fingerprint(model: Any) -> str:
    """SHA-256 (hex) of the model's function: its architecture, and every weight's name, dtype,
    shape and bytes.

    Models that differ in fields which decide no function share their sessions.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NO_FUNCTION}
    for name, option in model.config.fields().items():
        decides = option.decides in ("state", "function")
        if not decides or not option.traced(getattr(model.config, name)):
            config.pop(name, None)
    return digest(config, model.state_dict())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of the vocabulary."""
    return digest(tokenizer.get_vocab(), {})


def digest(facts: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of JSON values and of every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def leaves(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a mixer's state with its dotted name, in the order of `map_state`."""
    if isinstance(state, Tensor):
        yield name, state
    elif state is not None:
        for field, part in zip(state._fields, state, strict=True):
            yield from leaves(f"{name}.{field}", part)


_FACTS: dict[str, Any] = {
    "schema": int, "model": str, "tokenizer": str, "seed": int, "tokens_seen": int,
    "state_seen": int, "waiting": (int, type(None)), "ended": bool, "window": list, "shown": int,
    "held": str,
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(facts, tensors) of a session file. UserError when there is none, IntegrityError when it is
    not intact."""
    check_name(path, "the session file")
    if not path.is_file():
        raise UserError(f"no session file ({path}): make one with save (--save-session)")
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][HEADER])
        schema = facts["schema"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError(
            f"not a session, or damaged ({path}): use a file that --save-session wrote"
        ) from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise IntegrityError(
            f"session schema {schema} is newer than {SCHEMA} ({path}): upgrade spectral-window"
        )
    stated = facts.pop("sha256", None)
    right = facts.keys() == _FACTS.keys() and all(
        isinstance(facts[key], kind) and (kind is not int or not isinstance(facts[key], bool))
        for key, kind in _FACTS.items()
    )
    if not right or stated != digest(facts, tensors):
        raise IntegrityError(
            f"the session does not match its own SHA-256 ({path}): it was damaged; begin a new one"
        )
    return facts, tensors


def check_place(path: Path) -> None:
    """UserError unless a file can stand at `path`: a device or a folder is not replaced by one.

    What a killed process left beside it is removed.
    """
    check_name(path, "the session file")
    if path.exists() and not path.is_file():
        raise UserError(f"not a regular file ({path}): choose another name for the session")
    if not path.parent.is_dir():
        raise UserError(f"no such folder ({path.parent}): make it, or save the session elsewhere")
    remove_leftovers(path.parent, path.name)


def write(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the file whole or not at all. UserError for a bad place, ResourceError for no room."""
    check_place(path)
    facts = {"schema": SCHEMA, **facts}
    header = {HEADER: json.dumps({**facts, "sha256": digest(facts, tensors)})}
    write_bytes(path, safetensors.torch.save(tensors, header))
