"""Fixtures for the tests of hf/."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from transformers.utils import logging

from spectral_window.hf import SWHForCausalLM
from tests.hf.small import MIXERS, small_model

logging.disable_progress_bar()


# those of transformers' own tests (test_common.py)
_THEIR_MARKERS = (
    "accelerate_tests",
    "flaky",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_mps_test",
    "generate",
    "is_training_test",
    "is_tensor_parallel_test",
    "run_first",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in _THEIR_MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' tests")


@pytest.fixture(params=MIXERS)
def model(request: pytest.FixtureRequest) -> SWHForCausalLM:
    """A small model in eval mode, with either mixer."""
    return small_model(mixer=request.param)
