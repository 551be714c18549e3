"""Fixtures for the tests of hf/."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from transformers.utils import logging

from spectral_window.hf import SWHForCausalLM
from tests.hf.small import MIXERS, small_model

logging.disable_progress_bar()


@pytest.fixture(params=MIXERS)
def model(request: pytest.FixtureRequest) -> SWHForCausalLM:
    """A small model in eval mode, with either mixer."""
    return small_model(mixer=request.param)
