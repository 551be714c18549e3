"""`spectral-window bench`: see `lab/bench`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from spectral_window.commands.show import print_json, print_table, size
from spectral_window.errors import ResourceError, UserError, unknown
from spectral_window.files import write_json
from spectral_window.lab import bench
from spectral_window.lab.bench.figures import draw_all
from spectral_window.lab.bench.targets import evaluate, format_value
from spectral_window.lab.jobs import thread_counts
from spectral_window.training.machine import folder_name

TAGS = {
    "part": "{}",
    "length": "T {:,}",
    "context": "context {:,}",
    "window": "W {}",
    "heads": "heads: {}",
    "batch": "B {}",
    "layers": "layers: {}",
    "pass": "{}",
}


def run(
    *,
    benches: list[str],
    dtypes: list[str],
    counts: list[int],
    out: Path | None,
    quick: bool,
    json: bool,
    device: str = "cpu",
    minutes: float = 10.0,
    dry_run: bool = False,
) -> None:
    """Measure, show and, with `out`, write BENCH.json, goals.json and the pictures to its folder
    for this processor.

    device "cuda": the parts of `lab/bench/gpu.py` instead, in about `minutes`; `dry_run` walks
    them on a CPU.
    """
    if device != "cpu":
        _on_gpu(benches, device, out, minutes, dry_run)
        return
    names = bench.chosen(benches)
    out = out and bench.place(out)
    for dtype in dtypes:
        if dtype not in bench.DTYPES:
            raise unknown("dtype", dtype, bench.DTYPES)
    counts = counts or thread_counts()
    results: dict[str, Any] = {}
    failed: list[str] = []
    for name in names:
        once = name in bench.ONCE
        for count in counts[-1:] if once else counts:
            begin = time.perf_counter()
            wanted = [d for d in (dtypes or bench.DTYPES) if d == "float32" or not once or dtypes]
            try:
                groups = bench.measure_in_child(name, count, wanted, quick)
            except ResourceError as error:  # the others can still be measured
                failed.append(str(error))
                continue
            results.setdefault(name, []).extend(groups)
            if out is not None:
                bench.save(out, name, groups)
            if not json:
                for group in groups:
                    _show(name, group)
            spent = time.perf_counter() - begin
            print(f"bench {name}, threads {count}: {spent:.0f} s", file=sys.stderr)
    known = {name: bench.load(out, name) for name in bench.BENCHES} if out else results
    goals = evaluate(known)
    if out is not None:
        write_json(out / "goals.json", {"goals": goals})
        draw_all(known, out)
    if json:
        print_json({"benches": results, "goals": goals})
    else:
        _show_goals([goal for goal in goals if goal["bench"] in names and not quick])
    if failed:
        raise ResourceError("; ".join(failed))


def _on_gpu(parts: list[str], device: str, out: Path | None, minutes: float, dry_run: bool) -> None:
    from spectral_window.lab.bench import gpu

    if device != "cuda":
        raise unknown("device", device, ("cpu", "cuda"))
    for part in parts:
        if part not in gpu.PARTS:
            raise unknown("bench on a GPU", part, gpu.PARTS)
    if out is None:
        raise UserError("--out is missing (bench --device cuda): name a folder for the results")
    if not dry_run and not torch.cuda.is_available():
        raise UserError(
            "no usable GPU here (bench --device cuda): --dry-run walks the steps on a CPU"
        )
    if not dry_run:
        out /= folder_name(torch.cuda.get_device_name())
    unfinished = gpu.run(out, minutes=minutes, parts=parts, dry_run=dry_run)
    if unfinished:
        raise ResourceError(f"{'; '.join(unfinished)}; what was measured is in {out}")


def _show(name: str, group: dict[str, Any]) -> None:
    """The rows of one size under its name; why a contestant has no numbers, below the table."""
    lines: list[tuple[str, ...]] = []
    reasons: dict[str, list[str]] = {}
    at = ""
    for row in group["rows"]:
        if _tags(row) != at:
            at = _tags(row)
            lines.append((at, "", "", "", ""))
        lines.append((f"  {row['contestant']}", *_numbers(row)))
        if row["status"] != "ok":
            reasons.setdefault(f"{row['contestant']}: {row['status']}", []).append(at)
    head = ("", "ms", "times the first", "p10 - p90", "")
    print_table(f"{name}\n{bench.header(group)}", head, lines)
    for why, sizes in reasons.items():
        print(f"  {why} ({'; '.join(sizes)})")


def _tags(row: dict[str, Any]) -> str:
    words = [text.format(row[key]) for key, text in TAGS.items() if row.get(key) is not None]
    return ", ".join(words)


def _numbers(row: dict[str, Any]) -> tuple[str, str, str, str]:
    if row["status"] != "ok":
        return "none", "", "", ""
    if "error" in row:
        return "", "", "", f"error {row['error']:.1e}"
    if "slope" in row:
        return "", "", "", f"slope {row['slope']:.3f}"
    if "peak_bytes" in row:
        beyond = f", {row['inputs']:.2f} x u beyond y" if "inputs" in row else ""
        return "", "", "", f"{size(row['peak_bytes'])}{beyond}"
    ratio = spread = more = ""
    if "ratio" in row:
        ratio, spread = f"{row['ratio']:.3g}", f"{row['ratio_p10']:.3g} - {row['ratio_p90']:.3g}"
    if "GB_per_s" in row:
        more = f"{row['GB_per_s']:.3g} GB/s"
    return f"{row['milliseconds']:,.4g}", ratio, spread, more


def _show_goals(goals: list[dict[str, Any]]) -> None:
    if not goals:
        return
    lines: list[tuple[str, ...]] = []
    path = ""
    for goal in goals:
        if goal["path"] != path:
            path = goal["path"]
            lines.append((path, "", "", "", ""))
        threads = "" if goal["threads"] is None else str(goal["threads"])
        measured = format_value(goal["measured"], goal["unit"])
        lines.append((f"  {goal['goal']}", goal["dtype"], threads, measured, goal["reached"]))
    head = ("", "", "threads", "measured", "")
    print_table("goals: the worst of the rows that match", head, lines, numbers=False)
    for note in dict.fromkeys(g["note"] for g in goals if g["note"] and g["reached"] != "reached"):
        print(f"  {note}")
