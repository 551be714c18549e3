"""The tables of measurements in README.md and in these pages, made from results/, and from counts.

    python docs/tables.py          write them anew
    python docs/tables.py --check  exit 1 and name the files that are out of date

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from spectral_window.lab import scaling
from spectral_window.lab.bench import gpu_roofline
from spectral_window.lab.experiments import ablate, memory
from spectral_window.lab.experiments import recall as suite
from spectral_window.lab.paper import claims
from spectral_window.ops.methods import HAS_TRITON

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Row = dict[str, Any]


def read(path: str) -> Any:
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# ------------------------------------------------------------------------------- memory and recall

TASKS = ("Recall, 4 pairs", "Needle", "Induction")
RIVALS = {
    "Transformer": "Transformer",
    "Transformer, short conv.": "Transformer, short convolutions",
    "Kimi": "Kimi delta attention",
    "Mamba-2": "Mamba-2",
}


def _share(model: str, training: str, tasks: Sequence[str], times: int) -> str:
    """The mean share of right answers over tasks and seeds, `times` the length of training."""
    shares = [
        test["right"] / test["asked"]
        for row in read("memory/recall.json")["rows"]
        if (row["model"], row["training"]) == (model, training) and row["ability"] in tasks
        for test in row["tests"]
        if test["length"] == times * suite.ABILITIES[row["ability"]].base
    ]
    if not shares:
        return "-"
    mean = sum(shares) / len(shares)
    return f"{mean:.3f}" if mean >= 0.995 else f"{mean:.2f}"


def recall() -> str:
    """Right answers at 32 times the length of training."""
    models = {"SWH with memory": suite.RECOMMENDED, "SWH as published": "SWH", **RIVALS}
    rows = (
        [task, *(_share(model, "fixed", [task], 32) for model in models.values())] for task in TASKS
    )
    return markdown(["right answers at 1,024 tokens", *models], rows)


def recall_lengths() -> str:
    """The same against length, means over the three tasks."""
    models = {
        "SWH with memory, trained at up to 4,096": (suite.RECOMMENDED, "long"),
        "SWH with memory": (suite.RECOMMENDED, "fixed"),
        **{name: (model, "fixed") for name, model in RIVALS.items()},
        "SWH as published": ("SWH", "fixed"),
    }
    reaches = (1, 4, 32, *suite.FAR)
    rows = ([name, *(_share(*run, TASKS, k) for k in reaches)] for name, run in models.items())
    return markdown(["right answers at", *(f"{32 * k:,} tokens" for k in reaches)], rows)


def recall_far() -> str:
    """Right answers of forms of the memory at 256 and 1,024 times the length of training."""
    forms = {
        "recommended": (suite.RECOMMENDED, "fixed"),
        "recommended, trained at 32 to 256": (suite.RECOMMENDED, "mixed"),
        "recommended, trained at 32 to 4,096": (suite.RECOMMENDED, "long"),
        "sigmoid gate": (suite.CONVOLVED, "fixed"),
        "sigmoid gate, trained at 32 to 256": (suite.CONVOLVED, "mixed"),
        "sigmoid gate, trained at 32 to 4,096": (suite.CONVOLVED, "long"),
        "closing gate": (suite.CONVOLVED_CLOSING, "fixed"),
        "closing gate, trained at 32 to 256": (suite.CONVOLVED_CLOSING, "mixed"),
        "sigmoid gate, no short convolution": (suite.OURS, "fixed"),
        "closing gate, no short convolution": (suite.CLOSING, "fixed"),
    }
    rows = (
        [form, *(_share(*run, [task], times) for task in TASKS for times in suite.FAR)]
        for form, run in forms.items()
    )
    head = [f"{task.split(',')[0].lower()} at {32 * k:,}" for task in TASKS for k in suite.FAR]
    return markdown(["the memory", *head], rows)


def recall_hard() -> str:
    """Right answers at 32 times the length on tasks without the memory's bias."""
    models = {
        "recommended": suite.RECOMMENDED,
        "sigmoid gate": suite.CONVOLVED,
        **RIVALS,
        "Gated delta net": "Gated delta net (Qwen3-Next)",
    }
    rows = (
        [task, *(_share(model, "mixed", [task], 32) for model in models.values())]
        for task in (*suite.HARDER, *suite.HARDEST)
    )
    return markdown(["right answers at 1,024 tokens", *models], rows)


def _losses(path: str) -> dict[str, float]:
    """Held-out loss of each model's best learning rate and width in the sweep, first seed."""
    losses: dict[str, float] = {}
    for row in read(path)["rows"]:
        if (row["part"], row["seed"]) == ("sweep", 0):
            losses[row["variant"]] = min(row["eval_loss"], losses.get(row["variant"], 99.0))
    return dict(sorted(losses.items(), key=lambda item: item[1]))


def text() -> str:
    """Held-out loss beside linear models and Transformers of equal size, on two kinds of text."""
    manuals, prose = _losses("memory/lm-short.json"), _losses("memory/prose/lm-short.json")
    rows = (
        [name, f"{loss:.3f}", f"{prose[name]:.3f}" if name in prose else "-"]
        for name, loss in manuals.items()
    )
    return markdown(["model, 1.51 million parameters", "manuals", "prose"], rows)


def text_longer() -> str:
    """Held-out loss on the way through 20 million tokens of the manuals (seed 0), and at their end
    and at that of the dictionaries, means over seeds; each model at its best rate and width."""
    sweep = _losses("memory/lm-small.json")
    marks = (5_120_000, 18_432_000)
    curves = _curves("memory/lm-small.json")
    ends = [
        memory.ends(read(f"memory/{folder}lm-small.json")["rows"], "main")
        for folder in ("", "dictionary/")
    ]
    lines = []
    for model in sorted(curves, key=lambda m: ends[0].get(m, [curves[m][marks[-1]]])[0]):
        losses = sweep.get(model), *map(curves[model].get, marks)
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        lines.append([memory.short(model), *cells, *(_end(found.get(model)) for found in ends)])
    head = [f"{mark / 1e6:.1f} million" for mark in marks]
    return markdown(["model", "1.05 million, a schedule of that length", *head,
                     "20 million", "20 million, dictionaries"], lines)  # fmt: skip


def _end(end: tuple[float, Sequence[Row]] | None) -> str:
    if end is None:
        return "-"
    seeds = f" ({len(end[1])} seeds)" if len(end[1]) > 1 else ""
    return f"{end[0]:.3f}{seeds}"


def _curves(path: str) -> dict[str, dict[int, float]]:
    """Model -> the curve of the run of seed 0 that came farthest, and of those the best."""
    saved, found = read(path), {}
    runs = [r for r in (*saved["rows"], *saved.get("unfinished", ())) if r["part"] == "main"]
    for model in {row["variant"] for row in runs}:
        own = [row for row in runs if row["variant"] == model and row["seed"] == 0]
        longest = max(row["eval_curve"][-1][0] for row in own)
        late = [row for row in own if row["eval_curve"][-1][0] == longest]
        run = min(late, key=lambda row: row["eval_curve"][-1][1])
        found[model] = {int(tokens): loss for tokens, loss in run["eval_curve"]}
    return found


def ablate_memory() -> str:
    """What each part of the memory is worth on text, and for recall at 16 times the length."""
    rows, lines = read("memory/ablate.json")["rows"], []
    for line in ablate.table({"rows": rows}, ablate.BEYOND):
        text, far = line["text"], line[f"{ablate.TASK} {ablate.REACH[-1]}x"]
        cells = [f"{cell.value:.3f}" if cell is not None else "-" for cell in (text, far)]
        lines.append([line["variant"], *cells])
    return markdown(["variant", "held-out nats per token", "recall at 1,024 tokens"], lines)


_RUNS = {
    "recommended": "SWH with memory, recommended",
    "sigmoid": "SWH with memory, sigmoid gate",
    "first-layer": "SWH with memory, sigmoid gate, first layer alone",
    "swh": "SWH",
    "conv-transformer": "Transformer, short conv.",
}


def text_lengths() -> str:
    """Held-out loss in rows of the training length and in longer ones, of the manuals and of the
    dictionaries."""
    losses: dict[str, dict[tuple[str, int], float]] = {}
    for folder in ("", "dictionary/"):
        for row in read(f"memory/{folder}lengths.json")["rows"]:
            at = folder, row["length"]
            losses.setdefault(Path(row["model"]).parent.name, {})[at] = row["loss"]
    places = list(losses["recommended"])
    lines = [
        [_RUNS[run], *(f"{of[at]:.3f}" if at in of else "-" for at in places)]
        for run, of in sorted(losses.items(), key=lambda item: list(_RUNS).index(item[0]))
    ]
    head = (f"{'dictionaries' if folder else 'manuals'}, {length:,}" for folder, length in places)
    return markdown(["rows of", *head], lines)


def text_repeats() -> str:
    """Held-out loss by how often a token's context occurred before."""
    found = read("memory/repeats.json")["rows"]
    models = list(found[0]["loss"])
    total = sum(row["tokens"] for row in found)
    lines = []
    for row in found:
        losses = (f"{loss:.3f}" for loss in row["loss"].values())
        lines.append([row["context"], row["next"], f"{row['tokens'] / total:.0%}", *losses])
    head = ["last two tokens occurred", "next token", "of the tokens"]
    names = {
        "recommended": "recommended",
        "conv-transformer": "Transformer, short conv.",
        "swh": "SWH",
    }
    labels = [names[model] for model in models]
    return markdown([*head, *labels], lines)


def text_linear() -> str:
    """Held-out loss on the way through 5 million tokens of the manuals, of one schedule, and at
    the end of those of the dictionaries."""
    found, second = read("memory/lm-small.json"), read("memory/dictionary/lm-small.json")
    others = {r["variant"]: r["eval_loss"] for r in second["rows"] if r["part"] == "branches"}
    runs = [r for r in (*found["rows"], *found["unfinished"]) if r["part"] == "branches"]
    marks = (2_048_000, 3_072_000, 4_096_000)
    curves = {r["variant"]: {int(at): loss for at, loss in r["eval_curve"]} for r in runs}
    ends = {r["variant"]: r.get("eval_loss") for r in runs}
    lines = [
        [
            memory.short(model),
            *(
                f"{loss:.3f}" if loss else "-"
                for loss in (*map(curve.get, marks), ends[model], others.get(model))
            ),
        ]
        for model, curve in sorted(curves.items(), key=lambda item: item[1][marks[0]])
    ]
    head = [f"{mark / 1e6:.1f} million" for mark in marks]
    return markdown(["model", *head, "5 million", "5 million, dictionaries"], lines)


# ------------------------------------------------------------------------------- speed

_SETTINGS = [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]


def goals() -> str:
    """Every goal of the benchmark on the processor where all were measured; bold: not reached."""
    measured: dict[tuple[str, str], Row] = {}
    for row in read("cpu/amd-epyc-znver5/goals.json")["goals"]:
        cell = f"{row['measured']:.3g}"
        cell = cell if row["reached"] == "reached" else f"**{cell}**"
        settings = measured.setdefault((row["path"], row["goal"]), {})
        settings[row["dtype"], row["threads"]] = cell
    head = ["path", "goal", *(f"{dtype}, {n} thread{'s' * (n > 1)}" for dtype, n in _SETTINGS)]
    rows = ([*names, *(of.get(each, "-") for each in _SETTINGS)] for names, of in measured.items())
    return markdown(head, rows)


def roofline() -> str:
    """Least times on an H100: of each kernel, and of the rest of a layer forward and backward."""
    kernels: list[Sequence[str]] = []
    rest: dict[tuple[str, str], Row] = {}
    for row in gpu_roofline.table():
        share = "-" if row["share"] is None else f"{100 * row['share']:.1f}%"
        if row["part"] not in ("convolution", "window", "memory"):
            times = rest.setdefault((row["part"], row["kernel"]), {"bound": set(), "share": 0.0})
            times[row["pass"]] = row["microseconds"]
            times["bound"].add(row["bound"])
            times["share"] += row["share"] or 0.0
        elif row["microseconds"] >= 0.1:
            numbers = (cell or "-" for cell in gpu_roofline.number_cells(row))
            name = f"{gpu_roofline.PARTS[row['part']]}: `{row['kernel'].replace(' ', '`, ', 1)}"
            name = name if "`, " in name else f"{name}`"
            kernels.append([name, row["pass"], *numbers, row["bound"], share])
    head = [
        "kernel",
        "pass",
        "bytes in",
        "bytes out",
        "tensor",
        "other",
        "us",
        "limit",
        "of a layer",
    ]
    lines = [
        [
            name,
            *(f"{times[each]:.1f}" if each in times else "-" for each in ("forward", "backward")),
            " and ".join(sorted(times["bound"])),
            f"{100 * times['share']:.1f}%" if times["share"] else "-",
        ]
        for (_, name), times in rest.items()
    ]
    others = ["the rest", "us forward", "us backward", "limit", "of a layer"]
    return f"{markdown(head, kernels)}\n{markdown(others, lines)}"


def roofline_sums() -> str:
    """Least milliseconds of layers and training steps, and what was measured."""
    head, lines = gpu_roofline.sum_cells(gpu_roofline.sums(folder=RESULTS / "gpu"))
    return markdown(head, ([cell or "-" for cell in line] for line in lines))


def roofline_measured() -> str:
    """Measured times of the operators beside their least."""
    head, lines = gpu_roofline.measured_cells(gpu_roofline.compare(RESULTS / "gpu"))
    return markdown(head, lines)


# ------------------------------------------------------------------------------- on many GPUs

COMPARED = ("SWH with memory", "Transformer")


def scaling_models() -> str:
    """Parameters, states and operations of every model, counted."""
    return markdown(*scaling.model_cells())


def scaling_gpus() -> str:
    """A training step in rows of 8,192 tokens on 1 to 512 GPUs."""
    return markdown(*_without("context", *scaling.cells(scaling.table(contexts=[8192]))))


def scaling_context() -> str:
    """A training step of the larger models with up to 16 million tokens of context."""
    rows = scaling.table(["1.3b", "7b"], [64, 512], scaling.CONTEXTS[1:], COMPARED)
    return markdown(*scaling.cells(rows))


def scaling_parts() -> str:
    """What the memory and the traffic of one GPU consist of."""
    rows = scaling.table(["7b"], [512], [8192, 1_048_576, 16_777_216], COMPARED[:1])
    rows += scaling.table(["7b"], [512], [16_777_216], COMPARED[1:])
    return markdown(*scaling.part_cells(rows))


def _without(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> scaling.Cells:
    """Leave out a column."""
    at = list(head).index(name)
    return tuple(_cut(head, at)), [tuple(_cut(row, at)) for row in rows]


def _cut(row: Sequence[str], at: int) -> list[str]:
    return [*row[:at], *row[at + 1 :]]


# ------------------------------------------------------------------------------- others


def demo() -> str:
    """The two models of `spectral-window demo`."""
    rows = []
    for name, folder in (("SWH with memory", "swh"), ("Transformer", "transformer")):
        end = read(f"demo/{folder}/result.json")
        rows.append(
            [
                name,
                f"{end['parameters']:,}",
                f"{end['eval_loss']:.3f}",
                f"{end['bits_per_byte']:.3f}",
                f"{end['tokens_per_second']:,.0f}",
                f"{end['peak_memory_bytes'] / 2**30:.2f} GiB",
            ]
        )
    head = ("parameters", "held-out loss", "bits per byte", "training tokens/s", "peak memory")
    return markdown([f"after {end['tokens']:,} tokens", *head], rows)


HERE = "cpu/amd-epyc-znver3"  # the processor of the tables below


def _rows(bench: str, **wanted: str) -> list[Row]:
    """The rows of a bench of `HERE` that were measured and are as wanted."""
    rows = (row for group in read(f"{HERE}/{bench}.json")["groups"] for row in group["rows"])
    fits = wanted.items()
    return [row for row in rows if row["status"] == "ok" and fits <= row.items()]


def _times(row: Row) -> str:
    """A row's time as a multiple of the first's of its size, with the spread."""
    if row["ratio"] == row["ratio_p10"] == row["ratio_p90"] == 1:
        return "1"
    return f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})"


def sharded() -> str:
    """What a process holds, and the time of a step, with whole models and with parts."""
    rows = _rows("sharded", part="weights")
    kinds = ("parameters", "gradients", "moments")
    cells = (
        [
            f"`{row['contestant']}`",
            *(f"{row['bytes'][kind] / 1e6:.1f} MB" for kind in kinds),
            f"{sum(row['bytes'].values()) / 1e6:.1f} MB",
            f"{row['tokens_per_s']:,.0f}",
            _times(row),
        ]
        for row in rows
    )
    count = f"{rows[0]['parameters']:,} parameters"
    return markdown([count, *kinds, "together", "tokens/s", "time of a step"], cells)


def spans() -> str:
    """A step on one long row, of one process and of two that share it."""
    cells = (
        [
            f"{row['length']:,}",
            f"`{row['contestant']}`" if "sent_bytes" in row else row["contestant"],
            f"{row['tokens_per_s']:,.0f}",
            _times(row),
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['sent_bytes'] / 1e6:.2f} MB" if "sent_bytes" in row else "-",
        ]
        for row in _rows("sharded", part="one row")
    )
    head = ["tokens of the row", "", "tokens/s", "time of a step"]
    return markdown([*head, "a process adds at its peak", "states sent"], cells)


def paper() -> str:
    """Every claim of the paper with its verdict."""
    return claims.markdown(claims.evaluate(claims.read(RESULTS / "paper"))) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "goals": goals,
    "paper": paper,
    "recall": recall,
    "recall-far": recall_far,
    "recall-hard": recall_hard,
    "recall-lengths": recall_lengths,
    "roofline": roofline,
    "roofline-measured": roofline_measured,
    "roofline-sums": roofline_sums,
    "scaling-context": scaling_context,
    "scaling-gpus": scaling_gpus,
    "scaling-models": scaling_models,
    "scaling-parts": scaling_parts,
    "sharded": sharded,
    "spans": spans,
    "text": text,
    "text-linear": text_linear,
    "text-lengths": text_lengths,
    "text-repeats": text_repeats,
    "text-longer": text_longer,
    "ablate-memory": ablate_memory,
}


def renew(page: str) -> str:
    """The text of a page with every table in it made from results/. Without Triton the tables that
    count its kernels stay as they are."""

    def table(place: re.Match[str]) -> str:
        if place[2].startswith("roofline") and not HAS_TRITON:
            return place[0]
        return place[1] + TABLES[place[2]]() + place[3]

    return _PLACE.sub(table, page)


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if renew(page) != page:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(renew(page), encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
