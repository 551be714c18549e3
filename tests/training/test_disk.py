"""The disk full at every write of a run's own files, and what killed processes leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from spectral_window import files
from spectral_window.errors import ResourceError
from spectral_window.training import checkpoints, train
from spectral_window.training.loop import Loop
from tests.processes import python
from tests.training.runs import assert_same_run

BLOCK = 4096


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own; None where only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    made = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    yield place if made else None
    if made:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def free_bytes(disk: Path, count: int):
    """Within the block exactly `count` bytes, in whole blocks, are free on `disk`."""
    filler = disk / "filler"
    stat = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - count)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def largest_file(count: int):
    """Within the block no file may grow beyond `count` bytes, which stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_full(error: ResourceError, out: Path) -> None:
    said = str(error)
    assert error.exit_code == 5
    assert str(out) in said
    assert re.search(r"it needs about [\d,]+ bytes, [\d,]+ bytes are free", said), said
    assert "\n" not in said
    assert not list(out.rglob(".tmp-*"))


def test_the_disk_is_full_at_every_write_of_a_checkpoint_and_nothing_is_lost(
    small_disk, recipe, corpus, uninterrupted, tmp_path, monkeypatch
):
    """At the second save: with room for one block more each time, until there is room for all."""
    out = (small_disk or tmp_path) / "run"
    save, tried = Loop._save, []

    def squeezed(loop):
        if loop.step != 8:
            return save(loop)
        listed = checkpoints.verify(out / "checkpoints/step-4")["files"]
        if small_disk is None:
            limits = sorted({entry["bytes"] - 1 for entry in listed.values()})
        else:
            total = sum(entry["bytes"] for entry in listed.values()) + BLOCK * (len(listed) + 8)
            limits = range(0, total, BLOCK)
        before = sorted(path.name for path in (out / "checkpoints").iterdir())
        for limit in limits:
            full = largest_file(limit) if small_disk is None else free_bytes(small_disk, limit)
            try:
                with full:
                    save(loop)
            except ResourceError as error:
                assert_full(error, out)
                tried.append(limit)
                assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before
                checkpoints.verify(out / "checkpoints/step-4")
            else:
                assert limit == limits[-1] or limit > limits[len(limits) // 2]
                break
        return save(loop)

    monkeypatch.setattr(Loop, "_save", squeezed)
    train(recipe, out, corpus=corpus)
    assert len(tried) >= (4 if small_disk is None else 50)
    assert_same_run(uninterrupted, out)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_the_disk_is_full_at_a_runs_other_files(name, tmp_path):
    from spectral_window.training.metrics import MetricsLog

    def write(path):
        if name == "metrics.jsonl":
            MetricsLog(path).write({"step": 1, "loss": 2.0})
        else:
            files.write_json(path, {"a": "b" * 100})

    with largest_file(10), pytest.raises(ResourceError) as caught:
        write(tmp_path / name)
    assert_full(caught.value, tmp_path)
    if name != "metrics.jsonl":  # a line that was cut short is passed over when it is read
        assert not list(tmp_path.iterdir())
    assert MetricsLog(tmp_path / "metrics.jsonl").read() == []


def test_a_full_disk_is_told_by_rusts_libraries_in_their_own_way(tmp_path):
    """A tokenizer's file ends in a plain Exception."""
    from spectral_window.data.tokenizers import load_tokenizer

    with largest_file(1000), pytest.raises(ResourceError) as caught:
        files.write_folder(tmp_path / "t", load_tokenizer("bytes").save_pretrained, needs=5000)
    assert_full(caught.value, tmp_path)


def test_a_folder_replaced_by_a_file_under_a_run_is_exit_code_5(recipe, corpus, tmp_path):
    import shutil

    from tests.training.runs import Stopper

    out = tmp_path / "run"

    def replace():
        shutil.rmtree(out)
        out.write_text("mine")

    with pytest.raises(ResourceError, match="removed or replaced") as caught:
        train(recipe, out, corpus=corpus, progress=Stopper(3, replace))
    assert caught.value.exit_code == 5
    assert out.read_text() == "mine"


def test_a_folder_removed_and_made_again_by_another_is_not_written_to(recipe, corpus, tmp_path):
    import shutil

    from tests.training.runs import Stopper

    out = tmp_path / "run"

    def replace():
        shutil.rmtree(out)
        out.mkdir()
        (out / ".lock").touch()

    with pytest.raises(ResourceError, match="removed or replaced"):
        train(recipe, out, corpus=corpus, progress=Stopper(3, replace))
    assert [path.name for path in out.iterdir()] == [".lock"]


# ------------------------------------------------------------------- left-overs


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    child = python("-c", "")
    child.wait()
    return child.pid


def test_only_what_dead_processes_left_is_removed(dead, tmp_path):
    living = os.getppid()
    for pid in (dead, living):
        (tmp_path / f".tmp-step-4-{pid}").mkdir()
        (tmp_path / f".tmp-old-step-2-{pid}").mkdir()
        (tmp_path / f".tmp-talk.session-{pid}").touch()
    (tmp_path / ".tmp-mine").touch()
    files.remove_leftovers(tmp_path, "talk.session")
    assert not (tmp_path / f".tmp-talk.session-{dead}").exists()
    assert (tmp_path / f".tmp-step-4-{dead}").exists()
    files.remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        ".tmp-mine",
        *(f".tmp-{kind}-{living}" for kind in ("step-4", "old-step-2", "talk.session")),
    }


def test_the_temporary_folder_of_a_killed_evaluation_goes_at_the_next(dead, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = tmp_path / f"spectral-window-{os.getppid()}-b"
    for folder in (tmp_path / f"spectral-window-{dead}-a", living, tmp_path / "spectral-window-x"):
        folder.mkdir()
        (folder / "tokens").touch()
    with files.scratch_folder() as mine:
        assert {path.name for path in tmp_path.iterdir()} == {
            mine.name,
            living.name,
            "spectral-window-x",
        }
    assert not mine.exists()


def test_a_run_removes_what_a_killed_one_left_also_when_it_does_not_resume(
    dead, recipe, corpus, tmp_path
):
    out = tmp_path / "run"
    (out / "checkpoints" / f".tmp-step-4-{dead}").mkdir(parents=True)
    (out / f".tmp-config.json-{dead}").touch()
    short = recipe.replace(steps=1, warmup_steps=1)
    train(short, out, corpus=corpus, overwrite=True)
    assert not list(out.rglob(".tmp-*"))
