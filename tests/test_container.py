"""Containerfile: what it names exists, and its commands are commands. No image is built here."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from spectral_window.cli.program import command_names, load_command

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and line[0] != "#"]
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in LINES if name == instruction]


def test_every_instruction_is_known():
    known = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in LINES} == known
    assert LINES[0][0] == "FROM"


def test_its_python_is_a_supported_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.fullmatch(r"python:(3\.\d+)-slim", arguments("FROM")[0])
    assert version
    assert f"Programming Language :: Python :: {version[1]}" in project["classifiers"]


def test_what_it_copies_exists_and_reaches_the_builder():
    kept = {line.removeprefix("!") for line in IGNORED if line.startswith("!")}
    copied = {source for each in arguments("COPY") for source in each.split()[:-1]}
    assert "*" in IGNORED
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    # what a build of the package reads must be among them
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "spectral_window"} <= copied


def test_extras_and_pins_it_installs_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installs = [shlex.split(line) for line in arguments("RUN") if line.startswith("pip install ")]
    assert [words[-1] for words in installs] == ["torch", ".[serve]"]
    assert "serve" in project["optional-dependencies"]
    for words in installs:
        assert words[words.index("-c") + 1] == "constraints.txt"
    assert re.search("^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)


def test_it_does_not_run_as_root_and_its_cache_belongs_to_the_user():
    assert [name for name, _ in LINES].index("USER") < [rest for _, rest in LINES].index(
        "spectral-window warm-up"
    )
    user = arguments("USER")[0]
    assert f"useradd --create-home --uid 1000 {user}" in arguments("RUN")
    cache = dict(each.split("=") for each in arguments("ENV"))["NUMBA_CACHE_DIR"]
    assert cache.startswith(f"/home/{user}/")


@pytest.mark.parametrize("line", re.findall(r"spectral-window ((?:serve|warm-up).*)", TEXT))
def test_its_commands_parse(line):
    command, *words = shlex.split(line)
    assert command in command_names()
    with load_command(command).make_context(command, words):
        pass


def test_its_default_is_the_help_of_the_program():
    words = json.loads(arguments("ENTRYPOINT")[0]) + json.loads(arguments("CMD")[0])
    assert words == ["spectral-window", "--help"]
