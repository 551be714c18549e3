"""Supervised fine-tuning: ends are learned, padding is not, added chat tokens are used."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from spectral_window.data.tokenizers import END_OF_TEXT, load_tokenizer
from tests.hf.small import small_model

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model and its tokenizer in one folder, as a training leaves them."""
    tokenizer = load_tokenizer("bytes")
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    small_model(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_collator_masks_padding_and_keeps_every_end(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    rows = [tokenizer(text + END_OF_TEXT) for text in ("long enough", "short")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    eos = tokenizer.eos_token_id
    assert (batch["labels"] == eos).sum() == 2
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model(**batch).loss.isfinite()


def test_chat_tokens_that_were_added_are_used(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how the new rows are drawn
        model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(saved / "chat")
    model.save_pretrained(saved / "chat")
    tokenizer = AutoTokenizer.from_pretrained(saved / "chat")
    model = AutoModelForCausalLM.from_pretrained(saved / "chat")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
    begin, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert (ids == begin).sum() == (ids == end).sum() == 2
    prompt = tokenizer.apply_chat_template(
        talk[:1], return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=end)
    assert out.shape[1] <= prompt["input_ids"].shape[1] + 3


def test_a_model_learns_to_stop_from_padded_conversations(saved: Path) -> None:
    """The completion alone is scored, as TRL's SFTTrainer does it, its end included."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(saved).train()
    rows, masks = [], []
    for prompt, answer in (("ab:", "no"), ("a:", "yes")):
        head, tail = tokenizer(prompt).input_ids, tokenizer(answer + END_OF_TEXT).input_ids
        rows.append({"input_ids": head + tail})
        masks.append([0] * len(head) + [1] * len(tail))
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    for row, mask in enumerate(masks):
        batch["labels"][row, : len(mask)][torch.tensor(mask) == 0] = -100
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    prompts = tokenizer(["ab:", "a:"], return_tensors="pt", padding=True, padding_side="left")
    out = model.eval().generate(**prompts, max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(
        out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answers == ["no", "yes"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL's own setting
def test_trl_trains_by_path(saved: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not among the development packages")
    from datasets import Dataset

    data: Any = Dataset.from_list([{"prompt": "a:", "completion": "yes"}] * 4)
    config = trl.SFTConfig(
        str(tmp_path / "sft"),
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(str(saved), args=config, train_dataset=data)
    trainer.train()
    assert type(trainer.model).__name__ == "SWHForCausalLM"
