"""Atomic folders, locks, hashes and registries, which the whole package shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_window.errors import ResourceError, UserError
from spectral_window.files import hash_file, try_lock, write_folder
from spectral_window.registry import Registry


def fill(content: str):
    def write(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "text").write_text(content)

    return write


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", fill("old"))
    write_folder(tmp_path / "a", fill("new"))
    assert (tmp_path / "a" / "part" / "text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", fill("old"))
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if target == tmp_path / "a":
            monkeypatch.setattr(os, "rename", rename)
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(ResourceError, match="cannot write"):
        write_folder(tmp_path / "a", fill("new"))
    assert (tmp_path / "a" / "part" / "text").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


LOCK = """
import sys
from pathlib import Path
from spectral_window.files import try_lock
path = Path(sys.argv[1])
print(try_lock(path.open("w"), path))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_a_lock_is_refused_to_other_processes_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", LOCK, path], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    with path.open("w") as file:
        assert try_lock(file, path)
        assert other() == "False"
    assert other() == "True"


def test_a_file_that_was_removed_is_not_locked(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        path.unlink()
        assert os.name == "nt" or not try_lock(file, path)


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_registry_names_its_parts_and_suggests_the_nearest_name() -> None:
    things: Registry[type] = Registry("thing")
    part = things.register("window")(type("Window", (), {}))
    assert things.find("window") is part
    assert part.name == "window"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="unknown thing 'windw': did you mean 'window'"):
        things.find("windw")
    with pytest.raises(UserError, match="thing 'window' is registered already"):
        things.register("window")(part)
