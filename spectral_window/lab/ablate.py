"""Ablations: one part of the layer changed at a time, at equal parameters, on three abilities.

    recall                  four pairs anywhere in noise (data/tasks/posed.py), trained and asked at
                            64 tokens
    length generalisation   the same models asked at 2 to 16 times that
    text                    a language model, held-out loss in nats a token

All variants share training, seeds and questions, but that the window alone begins on text with the
initial weights it wants. The paper's layer is one of each group and is run once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_window.errors import unknown
from spectral_window.lab import probes, results
from spectral_window.lab.jobs import Say, run_all
from spectral_window.lab.probes import Exam, Probe
from spectral_window.lab.trainings import Text, Training

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
TASK = "recall"
LENGTH = 64  # of training; with W = 32 a query sees 33 to 64 tokens
REACH = (1, 2, 4, 8, 16)
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 32}
TEXT_KNOBS: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "steps": 256,
    "eval_every": 256,
}
QUICK_KNOBS: dict[str, Any] = {"steps": 4, "warmup_steps": 2}
NARROW = 0.02  # initial weights that attention alone wants (results/paper/lm-small.json)
PROBE_SEEDS, TEXT_SEEDS = (0, 1, 2), (0, 1)


def run(
    out: Path,
    work: Path,
    *,
    groups: Sequence[str],
    text: Text,
    quick: bool,
    workers: int,
    command: str,
    say: Say = print,
) -> dict[str, Any]:
    """Run what is missing of the `groups` (none: all) and write out/ablate.json, the earlier groups
    kept.

    quick: a few steps of one probe for each variant, and two language models: shows the way.
    work: where probes keep their rows and trainings their folders. Raises UserError for an unknown
    group, Interrupted on a signal; the next call goes on.
    """
    for group in groups:
        if group not in GROUPS:
            raise unknown("ablation", group, GROUPS)
    chosen = {group: GROUPS[group] for group in groups or GROUPS}
    variants = unique(chosen)
    trials = [probe for overrides in variants for probe in probes_of(overrides, quick)]
    texts = [
        training
        for overrides in (variants[:2] if quick else variants)
        for training in trainings_of(overrides, quick)
    ]
    earlier = results.load(out, "ablate") or {"rows": []}
    known = {row["key"]: row for row in earlier["rows"]}
    text.prepare(texts[0].resolved())
    missing = [(_name(probe), probe) for probe in trials if probe.key not in known]
    jobs = probes.jobs(missing, work, 9 if quick else probes.EACH)
    jobs += [t.job(work, text) for t in texts if t.key(text) not in known]
    say(f"{len(trials)} probes and {len(texts)} trainings, {len(jobs)} jobs to run")
    failed = run_all(jobs, workers=workers, say=say)
    for probe in trials:
        if row := probes.read(probe, work):
            known[probe.key] = {"measure": probe.task, "overrides": overrides_of(probe)} | row
    for training in texts:
        if row := training.row(work, text):
            known[row["key"]] = row
    path = results.keep(
        out, "ablate", list(known.values()), quick=quick, command=command, failed=failed
    )
    say(f"{len(known)} rows: {path}")
    return results.load(out, "ablate") or {}


def unique(groups: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The variants of all groups, each once."""
    found: list[dict[str, Any]] = []
    for variants in groups.values():
        found += [overrides for overrides in variants.values() if overrides not in found]
    return found


def probes_of(overrides: dict[str, Any], quick: bool = False) -> list[Probe]:
    """Recall of a variant, all seeds."""
    tests = tuple(Exam(TASK, LENGTH * k) for k in REACH)
    shape = SHAPE | overrides
    found = [
        Probe(TASK, shape, tests, lengths=(LENGTH,), steps=1000, lr=3e-3, seed=seed)
        for seed in PROBE_SEEDS
    ]
    if not quick:
        return found
    few = tuple(dataclasses.replace(test, rows=32) for test in tests[:2])
    return [dataclasses.replace(found[0], steps=4, rows=8, tests=few)]


def trainings_of(overrides: dict[str, Any], quick: bool = False) -> list[Training]:
    """The language models of a variant, all seeds."""
    name = "-".join(f"{key}-{_plain(value)}" for key, value in overrides.items()) or "paper"
    recipe, knobs = ("tiny", QUICK_KNOBS) if quick else ("paper-lm-small", TEXT_KNOBS)
    if overrides.get("branches") == ("window",):
        knobs = {**knobs, "initializer_range": NARROW}
    return [
        Training(
            recipe,
            {**knobs, **overrides, "seed": seed},
            f"text/{name}-seed{seed}",
            {"measure": "text", "overrides": _listed(overrides), "seed": seed},
        )
        for seed in (TEXT_SEEDS[:1] if quick else TEXT_SEEDS)
    ]


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


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a variant: group, name, and for every measure an `Estimate` over the seeds, or None
    where it is missing."""
    lines = []
    for group, variants in GROUPS.items():
        for name, overrides in variants.items():
            rows = [r for r in found["rows"] if r["overrides"] == _listed(overrides)]
            line: dict[str, Any] = {"group": group, "variant": name}
            for reach in REACH:
                counts = [
                    (t["right"], t["asked"])
                    for row in rows
                    if row["measure"] == TASK
                    for t in row["tests"]
                    if t["length"] == LENGTH * reach
                ]
                line[f"{TASK} {reach}x"] = results.share(counts) if counts else None
            losses = [row["eval_loss"] for row in rows if row["measure"] == "text"]
            line["text"] = results.mean(losses) if losses else None
            sizes = {row["parameters"] for row in rows if row["measure"] != "text"}
            line["parameters"] = max(sizes) if sizes else None
            lines.append(line)
    return lines
