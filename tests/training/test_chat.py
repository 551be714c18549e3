"""Training on conversations: the model learns to answer and to stop, and a resume is exact."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_window.commands import generate as command
from spectral_window.data.blocks import IGNORED, blocks_of
from spectral_window.data.chat import question_ids
from spectral_window.data.text import open_corpus
from spectral_window.errors import UserError
from spectral_window.generation.session import Session
from spectral_window.training import train
from spectral_window.training.evaluate import evaluate
from spectral_window.training.initial import Initial
from spectral_window.training.loading import load
from tests.training.runs import Crash, Stopper, assert_same_run, crash

NAMES = [
    "Ada",
    "Ben",
    "Cem",
    "Dea",
    "Eva",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ola",
    "Pia",
    "Quy",
    "Ron",
    "Sam",
    "Tia",
]
THINGS = ["tea", "milk", "wine", "rice", "soup", "salt", "corn", "figs", "eggs", "ham"]


def conversations() -> list[list[dict[str, str]]]:
    """Twenty, each with two questions."""
    found = []
    for i, name in enumerate(NAMES):
        first, second = THINGS[i % 10], THINGS[(3 * i + i // 10) % 10]
        texts = (f"{name}?", f"{name} likes {first}.", "And?", f"Also {second}!")
        roles = ("user", "assistant") * 2
        found.append([{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)])
    return found


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "messages.jsonl"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations()))
    return path


@pytest.fixture
def chat_recipe(recipe, chat_file):
    return recipe.replace(chat=True, data=(str(chat_file),), valid_fraction=0.1, sequence_length=64)


@pytest.fixture(scope="session")
def talker(chat_file, tmp_path_factory):
    """A base model, trained further until it knows the twenty conversations."""
    from spectral_window.training.recipes import Recipe

    folder = tmp_path_factory.mktemp("talker")
    text = folder / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"{n} drinks {t}. " * 4}) + "\n"
            for n, t in zip(NAMES, THINGS * 2, strict=True)
        )
    )
    held_out = folder / "held.jsonl"
    held_out.write_text(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "Zoe?"},
                    {"role": "assistant", "content": "Who?"},
                ]
            }
        )
    )
    base = Recipe(
        name="base",
        data=(str(text),),
        valid_fraction=0.2,
        tokenizer="bytes",
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        window=32,
        mixer="memory",
        memory_heads=2,
        initializer_range=0.1,
        sequence_length=64,
        batch_size=8,
        micro_batch_size=8,
        steps=20,
        lr=5e-3,
        warmup_steps=5,
        eval_every=1000,
        save_every=1000,
        match=None,
        device="cpu",
    )
    train(base, folder / "base")
    chat = base.replace(
        name="chat",
        chat=True,
        data=(str(chat_file),),
        valid=(str(held_out),),
        steps=150,
        weight_decay=0.0,
    )
    train(chat, folder / "chat", init=folder / "base")
    return folder / "chat"


def answer(loaded, session, question: str) -> str:
    ids = question_ids(loaded.tokenizer, [("user", question)], continuing=session.tokens_seen > 0)
    session.feed(ids)
    return "".join(session.stream(60, temperature=0))


def test_a_trained_model_answers_and_stops(talker):
    loaded = load(talker)
    for conversation in conversations():
        session = Session(loaded.model, loaded.tokenizer)
        for question, reply in zip(conversation[::2], conversation[1::2], strict=True):
            assert answer(loaded, session, question["content"]) == reply["content"]
            assert session.ended


def test_transformers_answers_by_the_saved_template_and_stops(talker):
    model = AutoModelForCausalLM.from_pretrained(talker / "model")
    tokenizer = AutoTokenizer.from_pretrained(talker / "model")
    for conversation in conversations()[:3]:
        inputs = tokenizer.apply_chat_template(
            conversation[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
        reply = tokenizer.decode(made[inputs["input_ids"].shape[1] :])
        assert reply == conversation[3]["content"] + "<|end|>"


def test_the_server_asks_in_the_same_tokens(talker):
    from spectral_window.serving.protocol import Message
    from spectral_window.serving.service import chat_ids

    tokenizer = load(talker).tokenizer
    turns = [("user", "Ada?"), ("assistant", "Ada likes tea."), ("user", "<|end|>?")]
    messages = [Message(role=role, content=content) for role, content in turns]
    assert chat_ids(tokenizer, messages, continuing=False) == question_ids(tokenizer, turns)


def test_the_command_asks_and_goes_on(talker, capsys, tmp_path):
    file = tmp_path / "ada.session"
    command.run(str(talker), chat="Ada?", temperature=0, save_session=file)
    assert capsys.readouterr().out == "Ada likes tea."
    command.run(str(talker), chat="And?", temperature=0, session_file=file)
    assert capsys.readouterr().out == conversations()[0][3]["content"]
    with pytest.raises(UserError, match="beside another beginning"):
        command.run(str(talker), "text", chat="Ada?")
    with pytest.raises(UserError, match="--system without --chat"):
        command.run(str(talker), "text", system="Be brief.")


def test_the_loss_is_the_mean_over_the_tokens_of_answers(talker):
    """Row by row, every document alone, against the log-probabilities themselves."""
    loaded, corpus = load(talker), open_corpus(talker / "data")
    stream, total, count = corpus.train, 0.0, 0
    bounds = [*stream.documents.tolist(), len(stream)]
    for begin, stop in itertools.pairwise(bounds):
        ids = torch.tensor(stream.tokens[begin:stop].astype("int64"))
        with torch.no_grad():
            scores = loaded.model(ids[None]).logits[0].double().log_softmax(-1)
        text = loaded.tokenizer.decode(ids)
        answers = [part.partition("<|end|>")[0] for part in text.split("<|assistant|>")[1:]]
        assert len(answers) == 2
        inside = False
        for t, token in enumerate(ids.tolist()):
            if inside:
                total -= scores[t - 1, token].item()
                count += 1
            piece = loaded.tokenizer.decode([token])
            inside = piece == "<|assistant|>" or (inside and piece != "<|end|>")
    found = evaluate(loaded.model, stream, length=64)
    assert found["tokens"] == count
    assert found["bytes"] == sum(len(c[i]["content"]) for c in conversations() for i in (1, 3))
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)


def test_what_is_asked_is_no_label(chat_recipe, tmp_path):
    train(chat_recipe.replace(steps=1, warmup_steps=0, batch_size=4), tmp_path / "run")
    rows = blocks_of(open_corpus(tmp_path / "run" / "data").train, 64)
    row = rows[0]
    loaded = load(tmp_path / "run")
    ignored = row["shift_labels"] == IGNORED
    assert ignored.any()
    assert not ignored.all()
    spoken = loaded.tokenizer.decode(row["shift_labels"][~ignored])
    assert "?" not in spoken
    assert spoken.count("<|end|>") == 2 * sum(row["position_ids"] == 0) - 2 * int(ignored[-1])


def test_a_stopped_chat_training_resumes_exactly(chat_recipe, tmp_path):
    train(chat_recipe, tmp_path / "whole")
    with pytest.raises(Crash):
        train(chat_recipe, tmp_path / "stopped", progress=Stopper(7, crash))
    train(chat_recipe, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_base_model_keeps_its_weights_and_gains_four_rows(recipe, chat_recipe, corpus, tmp_path):
    train(recipe.replace(steps=2, warmup_steps=1), tmp_path / "base", corpus=corpus)
    initial = Initial.read(tmp_path / "base")
    result = train(
        chat_recipe.replace(steps=1, warmup_steps=0, lr=1e-12), tmp_path / "chat", init=initial
    )
    loaded = load(tmp_path / "chat")
    assert loaded.model.config.vocab_size == len(loaded.tokenizer) == initial.config.vocab_size + 4
    assert result["parameters"] == loaded.model.count_parameters()
    old = initial.config.vocab_size
    for name, value in loaded.model.state_dict().items():
        assert torch.allclose(value[: len(initial.weights[name])], initial.weights[name], atol=1e-6)
    new = loaded.model.get_input_embeddings().weight[old:]
    assert (torch.cdist(new, new) + torch.eye(4) > 1e-3).all()
    assert loaded.model.config.eos_token_id == [256, 260]


def test_a_model_without_conversations_is_not_asked(recipe, corpus, tmp_path):
    train(recipe.replace(steps=1, warmup_steps=0), tmp_path / "run", corpus=corpus)
    with pytest.raises(UserError, match="not trained on conversations"):
        command.run(str(tmp_path / "run"), chat="Hi?")
