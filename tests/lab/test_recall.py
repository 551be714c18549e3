"""The recall suite: equal sizes, settings in the key, rows that are taken over, kept and shown."""

from __future__ import annotations

import dataclasses
import json
import signal
from itertools import chain

import pytest

from spectral_window.cli import main
from spectral_window.data.tasks import make
from spectral_window.hf.model import count_parameters
from spectral_window.lab.experiments import experiment, probes, recall, synthetic
from spectral_window.lab.experiments.experiment import Trial
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.training.interrupt import Interrupted

TRIALS = list(chain.from_iterable(recall.stages()))
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 4}
SMALL = Probe("needle", SHAPE, (Exam("needle", 32, 20),), lengths=(32,), steps=2, rows=4)


def test_a_key_names_all_settings_of_a_probe():
    other = {
        "task": "recall", "model": SHAPE | {"mixer": "memory"}, "tests": (Exam("needle", 64, 20),),
        "options": {"values": 8}, "match": False, "lengths": (32, 64), "rows": 5, "steps": 3,
        "lr": 2e-3, "weight_decay": 0.0, "decay_all": True, "clip": 2.0, "seed": 1,
    }  # fmt: skip
    assert other.keys() == {field.name for field in dataclasses.fields(Probe)}
    keys = {dataclasses.replace(SMALL, **{name: value}).key for name, value in other.items()}
    assert len(keys | {SMALL.key}) == len(other) + 1


def test_every_trial_has_its_own_key_and_name():
    assert len({t.run.key for t in TRIALS}) == len({t.name for t in TRIALS}) == len(TRIALS)


def test_every_task_has_the_memory_and_its_rivals_from_the_same_seeds_and_lengths():
    for ability in recall.ABILITIES:
        of = {model: set() for model in (recall.CONVOLVED, *recall.RIVALS)}
        for trial in TRIALS:
            if trial.labels["training"] == "long":  # for what memories alone are asked
                assert trial.labels["model"] in recall.MEMORIES
            elif trial.labels["ability"] == ability and trial.labels["model"] in of:
                of[trial.labels["model"]].add((trial.labels["training"], trial.run.seed))
        assert len({frozenset(runs) for runs in of.values()}) == 1, ability
        seeds = {seed for _, seed in of[recall.CONVOLVED]}
        assert seeds == ({0} if ability in recall.MORE else {0, 1, 2})


def test_models_are_equally_large():
    """On every vocabulary: tasks of the same one have the same models."""
    probes = {
        (make(t.run.task, **t.run.options).vocab_size, t.labels["model"]): t.run for t in TRIALS
    }
    for vocabulary in {size for size, _ in probes}:
        of = [
            count_parameters(probes[vocabulary, model].config())
            for model in recall.MODELS
            if (vocabulary, model) in probes
        ]
        assert len(of) >= 4
        assert max(of) <= 1.01 * min(of)


def test_no_model_sees_a_whole_sequence_in_its_window():
    for trial in TRIALS:
        assert 2 * trial.run.model["window"] < min(trial.run.lengths)


def test_two_thousand_sequences_are_asked_at_the_base_length_and_memories_at_1024_times():
    for trial in TRIALS:
        base = recall.ABILITIES[trial.labels["ability"]].base
        tests = {test.length // base: test for test in trial.run.tests}
        assert tests[1].rows == 2048
        mqar = trial.run.task == "mqar"
        assert max(k for k in tests if k not in recall.FAR) == (4 if mqar else 32)
        far = [test.length for k, test in tests.items() if k in recall.FAR]
        tasks = "needle", "induction", "recall"
        wanted = trial.labels["model"] in recall.MEMORIES and trial.run.task in tasks
        assert far == ([8192, 32_768] if wanted and trial.labels["ability"] in recall.KNOWN else [])


def test_rows_of_the_suite_synthetic_count_here_and_the_memory_learns_from_fewer_sequences():
    theirs = {e.run.key for e in synthetic.trials()}
    for trial in TRIALS:
        if trial.labels["ability"] in recall.KNOWN:
            taken = trial.labels["model"] in (recall.PUBLISHED, recall.TRANSFORMER)
            assert (trial.run.key in theirs) == taken
            if not taken and trial.labels["training"] != "long":
                (of,) = {
                    t.run.rows * t.run.steps
                    for t in TRIALS
                    if (t.labels["ability"], t.labels["model"])
                    == (trial.labels["ability"], recall.TRANSFORMER)
                }
                assert 2 <= of / (trial.run.rows * trial.run.steps) <= 5


@pytest.fixture
def stages(monkeypatch) -> list[list[Trial]]:
    """Two stages of a small probe each."""
    found = [
        [recall._trial("Needle", recall.OURS, "fixed", dataclasses.replace(SMALL, seed=seed))]
        for seed in (0, 1)
    ]
    monkeypatch.setattr(recall, "stages", lambda quick: found)
    return found


def test_a_stopped_suite_has_written_its_rows_and_goes_on(tmp_path, stages, monkeypatch):
    first, second = (stage[0].run for stage in stages)
    work, out, paper = (tmp_path / name for name in ("work", "out", "paper"))
    options = {
        "earlier": paper,
        "quick": False,
        "workers": 1,
        "command": "c",
        "log": lambda _: None,
    }
    paper.mkdir()
    row = json.loads(json.dumps(probes.run(first) | {"form": "posed"}))
    (paper / "synthetic.json").write_text(json.dumps({"rows": [row]}))

    def stopped(jobs, **_):
        if jobs:
            raise Interrupted(signal.SIGTERM)
        return []

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "run_all", stopped)
        with pytest.raises(Interrupted):
            recall.run(out, work, **options)
    (kept,) = json.loads((out / "recall.json").read_text())["rows"]
    about = {"ability": "Needle", "model": recall.OURS, "training": "fixed"}
    assert kept == {k: v for k, v in row.items() if k != "form"} | about
    found = recall.run(out, work, **options)
    assert [row["key"] for row in found["rows"]] == [first.key, second.key]
    # the results alone are enough to know what is done
    again = recall.run(out, tmp_path / "elsewhere", **options | {"earlier": None})
    assert again["rows"] == found["rows"]
    assert not list((tmp_path / "elsewhere").glob("*"))


def test_the_table_has_means_and_tells_how_many_seeds_there_were():
    def row(model: str, *right: int) -> dict:
        tests = [
            {"length": 32 * k, "right": r, "asked": 100}
            for k, r in zip((1, 32, 1024), right, strict=False)
        ]
        return {"ability": "Needle", "model": model, "training": "fixed", "tests": tests}

    rows = [row(recall.OURS, 100, 100, 90), row(recall.OURS, 100, 100, 60)]
    rows += [row(recall.OURS, 100, 99, 90), row(recall.TRANSFORMER, 100, 40)]
    assert recall.table(rows).splitlines() == [
        "| task | trained at | model | seeds | 1x | 4x | 32x | 256x | 1,024x |",
        "|---|---|---|---|---|---|---|---|---|",
        "| Needle | 32 | SWH with memory | 3 | 1.000 | - | 0.997 | - | 0.80 |",
        "| Needle | 32 | Transformer | 1 | 1.000 | - | 0.40 | - | - |",
    ]


def test_the_quick_version_runs_to_its_end_with_table_and_picture(tmp_path, capsys):
    assert main(["reproduce", "recall", "--quick", "--work", str(tmp_path)]) == 0
    assert "quick version" in capsys.readouterr().err
    results = tmp_path / "results"
    found = json.loads((results / "recall.json").read_text())
    assert found["quick"]
    every = [recall.CONVOLVED, *recall.RIVALS]
    assert [row["model"] for row in found["rows"]] == every
    assert (results / "recall.md").read_text().count("\n") == 2 + len(every)
    assert (results / "recall.png").read_bytes().startswith(b"\x89PNG")
