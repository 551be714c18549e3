"""lm-eval's scores are the log-likelihoods that the model itself gives."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.commands import eval as command
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import UserError
from spectral_window.training.judge import judge
from spectral_window.training.loading import Loaded

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and its libraries

QUESTIONS = [
    {"question": "The cat sat on the", "choices": ["mat", "moon", "<|endoftext|>"], "answer": 0},
    {"question": "Two and two make" * 30, "choices": ["five", "four"], "answer": 1},
    {"question": "é", "choices": ["a", "bb", "ccc"], "answer": 2},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes")
    config = SWHConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        window=8,
        mixer="memory",
        memory_heads=2,
        initializer_range=0.2,
        training_length=16,
        bos_token_id=256,
        eos_token_id=256,
    )
    return Loaded(SWHForCausalLM(config).eval(), tokenizer, tmp_path_factory.mktemp("m"), [])


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))

    def write(content: str) -> str:
        path = tmp_path / "task.yaml"
        path.write_text(content.replace("DATA", str(data)))
        return str(path)

    return write


def log_likelihood(loaded: Loaded, context: str, continuation: str, limit: int = 0) -> float:
    given = [256, *context.encode()]
    ids = [*given, *continuation.encode()]
    scored = len(ids) - len(given)
    ids = ids[-limit - 1 :] if limit else ids
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits[0].double()
    chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float(chosen[-scored:].sum())


@pytest.mark.parametrize("max_length", [None, 100])
def test_choices_have_the_log_likelihoods_of_the_model(loaded, task, max_length):
    found = judge(loaded, [task(CHOICE)], max_length=max_length)
    right = 0
    for question, sample in zip(QUESTIONS, found["samples"]["local_choice"], strict=True):
        got = [response[0][0] for response in sample["resps"]]
        # lm-eval puts a space between question and answer
        want = [
            log_likelihood(loaded, question["question"], f" {choice}", max_length or 0)
            for choice in question["choices"]
        ]
        assert got == pytest.approx(want, rel=1e-5)
        right += want.index(max(want)) == question["answer"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(right / 3)


def test_whole_texts_are_read_in_one_context_however_long(loaded, task):
    found = judge(loaded, [task(ROLLING)])
    for question, sample in zip(QUESTIONS, found["samples"]["local_rolling"], strict=True):
        want = log_likelihood(loaded, "", question["question"])
        assert sample["resps"][0][0] == pytest.approx(want, rel=1e-5)


def test_text_is_generated_after_the_token_that_begins_one(loaded, task):
    found = judge(loaded, [task(GENERATE)])
    for question, sample in zip(QUESTIONS, found["samples"]["local_generate"], strict=True):
        ids = torch.tensor([[256, *question["question"].encode()]])
        made = loaded.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=256)
        want = loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == want.split(".")[0]


def test_a_limit_asks_fewer(loaded, task):
    found = judge(loaded, [task(CHOICE)], limit=1)
    assert found["n-samples"]["local_choice"]["effective"] == 1


def test_the_command_prints_the_scores(loaded, task, capsys):
    loaded.model.save_pretrained(loaded.folder)
    loaded.tokenizer.save_pretrained(loaded.folder)
    command.run(str(loaded.folder), tasks=task(CHOICE), max_length=100, json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["questions"] == {"local_choice": 3}
    expected = judge(loaded, [task(CHOICE)], max_length=100)["results"]["local_choice"]
    assert shown["results"]["local_choice"]["acc,none"] == expected["acc,none"]
    with pytest.raises(UserError, match="--tasks beside a measure"):
        command.run(str(loaded.folder), data=["x.txt"], tasks="hellaswag")
    with pytest.raises(UserError, match="without --tasks"):
        command.run(str(loaded.folder), max_length=100)


def test_unknown_tasks_are_refused(loaded):
    with pytest.raises(UserError, match=r"no such task file \(none\.yaml\)"):
        judge(loaded, ["none.yaml"])
    with pytest.raises(UserError, match=r"no such task \(no_such_task\)"):
        judge(loaded, ["no_such_task"])


def test_without_the_extra_it_says_what_to_install(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'spectral-window\[judge\]'"):
        judge(loaded, ["hellaswag"])
