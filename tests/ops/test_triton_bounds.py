"""The Triton kernels stay inside their tensors: shown in Triton's interpreter, in a process of its
own, on tensors without memory."""

from __future__ import annotations

import re

import pytest

from tests.ops.test_triton_window import in_interpreter

pytest.importorskip("triton", reason="triton is not installed")


def test_no_kernel_reaches_outside_its_tensors():
    pytest_alone = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist")
    shown = in_interpreter(*pytest_alone, "tests/ops/interpreted_bounds.py")
    assert re.search(r"\d+ passed", shown)
    assert "skipped" not in shown
