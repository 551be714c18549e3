"""The demo end to end in its quick version: two real trainings, samples and the report."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from spectral_window.errors import UserError
from spectral_window.lab import demo
from spectral_window.lab.runs import Run, read_all
from spectral_window.nn.mixers import MIXERS
from tests.processes import python, wait_until


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.run(tmp_path_factory.mktemp("demo") / "out", quick=True, progress=False)


@pytest.fixture(scope="module")
def runs(page: Path) -> list[Run]:
    return read_all([page.parent / name for name in demo.RUNS])


def test_a_quick_demo_claims_nothing_in_large_letters(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (headline,) = re.findall(r"<h1>(.*?)</h1>", text)
    assert headline == "A quick version of 20 steps"
    assert "its numbers mean nothing" in text
    assert "<title>A quick version of 20 steps" in text


def test_demo_compares_like_with_like(runs: list[Run]) -> None:
    swh, transformer = runs
    assert [run.label for run in runs] == ["SWH with memory", "Transformer"]
    assert transformer.number("parameters") == pytest.approx(swh.number("parameters"), rel=0.01)
    assert swh.number("tokens") == transformer.number("tokens")
    assert swh.fingerprint() is not None
    assert swh.fingerprint() == transformer.fingerprint()
    recipes = [run.config["recipe"] for run in runs]
    # what each model may have for itself: its mixer, that mixer's options, its initial weights
    own = {"mixer", "initializer_range"} | (recipes[0].keys() ^ recipes[1].keys())
    options = {o.name for mixer in ("memory", "attention") for o in MIXERS[mixer].options}
    assert own - {"mixer", "initializer_range"} <= options
    shared = [{k: v for k, v in recipe.items() if k not in own} for recipe in recipes]
    assert shared[0] == shared[1]


def test_report_of_the_demo_misses_nothing(page: Path, runs: list[Run]) -> None:
    assert [run.missing for run in runs] == [(), ()]
    source = page.read_text()
    assert "missing</td>" not in source
    assert demo.QUICK_VERDICT[1] in source
    assert re.search(r"constant</td>.*grows too</td>", source)
    for run in runs:
        command = run.command()
        assert command is not None
        assert command.startswith("spectral-window train tiny ")
        assert command in source.replace("&#39;", "'")
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_both_models_continue_the_same_beginning(runs: list[Run]) -> None:
    samples = [run.samples[0] for run in runs]
    assert samples[0]["prompt"] == samples[1]["prompt"] == demo.PROMPT
    assert all(sample["text"] for sample in samples)


def test_the_same_sample_again_is_the_same_text(page: Path, runs: list[Run]) -> None:
    kept = json.loads((page.parent / "swh" / "samples.json").read_text())[0]["text"]
    assert demo.write_sample(page.parent / "swh", max_new_tokens=20) == kept


def test_an_earlier_demo_is_replaced_and_nothing_else_is_touched(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "swh" / "checkpoints").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (out / "transformer").symlink_to(elsewhere)
    for name in (demo.MARK, "report.html", "mine.txt"):
        (out / name).touch()
    with demo._claim(out):
        assert sorted(path.name for path in out.iterdir()) == [demo.MARK, "mine.txt"]
    assert (elsewhere / "kept").exists()


def test_a_folder_with_other_things_in_it_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "swh").mkdir()
    (tmp_path / "swh" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not a demo's folder"):
        demo.run(tmp_path)
    assert (tmp_path / "swh" / "thesis.txt").exists()
    with pytest.raises(UserError, match="is a file"):
        demo.run(tmp_path / "swh" / "thesis.txt")


def test_a_second_demo_in_the_same_folder_waits_its_turn(tmp_path: Path) -> None:
    with demo._claim(tmp_path), pytest.raises(UserError, match="another demo is running"):
        demo.run(tmp_path)


def test_a_training_that_fails_ends_the_demo_with_its_words_and_exit_code(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean '--resume'") as caught:
        demo._train(["train", "tiny", "--resum"], tmp_path, progress=False)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_demo_leaves_no_process_and_can_start_again(tmp_path: Path, signum: int) -> None:
    code = "import sys; from spectral_window.lab.demo import run; run(sys.argv[1], quick=True)"
    out = tmp_path / "out"
    with (tmp_path / "log").open("wb") as log:
        process = python("-c", code, out, stderr=log)
    wait_until((out / "swh" / "config.json").exists, process)
    process.send_signal(signum)
    assert process.wait() != 0
    assert not (out / "swh" / ".lock").exists(), "the training outlived the demo"
    assert not (out / "report.html").exists()
    with demo._claim(out):
        assert not (out / "swh").exists()
