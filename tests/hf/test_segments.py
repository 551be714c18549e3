"""A long text passes through the layers in segments: equal numbers, constant memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from spectral_window.hf import SWHForCausalLM
from spectral_window.hf import model as model_file
from tests.hf.small import error, small_model, tokens

ONE_DOCUMENT = None
LEFT_PADDED = [[0] * 9 + [1] * 28, [1] * 37, [0] * 37]
PACKED = [[*range(20), *range(17)], [*range(37)], [*range(3), *range(30), *range(4)]]


@torch.no_grad()
def _run(model: SWHForCausalLM, segment: int, monkeypatch: Any, **inputs: Any) -> Any:
    monkeypatch.setattr(model_file, "SEGMENT", segment)
    return model(tokens(3, 37), use_cache=True, **inputs)


@pytest.mark.parametrize("segment", [1, 4, 5, 7, 36])
@pytest.mark.parametrize("text", ["one document", "left-padded", "packed"])
def test_segments_give_the_logits_and_states_of_one_call(
    segment: int, text: str, monkeypatch: Any
) -> None:
    model = small_model()
    inputs: dict[str, Any] = {}
    if text == "left-padded":
        inputs["attention_mask"] = torch.tensor(LEFT_PADDED)
    if text == "packed":
        inputs["position_ids"] = torch.tensor(PACKED)
    whole = _run(model, 1000, monkeypatch, **inputs)
    parts = _run(model, segment, monkeypatch, **inputs)
    assert error(parts.logits, whole.logits) < 2e-6
    for mine, one in zip(parts.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert mine.seen == one.seen
        assert (mine.start is None) == (one.start is None)
        assert mine.start is None or torch.equal(mine.start, one.start)
        assert error(mine.state.spectral, one.state.spectral) < 2e-6  # fed by fp32 activations
        assert torch.equal(mine.state.window.position, one.state.window.position)


def test_without_a_cache_segments_still_see_what_came_before(monkeypatch: Any) -> None:
    model, ids = small_model(), tokens(2, 40)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        monkeypatch.setattr(model_file, "SEGMENT", 7)
        parts = model(ids, use_cache=False)
    assert parts.past_key_values is None
    assert error(parts.logits, whole) < 2e-6


@pytest.mark.parametrize("keep", [1, 2, 7, 8, 30])
def test_the_last_logits_are_the_last_of_all(keep: int, monkeypatch: Any) -> None:
    model = small_model()
    every = _run(model, 7, monkeypatch).logits
    last = _run(model, 7, monkeypatch, logits_to_keep=keep).logits
    assert last.shape[1] == keep
    assert error(last, every[:, -keep:]) < 2e-6


def test_hidden_states_are_of_the_whole_text(monkeypatch: Any) -> None:
    model = small_model()
    found = _run(model, 7, monkeypatch, output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in found] == [(3, 37, 32)] * 3


def test_attention_sees_the_whole_text_at_once(monkeypatch: Any) -> None:
    """Its state grows: segments would copy all keys again and again."""
    model = small_model(mixer="attention")
    whole = _run(model, 1000, monkeypatch).logits
    assert torch.equal(_run(model, 7, monkeypatch).logits, whole)


def test_guesses_can_be_taken_back_across_segments(monkeypatch: Any) -> None:
    model, ids = small_model(), tokens(2, 40)
    monkeypatch.setattr(model_file, "SEGMENT", 7)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, 9:], past_key_values=cache)
        cache.crop(-20)
        assert cache.get_seq_length() == 20
        after = model(ids[:, 20:], past_key_values=cache).logits
        whole = model(ids).logits
    assert error(after, whole[:, 20:]) < 2e-6


def test_memory_does_not_grow_with_the_prompt() -> None:
    """One [T, D] tensor of the long prompt would be 64 MB, and a layer makes many."""
    program = """
import torch
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.training.machine import peak_memory
torch.set_num_threads(1)
model = SWHForCausalLM(SWHConfig(vocab_size=61, hidden_size=256, num_hidden_layers=2,
    num_attention_heads=4, window=16)).eval()
peaks = []
for time in (4096, 65536):
    with torch.no_grad():
        model(torch.ones(1, time, dtype=torch.int64), use_cache=True, logits_to_keep=1)
    peaks.append(peak_memory("cpu"))
print(peaks[1] - peaks[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16e6
