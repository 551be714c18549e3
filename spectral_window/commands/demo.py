"""`spectral-window demo`: see `lab/demo.py`."""

from __future__ import annotations

from pathlib import Path

from spectral_window.lab import demo


def run(*, out: Path, quick: bool) -> None:
    """Train two models of equal size, compare, report; see `spectral-window demo --help`."""
    demo.run(out, quick=quick)
