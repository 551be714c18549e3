"""The file of a session: safetensors for its tensors, JSON in their header for the rest (the
summary), a SHA-256 over both.

Nothing is pickled. The hash finds damage (safetensors alone does not see a flipped bit); the
fingerprints of model and tokenizer tie the file to the model that made it, because a state means
nothing to another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import check_name, remove_leftovers, write_bytes
from spectral_window.nn.mixers import map_state

SCHEMA, HEADER = 1, "spectral-window session"
# What transformers adds to a config and no function depends on.
_NO_FUNCTION = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}


class Owner(NamedTuple):
    """What a session belongs to: the fingerprints of its model and its tokenizer.

    They read every weight, so whoever opens many sessions of one model takes them once.
    """

    model: str
    tokenizer: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Owner:
        """Compute both."""
        return cls(fingerprint(model), tokenizer_fingerprint(tokenizer))


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


def digest(summary: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of JSON values and of every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(json.dumps(summary, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def states(model: Any, tensors: dict[str, Tensor], seen: int) -> list[Any]:
    """Return the state of each layer's mixer after `seen` tokens, batch 1, from a file's tensors.

    Raises:
        KeyError: a tensor is missing.
        IntegrityError: a tensor has another shape or dtype, is not finite, or its positions are
            not those of `seen` tokens of one text without padding.
    """

    def read_state(index: int, block: Any) -> Any:
        empty = block.mixer.init_state(1, dtype=model.dtype, device=model.device)
        names = iter([name for name, _ in leaves(f"layers.{index}", empty)])
        growing = 0 if block.mixer.constant_state else seen  # the size that is 0 in `empty`

        def read_tensor(like: Tensor) -> Tensor:
            name = next(names)
            tensor = tensors[name]
            shape = [size or growing for size in like.shape]
            if list(tensor.shape) != shape or tensor.dtype != like.dtype:
                raise IntegrityError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
            if name.endswith(".position"):
                counting = torch.arange(seen, dtype=torch.int64, device=tensor.device)
                if not bool((tensor == (counting if tensor.dim() == 2 else seen)).all()):
                    raise IntegrityError(f"{name} is not what {seen} tokens leave")
            elif not bool(tensor.isfinite().all()):
                raise IntegrityError(f"{name} is not finite")
            return tensor.to(like.device)

        return map_state(empty, read_tensor)

    return [read_state(index, block) for index, block in enumerate(model.model.layers)]


def leaves(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a mixer's state with its dotted name, in the order of `map_state`."""
    if isinstance(state, Tensor):
        yield name, state
    elif state is not None:
        for field, part in zip(state._fields, state, strict=True):
            yield from leaves(f"{name}.{field}", part)


_FIELDS: dict[str, Any] = {
    "schema": int, "model": str, "tokenizer": str, "seed": int, "tokens_seen": int,
    "state_seen": int, "waiting": (int, type(None)), "ended": bool, "window": list, "shown": int,
    "held": str,
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the summary and the tensors of a session file.

    Raises:
        UserError: there is none.
        IntegrityError: it is not intact.
    """
    check_name(path, "the session file")
    if not path.is_file():
        raise UserError(f"no session file ({path}): make one with save (--save-session)")
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        summary = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][HEADER])
        schema = summary["schema"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError(
            f"not a session, or damaged ({path}): use a file that --save-session wrote"
        ) from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise IntegrityError(
            f"session schema {schema} is newer than {SCHEMA} ({path}): upgrade spectral-window"
        )
    stated = summary.pop("sha256", None)
    right = summary.keys() == _FIELDS.keys() and all(
        isinstance(summary[key], kind) and (kind is not int or not isinstance(summary[key], bool))
        for key, kind in _FIELDS.items()
    )
    if not right or stated != digest(summary, tensors):
        raise IntegrityError(
            f"the session does not match its own SHA-256 ({path}): it was damaged; begin a new one"
        )
    return summary, tensors


def check_place(path: Path) -> None:
    """Raise UserError unless `path` can be a file: a device or a folder is not replaced by one.

    Removes what a killed process left beside it.
    """
    check_name(path, "the session file")
    if path.exists() and not path.is_file():
        raise UserError(f"not a regular file ({path}): choose another name for the session")
    if not path.parent.is_dir():
        raise UserError(f"no such folder ({path.parent}): make it, or save the session elsewhere")
    remove_leftovers(path.parent, path.name)


def write(path: Path, summary: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the file whole or not at all.

    Raises:
        UserError: the place is bad.
        ResourceError: the disk is full.
    """
    check_place(path)
    summary = {"schema": SCHEMA, **summary}
    header = {HEADER: json.dumps({**summary, "sha256": digest(summary, tensors)})}
    write_bytes(path, safetensors.torch.save(tensors, header))
