"""Every script in examples/ runs as its docstring says, on small models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.nn.kernels import KERNELS

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    tokenizer = load_tokenizer("bytes")
    fields = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1}
    config = SWHConfig(**fields, num_attention_heads=2, window=4, mixer="memory")
    SWHForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_operators(run):
    shown = run("operators.py")
    assert "convolution: (2, 512, 64)" in shown
    assert "window: (2, 512, 4, 16)" in shown


def test_new_kernel(run):
    try:
        assert "parameters, loss" in run("new_kernel.py")
    finally:
        del KERNELS["change"]


def test_train_on_a_folder(run, tmp_path):
    (tmp_path / "books").mkdir()
    for name in "abcd":
        (tmp_path / "books" / f"{name}.txt").write_text(f"Story {name}. " + "The cat sat. " * 300)
    small = "tokenizer=bytes hidden_size=32 num_hidden_layers=1 steps=2 warmup_steps=1 window=4"
    sizes = "sequence_length=16 batch_size=2 micro_batch_size=2 memory_heads=1 match=none"
    out = tmp_path / "run"
    assert "held-out loss" in run(
        "train_on_a_folder.py", tmp_path / "books", out, *small.split(), *sizes.split()
    )
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks
def test_finetune_lora(run, model, tmp_path):
    text = tmp_path / "letter.txt"
    text.write_text("Dear cat, the mat is yours. " * 60)
    assert "trainable params" in run("finetune_lora.py", model, text, tmp_path / "lora", 2)
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert names
    assert all("lora_" in name for name in names)


def test_generate_with_session(run, model, tmp_path):
    script, file = "generate_with_session.py", tmp_path / "story.session"
    shown = [run(script, model, file, "Once upon a time", 20), run(script, model, file, "", 20)]
    assert "57 tokens so far" in shown[1]
    shown.append(run(script, model, tmp_path / "other.session", "Once upon a time", 40))
    start, rest, whole = (text.rpartition("\n[")[0] for text in shown)
    assert start + rest == whole


def test_every_example_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in source
