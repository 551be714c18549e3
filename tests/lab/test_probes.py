"""Probes learn a task; the row says what was measured; equal settings give equal rows."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from spectral_window.data.tasks import IGNORED, generator, make
from spectral_window.errors import DivergedError
from spectral_window.hf.model import count_parameters
from spectral_window.lab.experiments import probes
from spectral_window.lab.experiments.experiment import Trial, jobs_of
from spectral_window.lab.experiments.probes import Exam, Probe
from spectral_window.lab.jobs import run_all

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 8}
TINY = Probe(
    "needle",
    SHAPE,
    (Exam("needle", 16, 300), Exam("needle", 32, 100)),
    lengths=(16,),
    rows=16,
    steps=3,
)


def test_a_probe_learns_what_its_window_can_see():
    """One layer, a window that sees all of 8 tokens, an attention that can look a token back."""
    probe = Probe(
        "published-sorting",
        {**SHAPE, "mixer": "attention"},
        (Exam("published-sorting", 8, 1000),),
        lengths=(8,),
        steps=250,
        lr=1e-2,
    )
    row = probes.run(probe)
    test = row["tests"][0]
    assert test["asked"] == test["rows"] == 1000
    assert test["right"] > 300, "chance is 1 of 49"
    assert row["loss"] < 3.0


def test_the_same_settings_give_the_same_row_and_key():
    first, second = probes.run(TINY), probes.run(dataclasses.replace(TINY))
    timing = ("seconds", "train_seconds")
    assert {k: v for k, v in first.items() if k not in timing} == {
        k: v for k, v in second.items() if k not in timing
    }
    assert first["key"] == TINY.key
    for changed in ({"seed": 1}, {"lr": 2e-3}, {"model": {**SHAPE, "window": 4}}):
        assert dataclasses.replace(TINY, **changed).key != TINY.key


def test_scores_count_questions_whole_rows_and_answers_beyond_the_window():
    row = probes.run(
        dataclasses.replace(TINY, tests=(Exam("mqar", 64, 50),), task="mqar", lengths=(32,))
    )
    test = row["tests"][0]
    batch = make("mqar").batch(generator(64, "test"), 50, 64)
    assert test["asked"] == int((batch.labels != IGNORED).sum()) == 8 * 50
    assert test["far_asked"] == int((batch.distance >= 16).sum())
    assert test["rows"] == 50


def test_a_test_asks_every_model_the_same_questions():
    task = make("needle")
    first = task.batch(generator(32, "test"), 5, 32).inputs
    assert (task.batch(generator(32, "test"), 5, 32).inputs == first).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "attention"},
        {"branches": ("window",)},
        {"branches": ("spectral",)},
        {"fusion": "gated"},
        {"kernel": "multi_mode"},
    ],
)
def test_a_matched_variant_has_as_many_parameters_as_the_papers_layer(changes):
    shape = {**SHAPE, "hidden_size": 64}
    paper = count_parameters(Probe("needle", shape, ()).config())
    variant = Probe("needle", {**shape, **changes}, ())
    assert count_parameters(variant.config()) == pytest.approx(paper, rel=0.01)
    loose = dataclasses.replace(variant, match=False)
    assert count_parameters(loose.config()) != count_parameters(variant.config())


def test_as_published_weight_decay_also_moves_decays_and_frequencies():
    model = probes.SWHForCausalLM(TINY.config())
    posed = probes._groups(model, TINY)
    assert {group["weight_decay"] for group in posed} == {0.0, TINY.weight_decay}
    everything = list(probes._groups(model, dataclasses.replace(TINY, decay_all=True)))
    assert len(everything) == len(list(model.parameters()))


def test_mixed_lengths_come_in_the_second_half_at_equal_tokens():
    probe = dataclasses.replace(TINY, lengths=(16, 64), steps=40, rows=32)
    shapes = [batch.inputs.shape for batch in probes._batches(probe, make("needle"))]
    assert set(shapes[:20]) == {(32, 16)}
    assert set(shapes[20:]) == {(32, 16), (8, 64)}


def test_a_loss_that_is_not_finite_ends_the_probe():
    with pytest.raises(DivergedError, match="not finite"):
        probes.run(dataclasses.replace(TINY, lr=1e30, steps=20))


def test_a_probe_as_a_job_writes_its_row_once(tmp_path):
    trial = Trial("tiny", TINY, {})
    jobs = jobs_of([trial], tmp_path)
    assert TINY.read(tmp_path) is None
    assert run_all(jobs, workers=1, log=lambda line: None) == []
    assert jobs_of([trial], tmp_path) == []
    row = TINY.read(tmp_path)
    assert row is not None
    assert row["key"] == TINY.key
    assert row["environment"]["torch"] == torch.__version__
    assert json.loads((tmp_path / f"{TINY.key}.probe.json").read_text())["steps"] == 3


def test_a_probe_that_diverges_is_a_failure_and_the_others_of_its_process_run(tmp_path):
    wild, other = dataclasses.replace(TINY, lr=1e30, steps=20), dataclasses.replace(TINY, seed=1)
    trials = [Trial("wild", wild, {}), Trial("other", other, {})]
    said: list[str] = []
    assert run_all(jobs_of(trials, tmp_path), workers=1, log=said.append) == ["wild; other"]
    assert "the loss is not finite" in said[-1]
    assert wild.read(tmp_path) is None
    assert other.read(tmp_path) is not None
    assert [job.name for job in jobs_of(trials, tmp_path)] == ["wild"]
