"""A folder's `manifest.json`, by which any damage to its files is detected.

It is written last and holds the size and SHA-256 of every other file, facts about the folder (a
checkpoint's step, say), and a hash of itself. So a folder whose manifest agrees is whole, bit by
bit; one without it was not finished.

Only what is listed counts. Libraries read whatever of a known name lies in a folder (an index
beside the weights, say, leads to other weights), so an unlisted file of such a kind is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spectral_window.errors import IntegrityError
from spectral_window.files import hash_file, sync_file, write_text

SCHEMA = 1
MANIFEST = "manifest.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# what transformers and safetensors look for in a model's folder; a note or a picture harms nobody
_READ_BY_LIBRARIES = {".json", ".safetensors", ".jinja", ".txt", ".model", ".py", ".bin", ".pt"}


def seal(folder: Path, hashes: Mapping[str, str] = MappingProxyType({}), **facts: Any) -> None:
    """Force every file of `folder` to the disk, then write its manifest with `facts` in it.

    hashes: SHA-256 of files, by name, that whoever wrote them has computed.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        sha = hashes.get(path.name) or hash_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha}
    manifest = {"schema": SCHEMA, **facts, "files": files}
    signed = manifest | {"sha256": _own_hash(manifest)}
    write_text(folder / MANIFEST, json.dumps(signed, indent=1))


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file was read and agreed with it.

    Raises IntegrityError naming the first file that does not, or that is not listed and would be
    read by a library.
    """
    manifest = _read(folder)
    for path in sorted(folder.iterdir()):
        known = path.name == MANIFEST or path.name in manifest["files"]
        if not known and path.suffix in _READ_BY_LIBRARIES:
            raise IntegrityError(
                f"{path.name} is not listed in {MANIFEST} ({folder}): it came later; remove it"
            )
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise IntegrityError(f"{name} is missing ({folder}): use another checkpoint or copy")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise IntegrityError(
                f"{name} has {size} bytes instead of {entry['bytes']} ({folder}): "
                "it was cut or changed; use another checkpoint or copy"
            )
        if hash_file(path) != entry["sha256"]:
            raise IntegrityError(
                f"{name} does not match its SHA-256 ({folder}): "
                "it was damaged or changed; use another checkpoint or copy"
            )
    return manifest


def _read(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except OSError:
        raise IntegrityError(f"{MANIFEST} is missing ({folder}): it was not finished") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{MANIFEST} is not JSON ({folder}): it was damaged") from None
    if not isinstance(manifest, dict):
        raise IntegrityError(f"{MANIFEST} is not an object ({folder}): it was damaged")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise IntegrityError(
            f"schema {schema} is newer than {SCHEMA} ({folder}): upgrade spectral-window to use it"
        )
    stated = manifest.pop("sha256", None)
    if stated != _own_hash(manifest) or schema != SCHEMA:
        raise IntegrityError(f"{MANIFEST} does not match its own hash ({folder}): it was damaged")
    if not _is_list_of_files(manifest.get("files")):
        raise IntegrityError(f"{MANIFEST} lists no files ({folder}): it is not one of ours")
    return manifest


def _is_list_of_files(files: Any) -> bool:
    """Whether `files` maps plain names to sizes and SHA-256: a right hash proves no sense."""
    return isinstance(files, dict) and all(
        _PLAIN_NAME.fullmatch(name)
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"])
        for name, entry in files.items()
    )


def _own_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
