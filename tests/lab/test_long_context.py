"""Questions hidden in a long text, and the loss by position."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.commands import eval as command
from spectral_window.data.blocks import TokenStream
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import UserError
from spectral_window.generation.engine import Engine
from spectral_window.lab.long_context import (
    VALUES,
    is_right,
    loss_by_position,
    measure,
    picture,
    question,
    read_lengths,
    share_right,
)

KINDS = 32  # of tokens


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, KINDS, 5000).astype("u2")
    return TokenStream(tokens, np.array([0]), bytes=5000)


def new_model(**fields) -> SWHForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": KINDS, "hidden_size": 64, "num_hidden_layers": 2, "window": 8}
    more = {"num_attention_heads": 4, "mixer": "memory", "memory_heads": 2, "training_length": 32}
    return SWHForCausalLM(SWHConfig(**(shape | more | {"initializer_range": 0.1} | fields)))


def test_a_question_holds_its_answer_once_and_ends_with_its_key(stream):
    rng = np.random.default_rng(1)
    for length, pairs in [(32, 1), (64, 4), (6000, 4)]:
        for _ in range(20):
            asked = question(stream, length, pairs, rng, key_tokens=4)
            assert len(asked.ids) == length
            assert len(set(asked.candidates)) == VALUES
            key, value = asked.ids[-4:], asked.candidates[asked.answer]
            found = [asked.ids[i + 4] for i in range(length - 4) if asked.ids[i : i + 4] == key]
            assert value in found


def test_the_text_around_a_question_is_the_models_own(stream):
    asked = question(stream, 200, 1, np.random.default_rng(2))
    text = ",".join(map(str, stream.tokens))
    inner = asked.ids[1:-4]
    without = (inner[:place] + inner[place + 5 :] for place in range(len(inner) - 4))
    assert any(",".join(map(str, left)) in text for left in without)


def test_a_model_trained_to_recall_is_far_above_chance_and_an_untrained_one_at_it():
    """Trained on pairs that come again in another order: 0.76 in 350 steps, chance is 0.1."""
    rng, kinds = np.random.default_rng(3), 512
    text = np.concatenate([rng.permutation(kinds) for _ in range(40)]).astype("u2")
    stream = TokenStream(text, np.array([0]), bytes=1)
    model = new_model(vocab_size=kinds)
    assert share_right(model, stream, 32, 1, 100, seed=5, key_tokens=1) < 0.25
    model.train()
    rate, steps = 5e-3, 350
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30) * (1 - step / steps)
        tokens = rng.permuted(np.tile(np.arange(kinds), (32, 1)), axis=1)
        before = step % 4
        lead, pairs = tokens[:, :before], tokens[:, before : before + 16].reshape(32, 8, 2)
        order = rng.permuted(np.tile(np.arange(8), (32, 1)), axis=1)
        again = np.take_along_axis(pairs, order[:, :, None], 1)
        rows = np.concatenate((lead, pairs.reshape(32, 16), again.reshape(32, 16)), 1)
        ids = torch.from_numpy(rows)
        logits = model(ids, use_cache=False).logits[:, before + 16 :: 2]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, before + 17 :: 2].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert share_right(model, stream, 32, 1, 50, seed=5, key_tokens=1) > 0.5


def test_a_question_is_answered_by_the_likeliest_candidate(stream):
    """Read through the engine in segments, as in one forward pass."""
    model, rng = new_model().eval(), np.random.default_rng(4)
    engine = Engine(model)
    for _ in range(5):
        asked = question(stream, 1500, 4, rng)
        with torch.no_grad():
            logits = model(torch.tensor([asked.ids])).logits[0, -1]
        likeliest = max(range(VALUES), key=lambda i: logits[asked.candidates[i]].item())
        assert is_right(engine, asked._replace(answer=likeliest))
        assert not is_right(engine, asked._replace(answer=(likeliest + 1) % VALUES))
    assert not engine.rows


def test_the_loss_by_position_is_that_of_one_row_and_of_short_rows(stream):
    model = new_model(initializer_range=0.3).eval()
    found = loss_by_position(model, stream, 2100)
    tokens = torch.from_numpy(stream.tokens[:2101].astype("int64"))
    with torch.no_grad():
        whole = model(tokens[None, :-1]).logits[0]
        short = torch.cat(
            [model(tokens[None, s : min(s + 32, 2100)]).logits[0] for s in range(0, 2100, 32)]
        )
    assert [row["from"] for row in found] == [0, *(2**i for i in range(4, 12))]
    assert found[-1]["to"] == 2100
    for row in found:
        here = slice(row["from"], row["to"])
        for name, logits in (("loss", whole), ("short", short)):
            want = F.cross_entropy(logits[here], tokens[1:][here]).item()
            assert row[name] == pytest.approx(want, rel=1e-5)
    assert found[0]["loss"] == pytest.approx(found[0]["short"], rel=1e-6)
    assert found[-1]["loss"] != pytest.approx(found[-1]["short"], rel=1e-4)


def test_what_is_measured_is_the_same_again_and_has_a_picture(stream, tmp_path):
    model = new_model()
    found = measure(model, stream, [32, 64], count=3)
    assert found == measure(model, stream, [32, 64], count=3)
    assert [(row["task"], row["length"]) for row in found["questions"]] == [
        ("needle", 32),
        ("recall", 32),
        ("needle", 64),
        ("recall", 64),
    ]
    assert picture(found, "model", tmp_path / "long.png").stat().st_size > 10_000


def test_the_command_writes_one_json_and_a_picture(tmp_path, capsys):
    tokenizer = load_tokenizer("bytes")
    new_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    data, out = [str(tmp_path / "text.txt")], tmp_path / "out"
    command.run(str(tmp_path / "model"), data=data, needle="64,32", questions=2, out=out, json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((out / "long-context.json").read_text())
    assert [row["length"] for row in shown["questions"]] == [32, 32, 64, 64]
    assert (out / "long-context.png").exists()


@pytest.mark.parametrize("text", ["", "1q", "k", "31", "1k,,2k", "-64", "1.5k", "6kk"])
def test_bad_lengths_are_refused(text):
    with pytest.raises(UserError, match="no length"):
        read_lengths(text)
    assert read_lengths("1M,1k,64") == [64, 1024, 1 << 20]


def test_a_text_of_few_kinds_of_tokens_is_refused():
    poor = TokenStream(np.zeros(100, "u2"), np.array([0]), bytes=100, name="zeros")
    with pytest.raises(UserError, match=r"1 different tokens \(zeros\)"):
        question(poor, 64, 1, np.random.default_rng(0))
