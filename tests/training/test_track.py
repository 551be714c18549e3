"""`track=tensorboard` shows the metrics of a run where its users look, in files of the run."""

from __future__ import annotations

import pytest

from spectral_window.errors import UserError
from spectral_window.training import train
from tests.training.runs import rows


def test_tensorboard_shows_what_the_metrics_file_has(recipe, corpus, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train(recipe.replace(track="tensorboard"), out, corpus=corpus)
    (folder,) = (out / "tracker").iterdir()
    events = loader.EventAccumulator(str(folder))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "eval_loss", "bits_per_byte"):
        written = [(row["step"], row[name]) for row in rows(out) if name in row]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(written) > 1
        assert [step for step, _ in shown] == [step for step, _ in written]
        assert [x for _, x in shown] == pytest.approx([x for _, x in written], rel=1e-6)


def test_without_a_tracker_nothing_of_one_is_written(uninterrupted):
    assert not (uninterrupted / "tracker").exists()


def test_a_tracker_that_is_missing_is_named_before_anything_is_trained(
    recipe, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("spectral_window.training.loop.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio is missing \(track\): pip install trackio"):
        train(recipe.replace(track="trackio"), tmp_path / "run", corpus=corpus)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
