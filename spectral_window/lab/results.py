"""What experiments and benches leave on disk: one JSON per name in a folder.

experiments   {"suite": ..., "quick": ..., "command": ..., "rows": [{...}, ...]}
benches       {"bench": ..., "groups": [{"threads": ..., "dtype": ..., "quick": ..., ...}]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectral_window.errors import UserError
from spectral_window.files import write_json


def save(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write folder/NAME.json. Raises UserError rather than replace real results by quick ones."""
    path = folder / f"{name}.json"
    before = load(folder, name) or load(folder, name, "groups")
    if before and is_quick(content) and not is_quick(before):
        raise UserError(f"{path} holds real results (--quick): choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def load(folder: Path, name: str, holds: str = "rows") -> dict[str, Any] | None:
    """What `save` wrote, or None where nothing readable is there that has a list `holds`."""
    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get(holds), list) else None


def is_quick(content: dict[str, Any]) -> bool:
    """Whether these are results of a quick version, which measures nothing."""
    return any(part.get("quick") for part in (content, *content.get("groups", ())))
