"""`spectral-window bench`: see `lab/bench`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from spectral_window.cli.options import Debug, Json
from spectral_window.cli.output import format_bytes, log, print_json, print_table
from spectral_window.errors import ResourceError, UserError, unknown
from spectral_window.files import write_json

EXAMPLE = "bench decode --threads 1 --quick"
TAGS = {
    "part": "{}",
    "model": "{}",
    "length": "T {:,}",
    "context": "context {:,}",
    "window": "W {}",
    "heads": "heads: {}",
    "batch": "B {}",
    "layers": "layers: {}",
    "pass": "{}",
    "processes": "processes: {}",
}


def run(
    benches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BENCH]...",
            help="spectral, window, prefill, decode, train, scaling, memory, memory_op, "
            "memory_layer, serve, data, sharded, or all (the default). With --device cuda: "
            "ceilings, spectral, window, train.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write BENCH.json, goals.json and pictures to DIR/PROCESSOR."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="float32 or bfloat16. Repeatable. Default: both."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes and few rounds: to see that it works.")
    ] = False,
    json: Json = False,
    thread_count: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            max=4096,
            metavar="N",
            help="CPU threads. Default: 1, and then all.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu or cuda. With cuda, --out is needed.")
    ] = "cpu",
    minutes: Annotated[
        float, typer.Option(min=0.1, max=600, metavar="N", help="On a GPU: about how long in all.")
    ] = 10.0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="With --device cuda: every step at toy size on a CPU, Triton interpreted.",
        ),
    ] = False,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline",
            help="Measure nothing: print the least time of each GPU kernel and of a layer on an "
            "H100, beside what was measured (in --out, default results/gpu).",
        ),
    ] = False,
    shape: Annotated[
        str, typer.Option(metavar="ROWSxTOKENS", help="With --roofline: of a batch.")
    ] = "16x1024",
    debug: Debug = False,
) -> None:
    """How fast every path is here, beside what you would take instead and what the hardware allows;
    each is checked first."""
    from spectral_window.lab import bench
    from spectral_window.lab.bench.figures import draw_all
    from spectral_window.lab.bench.targets import evaluate
    from spectral_window.lab.jobs import thread_counts

    if roofline:
        _show_roofline(dtype or ["bfloat16"], shape, out or Path("results/gpu"), json)
        return
    if device != "cpu":
        _run_on_gpu(benches or [], device, out, minutes, dry_run)
        return
    names = bench.chosen(benches or [])
    out = out and bench.place(out)
    for name in dtype or ():
        if name not in bench.DTYPES:
            raise unknown("dtype", name, bench.DTYPES)
    # Each number of threads gets a process of its own.
    counts = [thread_count] if thread_count else thread_counts()
    results: dict[str, Any] = {}
    failed: list[str] = []
    for name in names:
        once = name in bench.ONCE
        for count in counts[-1:] if once else counts:
            begin = time.perf_counter()
            dtypes = dtype or [d for d in bench.DTYPES if d == "float32" or not once]
            try:
                groups = bench.measure_in_child(name, count, dtypes, quick)
            except ResourceError as error:  # the others can still be measured
                failed.append(str(error))
                continue
            results.setdefault(name, []).extend(groups)
            if out is not None:
                bench.save(out, name, groups)
            if not json:
                for group in groups:
                    _print_group(name, group)
            spent = time.perf_counter() - begin
            log(f"bench {name}, threads {count}: {spent:.0f} s")
    measured = {name: bench.load(out, name) for name in bench.BENCHES} if out else results
    goals = evaluate(measured)
    if out is not None:
        write_json(out / "goals.json", {"goals": goals})
        draw_all(measured, out)
    if json:
        print_json({"benches": results, "goals": goals})
    else:
        _print_goals([goal for goal in goals if goal["bench"] in names and not quick])
    if failed:
        raise ResourceError("; ".join(failed))


def _run_on_gpu(
    parts: list[str], device: str, out: Path | None, minutes: float, dry_run: bool
) -> None:
    import torch

    from spectral_window.lab.bench import gpu
    from spectral_window.training.machine import folder_name

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


def _show_roofline(dtypes: list[str], shape: str, folder: Path, json: bool) -> None:
    from spectral_window.lab import bench
    from spectral_window.lab.bench import gpu_roofline
    from spectral_window.ops.methods import HAS_TRITON

    if not HAS_TRITON:
        raise UserError("triton is missing (bench --roofline): its kernels are counted; install it")
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,7})", shape)
    if not found:
        raise UserError(f"--shape is {shape!r} (bench --roofline): write ROWSxTOKENS, as 16x1024")
    size = int(found[1]), int(found[2])
    shown: dict[str, Any] = {}
    for name in dtypes:
        if name not in bench.DTYPES:
            raise unknown("dtype", name, bench.DTYPES)
        chosen = bench.DTYPES[name]
        rows = gpu_roofline.table(*size, chosen)
        sums = gpu_roofline.sums(*size, chosen, folder)
        shown[name] = {"kernels": rows, "sums": sums}
        if not json:
            at = f"{size[0]} rows of {size[1]:,} tokens, 768 channels, {name}, on an H100"
            print_table(f"least time, bytes and operations: {at}", *gpu_roofline.kernel_cells(rows))
            print_table("a layer and a training step of 12", *gpu_roofline.sum_cells(sums))
    measured = gpu_roofline.compare(folder)
    if json:
        print_json({"shape": list(size), "dtypes": shown, "measured": measured})
    elif measured:
        print_table(f"operators, measured: {folder}", *gpu_roofline.measured_cells(measured))


def _print_group(name: str, group: dict[str, Any]) -> None:
    """Print the rows of each size under its name, and the reasons of missing numbers below."""
    from spectral_window.lab import bench

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
    if "peak_bytes" in row and "milliseconds" not in row:
        beyond = f", {row['inputs']:.2f} x u beyond y" if "inputs" in row else ""
        return "", "", "", f"{format_bytes(row['peak_bytes'])}{beyond}"
    ratio = spread = more = ""
    if "ratio" in row:
        ratio, spread = f"{row['ratio']:.3g}", f"{row['ratio_p10']:.3g} - {row['ratio_p90']:.3g}"
    if "GB_per_s" in row:
        more = f"{row['GB_per_s']:.3g} GB/s"
    if "tokens_per_s" in row:
        more = f"{row['tokens_per_s']:,.4g} tokens/s"
    if "MB_per_s_per_core" in row:
        more += f", {row['MB_per_s_per_core']:.3g} MB/s a core"
    for key, what in (("peak_bytes", "at its peak"), ("sent_bytes", "sent")):
        if key in row:
            more += f", {format_bytes(row[key])} {what}"
    if "bytes" in row:
        more += f", {format_bytes(sum(row['bytes'].values()))} held"
    return f"{row['milliseconds']:,.4g}", ratio, spread, more


def _print_goals(goals: list[dict[str, Any]]) -> None:
    from spectral_window.lab.bench.targets import format_value

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
