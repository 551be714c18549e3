"""The benchmark of several processes compares losses before it times, and names what failed."""

from __future__ import annotations

import pytest
import torch

from spectral_window.errors import ResourceError
from spectral_window.lab.bench import peaks, sharded


def test_every_way_is_measured_and_its_memory_and_bytes_are_of_its_kind():
    rows = sharded.bench_sharded(torch.float32, quick=True)
    assert [row["status"] for row in rows] == ["ok"] * 5, rows
    whole, parts = rows[:2]
    assert (whole["contestant"], parts["contestant"]) == (sharded.WHOLE, sharded.PARTS)
    assert whole["bytes"]["parameters"] == 4 * whole["parameters"]
    for kind, bytes_ in whole["bytes"].items():
        assert parts["bytes"][kind] == pytest.approx(bytes_ / sharded.PROCESSES, rel=0.02)
    alone, threaded, spans = rows[2:]
    assert spans["sent_bytes"] > 0
    assert "sent_bytes" not in alone.keys() | threaded.keys()
    if peaks.RESET.exists():
        assert spans["peak_bytes"] < alone["peak_bytes"]  # it holds half of the tokens


def test_a_step_with_another_loss_or_gradient_gets_no_time():
    assert sharded.off((2.0, 3.0), (2.0, 3.0)) == 0
    assert sharded.off((2.0, 3.003), (2.0, 3.0)) == pytest.approx(1e-3)
    names = (sharded.ALONE, sharded.THREADED, sharded.SPANS)
    rows = sharded.timed(lambda _: [], names, "wrong: relative error 1.0e-03", True, 64)
    assert [row["status"][:5] for row in rows] == ["ok", "ok", "wrong"]
    assert "milliseconds" not in rows[-1]


def test_a_failure_of_the_processes_is_named(monkeypatch):
    """torchrun's own last words, which say nothing, were named instead."""
    said = """[rank1]: Traceback (most recent call last):
[rank1]: ValueError: surprise: 3
[rank0]: RuntimeError: Connection closed by peer
W1127 00:19:08.715000 880 torch/distributed/elastic/api.py:1028] Sending process 1 closing signal
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
    assert sharded.first_error(said) == "[rank1]: ValueError: surprise: 3"
    assert sharded.first_error("") == "it said nothing"
    monkeypatch.setattr(sharded, "__name__", "spectral_window.nothing")
    with pytest.raises(ResourceError, match=r"No module named .*one of 2 processes"):
        sharded.bench_sharded(torch.float32, quick=True)
