"""No address reaches compiled code unchecked, buffers never depend on global defaults, and no state
of the folder of compiled code stops a start."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectral_window
from spectral_window.ops import Modes, WindowState, rotate, spectral_conv, window_attention
from spectral_window.ops.pointwise import rms_norm

PACKAGE = Path(spectral_window.__file__).parent
FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "linspace"}


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment,
    )


def test_every_compiled_entry_refuses_misuse_or_gives_the_right_numbers():
    pytest.importorskip("numba")
    done = child("-m", "tests.ops.misuse")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["done"], done.stdout


@pytest.mark.parametrize("package", ["ops", "nn", "generation"])
def test_buffers_are_made_with_dtype_and_device(package):
    # torch.set_default_dtype and set_default_device reach every factory that is not told; only
    # parameters of modules are meant to follow them
    untold = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        parameters = {
            id(argument)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
            for argument in node.args
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or id(node) in parameters:
                continue
            home, _, name = ast.unparse(node.func).rpartition(".")
            told = {keyword.arg for keyword in node.keywords}
            if home == "torch" and name in FACTORIES and not {"dtype", "device"} <= told:
                untold.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not untold


def ring(time: int = 4) -> tuple[list[torch.Tensor], WindowState]:
    q, k, v = (torch.randn(2, time, 2, 4) for _ in range(3))
    return [q[:, :1], k[:, :1], v[:, :1]], window_attention(q, k, v, window=2)[1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int16])
def test_a_state_that_was_cast_is_refused_and_not_misread(dtype):
    tokens, state = ring()
    with pytest.raises(ValueError, match="position of the state"):
        window_attention(*tokens, window=2, state=state._replace(position=state.position.to(dtype)))
    with pytest.raises(ValueError, match="value of the state"):
        window_attention(*tokens, window=2, state=state._replace(value=state.value.double()))


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf")])
def test_rope_theta_that_has_no_powers_is_refused(theta):
    tokens, _ = ring()
    with pytest.raises(ValueError, match="rope_theta"):
        window_attention(*tokens, window=2, rope_theta=theta)
    with pytest.raises(ValueError, match="rope_theta"):
        rotate(tokens[0], torch.zeros(1, dtype=torch.int64), theta)


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_an_eps_that_gives_no_norm_is_refused(eps):
    with pytest.raises(ValueError, match="eps"):
        rms_norm(torch.ones(2, 4), torch.ones(4), eps)


@pytest.mark.parametrize("name", ["u", "decay", "frequency", "gain", "state", "positions"])
def test_out_may_overlap_no_input(name):
    out = torch.zeros(2, 8, 4)
    inside = out.flatten()
    inputs = {
        "u": torch.randn(2, 8, 4),
        **{part: torch.rand(4) for part in ("decay", "frequency", "gain")},
        "state": torch.zeros(2, 4, 1, 2, dtype=torch.float64),
        "positions": torch.arange(8).expand(2, -1).contiguous(),
    }
    x = inputs[name]
    inputs[name] = inside.view(x.dtype)[: x.numel()].view(x.shape).copy_(x)
    if name == "u":
        inputs["u"] = out
    modes = Modes(inputs["decay"], inputs["frequency"], inputs["gain"])
    with pytest.raises(ValueError, match=f"out overlaps {name}"), torch.no_grad():
        spectral_conv(
            inputs["u"], modes, state=inputs["state"], positions=inputs["positions"], out=out
        )


def test_one_token_goes_on_from_nothing_nowhere():
    u, modes = torch.randn(1, 1, 4), Modes(torch.rand(4), torch.rand(4))
    with pytest.raises(ValueError, match="position 3"):
        spectral_conv(u, modes, positions=torch.tensor([[3]]))


# --- compiled code on disk -----------------------------------------------------------------------

NORM = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from spectral_window.ops.pointwise import swiglu
x = torch.randn(2, 8)
y = swiglu(x, x)
assert torch.allclose(y, x * x * torch.sigmoid(x)), y
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    pytest.importorskip("numba")
    folder = tmp_path_factory.mktemp("numba")
    first = child("-c", NORM, NUMBA_CACHE_DIR=str(folder))
    assert first.returncode == 0, first.stderr
    assert "INFO compiling loops" in first.stdout
    assert str(folder) in first.stdout
    return folder


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_compiled_code_is_stored_and_loaded_without_a_word(stored):
    again = child("-c", NORM, NUMBA_CACHE_DIR=str(stored))
    assert (again.returncode, again.stdout) == (0, "")


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "text"])
def test_damaged_compiled_code_is_compiled_anew_and_replaced(stored, damage):
    (path,) = files(stored)
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    damaged = {"emptied": b"", "cut": sound[:-9], "flipped": bytes(flipped), "text": b"no code\n"}
    path.write_bytes(damaged[damage])
    done = child("-c", NORM, NUMBA_CACHE_DIR=str(stored))
    assert done.returncode == 0, done.stderr
    assert "INFO compiling" in done.stdout
    assert "WARNING" not in done.stdout
    assert len(path.read_bytes()) > 1000
    assert path.read_bytes()[:32] == sound[:32]
    test_compiled_code_is_stored_and_loaded_without_a_word(stored)


def test_the_command_line_shows_that_code_is_being_compiled(capsys):
    from spectral_window.cli.errors import log_to_stderr

    log = logging.getLogger("spectral_window")
    before, log.handlers = log.handlers, []
    try:
        log_to_stderr()
        log_to_stderr()
        log.info("compiling loops")
        log.warning("compiled code cannot be stored\x1b")
    finally:
        log.handlers, log.propagate = before, True
        log.setLevel(logging.NOTSET)
    assert capsys.readouterr().err.splitlines() == [
        "spectral-window: compiling loops",
        "spectral-window: warning: compiled code cannot be stored\\x1b",
    ]


def test_a_full_disk_costs_a_line_and_no_start(tmp_path):
    pytest.importorskip("numba")
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    done = child("-c", limit + NORM, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING compiled code cannot be stored") == 1
    assert not files(tmp_path)


def test_a_cache_folder_that_cannot_be_one_costs_no_start(tmp_path):
    pytest.importorskip("numba")
    blocked = tmp_path / "a file"
    blocked.write_text("")
    locators = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    done = child("-c", NORM, NUMBA_CACHE_DIR=str(blocked), **locators)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING compiled code cannot be stored") == 1
    assert "INFO compiling loops" in done.stdout
