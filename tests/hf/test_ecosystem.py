"""Uses of a transformers model: Trainer, pipeline, adapters, importing the package."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from spectral_window.hf import SWHForCausalLM
from tests.hf.small import (
    MIXERS,
    VOCAB,
    error,
    small_config,
    small_model,
    tokens,
    word_tokenizer,
)


class Repeats(Dataset):
    """Rows of one four-token pattern each, easily learned; the second half of a row is padding."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x = tokens(1, 4, seed=row % 4)[0].repeat(6)
        mask = torch.ones_like(x)
        mask[18:] = 0
        return {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}


def _train(model: SWHForCausalLM, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 4,
        "save_strategy": "steps",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    settings.update(arguments)
    resume = settings.pop("resume", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # no accelerator
        trainer = Trainer(
            model, TrainingArguments(str(folder), **settings), train_dataset=Repeats()
        )
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_and_resumes_exactly(bf16: bool, tmp_path: Path) -> None:
    fields = {"initializer_range": 0.05}
    whole = _train(small_model(**fields), tmp_path / "whole", bf16=bf16)
    losses = _losses(whole)
    assert losses[-1] < 0.9 * losses[0]
    # the loss is a mean over tokens also under accumulation: near ln(vocabulary) at first
    assert losses[0] == pytest.approx(torch.log(torch.tensor(float(VOCAB))).item(), rel=0.1)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = _train(small_model(1, **fields), tmp_path / "again", bf16=bf16, resume=checkpoint)
    for name, p in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], p), name


# accelerate and peft still call what transformers 5.23 renamed
renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@renamed
def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    plain = _train(small_model(), tmp_path / "a", max_steps=2)
    saving = _train(small_model(), tmp_path / "b", max_steps=2, gradient_checkpointing=True)
    for name, p in plain.model.state_dict().items():
        assert error(saving.model.state_dict()[name], p) < 1e-5, name


def test_pipeline_generates_text_alone_and_in_a_padded_batch(tmp_path: Path) -> None:
    from transformers import pipeline

    small_model().save_pretrained(tmp_path)
    word_tokenizer("left").save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    how = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False}
    prompts = ["w3 w4 w5 w6 w7 w8 w9", "w11 w12", "w5"]
    alone = [write(prompt, **how)[0]["generated_text"] for prompt in prompts]
    together = [one[0]["generated_text"] for one in write(prompts, batch_size=3, **how)]
    assert together == alone
    assert all(len(text.split()) >= 8 for text in alone)


@renamed
def test_lora_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    x, base = tokens(2, 17), small_model()
    before = base(x).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("conv_proj" in name for name in trained)
    assert any("down_proj" in name for name in trained)
    assert not any("kernel" in name or "lm_head" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(x, labels=x).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    want = model.eval()(x).logits.detach()
    assert error(want, before) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), str(tmp_path)).eval()
    assert torch.equal(loaded(x).logits, want)
    prompt = x[:, :5]
    merged = loaded.merge_and_unload()
    assert type(merged) is SWHForCausalLM
    assert error(merged(x).logits, want) < 1e-5
    got = merged.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(
        got, merged.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    )


@renamed
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig", "LoHaConfig"])
def test_an_adapter_without_named_maps_takes_those_that_mix_tokens(kind: str, mixer: str) -> None:
    """PEFT knows the maps of its own models by a table; for ours it asked for target_modules."""
    import peft

    base, x = small_model(mixer=mixer), tokens(2, 9)
    before = base(x).logits.detach()
    more = {"total_step": 9} if kind == "AdaLoraConfig" else {}
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **more))
    adapted = {name.split(".")[-1] for name, p in base.named_modules() if hasattr(p, "base_layer")}
    ours = {"conv_proj"} if mixer != "attention" else set()
    assert adapted == {"q_proj", "v_proj", "out_proj"} | ours
    model(x, labels=x).loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    for p in learned:
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    want = model.eval()(x).logits.detach()
    assert error(want, before) > 1e-3
    assert error(model.merge_and_unload()(x).logits, want) < 1e-5
    if kind == "LoraConfig":
        base = small_model(mixer=mixer)
        unloaded = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM")).unload()
        assert torch.equal(unloaded(x).logits, before)


def _virtual_tokens(kind: str) -> Any:
    """A small PEFT config of `kind`, with four virtual tokens."""
    import peft

    more = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **more)


@renamed
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_virtual_tokens_train_and_generate_in_a_padded_batch(kind: str, mixer: str) -> None:
    """PEFT sends a mask whose ones are floats."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(small_model(mixer=mixer), _virtual_tokens(kind))
    x = tokens(2, 9)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    model(x, attention_mask=mask, labels=x).loss.backward()
    learned = [p.grad for p in model.parameters() if p.requires_grad]
    assert learned
    assert all(grad is not None and grad.abs().sum() > 0 for grad in learned)
    how = {"max_new_tokens": 6, "do_sample": False}
    model.eval()
    got = model.generate(input_ids=x, attention_mask=mask, **how)
    whole = model.generate(input_ids=x, attention_mask=mask, use_cache=False, **how)
    alone = model.generate(input_ids=x[:1, 3:], attention_mask=mask[:1, 3:], **how)
    assert torch.equal(got, whole)
    assert torch.equal(got[0, 9:], alone[0, 6:])


@renamed
@pytest.mark.parametrize("mixer", MIXERS)
def test_prefix_tuning_which_learns_keys_and_values_is_refused(mixer: str) -> None:
    from peft import get_peft_model

    model = get_peft_model(small_model(mixer=mixer), _virtual_tokens("PrefixTuningConfig"))
    with pytest.raises(ValueError, match="prompt tuning instead of prefix tuning"):
        model(tokens(2, 9))


def test_continuous_batching_is_refused_in_one_line() -> None:
    model = small_model()
    for call in (
        lambda: model.generate_batch([[1, 2]]),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager().__enter__(),
    ):
        with pytest.raises(NotImplementedError, match="left-padded batch") as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- importing


def _python(code: str) -> dict[str, Any]:
    """Run `code` in a new Python; it prints one JSON object."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    loaded = _python(
        "import sys, json, spectral_window\n"
        "print(json.dumps({name: name in sys.modules for name in ('torch', 'transformers')}))"
    )
    assert loaded == {"torch": False, "transformers": False}


@pytest.mark.parametrize("first", ["spectral_window", "transformers"])
def test_auto_classes_know_the_model_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    ours = "import spectral_window\n"
    theirs = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
    order = {
        "spectral_window": ours + theirs,
        "transformers": theirs + ours,
    }
    got = _python(
        order[first] + "import json\n"
        f"path = {str(tmp_path)!r}\n"
        "print(json.dumps({'config': type(AutoConfig.from_pretrained(path)).__name__,"
        "'base': type(AutoModel.from_pretrained(path)).__name__,"
        "'head': type(AutoModelForCausalLM.from_pretrained(path)).__name__}))"
    )
    assert got == {"config": "SWHConfig", "base": "SWHModel", "head": "SWHForCausalLM"}


ORDERS = {
    "ours first": "import spectral_window, transformers\n",
    "theirs first": "import transformers, spectral_window\n",
    "theirs loaded before": "import transformers\n"
    "from transformers import Trainer, LlamaForCausalLM\nimport spectral_window\n",
    "theirs loaded after": "import spectral_window, transformers\n"
    "from transformers import Trainer, LlamaForCausalLM\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_lends_our_names_and_spares_our_dynamics(order: str, tmp_path: Path) -> None:
    """`transformers serve` and trainers by path ask the package itself for an architecture."""
    small_model().save_pretrained(tmp_path)
    got = _python(
        ORDERS[order] + "import json\n"
        f"path = {str(tmp_path)!r}\n"
        "config = transformers.AutoConfig.from_pretrained(path)\n"
        "model = getattr(transformers, config.architectures[0]).from_pretrained(path)\n"
        "again = __import__('transformers').SWHForSequenceClassification\n"
        "from transformers import Trainer\n"
        "decayed = Trainer.get_decay_parameter_names(None, model)\n"
        "print(json.dumps({'class': type(model).__name__, 'map': config.auto_map,"
        "'again': again.__name__, 'kernels': [n for n in decayed if 'kernel' in n],"
        "'none': hasattr(transformers, 'shard') or hasattr(transformers, 'SWHModle')}))"
    )
    assert got == {
        "class": "SWHForCausalLM",
        "map": {},
        "again": "SWHForSequenceClassification",
        "kernels": [],
        "none": False,
    }


def test_the_auto_classes_build_the_model_from_a_config() -> None:
    assert type(AutoModelForCausalLM.from_config(small_config())) is SWHForCausalLM


def test_a_name_the_package_does_not_have_is_an_attribute_error() -> None:
    import spectral_window

    assert "SWHForCausalLM" in dir(spectral_window)
    with pytest.raises(AttributeError, match="no attribute 'SWHModle'"):
        _ = spectral_window.SWHModle
