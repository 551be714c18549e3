"""What a command prints: results on stdout, a table or JSON; everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(summary: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(summary, indent=2, default=str))


def print_table(
    title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: bool = True
) -> None:
    """Print a title and a table on stdout.

    Args:
        title: printed above the table.
        head: a name per column; without a head if all are empty.
        rows: a cell per column.
        numbers: whether all columns but the first are aligned to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(head), pad_edge=False)
    for index, name in enumerate(head):
        # In a narrow terminal cells fold: a number is never cut.
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    console.print(table)


def format_bytes(count: float) -> str:
    """Write a number of bytes with its unit: 1536 -> 1.54 kB (thousands)."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.3g} {unit}"


def warn(lines: Iterable[str]) -> None:
    """Print warnings on stderr, one per line."""
    for line in lines:
        print(f"spectral-window: warning: {' '.join(line.split())}", file=sys.stderr)


def log(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
