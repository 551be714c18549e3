"""The command as a process: signals at any moment, streams that are closed or full, an environment
that makes no sense. One line and the right code each time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from spectral_window.cli import main
from spectral_window.errors import UserError
from spectral_window.training.parallel import World

COMMAND = [sys.executable, "-m", "spectral_window"]


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `line` in a shell, where $SW is the command."""
    return subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "SW": " ".join(COMMAND), **environment},
        capture_output=True,
        text=True,
    )


# ------------------------------------------------------------------- signals

LOST = """
import os, signal, sys, weakref
from spectral_window.cli import main
from spectral_window.training import trainer

class Thing: pass

def lose_the_signal(where):
    def wrapped(*args, **kwargs):
        thing = Thing()
        kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{name}))
        del thing  # the callback runs here, and what the handler raises in it is dropped
        return where(*args, **kwargs)
    return wrapped

trainer.accumulation = lose_the_signal(trainer.accumulation)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_lost_in_a_weak_references_callback_still_ends_the_command(name, code, tmp_path):
    """Training went on to its end."""
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 400)
    words = ["train", "tiny", "tokenizer=bytes", "hidden_size=16", "match=none", "steps=100000"]
    words += ["txt_documents=paragraph"]
    (tmp_path / "b.txt").write_text("A dog ran by. " * 400)
    words += ["--data", str(tmp_path), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", LOST.replace("{name}", name), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("spectral-window: error: ")


IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from spectral_window.__main__ import main
sys.argv[1:] = ["info", "tiny"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module", ["typer", "spectral_window.commands.info", "torch", "transformers"]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(module):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.replace("{module}", module)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "spectral-window: error: interrupted\n"


def test_the_handlers_of_before_are_back_after_a_command():
    watched = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(signum) for signum in watched], sys.unraisablehook
    assert main(["--version"]) == 0
    assert ([signal.getsignal(signum) for signum in watched], sys.unraisablehook) == before


# ------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$SW --version >&-", 0),
        ("$SW --version <&- >&- 2>&-", 0),
        ("$SW --version 2>&-", 0),
        ("$SW train nothing 2>&-", 2),
        ("$SW train nothing 2>/dev/full", 2),
        ("$SW generate m --prompt-file - <&-", 2),
        ("$SW --version >/dev/full", 5),
    ],
)
def test_a_closed_or_full_stream_does_no_harm(line, code):
    done = shell(line)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert done.stderr.count("\n") <= 1


# ------------------------------------------------------------------- environment


@pytest.mark.parametrize("value", ["0", "-3", "1", "abc", "99999999999", "٣", " ", "1.5"])
def test_a_terminals_size_that_makes_no_sense_is_not_believed(value, monkeypatch, capsys):
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, value)
    assert main(["train", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", value) for value in ("0", "-1", "two", "", "1e3", "99999999999")),
        *(("RANK", value) for value in ("-1", "1", "x")),
        *(("LOCAL_RANK", value) for value in ("1", "x", "-2")),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "70000"),
        ("MASTER_PORT", "http"),
    ],
)
def test_torchruns_variables_are_checked_before_any_work(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name} is .*torchrun") as caught:
        World.join("cpu")
    assert caught.value.exit_code == 2


def test_half_of_torchruns_variables_for_one_process_are_refused_too(monkeypatch):
    """transformers would wait for the others."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE is not set"):
        World.join("cpu")


# ------------------------------------------------------------------- names and sizes


@pytest.mark.parametrize(
    "words",
    [
        ["train", "tiny", "--data", "{prose}", "--out", "{bad}"],
        ["train", "tiny", "--data", "{prose}", "--corpus", "{bad}", "--out", "{new}"],
        ["train", "tiny", "--data", "{prose}", "--init", "{bad}", "--out", "{new}"],
        ["generate", "{bad}", "x"],
        ["eval", "{bad}"],
        ["generate", "m", "x", "--save-session", "{bad}"],
    ],
    ids=lambda words: " ".join(words[-2:]),
)
@pytest.mark.parametrize("name", ["caf\udce9", "n" * 300], ids=["not UTF-8", "too long"])
def test_a_name_that_no_library_can_open_is_one_line(words, name, tmp_path, capsys):
    (tmp_path / "prose.txt").write_text("The cat sat on the mat. " * 400)
    places = {
        "prose": str(tmp_path / "prose.txt"),
        "bad": str(tmp_path / name),
        "new": str(tmp_path / "new"),
    }
    assert main([word.format(**places) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a bug" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["prose.txt"]


MODEST = 2 << 30  # bytes: what torch and transformers take by themselves, and more

CHILD = """
import resource, sys
from spectral_window.cli import main
code = main(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.parametrize(
    "overrides",
    [
        ["num_hidden_layers=1000000000"],
        ["batch_size=8e12"],
        ["batch_size=8e9", "micro_batch_size=8e9"],
        ["hidden_size=131072", "num_hidden_layers=8"],  # 10^12 parameters
        ["vocab_size=2000000000"],
        ["sequence_length=2000000000"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_products_are_bounded_before_anything_is_allocated(overrides, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 400)
    words = ["train", "tiny", "tokenizer=bytes", "match=none", *overrides]
    words += ["--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    code, peak = map(int, done.stdout.split())
    assert code == 5, done.stderr
    assert " GB" in done.stderr
    assert done.stderr.count("\n") == 1
    assert peak < MODEST
    assert not (tmp_path / "run").exists()
