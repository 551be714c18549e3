"""Checkpoints at the level of files: any damage is noticed, and a kill at any act does no harm."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_window import files
from spectral_window.errors import IntegrityError, ResourceError
from spectral_window.training import checkpoints
from tests.training.children import KILLED, save_child, write_numbers


def save(root, step, keep=2):
    return checkpoints.save(root, step, lambda f: write_numbers(f, step), about={}, keep=keep)


def steps(root):
    return sorted(checkpoints.step_of(path) for path in root.glob("step-*"))


FILES = ("manifest.json", "numbers.bin", "text.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved"), 3)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_offset_or_removed_is_detected_and_named(saved, tmp_path, name):
    copy = shutil.copytree(saved, tmp_path / saved.name)
    content = (copy / name).read_bytes()
    for length in {*range(0, len(content), max(1, len(content) // 64)), len(content) - 1}:
        (copy / name).write_bytes(content[:length])
        with pytest.raises(IntegrityError, match=name):
            checkpoints.verify(copy)
    (copy / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        checkpoints.verify(copy)
    (copy / name).symlink_to(saved / name)
    if name != "manifest.json":
        with pytest.raises(IntegrityError, match=f"{name} is missing"):
            checkpoints.verify(copy)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_detected(saved, tmp_path_factory, name, data):
    copy = shutil.copytree(saved, tmp_path_factory.mktemp("copy") / saved.name)
    content = bytearray((copy / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (copy / name).write_bytes(content)
    with pytest.raises(IntegrityError):
        checkpoints.verify(copy)


def test_swapped_files_files_of_two_steps_and_a_renamed_folder_are_detected(saved, tmp_path):
    other = save(tmp_path, 4)
    copy = shutil.copytree(saved, tmp_path / saved.name)
    shutil.copy(other / "numbers.bin", copy)
    with pytest.raises(IntegrityError, match=r"numbers\.bin does not match"):
        checkpoints.verify(copy)
    shutil.copy(saved / "text.json", copy / "numbers.bin")
    with pytest.raises(IntegrityError, match=r"numbers\.bin has 11 bytes instead of 500"):
        checkpoints.verify(copy)
    with pytest.raises(IntegrityError, match=r"of step 4 .*renamed"):
        checkpoints.verify(other.rename(tmp_path / "step-5"))


def test_a_manifest_of_a_later_version_is_refused_with_advice(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / saved.name)
    text = (copy / "manifest.json").read_text().replace('"schema": 1', '"schema": 2')
    (copy / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match="upgrade"):
        checkpoints.verify(copy)


def test_pruning_keeps_the_newest_and_never_counts_a_damaged_one(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    assert steps(tmp_path) == [3, 4]
    (tmp_path / "step-4/numbers.bin").write_bytes(b"")
    save(tmp_path, 5)
    assert steps(tmp_path) == [3, 4, 5]  # 3 and 5 are whole
    save(tmp_path, 6, keep=1)  # asks for less than two
    assert {5, 6} <= set(steps(tmp_path))
    assert 3 not in steps(tmp_path)


def test_the_choice_is_by_step_and_not_by_time_or_by_the_alphabet(tmp_path):
    for step in (10, 9):
        save(tmp_path, step, keep=5)
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-12").write_text("a file")
    newest, refused = checkpoints.newest(tmp_path)
    assert newest == tmp_path / "step-10"
    assert len(refused) == 1
    assert "step-11" in refused[0]


def test_an_error_while_writing_leaves_the_older_ones_and_nothing_else(tmp_path):
    save(tmp_path, 1)

    def full(folder):
        write_numbers(folder, 2)
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"No space left.*step-2.*needs about 1,234 bytes"):
        checkpoints.save(tmp_path, 2, full, about={}, needs=1234)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    checkpoints.verify(tmp_path / "step-1")


def test_a_kill_before_any_act_of_a_save_leaves_a_whole_checkpoint_to_resume(processes, tmp_path):
    """Every fsync, rename, removal and creation of one save that also replaces and prunes."""
    start = tmp_path / "start"
    for step in (1, 2, 3):
        save(start, step, keep=2)
    shutil.copytree(start / "step-3", start / "damaged").rename(start / "step-4")

    def run(root, die_at, report=None):
        child = processes.Process(target=save_child, args=(str(root), 4, die_at, report))
        child.start()
        child.join()
        return child.exitcode

    report = processes.Queue()
    assert run(shutil.copytree(start, tmp_path / "count"), 0, report) == 0
    acts = report.get()
    assert acts >= 12
    for die_at in range(1, acts + 1):
        root = shutil.copytree(start, tmp_path / f"at-{die_at}")
        assert run(root, die_at) == KILLED
        files.remove_leftovers(root)
        assert {path.name for path in root.iterdir()} <= {f"step-{n}" for n in range(5)}
        newest, _ = checkpoints.newest(root)
        assert newest is not None, f"act {die_at}"
        step = checkpoints.step_of(newest)
        assert step in (3, 4)
        assert (newest / "numbers.bin").read_bytes() == bytes([step]) * 500
        whole = [path for path in root.iterdir() if _is_whole(path)]
        assert len(whole) >= 2, f"act {die_at}"
        save(root, 5)
        assert checkpoints.newest(root)[0] == root / "step-5"


def _is_whole(folder):
    try:
        checkpoints.verify(folder)
    except IntegrityError:
        return False
    return True


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """The order of system calls stands in for a power cut."""
    import os

    calls = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or real_sync(fd)
    )
    monkeypatch.setattr(os, "rename", lambda a, b: calls.append(("rename", b)) or real_rename(a, b))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc to see which file is synced")
    save(tmp_path, 7)
    rename = calls.index(("rename", tmp_path / "step-7"))
    before = [os.path.basename(path) for path in calls[:rename]]
    for name in ("numbers.bin", "text.json"):
        assert name in before
        assert before.index(name) < max(i for i, n in enumerate(before) if "manifest" in n)
    assert calls[rename - 1].startswith(str(tmp_path / ".tmp-step-7"))  # the folder itself
    assert calls[rename + 1] == str(tmp_path)
