"""Tries tools on small models, ours and two others of constant state: the results of ecosystem.md.

    PYTHONPATH=. python docs/ecosystem.py

Each function below is a row: it takes a model's folder (with a tokenizer) and returns what to say,
"yes" or the reason why not; of an exception it is the first line. Add a row by
adding a function to ROWS, and a test of ours beside the tests of hf/.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    pipeline,
)

from tests.hf.small import VOCAB, small_model, tokens, word_tokenizer

GREEDY = {"max_new_tokens": 8, "do_sample": False}
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.2}


def models() -> dict[str, Any]:
    """Return the three models, with random weights."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    mamba = Mamba2Config(
        **SMALL, **ends, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8
    )
    gemma = RecurrentGemmaConfig(
        **SMALL, **ends, num_attention_heads=2, lru_width=32, intermediate_size=64,
        attention_window_size=16,
    )  # fmt: skip
    return {
        "spectral-window": small_model(mixer="memory", pad_token_id=0),
        "Mamba2": Mamba2ForCausalLM(mamba).eval(),
        "RecurrentGemma": RecurrentGemmaForCausalLM(gemma).eval(),
    }


def _close(got: torch.Tensor, want: torch.Tensor) -> str:
    worst = float((got - want).abs().max())
    return "yes" if worst < 1e-3 else f"no: logits differ by {worst:.2g}"


def batch_of_texts(folder: str) -> str:
    """A pipeline writes the same for texts of several lengths together as for each alone."""
    write = pipeline("text-generation", model=folder, device="cpu")
    prompts = ["w3 w4 w5 w6 w7 w8 w9", "w11 w12", "w5"]
    alone = [write(prompt, **GREEDY)[0]["generated_text"] for prompt in prompts]
    together = [one[0]["generated_text"] for one in write(prompts, batch_size=3, **GREEDY)]
    return "yes" if alone == together else "no: other text in a padded batch"


def continue_from_cache(folder: str) -> str:
    """The logits of the second half of a text, from the cache of the first, are those at once."""
    model, x = AutoModelForCausalLM.from_pretrained(folder), tokens(1, 20)
    name = "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"
    first = model(x[:, :12], use_cache=True)
    second = model(x[:, 12:], **{name: first[name], "use_cache": True})
    return _close(second.logits, model(x).logits[:, 12:])


def packed_documents(folder: str) -> str:
    """Documents in one row, told by position_ids, have the logits they have alone."""
    model, x = AutoModelForCausalLM.from_pretrained(folder), tokens(1, 20)
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    return _close(model(x, position_ids=positions).logits[:, 9:], model(x[:, 9:]).logits)


def beams(folder: str) -> str:
    """Beam search gives the same with the cache as without."""
    model, x = AutoModelForCausalLM.from_pretrained(folder), tokens(2, 9)
    got = model.generate(x, num_beams=3, **GREEDY)
    want = model.generate(x, num_beams=3, use_cache=False, **GREEDY)
    return "yes" if torch.equal(got, want) else "no: other text"


def prompt_lookup(folder: str) -> str:
    """Guessing tokens from the prompt gives the text that generating one by one gives."""
    model, x = AutoModelForCausalLM.from_pretrained(folder), tokens(1, 4).repeat(1, 4)
    got = model.generate(x, prompt_lookup_num_tokens=3, **GREEDY)
    return "yes" if torch.equal(got, model.generate(x, **GREEDY)) else "no: other text"


def classify_texts(folder: str) -> str:
    """The weights begin a classifier of texts."""
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    return "yes"


def classify_tokens(folder: str) -> str:
    """The weights begin a classifier of tokens."""
    AutoModelForTokenClassification.from_pretrained(folder, num_labels=3)
    return "yes"


def lora_by_default(folder: str) -> str:
    """`LoraConfig()` without target_modules trains and merges."""
    model, x = AutoModelForCausalLM.from_pretrained(folder), tokens(2, 9)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted(input_ids=x, labels=x).loss.backward()
    learned = [p for p in adapted.parameters() if p.requires_grad]
    still = [p for p in learned if p.grad is None]
    if still:
        return f"no: {len(still)} of {len(learned)} adapters get no gradient"
    for p in learned:
        torch.nn.init.normal_(p, std=0.1)
    want = adapted.eval()(input_ids=x).logits.detach()
    return _close(adapted.merge_and_unload()(x).logits, want)


def prompt_tuning(folder: str) -> str:
    """Learned virtual tokens generate the same with the cache as without."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    x = tokens(2, 9)
    model(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss.backward()
    how = {"input_ids": x, "attention_mask": torch.ones_like(x), **GREEDY}
    got, want = model.eval().generate(**how), model.generate(**how, use_cache=False)
    return "yes" if torch.equal(got, want) else "no: other text"


def gradient_checkpointing(folder: str) -> str:
    """Activations that are computed again give the same gradients."""
    gradients = []
    for saving in (False, True):
        model, x = AutoModelForCausalLM.from_pretrained(folder).train(), tokens(2, 9)
        if saving:
            model.gradient_checkpointing_enable()
        model(x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    worst = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    return "yes" if worst < 1e-5 else f"no: gradients differ by {worst:.2g}"


def tokenizer(folder: str) -> str:
    """AutoTokenizer reads what was saved beside the model."""
    return "yes" if AutoTokenizer.from_pretrained(folder)("w3 w4").input_ids == [3, 4] else "no"


ROWS: tuple[Callable[[str], str], ...] = (
    tokenizer,
    batch_of_texts,
    continue_from_cache,
    packed_documents,
    beams,
    prompt_lookup,
    classify_texts,
    classify_tokens,
    lora_by_default,
    prompt_tuning,
    gradient_checkpointing,
)


def answer(row: Callable[[str], str], folder: str) -> str:
    """Return what `row` says of the model in `folder`, on one line."""
    try:
        return row(folder)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def main() -> None:
    """Print a line for each row and model."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, peft {peft.__version__}")
    with tempfile.TemporaryDirectory() as root:
        for name, model in models().items():
            model.save_pretrained(Path(root) / name)
            word_tokenizer("left").save_pretrained(Path(root) / name)
        for row in ROWS:
            print(f"\n{row.__doc__}")
            for name in models():
                print(f"    {name:16} {answer(row, str(Path(root) / name))}")


if __name__ == "__main__":
    main()
