"""Ablations: one part of the layer changed at a time, at equal parameters, on three abilities.

    recall                  four pairs anywhere in noise (data/tasks/well_posed.py), trained and
                            asked at 64 tokens
    length generalisation   the same models asked at 2 to 16 times that
    text                    a language model, held-out loss in nats per token

All variants share training, seeds and questions, except that the window alone has its own width of
the initial weights on text. The paper's layer is one of each group and is run once.

The group "memory" is beyond the paper (`nn/memory.py`; what no option of it changes is in
`variants.py`): run by its name alone, with results of its own. Its text is in float32, which every
CPU computes fast, twice as long, and has a third seed. The first seed of every variant comes first,
so a run that is stopped has a row of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_window.errors import UserError, unknown
from spectral_window.files import write_text
from spectral_window.lab.estimates import Estimate, mean, share
from spectral_window.lab.experiments.experiment import EACH, Experiment, Trial
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.experiments.trainings import RECIPES_OWN, Text, Training
from spectral_window.lab.jobs import Log
from spectral_window.lab.results import load

PAPER: dict[str, Any] = {}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "window": {
        f"W = {width}": {} if width == 32 else {"window": width}
        for width in (16, 32, 64, 128, 256, 512)
    },
    "branches": {
        "both (paper)": PAPER,
        "spectral only": {"branches": ("spectral",)},
        "window only": {"branches": ("window",)},
    },
    "fusion": {
        "norm-add (paper)": PAPER,
        "learned weights": {"fusion": "weighted"},
        "gated": {"fusion": "gated"},
        "symmetric norm": {"fusion": "symmetric_norm"},
        "sum without norm": {"fusion": "sum"},
    },
    "kernel": {
        "oscillator (paper)": PAPER,
        "pure decay": {"kernel": "pure_decay"},
        "log-spaced oscillators": {"kernel": "log_spaced"},
        "several modes a channel": {"kernel": "multi_mode"},
        "free-form filter": {"kernel": "free_form"},
        "implicit MLP filter": {"kernel": "implicit_mlp"},
        "fixed short filter": {"kernel": "short_filter"},
    },
}
MEMORY: dict[str, Any] = {"mixer": "memory"}
CONVOLVED: dict[str, Any] = MEMORY | {"short_convolution": True}
VARIANT: dict[str, Any] = {"mixer": "memory_variant"}
BEYOND: dict[str, dict[str, dict[str, Any]]] = {
    "memory": {
        "no memory (paper)": PAPER,
        "memory": MEMORY,
        "short convolution": CONVOLVED,
        "short convolution, W = 128": CONVOLVED | {"window": 128},
        "short convolution, gate that closes": CONVOLVED | {"write_gate": "closing"},
        "short convolution, no convolution branch": CONVOLVED | {"branches": ("window",)},
        "short convolution, gate that reflects": CONVOLVED | {"write_gate": "reflecting"},
        "write gate that closes": MEMORY | {"write_gate": "closing"},
        "2 heads": MEMORY | {"memory_heads": 2},
        "4 heads": MEMORY | {"memory_heads": 4},
        "no convolution": MEMORY | {"branches": ("window",)},
        "no read gate": VARIANT | {"read_gate": False},
        "key: the token before, fixed": VARIANT | {"memory_key": "before"},
        "key: the window's": VARIANT | {"memory_key": "window"},
        "added, no delta rule": VARIANT | {"delta_rule": False},
        "own query": VARIANT | {"memory_query": True},
        "own query and value": VARIANT | {"memory_query": True, "memory_value": True},
        "decay": VARIANT | {"memory_decay": True},
        "in the first layer of two": VARIANT | {"memory_in": "first"},
        "in the second layer of two": VARIANT | {"memory_in": "others"},
        "W = 16": MEMORY | {"window": 16},
        "W = 64": MEMORY | {"window": 64},
        "W = 128": MEMORY | {"window": 128},
        "kernel: log-spaced": MEMORY | {"kernel": "log_spaced"},
        "kernel: fixed short filter": MEMORY | {"kernel": "short_filter"},
    },
}
TASK = "recall"
LENGTH = 64  # of training; with W = 32 a query sees 33 to 64 tokens
REACH = (1, 2, 4, 8, 16)
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 32}
LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "steps": 256,
    "eval_every": 256,
}
LONGER: dict[str, Any] = {"dtype": "float32", "steps": 512}  # of the groups beyond the paper
QUICK: dict[str, Any] = {"steps": 4, "warmup_steps": 2}
NARROW = 0.02  # initial weights that suit attention alone (results/paper/lm-small.json)
PROBE_SEEDS, TEXT_SEEDS = (0, 1, 2), (0, 1)
BEYOND_SEEDS = (0, 1, 2)  # of the text beyond the paper


def run(
    out: Path,
    work: Path,
    *,
    groups: Sequence[str],
    text: Text,
    quick: bool,
    workers: int,
    command: str,
    earlier: Path | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Run what is missing of the `groups` (none: the paper's), and write out/ablate.json, at the
    end or when it is stopped, with the rows of earlier groups.

    earlier: the folder of another ablate.json, whose rows of these variants are not run again.
    quick: a few steps of one probe for each variant, and two language models: shows the way.
    work: where probes keep their rows and trainings their folders. Raises UserError for an unknown
    group, Interrupted on a signal; the next call continues.
    """
    beyond = is_beyond(groups)
    trials = trials_of(unique(named(groups)), text, quick=quick, beyond=beyond)
    first = next(trial.run for trial in trials if isinstance(trial.run, Training))
    text.prepare(first.resolved())
    keys = {trial.run.key for trial in trials}
    shared = (load(earlier, "ablate") if earlier else None) or {"rows": []}
    experiment = Experiment(
        "ablate", out, work, quick=quick, workers=workers, command=command, log=log,
        earlier=[row for row in shared["rows"] if row["key"] in keys],
    )  # fmt: skip
    saved: dict[str, Any] = {}
    try:
        experiment.run(trials, each=9 if quick else EACH)
    finally:
        rows = experiment.earlier | {row["key"]: row for row in experiment.rows(trials)}
        saved = experiment.save(list(rows.values()))
        if beyond and rows:
            write_text(out / "ablate.md", markdown(saved["rows"]))
    return saved


def trials_of(
    variants: Sequence[dict[str, Any]], text: Text, *, quick: bool = False, beyond: bool = False
) -> list[Trial]:
    """Recall and text of every variant, all seeds: all probes first, or, beyond the paper, the
    first seed of everything first."""
    recall = [trial for overrides in variants for trial in probes_of(overrides, quick)]
    losses = [
        trial
        for overrides in (variants[:2] if quick else variants)
        for trial in trainings_of(overrides, quick, beyond, text)
    ]
    return [
        trial
        for seeds in ([(seed,) for seed in PROBE_SEEDS] if beyond else [PROBE_SEEDS])
        for trial in (*recall, *losses)
        if _seed(trial) in seeds
    ]


def _seed(trial: Trial) -> int:
    return trial.run.seed if isinstance(trial.run, Probe) else trial.labels["seed"]


def named(groups: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """The groups of these names; none: the paper's. Raises UserError for an unknown one."""
    every = GROUPS | BEYOND
    for group in groups:
        if group not in every:
            raise unknown("ablation", group, every)
    return {group: every[group] for group in groups or GROUPS}


def is_beyond(groups: Sequence[str]) -> bool:
    """Are these groups beyond the paper? Raises UserError where some are and some are not."""
    kinds = {group in BEYOND for group in groups}
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(groups)} (ablations): {', '.join(BEYOND)} has results of its own; run it "
            "by itself"
        )
    return kinds == {True}


def unique(groups: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The variants of all groups, each once."""
    different: list[dict[str, Any]] = []
    for variants in groups.values():
        different += [overrides for overrides in variants.values() if overrides not in different]
    return different


def probes_of(overrides: dict[str, Any], quick: bool = False) -> list[Trial]:
    """Recall of a variant, all seeds. Labels: measure, overrides."""
    tests = tuple(Exam(TASK, LENGTH * k) for k in REACH)
    probes = [
        Probe(TASK, SHAPE | overrides, tests, lengths=(LENGTH,), steps=1000, lr=3e-3, seed=seed)
        for seed in PROBE_SEEDS
    ]
    if quick:
        few = tuple(dataclasses.replace(test, rows=32) for test in tests[:2])
        probes = [dataclasses.replace(probes[0], steps=4, rows=8, tests=few)]
    return [
        Trial(_name(probe), probe, {"measure": probe.task, "overrides": overrides_of(probe)})
        for probe in probes
    ]


def trainings_of(
    overrides: dict[str, Any], quick: bool = False, beyond: bool = False, text: Text = RECIPES_OWN
) -> list[Trial]:
    """The language models of a variant, all seeds. Labels: measure, overrides, seed."""
    name = "-".join(f"{key}-{_plain(value)}" for key, value in overrides.items()) or "paper"
    longer, seeds = (LONGER, BEYOND_SEEDS) if beyond else ({}, TEXT_SEEDS)
    recipe, shape = "paper-lm-small", LANGUAGE_MODEL | longer
    if quick:
        recipe, shape = "tiny", longer | QUICK
    if overrides.get("branches") == ("window",):
        shape = {**shape, "initializer_range": NARROW}
    trials = []
    for seed in seeds[:1] if quick else seeds:
        place = f"text/{name}-seed{seed}"
        training = Training(recipe, {**shape, **overrides, "seed": seed}, place, text)
        labels = {"measure": "text", "overrides": _listed(overrides), "seed": seed}
        trials.append(Trial(place, training, labels))
    return trials


def overrides_of(probe: Probe) -> dict[str, Any]:
    """What a probe's model changes in the paper's layer."""
    return _listed({k: v for k, v in probe.model.items() if SHAPE.get(k) != v})


def _listed(overrides: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}


def _plain(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _name(probe: Probe) -> str:
    changes = " ".join(f"{k}={_plain(v)}" for k, v in probe.model.items() if SHAPE.get(k) != v)
    return f"{probe.task}, {changes or 'the paper'}, seed {probe.seed}"


def table(
    results: dict[str, Any], groups: dict[str, dict[str, dict[str, Any]]] = GROUPS
) -> list[dict[str, Any]]:
    """One line a variant of `groups`: group, name, and for every measure an `Estimate` over the
    seeds, or None where it is missing."""
    lines = []
    for group, variants in groups.items():
        for name, overrides in variants.items():
            rows = [r for r in results["rows"] if r["overrides"] == _listed(overrides)]
            line: dict[str, Any] = {"group": group, "variant": name}
            for reach in REACH:
                counts = [
                    (t["right"], t["asked"])
                    for row in rows
                    if row["measure"] == TASK
                    for t in row["tests"]
                    if t["length"] == LENGTH * reach
                ]
                line[f"{TASK} {reach}x"] = share(counts) if counts else None
            losses = [row["eval_loss"] for row in rows if row["measure"] == "text"]
            line["text"] = mean(losses) if losses else None
            sizes = {row["parameters"] for row in rows if row["measure"] != "text"}
            line["parameters"] = max(sizes) if sizes else None
            lines.append(line)
    return lines


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The groups beyond the paper as a Markdown table: means over seeds."""
    reaches = (1, REACH[-1])
    head = ["variant", "parameters of the language model", "held-out nats per token"]
    head += [f"recall at {LENGTH * reach:,} tokens" for reach in reaches]
    text = f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
    for line in table({"rows": list(rows)}, BEYOND):
        mine = [
            row for row in rows if row["overrides"] == _listed(BEYOND["memory"][line["variant"]])
        ]
        sizes = {row["parameters"] for row in mine if row["measure"] == "text"}
        cells = [f"{max(sizes):,}" if sizes else "-", _mean(line["text"], 3)]
        cells += [_mean(line[f"{TASK} {reach}x"], 3) for reach in reaches]
        text += f"| {line['variant']} | {' | '.join(cells)} |\n"
    return text


def _mean(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    seeds = f" ({estimate.seeds} seeds)" if estimate.seeds > 1 else ""
    return f"{estimate.value:.{digits}f}{seeds}"
