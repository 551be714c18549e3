"""transformers' Trainer: evaluation loss, labels of predictions, weight decay, early stop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from spectral_window.hf import SWHForCausalLM, SWHForSequenceClassification
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS
from spectral_window.nn.layers import no_weight_decay
from tests.hf.small import MIXERS, small_model, tokens


class Patterns(Dataset):
    """Rows of one three-token pattern each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x = tokens(1, 3, seed=row % 2)[0].repeat(4)
        return {"input_ids": x, "labels": x}


def _trainer(model: Any, folder: Path, data: Any = None, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    callbacks = arguments.pop("callbacks", None)
    data = Patterns() if data is None else data
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings | arguments),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


def test_labels_alone_are_what_trainer_takes_for_labels() -> None:
    assert find_labels(SWHForCausalLM) == ["labels"]
    assert find_labels(SWHForSequenceClassification) == ["labels"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_evaluating_gives_a_loss_and_predicting_gives_labels(mixer: str, tmp_path: Path) -> None:
    model = small_model(mixer=mixer)
    trainer = _trainer(model, tmp_path)
    x = torch.stack([Patterns()[row]["input_ids"] for row in range(8)])
    with torch.no_grad():
        want = model(x, labels=x)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(want.loss), rel=1e-5)
    told = trainer.predict(Patterns())
    assert (told.label_ids == x.numpy()).all()
    assert told.predictions.shape == want.logits.shape


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("adapter", [False, True])
def test_a_smoothed_loss_is_of_the_next_token(adapter: bool, tmp_path: Path) -> None:
    """Trainer shifted labels for the classes of its own tables alone: ours had the loss of the
    token itself."""
    from peft import LoraConfig, get_peft_model

    model, smoothing = small_model(), 0.1
    x = tokens(2, 9)
    log_p = model(x).logits[:, :-1].log_softmax(2)
    right = -log_p.gather(2, x[:, 1:, None]).mean()
    want = (1 - smoothing) * right - smoothing * log_p.mean()
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    trainer = _trainer(model, tmp_path, label_smoothing_factor=smoothing)
    got = trainer.compute_loss(model.eval(), {"input_ids": x, "labels": x})
    assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_the_best_model_is_loaded_and_training_stops_early(tmp_path: Path) -> None:
    """A rate that only does harm: the first evaluation is the best, the second the last."""
    model = small_model()
    trainer = _trainer(
        model,
        tmp_path,
        max_steps=20,
        learning_rate=0.5,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.global_step == len(losses) < 20
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def _groups(trainer: Trainer) -> dict[str, float]:
    """name -> weight decay"""
    name_of = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return {name_of[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("kernel", KERNELS)
def test_weight_decay_reaches_no_dynamics(kernel: str, tmp_path: Path) -> None:
    model = small_model(kernel=kernel)
    groups = _groups(_trainer(model, tmp_path, weight_decay=0.1))
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert not [name for name, decay in groups.items() if decay and ".kernel." in name]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_weight_decay_reaches_matrices_alone(fusion: str, tmp_path: Path) -> None:
    model = small_model(fusion=fusion)
    groups = _groups(_trainer(model, tmp_path, weight_decay=0.1))
    decayed = {name for name, decay in groups.items() if decay}
    assert decayed == set(groups) - no_weight_decay(model)
    assert all(model.get_parameter(name).dim() == 2 for name in decayed)


def test_weight_decay_is_right_inside_an_adapter_and_untouched_elsewhere(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = get_peft_model(
            small_model(), LoraConfig(r=2, target_modules=["conv_proj"], modules_to_save=["kernel"])
        )
    decayed = {
        name
        for name, decay in _groups(_trainer(adapter, tmp_path, weight_decay=0.1)).items()
        if decay
    }
    assert any("lora_A" in name for name in decayed)
    assert not any("kernel" in name for name in decayed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_attention_heads=2, **shape))
    groups = _groups(_trainer(llama, tmp_path, weight_decay=0.1))
    assert {name for name, decay in groups.items() if not decay} == {
        name for name in groups if "norm" in name
    }
