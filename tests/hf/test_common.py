"""transformers' own tests of a model, run on ours.

They are not in the wheel. `TRANSFORMERS_TESTS` names the folder `tests` of a git checkout of the
installed version, or of its source archive, which lacks the tests of generation:

    pip download --no-deps --no-binary :all: transformers==5.23.0
    tar xf transformers-5.23.0.tar.gz && touch transformers-5.23.0/tests/__init__.py
    pip install parameterized
    TRANSFORMERS_TESTS=transformers-5.23.0/tests pytest tests/hf/test_common.py

docs/ecosystem.md has the result, and says of each test that cannot apply why.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_window.hf import (
    SWHConfig,
    SWHForCausalLM,
    SWHForSequenceClassification,
    SWHForTokenClassification,
    SWHModel,
)

FOLDER = os.environ.get("TRANSFORMERS_TESTS", "")
if not (Path(FOLDER) / "test_modeling_common.py").is_file() or not FOLDER:
    pytest.skip(
        "TRANSFORMERS_TESTS names no folder of transformers' tests", allow_module_level=True
    )
pytest.importorskip("parameterized")
pytestmark = pytest.mark.filterwarnings("ignore")

_NAME = "tests_of_transformers"  # `tests` is ours
# modules that the source archive lacks, with what the others import from them
_ABSENT: dict[str, dict[str, Any]] = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
}


def _package(name: str, folder: Path) -> None:
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


_package(_NAME, Path(FOLDER))
for dotted, contents in _ABSENT.items():
    place = Path(FOLDER) / f"{dotted.replace('.', '/')}.py"
    if not place.is_file():
        _package(f"{_NAME}.{dotted.split('.')[0]}", place.parent)
        module = types.ModuleType(f"{_NAME}.{dotted}")
        vars(module).update(contents)
        sys.modules[module.__name__] = module


def _of_transformers(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{_NAME}.{module}"), name)


ConfigTester = _of_transformers("test_configuration_common", "ConfigTester")
ModelTesterMixin = _of_transformers("test_modeling_common", "ModelTesterMixin")
GenerationTesterMixin = _of_transformers("generation.test_utils", "GenerationTesterMixin")


class SWHTester:
    """Small configs and inputs, by the names that the tests read."""

    batch_size, seq_length, vocab_size, hidden_size = 3, 7, 99, 32
    num_hidden_layers, num_attention_heads, num_labels = 2, 4, 3
    is_training = True

    def __init__(self, mixer: str):
        self.mixer = mixer

    def get_config(self) -> SWHConfig:
        return SWHConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            mixer=self.mixer,
            num_labels=self.num_labels,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[SWHConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class SWHTests(ModelTesterMixin, GenerationTesterMixin):
    """The tests of transformers, for one mixer."""

    mixer: str
    all_model_classes = (
        SWHModel,
        SWHForCausalLM,
        SWHForSequenceClassification,
        SWHForTokenClassification,
    )
    has_attentions = False  # no weights of attention are made
    test_can_init_all_missing_weights_before_2023 = True  # our files carry no year

    def setUp(self) -> None:
        self.model_tester = SWHTester(self.mixer)
        self.config_tester = ConfigTester(self, config_class=SWHConfig, hidden_size=32)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestSpectralWindow(SWHTests, unittest.TestCase):
    mixer = "spectral_window"


class TestMemory(SWHTests, unittest.TestCase):
    mixer = "memory"


class TestAttention(SWHTests, unittest.TestCase):
    mixer = "attention"
