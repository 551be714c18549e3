"""Ctrl-C and SIGTERM: one request, however many signals it arrives as."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess

import pytest

from spectral_window.training import checkpoints
from spectral_window.training import interrupt as module
from spectral_window.training.interrupt import Interrupted, catch_signals
from tests.processes import python, wait_until


@pytest.mark.parametrize("pair", [(15, 15), (2, 2), (2, 15)])
def test_two_signals_at_about_the_same_time_are_one_request(pair, monkeypatch):
    """`timeout` and a terminal signal a process and its group, launchers pass signals on."""
    monkeypatch.setattr(module, "SAME_REQUEST_SECONDS", float("inf"))  # on a busy machine too
    with catch_signals() as stop:
        os.kill(os.getpid(), pair[0])
        os.kill(os.getpid(), pair[1])
        assert stop.signum == pair[0]


def test_asked_again_later_it_stops_at_once(monkeypatch):
    monkeypatch.setattr(module, "SAME_REQUEST_SECONDS", -1.0)
    with pytest.raises(Interrupted) as caught, catch_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert (caught.value.exit_code, caught.value.checkpoint) == (130, None)


def test_the_handlers_of_before_are_put_back():
    before = [signal.getsignal(signum) for signum in module.SIGNALS]
    with pytest.raises(ZeroDivisionError), catch_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(signum) for signum in module.SIGNALS] == before


def test_a_second_process_in_a_runs_folder_is_refused_and_the_first_goes_on(text_file, tmp_path):
    out = tmp_path / "run"
    overrides = ["tokenizer=bytes", "hidden_size=16", "match=none", "steps=100000", "log_every=1"]
    words = ["-m", "spectral_window", "train", "tiny", *overrides]
    words += ["--data", str(text_file), "--out", str(out)]
    metrics = out / "metrics.jsonl"
    first = python(*words, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), first)
    for how in ([], ["--resume"], ["--overwrite"]):
        second = python(*words, *how, stderr=subprocess.PIPE, text=True)
        _, said = second.communicate()
        assert second.returncode == 2
        assert said.strip().splitlines()[-1].startswith("spectral-window: error: ")
    size = metrics.stat().st_size
    wait_until(lambda: metrics.stat().st_size > size, first)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143


@pytest.mark.parametrize("sent", [["SIGTERM"], ["SIGINT"], ["SIGINT", "SIGTERM"]])
def test_the_command_saves_says_how_to_go_on_and_exits_with_the_signals_code(
    text_file, tmp_path, sent
):
    out = tmp_path / "run"
    overrides = ["tokenizer=bytes", "hidden_size=16", "match=none", "steps=100000", "log_every=1"]
    words = ["train", "tiny", *overrides, "--data", str(text_file), "--out", str(out)]
    metrics = out / "metrics.jsonl"
    child = python("-m", "spectral_window", *words, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), child)
    for name in ("SIGSTOP", *sent, "SIGCONT"):  # it sees all at once, on a busy machine too
        child.send_signal(signal.Signals[name])
    _, said = child.communicate()
    name = signal.Signals(child.returncode - 128).name
    assert name in sent
    folder, _ = checkpoints.newest(out / "checkpoints")
    last = said.strip().splitlines()[-1]
    again = shlex.join(["spectral-window", "train", "--resume", str(out)])
    step = checkpoints.step_of(folder)
    assert last == f"spectral-window: stopped at step {step}; go on with: {again}"
    assert "Traceback" not in said
