"""The loss by how often a token's context occurred before."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.commands import eval as command
from spectral_window.data.blocks import IGNORED, TokenStream
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import UserError
from spectral_window.lab.repeats import CONTEXT, NAMES, NEXT, SEEN, kinds, measure, picture
from spectral_window.training.evaluate import evaluate

VOCAB = 6  # so that contexts occur often


def new_model(seed: int = 0, **fields) -> SWHForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "window": 4}
    more = {"num_attention_heads": 2, "mixer": "memory", "initializer_range": 0.3}
    return SWHForCausalLM(SWHConfig(**(shape | more | fields))).eval()


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 331).astype("u2")
    return TokenStream(tokens, np.array([0, 50, 51, 200]), bytes=331)


def test_a_place_is_counted_by_what_its_document_said_before():
    ids = [1, 2, 3, 1, 2, 3, 1, 2, 1, 2, 3]
    labels = [*ids[1:], IGNORED]
    starts = [True] + 7 * [False] + [True] + 2 * [False]
    names = [(NAMES[k // 2], NEXT[k % 2]) if k >= 0 else None for k in kinds(ids, starts, labels)]
    new, again = ("new", "other"), ("once", "repeated")
    assert names == [
        *(new, new, new, new),  # 1; 1 2; 2 3; 3 1, each for the first time
        *(again, again, again),  # 1 2, 2 3 and 3 1 once more, and what followed them
        ("2 or 3 times", "other"),  # 3 followed 1 2, and now a document ends
        *(new, new),  # and the next one does not know it
        None,
    ]


def slow_kinds(ids, starts, labels):
    """As the definition reads: every earlier place of the document is looked at."""
    found = []
    for t, label in enumerate(labels):
        begin = max(s for s in range(t + 1) if starts[s])
        here = ids[max(begin, t + 1 - CONTEXT) : t + 1]
        before = [s for s in range(begin, t) if ids[max(begin, s + 1 - CONTEXT) : s + 1] == here]
        times = len(before)
        group = max(i for i, least in enumerate(SEEN) if times >= least)
        repeated = any(labels[s] == label for s in before)
        found.append(-1 if label == IGNORED else 2 * group + repeated)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_counting_as_one_reads_is_counting_over_all_places(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, 60).tolist()
    labels = [*ids[1:50], *[IGNORED] * 11]
    starts = [True, *(rng.random(59) < 0.05)]
    assert kinds(ids, starts, labels).tolist() == slow_kinds(ids, starts, labels)


def test_the_kinds_together_are_the_held_out_loss(stream):
    models = {"a": new_model(0), "b": new_model(1, mixer="attention")}
    found = measure(models, stream, length=64, batch=2)
    total = sum(row["tokens"] for row in found["rows"])
    assert total == len(stream) - 1
    for label, model in models.items():
        mean = sum(row["tokens"] * row["loss"][label] for row in found["rows"]) / total
        assert mean == pytest.approx(evaluate(model, stream, length=64)["loss"], rel=1e-5)
    few = measure(models, stream, length=64, max_tokens=100)
    assert sum(row["tokens"] for row in few["rows"]) == 128


def test_each_kind_has_the_loss_of_its_own_tokens(stream):
    model = new_model()
    found = measure({"a": model}, stream, length=330)
    ids = torch.from_numpy(stream.tokens.astype("int64"))
    starts = [t in stream.documents for t in range(330)]
    positions = torch.tensor([t - max(d for d in stream.documents if d <= t) for t in range(330)])
    with torch.no_grad():
        logits = model(ids[None, :-1], position_ids=positions[None], use_cache=False).logits[0]
    loss = F.cross_entropy(logits, ids[1:], reduction="none")
    kind = torch.tensor(slow_kinds(ids[:-1].tolist(), starts, ids[1:].tolist()))
    rows = iter(found["rows"])
    for number in range(2 * len(SEEN)):
        if (kind == number).any():
            row = next(rows)
            assert (row["context"], row["next"]) == (NAMES[number // 2], NEXT[number % 2])
            assert row["tokens"] == int((kind == number).sum())
            assert row["loss"]["a"] == pytest.approx(loss[kind == number].mean().item(), rel=1e-5)


def save(folder, seed: int, added: tuple[str, ...] = (), **fields) -> str:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(list(added))
    new_model(seed, vocab_size=len(tokenizer), **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command_compares_models_and_draws_a_picture(tmp_path, capsys):
    first, second = save(tmp_path / "one", 0), save(tmp_path / "two", 1, mixer="attention")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    data, out = [str(tmp_path / "text.txt")], tmp_path / "out"
    given = {"data": data, "repeats": True, "length": 128}
    command.run(first, beside=[second], out=out, json=True, **given)
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((out / "repeats.json").read_text())
    assert shown["models"] == {"one": first, "two": second}
    assert {label for row in shown["rows"] for label in row["loss"]} == {"one", "two"}
    assert (out / "repeats.png").stat().st_size > 10_000
    command.run(first, **given)
    assert "2 or 3 times" in capsys.readouterr().out
    other = save(tmp_path / "else" / "one", 2)
    command.run(first, beside=[other], json=True, **given)
    assert json.loads(capsys.readouterr().out)["models"] == {first: first, other: other}
    with pytest.raises(UserError, match="a model twice"):
        command.run(first, beside=[first], **given)
    with pytest.raises(UserError, match="--beside without --repeats"):
        command.run(first, data=data, beside=[second])
    with pytest.raises(UserError, match="--needle beside --repeats"):
        command.run(first, needle="64", **given)


def test_models_of_other_tokenizers_are_not_compared(tmp_path):
    first, second = save(tmp_path / "one", 0), save(tmp_path / "two", 1, added=("fox",))
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 20)
    with pytest.raises(UserError, match="another tokenizer"):
        command.run(first, data=[str(tmp_path / "text.txt")], repeats=True, beside=[second])


def test_rows_are_as_long_as_in_training_whatever_the_text(tmp_path, capsys):
    """They were 1,024 tokens where text was named beside a model that saw other rows."""
    model = save(tmp_path / "one", 0, training_length=96)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for more in ({}, {"repeats": True}):
        command.run(model, data=[str(tmp_path / "text.txt")], json=True, **more)
        assert json.loads(capsys.readouterr().out)["length"] == 96


def test_a_picture_of_one_kind_alone_is_drawn(tmp_path):
    row = {"context": "new", "next": "other", "tokens": 3, "loss": {"a": 1.0}}
    found = {"length": 8, "context_tokens": 2, "rows": [row]}
    assert picture(found, tmp_path / "one.png").exists()
