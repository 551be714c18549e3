"""The window's GPU kernels, proven without a GPU: their numbers in Triton's interpreter (in a
process of its own), and what the compiler makes of them for real cards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.ops import resolve, window_attention

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parent.parent.parent


def in_interpreter(*command: str, timeout: float = 500) -> str:
    """Output of a Python command that may import kernels for the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_kernels_keep_the_contract_in_the_interpreter():
    shown = in_interpreter(
        "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/ops/interpreted_window.py"
    )
    assert re.search(r"\d+ passed", shown)
    assert "skipped" not in shown


def test_a_cpu_takes_no_gpu_method(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(UserError, match="'triton'"):
        window_attention(q, q, q, window=2, method="triton")
    assert resolve("window", "auto", q)[0] != "triton"


def test_a_gpu_takes_the_kernels_and_says_why():
    class OnGPU:
        shape, dtype, device = (1, 5, 1, 4), torch.bfloat16, torch.device("cuda")
        is_cuda = True

        def dim(self):
            return 4

    assert resolve("window", "auto", OnGPU())[0] == "triton"
    OnGPU.dtype = torch.float64
    assert resolve("window", "auto", OnGPU())[0] == "chunked"
