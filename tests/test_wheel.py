"""A wheel built from the tree works without the repository: it holds every file that it needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import spectral_window

ROOT = Path(__file__).parent.parent
TEXT = "The cat sat on the mat. A dog ran by, and the cat ran up the tree.\n" * 40
SMALL = ["tokenizer=bytes", "hidden_size=16", "num_hidden_layers=1", "steps=2", "warmup_steps=1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what the wheel is made of, away from the checkout and its leftovers."""
    pytest.importorskip("setuptools")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "spectral_window", tree / "spectral_window", ignore=ignored)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, out], cwd=tree, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_metadata_has_the_one_version_and_no_link_that_an_index_cannot_follow(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert f"-{spectral_window.__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = files.read(name).decode()
    assert f"\nVersion: {spectral_window.__version__}\n" in metadata
    assert "# spectral-window" in metadata
    assert re.findall(r"\]\((?!https://)[^)]*\)", metadata) == []


def use(python: Path, folder: Path) -> None:
    """Train `tiny` and generate by the installed command, in an empty folder."""
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.replace("cat", "fox"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def call(*words: str) -> str:
        done = subprocess.run(
            [*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = call(python, "-c", "import spectral_window; print(spectral_window.__file__)").strip()
    assert Path(where).is_relative_to(python.parent.parent), where
    command = python.with_name("spectral-window")
    sources = ["--data", "text.txt", "--valid", "other.txt"]
    call(command, "train", "tiny", *SMALL, *sources, "--out", "run")
    assert call(command, "generate", "run", "The cat", "-n", "5").startswith("The cat")
    call(command, "report", "run")
    assert (folder / "run" / "report.html").exists()


def environment_in(folder: Path, *flags: str) -> Path:
    subprocess.run([sys.executable, "-m", "venv", *flags, folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.timeout(1800)  # it compiles every loop anew
def test_the_wheel_trains_and_generates_without_the_repository(wheel, tmp_path):
    """In an environment of its own that sees the dependencies installed here, and not the
    repository: a path in a .pth file is searched, but its own .pth files are not."""
    python = environment_in(tmp_path / "venv", "--without-pip")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel],
        check=True,
    )
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    use(python, tmp_path / "work")


@pytest.mark.slow
def test_the_wheel_installs_with_its_dependencies_in_an_empty_environment(wheel, tmp_path):
    """From the package index: some 400 MB."""
    python = environment_in(tmp_path / "venv")
    constraints = ROOT / "constraints.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", constraints, wheel],
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    use(python, tmp_path / "work")
