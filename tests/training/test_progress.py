"""What a terminal shows of a training."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from spectral_window.training.progress import RichProgress

TITLE, STEP, NUMBERS = "paper-lm-small (memory)", "1234/4883", "loss 4.123  12,346 tokens/s"


def line(width: int) -> str:
    """The bar's line on a terminal of `width` columns."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False
    )
    progress = RichProgress(console)
    progress.start(TITLE, 0, 4883)
    progress.step(1234, 4.1234, 12_345.6)
    progress._bar.refresh()
    progress.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n")
    return [text for text in shown.splitlines() if text.strip()][-1]


@pytest.mark.parametrize("width", [20, 38, 39, 47, 55, 64, 79, 80, 81, 92, 93, 101, 140])
def test_a_narrow_terminal_drops_columns_and_cuts_no_number(width):
    shown = line(width)
    assert len(shown.rstrip()) <= width
    assert "…" not in shown
    assert STEP in shown
    for digits in re.findall(r"\d[\d,.]*", shown.replace(STEP, "")):
        assert digits in (*re.findall(r"\d[\d,.]*", NUMBERS), "0", "00")


def test_a_wide_terminal_shows_everything():
    shown = line(120)
    assert shown.startswith(TITLE)
    assert all(part in shown for part in ("━", STEP, NUMBERS, "0:00:00", "--:--"))
