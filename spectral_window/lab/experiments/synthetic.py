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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spectral_window.data.tasks import ceiling, make
from spectral_window.lab.experiments.experiment import EACH, Experiment, Trial
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.jobs import Log

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
WELL_POSED_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window": 8,
}
REACH = (1, 2, 4, 8, 16, 32)  # times the training length
BASE = 32


def trials(*, seeds: tuple[int, ...] = SEEDS, quick: bool = False) -> list[Trial[Probe]]:
    """The whole suite, the published part first. Labels: form ("published" or "posed"), model, and
    training ("fixed" or "mixed" lengths).

    quick: shows the way and no result: ten steps of SWH and Transformer, one seed.
    """
    if not quick:
        return [*_published(seeds), *_well_posed(seeds)]
    first = [*_published(seeds[:1]), *_well_posed(seeds[:1])]
    return [
        dataclasses.replace(trial, run=shorten(trial.run))
        for trial in first
        if trial.labels["model"] in ("SWH", "Transformer") and trial.labels["training"] == "fixed"
    ]


def _trial(form: str, model: str, training: str, probe: Probe) -> Trial[Probe]:
    name = f"{form} {probe.task}, {model}, {training}, seed {probe.seed}"
    return Trial(name, probe, {"form": form, "model": model, "training": training})


def _published(seeds: tuple[int, ...]) -> Iterator[Trial[Probe]]:
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
                yield _trial("published", model, "fixed", probe)


def _well_posed(seeds: tuple[int, ...]) -> Iterator[Trial[Probe]]:
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
                shape = WELL_POSED_SHAPE | MODELS[model]
                probe = Probe(task, shape, tests, lengths=lengths, steps=steps, lr=3e-3, seed=seed)
                yield _trial("posed", model, training, probe)
        for task, length in (("sorting", 32), ("mqar", 64)):
            tests = tuple(Exam(task, length * k) for k in (1, 2, 4))
            for model in ("SWH", "Transformer", "window only"):
                shape = WELL_POSED_SHAPE | MODELS[model]
                probe = Probe(task, shape, tests, lengths=(length,), steps=1500, lr=3e-3, seed=seed)
                yield _trial("posed", model, "fixed", probe)


def shorten(probe: Probe) -> Probe:
    """Ten steps and two small tests of it: for a quick version."""
    tests = tuple(dataclasses.replace(test, rows=64) for test in probe.tests[:2])
    return dataclasses.replace(probe, steps=10, rows=16, tests=tests)


def run(
    out: Path, work: Path, *, quick: bool, workers: int, command: str, log: Log = print
) -> dict[str, Any]:
    """Run what is missing of the suite, `workers` probes at a time, and write out/synthetic.json.

    work: where each probe leaves its row. Returns what was written. Raises Interrupted on a signal;
    the next call continues.
    """
    experiment = Experiment(
        "synthetic", out, work, quick=quick, workers=workers, command=command, log=log
    )
    suite = trials(quick=quick)
    experiment.run(suite, each=8 if quick else EACH)
    return experiment.save(experiment.rows(suite), ceilings=ceilings(suite))


def ceilings(suite: Sequence[Trial[Probe]]) -> list[dict[str, Any]]:
    """The best possible score of every test in the suite."""
    asked = {(test.task, test.length): None for trial in suite for test in trial.run.tests}
    return [
        {"task": task, "length": length, "ceiling": ceiling(make(task), length)}
        for task, length in asked
    ]


def chance(task: str, **options: Any) -> float:
    """The score of a guess among the tokens that can be an answer."""
    one = make(task, **options)
    return 1 / getattr(one, "values", getattr(one, "tokens", one.vocab_size))
