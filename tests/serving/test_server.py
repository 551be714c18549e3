"""Promises of `spectral-window serve` as a process: signals, ports, kills, models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from spectral_window.cli import main
from spectral_window.generation.session import Session
from spectral_window.serving.server import listen
from tests.processes import python
from tests.serving.conftest import save_model
from tests.serving.test_http import NO_DEADLINE, expected, post

LONG = {"prompt": "hello", "max_tokens": 10**7, "stream": True, "ignore_eos": True, "seed": 7}
ENDLESS = ("--max-new-tokens", 10**7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("serve") / "mine")


def start(*arguments: object) -> tuple[subprocess.Popen, str]:
    """Start the command on a free port; the process and its address when it answers."""
    words = ["-m", "spectral_window", "serve", *arguments, "--port", "0"]
    child = python(*words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if found := re.match(r"serving (\S+) at (http://\S+) ", line):
            return child, found[2]
    raise AssertionError(f"it ended with {child.wait()}")


def ended(child: subprocess.Popen) -> tuple[int, str]:
    """The exit code and what stderr still had."""
    _, err = child.communicate()
    return child.returncode, err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_stream_end_keeps_its_session_and_ends_with_0(
    folder, tmp_path, model, tokenizer, signum
):
    child, address = start(folder, "--sessions", tmp_path, "--grace", 600)
    body = {**LONG, "max_tokens": 300, "session_id": "mine"}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, **NO_DEADLINE) as answer:
        lines = answer.iter_lines()
        events = [next(lines)]
        child.send_signal(signum)
        events += [line for line in lines if line]
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert ended(child) == (0, "")
    session = Session(model, tokenizer, seed=7)
    session.feed("hello")
    options = {"temperature": 1.0, "ignore_eos": True, "finish": False}
    whole = "".join(session.stream(300, **options))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    kept = Session.load(tmp_path / "mine.session", model, tokenizer)
    assert kept.tokens_seen == session.tokens_seen


def test_after_a_signal_new_requests_get_503(folder, tmp_path, model, tokenizer):
    """The stream that keeps the server is endless, and its client goes at last: what it got is
    kept."""
    child, address = start(folder, "--sessions", tmp_path, "--grace", 600, *ENDLESS)
    body = {**LONG, "session_id": "mine"}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, **NO_DEADLINE) as answer:
        lines = answer.iter_lines()
        next(lines)
        child.send_signal(signal.SIGTERM)
        refused = None
        while refused is None or refused.status_code == 200:
            refused = post(address, prompt="a", max_tokens=1)
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert httpx.get(f"{address}/health", **NO_DEADLINE).status_code == 503
        lines.close()
    assert ended(child) == (0, "")
    assert Session.load(tmp_path / "mine.session", model, tokenizer).tokens_seen > 6


@pytest.mark.parametrize(
    ("grace", "signals"), [(600, [signal.SIGTERM, signal.SIGINT]), (0, [signal.SIGTERM])]
)
def test_a_second_signal_or_the_end_of_the_grace_cuts_streams_short(folder, grace, signals):
    child, address = start(folder, "--grace", grace, *ENDLESS)
    with httpx.stream("POST", f"{address}/v1/completions", json=LONG, **NO_DEADLINE) as answer:
        lines = answer.iter_lines()
        next(lines)
        for signum in signals:
            child.send_signal(signum)
        events = [line for line in lines if line]
    assert '"finish_reason":"length"' in events[-2]
    assert events[-1] == "data: [DONE]"
    assert ended(child) == (0, "")


def test_a_session_survives_kill_9_and_goes_on_in_another_process(
    folder, tmp_path, model, tokenizer
):
    """What an answer brought is kept; what was being written is as if never asked."""
    child, address = start(folder, "--sessions", tmp_path, *ENDLESS)
    asked = {"prompt": "hello", "session_id": "mine", "max_tokens": 16, "ignore_eos": True}
    first = post(address, seed=7, **asked).json()["choices"][0]["text"]
    body = {**asked, "prompt": "lost", "max_tokens": 10**7, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, **NO_DEADLINE) as answer:
        lines = answer.iter_lines()
        next(lines)
        child.kill()
        with pytest.raises(httpx.HTTPError):
            list(lines)
    assert ended(child)[0] == -signal.SIGKILL
    child, address = start(folder, "--sessions", tmp_path)
    second = post(address, **{**asked, "prompt": ""}).json()["choices"][0]["text"]
    session = Session(model, tokenizer, seed=7)
    session.feed("hello")
    options = {"temperature": 1.0, "ignore_eos": True, "finish": False}
    assert first + second == "".join(session.stream(32, **options))


# ------------------------------------------------------------------------------- starting


def refuse(capfd: Any, *words: object) -> tuple[int, str]:
    code = main(["serve", *map(str, words)])
    return code, capfd.readouterr().err


def test_two_servers_on_one_port_is_one_line_and_2(folder, capfd):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, err = refuse(capfd, folder, "--port", port)
    assert code == 2
    assert re.fullmatch(
        rf"spectral-window: error: cannot listen, [^\n]*127.0.0.1:{port}[^\n]*\n", err
    )


@pytest.mark.parametrize(
    "words",
    [
        ["/no/such/model"],
        ["--host", "no.such.host.invalid"],
        ["--slots", "0"],
        ["--port", "70000"],
        ["--api-key", ""],
        ["--sessions", __file__],
    ],
)
def test_what_cannot_start_is_one_line_and_2(folder, capfd, words):
    words = words if words[0].startswith("/") else [folder, *words]
    code, err = refuse(capfd, *words, *(() if "--port" in words else ("--port", 0)))
    assert code == 2
    assert re.fullmatch(r"spectral-window: error: [^\n]+\n", err), err


def test_without_the_extra_it_says_what_to_install(folder):
    code = (
        "import sys; sys.modules['fastapi'] = None; from spectral_window.cli import main; "
        f"sys.exit(main(['serve', {str(folder)!r}, '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'spectral-window[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_key_may_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("SPECTRAL_WINDOW_API_KEY", "hidden")
    child, address = start(folder)
    assert post(address, prompt="a").status_code == 401
    headers = {"Authorization": "Bearer hidden"}
    models = httpx.get(f"{address}/v1/models", headers=headers, **NO_DEADLINE).json()
    assert [model["id"] for model in models["data"]] == ["mine"]
    child.send_signal(signal.SIGTERM)
    assert ended(child) == (0, "")


def test_a_checkpoint_of_a_run_and_a_transformer_are_served(tmp_path, tokenizer):
    """A Transformer's states grow; a line says so."""
    run = tmp_path / "run"
    (tmp_path / "a.txt").write_text("The cat sat on the mat. A dog ran by. " * 200)
    words = ["train", "tiny", "tokenizer=bytes", "hidden_size=16", "steps=4", "warmup_steps=1",
             "save_every=2", "mixer=attention", "txt_documents=paragraph"]  # fmt: skip
    assert main([*words, "--data", str(tmp_path / "a.txt"), "--out", str(run)]) == 0
    (checkpoint, *_) = sorted((run / "checkpoints").glob("step-*"))
    child, address = start(checkpoint, "--name", "check", "--slots", 1)
    answers = [post(address, prompt="The", n=3, max_tokens=20, temperature=0) for _ in range(2)]
    texts = {c["text"] for answer in answers for c in answer.json()["choices"]}
    assert len(texts) == 1
    child.send_signal(signal.SIGTERM)
    assert ended(child) == (0, "")


def test_a_pipe_that_closes_does_not_end_it(folder, model, tokenizer):
    child, address = start(folder)
    assert child.stderr is not None
    child.stderr.close()
    answer = post(address, prompt="hello", seed=7, ignore_eos=True)
    assert answer.json()["choices"][0]["text"] == expected(model, tokenizer, "hello")
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 0
