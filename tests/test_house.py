"""The rules of the house: who may import whom, and that every module says what it is for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spectral_window"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = [
    path for path in sorted(Path(__file__).parent.rglob("*.py")) if path.name != "processes.py"
]
# imports go downward only: a room may use the rooms below it
FLOORS = [
    {"__main__"},
    {"commands"},
    {"cli"},
    {"lab"},
    {"serving"},
    {"generation", "training"},
    {"hf"},
    {"data"},
    {"nn"},
    {"ops"},
    {"files", "registry"},
    {"errors"},
]
# who alone may import an outside package at all
ONLY_IN = {
    "transformers": ("hf/", "training/", "data/tokenizers.py", "lab/baselines/"),
    "matplotlib": ("lab/",),
    "numba": ("ops/compiled/",),
    "triton": ("ops/triton_",),
    "datasets": ("data/", "lab/bench/data.py"),
    "fsspec": ("data/remote.py",),
    "lm_eval": ("training/judge.py",),
    "typer": ("cli/", "commands/"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic"), ("serving/",)),
    "prometheus_client": ("serving/",),
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, at the top of the file?) of everything a file imports, type-checking blocks
    left out."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", top) for alias in node.names]
    return found


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "spectral_window" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    floor = next(i for i, rooms in enumerate(FLOORS) if here in rooms)
    for dotted, _ in imports(path):
        there = room(dotted)
        if there is None or there == here:
            continue
        level = next((i for i, rooms in enumerate(FLOORS) if there in rooms), None)
        if level is None:
            continue  # a name of spectral_window/__init__.py
        assert level > floor, (
            f"{path.name} ({here}) imports {dotted}: {there} does not lie below {here}"
        )


def test_no_file_imports_itself_by_a_detour():
    """Not within a room either, not inside a function, not for types alone."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
    }

    def module(dotted: str) -> str:
        while dotted not in modules:
            dotted = dotted.rpartition(".")[0]
        return dotted

    uses = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found = {
            module(f"{node.module}.{alias.name}")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name)
            for alias in node.names
        }
        uses[name.removesuffix(".__init__")] = found - {PACKAGE.name}
    while uses:  # take away whoever needs nobody that is left
        free = [name for name, needed in uses.items() if not needed & uses.keys()]
        assert free, f"import each other: {sorted(uses)}"
        for name in free:
            del uses[name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_packages_stay_in_their_rooms(path):
    here = path.relative_to(PACKAGE).as_posix()
    for dotted, top in imports(path):
        package = dotted.split(".")[0]
        if package in ONLY_IN:
            assert here.startswith(ONLY_IN[package]), f"{here} imports {package}"
        if package == "datasets":
            assert not top, f"{here} must import datasets only when it is used"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_command_answers_without_loading_torch():
    code = "import sys, spectral_window.cli; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time", "sleep"}


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(TESTS[0].parent)))
def test_no_test_depends_on_the_clock_or_leaves_a_process(path):
    """A busy machine may take any time: the only deadline is pytest's own, and children are started
    and waited for by processes.py."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name.removeprefix("time.").removesuffix("_ns") not in CLOCKS, call.lineno
        assert name.split(".")[-1] != "Popen", call.lineno
        assert not any(keyword.arg == "timeout" for keyword in call.keywords), call.lineno


def test_every_test_named_in_the_table_of_faults_exists():
    tests = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (tests / "FAULTS.md").read_text())
    assert len(named) > 50
    missing = [f"{f}::{name}" for f, name in named if f"def {name}(" not in (tests / f).read_text()]
    assert not missing


def test_torch_is_asked_whether_it_exports_in_one_place():
    """torch 2.11 answers yes in every graph of torch.compile: a model on a GPU took plain methods
    there. `ops/tracing.py` knows."""
    asking = [path.name for path in FILES if "compiler.is_exporting(" in path.read_text()]
    assert asking == ["tracing.py"]  # its docstring says why
