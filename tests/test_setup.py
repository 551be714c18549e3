"""The files that install the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_constraint_is_a_name_and_a_version():
    # a frozen editable install once left a path of one machine here, which pip refuses
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_the_core_of_make_check_is_of_files_that_exist():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    core = re.search(r"^CORE := (.*)$", makefile, re.M)
    assert core
    files = core[1].split()
    assert len(files) == len(set(files)) > 5
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_hosted_ci_runs_every_python_that_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert matrix
    assert re.findall(r"3\.\d+", matrix[1]) == named
    assert project["requires-python"] == f">={named[0]}"
    readme = (ROOT / "README.md").read_text()
    assert f"Python {named[0]} to {named[-1]} on Linux or macOS" in readme
