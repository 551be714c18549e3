"""Every script in examples/ runs as its docstring says, on small models."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.data.chat import add_chat, end_ids
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


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "chat"
    tokenizer = add_chat(load_tokenizer("bytes"))
    fields = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end_ids(tokenizer)}
    config = SWHConfig(**fields, **ends, num_attention_heads=2, window=4, mixer="memory")
    SWHForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.filterwarnings("ignore")  # of TRL and its libraries
def test_finetune_sft(run, chat_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "messages.jsonl"
    talks = [[turn("user", f"{i}?"), turn("assistant", f"{i}!" * (i % 5 + 1))] for i in range(40)]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    assert "mean loss" in run("finetune_sft.py", chat_model, file, tmp_path / "sft", 3)
    assert (tmp_path / "sft" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_finetune_dpo(run, chat_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "pairs.jsonl"
    pairs = [
        {
            "prompt": [turn("user", f"{i}?")],
            "chosen": [turn("assistant", "yes")],
            "rejected": [turn("assistant", "no")],
        }
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shown = run("finetune_dpo.py", chat_model, file, tmp_path / "dpo", 6)
    first, last = map(float, re.findall(r"-?[0-9.]+[0-9]", shown.split("margin between")[1]))
    assert first == 0  # the model is its own reference
    assert last > 0


@pytest.mark.filterwarnings("ignore")
def test_what_trl_packs_without_padding_does_not_leak(chat_model):
    """TRL joins documents into one row, with position_ids, cu_seq_lens and seq_idx."""
    collator = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    model = SWHForCausalLM.from_pretrained(chat_model).eval()
    numbers = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 250, (n,), generator=numbers).tolist() for n in (13, 1, 9, 22)]
    batch = collator(pad_token_id=255, padding_free=True)([{"input_ids": d} for d in documents])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert {"position_ids", "cu_seq_lens_q"} <= set(inputs)
    alone = [model(torch.tensor([d])).logits[0] for d in documents]
    bounds = tuple(name for name in inputs if name not in ("input_ids", "position_ids"))
    for left_out in ((), ("position_ids",), bounds):
        given = {name: value for name, value in inputs.items() if name not in left_out}
        packed = model(**given, use_cache=False).logits[0].split([len(d) for d in documents])
        for one, other in zip(packed, alone, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    together = model(batch["input_ids"]).logits[0]
    assert not torch.allclose(together[13:], torch.cat(alone)[13:], atol=1e-3)


def test_generate_with_session(run, model, tmp_path):
    script, file = "generate_with_session.py", tmp_path / "story.session"
    shown = [run(script, model, file, "Once upon a time", 20), run(script, model, file, "", 20)]
    assert "57 tokens so far" in shown[1]
    shown.append(run(script, model, tmp_path / "other.session", "Once upon a time", 40))
    start, rest, whole = (text.rpartition("\n[")[0] for text in shown)
    assert start + rest == whole


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="packages of Debian are unpacked by dpkg")
def test_debian_text(run, monkeypatch, tmp_path):
    """From packages of our own; in the place of apt-get stands a script that copies them."""

    def sentence(number: int) -> str:
        return (
            f"This is paragraph {'abcdefghij'[number % 10] * (1 + number // 10)} of the text, "
            + ("and it has the words that a sentence in English is made of, as you can see for it.")
        )

    files = {
        "doc/a.txt": "\n\n".join(sentence(number) for number in range(90)),
        "doc/b.html": f"<html><p>{sentence(3)}</p><pre>x = 1</pre><p>{sentence(95)}</p></html>",
        "doc/c.txt.gz": f"{sentence(96)}\n\nShort.\n\n{'1 2 3 4 ' * 40}",
        "doc/de/d.txt": sentence(97),
        "doc/image.png": sentence(98),
    }
    for package in ("dict-gcide", "anarchism", "dict-foldoc", "fortunes"):
        for name, text in files.items():
            path = tmp_path / package / "usr" / "share" / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".gz":
                path.write_bytes(gzip.compress(text.encode()))
            else:
                path.write_text(text)
        control = tmp_path / package / "DEBIAN" / "control"
        control.parent.mkdir()
        control.write_text(
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\n"
            "Description: text\n"
        )
        subprocess.run(
            ["dpkg-deb", "--build", tmp_path / package, tmp_path / f"{package}_1_all.deb"],
            check=True,
            capture_output=True,
        )
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text(f'#!/bin/sh\ncp "{tmp_path}/$3"_1_all.deb .\n')
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        run("debian_text.py", "dictionary", out)
    assert ended.value.code == 0
    train, valid = ((out / name).read_text() for name in ("train.txt", "valid.txt"))
    found = sorted(filter(None, (train + valid).split("\n\n")))
    assert found == sorted(sentence(number) for number in (*range(90), 95, 96))


def test_every_example_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    source += '"generate_onnx.py"'  # in hf/test_export.py, beside what it reads
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in source
