"""`track=tensorboard` shows the metrics of a run where its users look, in files of the run."""

from __future__ import annotations

import contextlib
import json
import pickle
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def test_wandb_keeps_the_metrics_in_the_run_and_sends_nothing(recipe, corpus, tmp_path):
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    out = tmp_path / "run"
    train(recipe.replace(track="wandb"), out, corpus=corpus)
    (file,) = (out / "tracker").glob("wandb/offline-run-*/run-*.wandb")
    shown: dict[str, list[float]] = {}
    for data in _records_of(file.read_bytes()):
        record = records.Record.FromString(data)
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            shown.setdefault(name, []).append(json.loads(item.value_json))
    _agree(rows(out), shown)
    assert not Path("wandb").exists()


def test_trackio_keeps_the_metrics_in_the_run(recipe, corpus, tmp_path):
    pytest.importorskip("trackio")
    out = tmp_path / "run"
    # trackio reads where to write when it is first imported
    code = (
        "import sys, pickle; from spectral_window.training import train;"
        "recipe, out, corpus = pickle.load(sys.stdin.buffer); train(recipe, out, corpus=corpus)"
    )
    given = pickle.dumps((recipe.replace(track="trackio"), out, corpus))
    subprocess.run([sys.executable, "-c", code], input=given, check=True, capture_output=True)
    (file,) = (out / "tracker").glob("*.db")
    shown: dict[str, list[float]] = {}
    with contextlib.closing(sqlite3.connect(file)) as database:
        for (values,) in database.execute("SELECT metrics FROM metrics ORDER BY id"):
            for name, value in json.loads(values).items():
                shown.setdefault(name, []).append(value)
    _agree(rows(out), shown)


def _records_of(log: bytes) -> Iterator[bytes]:
    """The records of a wandb file: a header of 7 bytes, then LevelDB's log format, blocks of 32
    KiB with pieces of records (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last)."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def _agree(written: list[dict[str, Any]], shown: dict[str, list[float]]) -> None:
    for name in ("loss", "lr", "grad_norm", "eval_loss", "bits_per_byte"):
        values = [row[name] for row in written if name in row]
        assert len(values) > 1
        assert shown[name] == pytest.approx(values, rel=1e-6)


def test_without_a_tracker_nothing_of_one_is_written(uninterrupted):
    assert not (uninterrupted / "tracker").exists()


def test_a_tracker_that_is_missing_is_named_before_anything_is_trained(
    recipe, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("spectral_window.training.loop.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio is missing \(track\): pip install trackio"):
        train(recipe.replace(track="trackio"), tmp_path / "run", corpus=corpus)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
