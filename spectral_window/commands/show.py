"""How results are printed: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(facts, indent=2, default=str))


def print_table(
    title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: bool = True
) -> None:
    """A title and a table on stdout; no head if all names are empty. numbers: to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_header=any(head), pad_edge=False)
    for index, name in enumerate(head):
        # In a narrow terminal cells fold: a number is never cut.
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    console.print(table)


def size(count: float) -> str:
    """Bytes in words: 1536 -> 1.5 kB (thousands)."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.3g} {unit}"


def tell(notes: list[str]) -> None:
    """Warnings on stderr, a line each."""
    for note in notes:
        print(f"spectral-window: warning: {' '.join(note.split())}", file=sys.stderr)
