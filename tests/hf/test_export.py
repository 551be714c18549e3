"""Exported graphs: they compute what the model does, without this package."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from spectral_window.cli import main
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import IntegrityError, UserError
from spectral_window.generation.decoding import Sampling
from spectral_window.generation.engine import Engine
from spectral_window.hf import export as module
from spectral_window.hf.export import Prefill, export
from spectral_window.nn.kernels import KERNELS
from spectral_window.ops import recorded
from spectral_window.ops.chunked_delta import _solve
from spectral_window.ops.memory_step import WRITE_GATES
from tests.hf.small import small_model

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "generate_onnx.py"


def model_of(**fields):
    """A layer of the memory, which has all that the paper's has, or of the mixer in `fields`."""
    if "mixer" not in fields:
        fields |= {"mixer": "memory", "memory_heads": 2}
    return small_model(vocab_size=257, num_hidden_layers=1, **fields)


def by_engine(model, prompt, count):
    """The most likely tokens, by our own engine."""
    engine = Engine(model)
    row = engine.add(prompt, Sampling(temperature=0))
    while engine.prefill(row):
        pass
    written = []
    for _ in range(count):
        engine.step([row])
        (token,) = engine.sample([row])
        engine.extend(row, [token])
        written.append(token)
    return written


@pytest.mark.timeout(1800)  # the exporter takes a minute, and on a busy machine five
def test_onnx_runtime_alone_generates_our_tokens(tmp_path):
    """And the graphs agree with the model, packed and padded, before the folder is there."""
    pytest.importorskip("onnxruntime")
    model, out = model_of(), tmp_path / "out"
    errors = export(model, load_tokenizer("bytes"), out)
    assert max(errors.values()) <= 1e-5
    assert {"prefill.onnx", "step.onnx", "weights.bin", "tokenizer.json", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    weights = (out / "weights.bin").read_bytes()
    for weight in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        ways = {x.detach().contiguous().numpy().tobytes() for x in (weight, weight.T)}
        assert sum(map(weights.count, ways)) == 1  # of both graphs
    generate = runpy.run_path(str(EXAMPLE))["generate"]
    prompt = list(b"Once upon a time there was a model of constant state.")
    assert generate(str(out), prompt, 200) == by_engine(model, prompt, 200)


def test_torch_loads_an_exported_folder_and_a_second_export_is_refused(tmp_path, capsys):
    model, source, out = model_of(), tmp_path / "model", tmp_path / "out"
    model.save_pretrained(source)
    load_tokenizer("bytes").save_pretrained(source)
    words = ["export", str(source), "--format", "torch", "--out", str(out)]
    assert main(words) == 0
    ids = torch.tensor([list(b"any length")])
    positions = torch.arange(ids.shape[1])[None]
    got = torch.export.load(out / "prefill.pt2").module()(ids, positions)[0]
    with torch.no_grad():
        assert torch.allclose(got, model(ids).logits, atol=1e-5)
    assert "`0.memory` | [batch, 2, 16, 16] | float32" in (out / "README.md").read_text()
    assert main(words) == 2
    assert "choose a new folder" in capsys.readouterr().err


def test_a_state_that_grows_is_refused_with_a_reason(tmp_path):
    with pytest.raises(UserError, match="keeps all keys and values"):
        export(small_model(mixer="attention"), None, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_differs_from_the_model_is_refused(monkeypatch):
    model = model_of()

    def wrong(inputs):
        logits, *states = Prefill(model)(*inputs)
        return [logits * 1.0001, *states]

    with torch.no_grad(), pytest.raises(IntegrityError, match="prefill differs"):
        module._compare(model, wrong, lambda inputs: list(module.Step(model)(*inputs)))


def test_the_triangular_system_of_a_graph_is_as_exact_as_substitution(monkeypatch):
    """Equal keys, where a sum of powers overflows."""
    lower = torch.ones(1, 64, 64, dtype=torch.float64).tril(-1)
    right = torch.randn(1, 64, 3, dtype=torch.float64)
    want = _solve(lower, right)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.allclose(_solve(lower, right), want, rtol=1e-12, atol=1e-12)


def test_rows_are_sorted_without_a_sort():
    positions = torch.tensor([[-1, 5, -1, 6, 0, 1, -1, -1], [-1] * 8, [0, 1, 0, -1, 0, 1, 2, 3]])
    rows = recorded.tokens_first(positions)
    assert rows.order.tolist() == [
        [1, 3, 4, 5, 0, 2, 6, 7],
        list(range(8)),
        [0, 1, 2, 4, 5, 6, 7, 3],
    ]
    assert rows.head.tolist() == [[0, 0, 2, 2, 2, 2, 2, 2], [0] * 8, [0, 0, 2, 3, 3, 3, 3, 3]]
    assert rows.tokens.tolist() == [4, 0, 7]


@pytest.mark.slow
@pytest.mark.parametrize("gate", WRITE_GATES)
def test_every_write_gate_is_exported(gate, tmp_path):
    model = model_of(write_gate=gate)
    errors = export(model, load_tokenizer("bytes"), tmp_path / "out", "torch")
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_every_kernel_is_exported(kernel, tmp_path):
    model = model_of(mixer="spectral_window", kernel=kernel)
    errors = export(model, load_tokenizer("bytes"), tmp_path / "out", "torch")
    assert max(errors.values()) <= 1e-5
