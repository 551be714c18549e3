"""The fresh process of `measure_in_child`."""

from __future__ import annotations

from spectral_window.lab.bench import measure_groups
from spectral_window.lab.jobs import send_rows

if __name__ == "__main__":
    send_rows(measure_groups)
