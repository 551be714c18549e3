"""`bench --device cuda`: its own parts walked at toy size, and what it refuses.

The operators' parts are walked in `tests/ops/interpreted_*.py` and `tests/ops/test_triton_*.py`."""

from __future__ import annotations

import json

import pytest
import torch

from spectral_window.cli import main
from spectral_window.lab.bench import gpu, gpu_train


def test_ceilings_tokens_and_training_steps_are_walked_and_kept(tmp_path):
    parts = {"ceilings": 3, "decode": 10, "train": 7}
    words = [*parts, "--device", "cuda", "--dry-run", "--minutes", "600"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    for part, least in parts.items():
        kept = json.loads((tmp_path / f"{part}.json").read_text())
        assert kept["dry_run"] is True
        good = [row for row in kept["rows"] if row["status"] == "ok"]
        assert len(good) >= least
        others = [row for row in kept["rows"] if row["status"] != "ok"]
        assert all("(fla)" in row["contestant"] for row in others)  # they need a GPU


def test_checks_run_in_their_order_and_each_row_names_its_check(tmp_path, monkeypatch):
    assert gpu.CHECKS[0][0] == ("delta",)
    # all are walked in tests/ops
    monkeypatch.setattr(gpu, "CHECKS", ((("threads",), 0.5), (("spectral",), 0.5)))
    assert gpu.run(tmp_path, minutes=600, parts=["check"], dry_run=True, log=print) == []
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    sections = [row["section"] for row in rows]
    first = sections.count("check_threads")
    assert sections == ["check_threads"] * first + ["spectral check"] * (len(rows) - first)
    assert [row["threads"] for row in rows[:first]] == [1, 2, 4, 4]
    assert all(row["status"] == "ok" for row in rows[:first])
    assert len(rows) - first >= 10
    assert all(row["good"] for row in rows[first:])


def test_a_part_that_runs_out_of_time_keeps_its_rows_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 3600.0)  # a busy machine starts slowly
    said: list[str] = []
    unfinished = gpu.run(tmp_path, minutes=1e-6, parts=["ceilings"], dry_run=True, log=said.append)
    assert len(unfinished) == 1
    assert "out of time" in unfinished[0]
    rows = json.loads((tmp_path / "ceilings.json").read_text())["rows"]
    assert rows[0]["contestant"] == "copy"


def test_what_is_prepared_in_time_is_measured():
    """A bench on a card ended while its last models were built, and had no row."""
    device, names = torch.device("cpu"), ["SWH", "Transformer"]
    late, *rest = gpu_train.bench(device, True, names, ((1, 8),), ("as called",), seconds=0.0)
    assert (late["contestant"], late["status"][:8]) == ("Transformer, as called", "left out")
    assert [(row["contestant"], row["status"]) for row in rest] == [("SWH, as called", "ok")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "cuda"], "--out is missing"),
        (["--device", "tpu", "--out", "x"], "unknown device 'tpu'"),
        (["prefill", "--device", "cuda", "--out", "x"], "unknown bench on a GPU 'prefill'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_points_to_the_dry_run(capsys, tmp_path):
    assert main(["bench", "--device", "cuda", "--out", str(tmp_path / "x")]) == 2
    assert "--dry-run" in capsys.readouterr().err
