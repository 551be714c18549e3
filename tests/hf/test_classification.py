"""Classes of texts and of tokens do not depend on padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from spectral_window.hf import SWHForSequenceClassification, SWHForTokenClassification
from tests.hf.small import MIXERS, error, small_config, small_model, tokens, word_tokenizer

LENGTHS = (9, 4, 7)


def _classifier(**fields: Any) -> SWHForSequenceClassification:
    torch.manual_seed(0)
    return SWHForSequenceClassification(small_config(num_labels=3, **fields)).eval()


def _padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(9 - len(text), 9) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask, texts


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_has_the_class_it_has_alone(side: str, mixer: str) -> None:
    model = _classifier(mixer=mixer)
    ids, mask, texts = _padded(side)
    want = torch.cat([model(text[None]).logits for text in texts])
    assert want.shape == (3, 3)
    assert error(model(ids, attention_mask=mask).logits, want) <= 5e-6
    embeds = model.get_input_embeddings()(ids)
    assert error(model(inputs_embeds=embeds, attention_mask=mask).logits, want) <= 5e-6
    if side == "right":
        model.config.pad_token_id = 0
        assert error(model(ids).logits, want) <= 5e-6


@torch.no_grad()
def test_an_end_token_that_also_pads_is_no_padding_where_the_mask_says_so() -> None:
    model = _classifier(pad_token_id=5, eos_token_id=5)
    text = torch.tensor([[3, 4, 5]])
    got = model(text, attention_mask=torch.ones_like(text)).logits
    assert torch.equal(got, model.score(model.model(text).last_hidden_state[:, 2]))


def test_a_language_model_becomes_a_classifier_and_comes_back_from_disk(tmp_path: Path) -> None:
    language = small_model()
    language.save_pretrained(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "lm", num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    assert type(model) is SWHForSequenceClassification
    x = tokens(2, 7)
    assert torch.equal(model.model(x).last_hidden_state, language.model(x).last_hidden_state)
    model.save_pretrained(tmp_path / "classes")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classes")
    assert torch.equal(again(x).logits, model(x).logits)
    assert again.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (None, torch.tensor([0, 2])),
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
        ("regression", torch.randn(2, 3)),
    ],
)
def test_every_kind_of_loss_has_gradients(kind: str | None, labels: torch.Tensor) -> None:
    model = _classifier(problem_type=kind)
    out = model(tokens(2, 6), labels=labels)
    out.loss.backward()
    assert out.loss.item() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "there are 3 classes, use 0 to 2"),
        (torch.tensor([0, -1]), "there are 3 classes"),
        (torch.tensor([0]), r"labels have shape \[1\] .* expected \[2\]"),
        (torch.zeros(2, 6), r"labels have shape \[2, 6\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _classifier()(tokens(2, 6), labels=labels)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens has no class"):
        _classifier()(torch.zeros(2, 0, dtype=torch.int64))


def test_accumulated_steps_have_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    """Trainer must average over the steps itself: the loss is a mean over rows."""
    ids, mask, _ = _padded("left")
    data = [
        {"input_ids": ids[row % 3], "attention_mask": mask[row % 3], "labels": row % 3}
        for row in range(4)
    ]
    trained = []
    for batch, steps in ((4, 1), (2, 2)):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, report_to="none",
            gradient_accumulation_steps=steps, use_cpu=True, disable_tqdm=True, optim="sgd",
            dataloader_pin_memory=False, max_grad_norm=0.0, learning_rate=1.0, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(_classifier(), arguments, train_dataset=data)
        trainer.train()
        trained.append(trainer.model.score.weight.detach().clone())
    moved = trained[0] - _classifier().score.weight
    assert error(trained[1] - trained[0] + moved, moved) < 1e-4


# -------------------------------------------------------------------------------- classes of tokens


def _tagger(**fields: Any) -> SWHForTokenClassification:
    torch.manual_seed(0)
    return SWHForTokenClassification(small_config(num_labels=3, **fields)).eval()


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_a_padded_text_have_the_classes_they_have_alone(side: str, mixer: str) -> None:
    model = _tagger(mixer=mixer)
    ids, mask, texts = _padded(side)
    want = torch.cat([model(text[None]).logits[0] for text in texts])
    got = model(ids, attention_mask=mask).logits
    assert got.shape == (3, 9, 3)
    assert error(got[mask.bool()], want) <= 5e-6


def test_a_language_model_becomes_a_tagger_that_a_pipeline_uses(tmp_path: Path) -> None:
    language = small_model()
    language.save_pretrained(tmp_path / "lm")
    names = {0: "O", 1: "WORD", 2: "NAME"}
    model = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "lm", num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    )
    assert type(model) is SWHForTokenClassification
    model.eval().save_pretrained(tmp_path / "tags")
    word_tokenizer().save_pretrained(tmp_path / "tags")
    tag = pipeline("token-classification", str(tmp_path / "tags"), device="cpu", ignore_labels=[])
    classes = model(torch.tensor([[3, 4, 5]])).logits[0].argmax(1)
    assert [each["entity"] for each in tag("w3 w4 w5")] == [names[int(c)] for c in classes]


def test_the_loss_of_tokens_ignores_what_has_no_label() -> None:
    model, x = _tagger(), tokens(2, 6)
    labels = torch.tensor([[0, 1, 2, -100, 0, 1], [2, -100, -100, 1, 1, 1]])
    out = model(x, labels=labels)
    log_p = out.logits.log_softmax(2)
    scored = labels != -100
    want = -log_p[scored].gather(1, labels[scored][:, None]).mean()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(x, labels=labels, num_items_in_batch=18).loss.item() == pytest.approx(
        want.item() / 2, rel=1e-5
    )
    assert model(x, labels=torch.full_like(x, -100)).loss.item() == 0.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 6), 3), "there are 3 classes, use 0 to 2"),
        (torch.zeros(2, 5, dtype=torch.int64), r"labels have shape \[2, 5\] .* expected \[2, 6\]"),
        (torch.zeros(2, dtype=torch.int64), r"labels have shape \[2\]"),
    ],
)
def test_labels_that_are_no_classes_of_tokens_are_refused(
    labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _tagger()(tokens(2, 6), labels=labels)
