"""`spectral-window bench`: see `lab/bench.py`."""

from __future__ import annotations

from pathlib import Path

from spectral_window.commands.show import print_json, print_table
from spectral_window.lab import bench
from spectral_window.training.files import write_json


def run(*, operators: list[str], out: Path | None, quick: bool, json: bool) -> None:
    """Measure, show and, with `out`, write OPERATOR.json there."""
    for operator in operators or ["spectral", "window"]:
        found = bench.run(operator, quick=quick)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / f"{operator}.json", found)
        if json:
            print_json(found)
            continue
        where = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
        print_table(
            f"{operator}, one row of {found['channels']} channels, float32"
            + (" (quick: a trial, not a measurement)" if quick else "")
            + f"\n{where}",
            ("T, pass", "contestant", "ms", "times the first", "p10 - p90"),
            [
                (
                    f"{row['length']:,} {row['pass']}",
                    row["contestant"],
                    *(
                        (
                            f"{row['milliseconds']:,.2f}",
                            f"{row['ratio']:.2f}" if "ratio" in row else "",
                            f"{row['ratio_p10']:.2f} - {row['ratio_p90']:.2f}"
                            if "ratio" in row
                            else "",
                        )
                        if row["status"] == "ok"
                        else (row["status"], "", "")
                    ),
                )
                for row in found["rows"]
            ],
        )
