"""metrics.jsonl: losses, speed and events, one JSON object per line, in the order of the steps.

    {"step": 10, "tokens": 81920, "seconds": 31.2,
     "loss": 7.91, "lr": 0.0002, "grad_norm": 1.7, "tokens_per_second": 2650}
    {"step": 100, "tokens": 819200, "seconds": 320.1,
     "eval_loss": 5.2, "perplexity": 181.3, "bits_per_byte": 2.1, "eval_tokens": 65536}
    {"step": 100, "tokens": 819200, "event": "resume"}

`loss` is the mean over the steps since the line before; `seconds` is the wall time of training so
far, evaluation and saving included, over all sessions; `tokens_per_second` counts training steps
only. On resume the lines after the checkpoint's step are dropped, because those steps run again: no
step is missing and none is there twice.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectral_window.files import cannot_write, write_text


class MetricsLog:
    """Appends to `path`, after `confirm()` found its folder in place. With None (a process that is
    not the first) no call does anything."""

    def __init__(self, path: Path | None, confirm: Callable[[], None] = lambda: None) -> None:
        self.path, self._confirm = path, confirm

    def write(self, row: dict[str, Any]) -> None:
        """One line; a number that is not finite becomes null, which JSON can say."""
        if self.path is None:
            return
        self._confirm()
        row = {key: _plain(value) for key, value in row.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise cannot_write(error, self.path, len(line)) from error

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; one that a kill cut short is skipped."""
        rows = []
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def rewind(self, step: int) -> None:
        """Keep only the lines of steps up to `step`."""
        if self.path is None:
            return
        lines = [json.dumps(row) + "\n" for row in self.read() if row["step"] <= step]
        write_text(self.path, "".join(lines))

    def speed(self) -> float | None:
        """Median tokens per second over the lines; the first, which holds the warming-up, is left
        out if there are more."""
        speeds = [row["tokens_per_second"] for row in self.read() if row.get("tokens_per_second")]
        return statistics.median(speeds[1:] or speeds) if speeds else None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
