"""The five diagnostic tasks, twice.

As published: the paper's generators, sizes and training (PAPER.md section 2); the paper's number
for length generalisation and the needle comes from the associative model at T = 128 and 256. Beside
every score stands the ceiling, the score of the best possible solver, because these tasks cannot be
solved: the key also occurs by chance.

Well-posed: the same abilities where an answer exists (`data/tasks/well_posed.py`), with equal
parameters, the window shorter than the shortest sequence, and 2,048 held-out examples at every
length. Recall, needle and induction are trained at 32 tokens and asked at 1 to 32 times that.
"mixed" models have seen up to 8 times in the second half of their training, so that only 16 and 32
times are beyond it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_window.data.tasks import ceiling, make
from spectral_window.lab import results
from spectral_window.lab.experiments import probes
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.jobs import Say, run_all

SEEDS = (0, 1, 2)
MODELS: dict[str, dict[str, Any]] = {
    "SWH": {},
    "Transformer": {"mixer": "attention"},
    "window only": {"branches": ("window",)},
}
PUBLISHED_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "window": 32,
}
POSED_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window": 8,
}
REACH = (1, 2, 4, 8, 16, 32)  # times the training length
BASE = 32


@dataclass(frozen=True)
class Entry:
    """One line of the suite: which form and model, and the probe that measures it."""

    form: str  # "published" or "posed"
    model: str
    training: str  # "fixed" or "mixed" lengths
    probe: Probe


def entries(*, seeds: tuple[int, ...] = SEEDS, quick: bool = False) -> list[Entry]:
    """The whole suite, the published part first; `quick` shows the way and no result: ten steps of
    SWH and Transformer, one seed."""
    if not quick:
        return [*_published(seeds), *_posed(seeds)]
    found = [*_published(seeds[:1]), *_posed(seeds[:1])]
    few = [e for e in found if e.model in ("SWH", "Transformer") and e.training == "fixed"]
    return [dataclasses.replace(entry, probe=shorten(entry.probe)) for entry in few]


def _published(seeds: tuple[int, ...]) -> Iterator[Entry]:
    for seed in seeds:
        for task in ("associative", "induction", "sorting"):
            name = f"published-{task}"
            tests = [Exam(name, 32, 4096)]
            if task == "associative":
                tests += [Exam(name, 128, 4096), Exam("published-needle", 256, 4096)]
            for model in ("SWH", "Transformer"):
                shape = PUBLISHED_SHAPE | MODELS[model]
                probe = Probe(
                    name, shape, tuple(tests), match=False, decay_all=True, seed=seed
                )  # 3,000 steps of 64 at 1e-3
                yield Entry("published", model, "fixed", probe)


def _posed(seeds: tuple[int, ...]) -> Iterator[Entry]:
    mixed = tuple(BASE * k for k in REACH if k <= 8)
    for seed in seeds:
        # induction asks once a row for a token like all others, and takes longest to learn
        for task, steps in (("recall", 1000), ("needle", 1000), ("induction", 2000)):
            tests = tuple(Exam(task, BASE * k) for k in REACH)
            for model, training, lengths in (
                ("SWH", "fixed", (BASE,)),
                ("Transformer", "fixed", (BASE,)),
                ("window only", "fixed", (BASE,)),
                ("SWH", "mixed", mixed),
                ("Transformer", "mixed", mixed),
            ):
                shape = POSED_SHAPE | MODELS[model]
                probe = Probe(task, shape, tests, lengths=lengths, steps=steps, lr=3e-3, seed=seed)
                yield Entry("posed", model, training, probe)
        for task, length in (("sorting", 32), ("mqar", 64)):
            tests = tuple(Exam(task, length * k) for k in (1, 2, 4))
            for model in ("SWH", "Transformer", "window only"):
                shape = POSED_SHAPE | MODELS[model]
                probe = Probe(task, shape, tests, lengths=(length,), steps=1500, lr=3e-3, seed=seed)
                yield Entry("posed", model, "fixed", probe)


def shorten(probe: Probe) -> Probe:
    """Ten steps and two small tests of it: for a quick version."""
    tests = tuple(dataclasses.replace(test, rows=64) for test in probe.tests[:2])
    return dataclasses.replace(probe, steps=10, rows=16, tests=tests)


def run(
    out: Path, work: Path, *, quick: bool, workers: int, command: str, say: Say = print
) -> dict[str, Any]:
    """Run what is missing of the suite, `workers` probes at a time, and write out/synthetic.json.

    work: where every probe keeps its own row, so that a stopped suite goes on and a finished one is
    only read. Returns what was written. Raises Interrupted on a signal.
    """
    suite = entries(quick=quick)
    known = {row["key"]: row for row in (results.load(out, "synthetic") or {"rows": []})["rows"]}
    missing = [(_name(e), e.probe) for e in suite if e.probe.key not in known]
    each = 8 if quick else probes.EACH
    jobs = probes.jobs(missing, work, each)
    say(f"{len(suite)} probes, {len(missing)} not in earlier results, {len(jobs)} jobs to run")
    failed = run_all(jobs, workers=workers, say=say)
    rows = []
    for entry in suite:
        row = known.get(entry.probe.key) or probes.read(entry.probe, work)
        if row is not None:
            about = {"form": entry.form, "model": entry.model, "training": entry.training}
            rows.append(about | row)
    more = {"failed": failed, "ceilings": ceilings(suite)}
    written = results.keep(out, "synthetic", rows, quick=quick, command=command, **more)
    say(f"{len(rows)} of {len(suite)} rows: {written}")
    return results.load(out, "synthetic") or {}


def ceilings(suite: list[Entry]) -> list[dict[str, Any]]:
    """The best possible score of every test in the suite."""
    asked = {(t.task, t.length): None for e in suite for t in e.probe.tests}
    return [
        {"task": task, "length": length, "ceiling": ceiling(make(task), length)}
        for task, length in asked
    ]


def _name(entry: Entry) -> str:
    probe = entry.probe
    return f"{entry.form} {probe.task}, {entry.model}, {entry.training}, seed {probe.seed}"
