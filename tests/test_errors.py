"""Every failure is told as what it is: of the user, a file, the numbers, the machine, or ours."""

from __future__ import annotations

import ast
import builtins
import inspect
import itertools
import pkgutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import spectral_window
from spectral_window import errors
from spectral_window.cli import main
from spectral_window.cli.errors import explain
from spectral_window.errors import (
    KINDS,
    DivergedError,
    FaultFound,
    IntegrityError,
    NetworkError,
    NotFiniteError,
    ResourceError,
    SpectralWindowError,
    UserError,
    UserTypeError,
)
from spectral_window.ops.fir import Taps, fir_conv
from spectral_window.ops.modes import Modes
from spectral_window.ops.spectral import spectral_conv
from spectral_window.training.recipes import RECIPES

PACKAGE = Path(spectral_window.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TOO_MUCH = 1 << 50  # bytes: more than a process can address


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


# ------------------------------------------------------------------------------ the classes


@pytest.mark.parametrize(
    ("kind", "code", "bases"),
    [
        (UserError, 2, [ValueError]),
        (UserTypeError, 2, [UserError, TypeError]),
        (IntegrityError, 3, [ValueError]),
        (DivergedError, 4, [ArithmeticError]),
        (NotFiniteError, 4, [DivergedError, ValueError]),
        (ResourceError, 5, []),
        (NetworkError, 6, []),
        (FaultFound, 7, []),
    ],
)
def test_every_kind_has_its_exit_code_and_the_bases_that_callers_expect(kind, code, bases):
    assert issubclass(kind, SpectralWindowError)
    assert explain(kind("what (where): what to do")) == ("what (where): what to do", code)
    standard = [ValueError, TypeError, ArithmeticError, OSError, LookupError, RuntimeError]
    inherited = {base for base in [*KINDS, *standard] if issubclass(kind, base) and base != kind}
    assert {base for base in bases if base != kind} <= inherited
    assert inherited <= {*bases, *(b for base in bases for b in base.__mro__)}


def test_kinds_stand_beside_one_another_and_each_exit_code_means_one():
    for one, other in itertools.permutations(KINDS, 2):
        assert not issubclass(one, other)
    assert len({kind.exit_code for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert type(errors.from_exit_code(kind.exit_code, "said")) is kind
    assert explain(errors.from_exit_code(-9, "killed")) == ("killed", 1)


def test_every_error_class_of_the_package_is_of_one_kind():
    for module in pkgutil.walk_packages([str(PACKAGE)], "spectral_window."):
        if not module.name.endswith("__main__") and "triton" not in module.name:
            import_module(module.name)
    found = set()
    waiting = [SpectralWindowError]
    while waiting:
        waiting += (below := waiting.pop().__subclasses__())
        found |= {kind for kind in below if kind.__module__.startswith("spectral_window")}
    assert found > set(KINDS)
    for one in found:
        assert sum(issubclass(one, kind) for kind in KINDS) == 1, one
        assert one.exit_code == next(k for k in KINDS if issubclass(one, k)).exit_code


# ------------------------------------------------------------------------------ a command fails


def fails_with(error: Exception, monkeypatch, capsys) -> tuple[int, str]:
    """What a command says and returns that meets `error` on its way."""

    def recipe():
        raise error

    monkeypatch.setitem(RECIPES, "tiny", recipe)
    code = main(["info", "tiny"])
    said = capsys.readouterr().err
    assert said.startswith("spectral-window: error: ")
    assert said.count("\n") == 1
    return code, said


@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, KeyError, IndexError, RuntimeError, ArithmeticError, Exception]
)
def test_a_plain_exception_inside_a_command_is_called_a_bug(kind, monkeypatch, capsys):
    """Raised by a module of the package or by a library: it is ours, and no mistake of the user."""
    code, said = fails_with(kind("x is 3"), monkeypatch, capsys)
    assert code == 1
    assert f"{kind.__name__}: " in said
    assert "x is 3" in said
    assert "(a bug)" in said


@pytest.mark.parametrize("kind", [*KINDS, UserTypeError, NotFiniteError])
def test_an_error_of_ours_inside_a_command_ends_it_with_its_exit_code(kind, monkeypatch, capsys):
    code, said = fails_with(kind("what (where): what to do"), monkeypatch, capsys)
    assert (code, said) == (kind.exit_code, "spectral-window: error: what (where): what to do\n")


@pytest.mark.parametrize("line", ["info @", "doctor @", "eval @", "generate @ x", "report @"])
def test_a_home_that_nobody_has_is_a_place_that_is_not_there(line, capsys):
    code = main(line.replace("@", "~nobody-of-that-name/run").split())
    assert code == 2
    assert "~nobody-of-that-name/run" in capsys.readouterr().err


def allocated_by_torch():
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def allocated_by_numpy():
    np.empty(TOO_MUCH, dtype=np.uint8)


def allocated_by_python():
    bytearray(TOO_MUCH)


def allocated_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "allocate", [allocated_by_torch, allocated_by_numpy, allocated_by_python, allocated_on_a_gpu]
)
def test_memory_that_is_not_there_is_a_lack_of_the_machine(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    line, code = explain(caught.value)
    assert code == 5
    assert line.startswith("out of memory (")
    assert "\n" not in line


U, ONES = torch.ones(1, 8, 2), torch.ones(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: spectral_conv(U, Modes(ONES / 0, ONES)),
        lambda: spectral_conv(U, Modes(ONES, ONES / 0), method="scan"),
        lambda: spectral_conv(U / 0, Modes(ONES, ONES), method="fft"),
        lambda: fir_conv(U, Taps(torch.ones(2, 3) / 0)),
        lambda: fir_conv(U / 0, Taps(torch.ones(2, 3)), method="fft"),
    ],
)
def test_an_operator_calls_numbers_that_are_not_finite_by_their_class(call):
    with pytest.raises(NotFiniteError):
        call()


# ------------------------------------------------------------------------------ the source

# What Python's protocols ask for, where a method has such a protocol to answer.
PROTOCOLS = {"NotImplementedError", "AttributeError", "IndexError", "KeyboardInterrupt"}
BUILTIN = {
    name
    for name, value in vars(builtins).items()
    if inspect.isclass(value) and issubclass(value, BaseException)
}
BUGS = {"ops/compiled/threads.py"}  # compiled code that failed: nothing a user could have done
AS_OSERROR = {"data/shards.py"}  # a library's plain Exception for a full disk, where it writes


def raised(path: Path) -> set[str]:
    """Names of the classes that a file raises."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            exc = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(exc, ast.Name):
                found.add(exc.id)
    return found


@pytest.mark.parametrize("path", FILES, ids=named)
def test_modules_raise_errors_of_ours_alone(path):
    allowed = PROTOCOLS | ({"RuntimeError"} if named(path) in BUGS else set())
    allowed |= {"OSError"} if named(path) in AS_OSERROR else set()
    assert not raised(path) & BUILTIN - allowed


QUESTIONS = {"startswith", "endswith", "find", "index", "count", "search", "match", "fullmatch"}


def exceptions_of(scope: ast.AST) -> set[str]:
    """Names of the exceptions that a handler catches or a function is given."""
    if isinstance(scope, ast.ExceptHandler):
        return {scope.name} - {None}
    if isinstance(scope, ast.FunctionDef):
        told = [(a.arg, a.annotation and ast.unparse(a.annotation)) for a in scope.args.args]
        return {name for name, kind in told if name == "error" or "Exception" in (kind or "")}
    return set()


def is_text(node: ast.AST, exceptions: set[str], texts: set[str]) -> bool:
    """Whether an exception's words, or the name of its class, are part of an expression."""
    for part in ast.walk(node):
        source = ast.unparse(part) if isinstance(part, (ast.Name, ast.Attribute, ast.Call)) else ""
        words = [f"{e}.{name}" for e in exceptions for name in ("args", "msg", "message")]
        words += [f"{f}({e})" for e in exceptions for f in ("str", "repr")]
        words += [f"type({e}).__name__" for e in exceptions]
        if source in texts | {*words} or source.endswith(".format_message()"):
            return True
    return False


def decisions_by_text(tree: ast.AST) -> list[int]:
    """Lines where a caught or given exception's words, or the name of its class, decide."""
    lines = []
    for scope in ast.walk(tree):
        exceptions, texts = exceptions_of(scope), set()
        for node in ast.walk(scope) if exceptions else ():
            if isinstance(node, ast.Assign) and is_text(node.value, exceptions, texts):
                names = [n for target in node.targets for n in ast.walk(target)]
                texts |= {n.id for n in names if isinstance(n, ast.Name)}
            asks = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in QUESTIONS
            if (asks or isinstance(node, ast.Compare)) and is_text(node, exceptions, texts):
                lines.append(node.lineno)
    return sorted(set(lines))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_message_decides_what_an_error_is(path):
    tree = ast.parse(path.read_text())
    if named(path) == "errors.py":  # torch has no class for a lack of CPU memory
        tree.body = [n for n in tree.body if getattr(n, "name", "") != "is_out_of_memory"]
    assert not decisions_by_text(tree)


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept ValueError as e:\n    if 'finite' not in str(e): raise",
        "def explain(error):\n    kind = type(error).__name__\n    return kind == 'MemoryError'",
        "def explain(error: Exception):\n    m = str(error)\n    return re.search('x', m)",
        "try: f()\nexcept ValueError as e:\n    late = e.msg.startswith('Unterminated')",
    ],
)
def test_the_search_for_deciding_messages_finds_those_there_were(source):
    assert decisions_by_text(ast.parse(source))
