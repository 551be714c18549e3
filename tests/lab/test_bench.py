"""The benchmark checks before it times, and never shows a number it did not measure."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from spectral_window.cli import app
from spectral_window.errors import UserError
from spectral_window.lab import bench


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bench, "QUICK", (64,))


def test_every_row_is_measured_or_says_why(short, tmp_path):
    shown = CliRunner().invoke(app, ["bench", "--quick", "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    for operator in ("spectral", "window"):
        found = json.loads((tmp_path / f"{operator}.json").read_text())
        assert found["quick"] is True
        assert found["environment"]["threads"] == torch.get_num_threads()
        assert all(row["status"] == "ok" and row["milliseconds"] > 0 for row in found["rows"])
        assert {row["pass"] for row in found["rows"]} == {"forward", "forward + backward"}


def test_a_wrong_contestant_gets_no_time(short, monkeypatch):
    draw, contestants = bench._OPERATORS["spectral"]
    wrong = bench.Contestant("wrong", lambda inputs: bench._spectral("scan")(inputs) * 1.001)
    monkeypatch.setitem(bench._OPERATORS, "spectral", (draw, [*contestants, wrong]))
    rows = [r for r in bench.run("spectral", quick=True)["rows"] if r["contestant"] == "wrong"]
    assert rows
    assert all(r["status"].startswith("wrong") and "milliseconds" not in r for r in rows)


def test_a_failing_contestant_says_why(short, monkeypatch):
    def fail(inputs):
        raise RuntimeError("not enough memory: you tried to allocate 10 EB")

    draw, contestants = bench._OPERATORS["window"]
    broken = bench.Contestant("broken", fail, exact=False)
    monkeypatch.setitem(bench._OPERATORS, "window", (draw, [*contestants, broken]))
    rows = [r for r in bench.run("window", quick=True)["rows"] if r["contestant"] == "broken"]
    assert all("10 EB" in r["status"] and "milliseconds" not in r for r in rows)


def test_an_unknown_operator_is_named():
    with pytest.raises(UserError, match="did you mean 'spectral'"):
        bench.run("spectrl")
