"""The model card of a saved folder: README.md, which the Hub shows and reads.

It says what is known where it is written: of a run (`training.trainer`) its numbers, its data and
its command; of a model alone its size and how to load it. A model that was loaded from a folder
keeps what that folder's card says of the training. A README.md that a person wrote is never
replaced.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spectral_window.files import write_text
from spectral_window.hf.stubs import AUTO_CLASSES, INSTALL

CARD = "README.md"
# By this line a card of ours is known; it also tells a person how to keep a text of his own.
MARK = "*Written when the model was saved. Remove this line, and saving again keeps your text.*"
TRAINING = "## Training\n"
_UNRECORDED = "Of the weights that were loaded; what was done to them later is not recorded.\n"
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


class TrainingRecord(NamedTuple):
    """What a run knows of its model when it ends.

    Attributes:
        recipe: its name, by which the list of results calls the model.
        command: the command line.
        data: sources of the text, as they were given.
        tokens: tokens read in training, repeated ones too.
        loss: nats per token of the held-out text.
        perplexity: exp(loss).
        bits_per_byte: of the held-out text.
        held_out: tokens of the held-out text.
        context: tokens of a row, in training and when the loss was measured.
    """

    recipe: str
    command: str
    data: tuple[str, ...]
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    held_out: int
    context: int


def write_card(
    folder: str | os.PathLike[str],
    model: Any,
    training: TrainingRecord | None = None,
) -> None:
    """Write the card of `model` into `folder`, unless a person's README.md is there.

    Args:
        folder: the folder that the model is saved in.
        model: an SWH model.
        training: the run that made it; None keeps what the folder that it was loaded from tells.

    Raises:
        ResourceError: the file cannot be written.
    """
    path = Path(folder) / CARD
    if not path.is_file() or _is_ours(path):
        write_text(path, str(model_card(model, training)))


def model_card(model: Any, training: TrainingRecord | None = None) -> ModelCard:
    """Return the card of `model`.

    Args:
        model: an SWH model.
        training: the run that made it; None keeps what the folder that it was loaded from tells.
    """
    auto_class = AUTO_CLASSES.get(type(model).__name__, "AutoModel")
    task = _TASKS[auto_class]
    data = ModelCardData(
        license="unknown",  # of weights it depends on their text: whoever publishes them decides
        library_name="transformers",
        pipeline_tag=task,
        tags=["spectral-window", model.config.model_type, model.config.mixer],
        model_name=training.recipe if training else None,
        eval_results=_results(training, task) if training else None,
    )
    about = _about_training(training) if training else _told_before(model)
    text = f"""
# {type(model).__name__}, {model.count_parameters():,} parameters

{MARK}

{_about_model(model)}

## Use

The code is the Python package spectral-window ({INSTALL}).

```python
from transformers import AutoTokenizer, {auto_class}

folder = "..."  # this folder, or its name on the Hub
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

After `import spectral_window` it loads without `trust_remote_code`, which otherwise does just that
import.

{about}
## Licence

None is stated for these weights: whoever publishes them sets `license` above. The package is under
Apache-2.0.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _about_model(model: Any) -> str:
    config = model.config
    rows = {
        "mixer": config.mixer,
        "layers": config.num_hidden_layers,
        "channels": config.hidden_size,
        "vocabulary": f"{config.vocab_size:,} tokens",
        "trained on rows of": f"{config.training_length:,} tokens",
    }
    if model.constant_state:
        rows["state of a text of any length"] = f"{model.state_bytes(1):,} bytes"
    return _table("model", rows)


def _about_training(training: TrainingRecord) -> str:
    rows = {
        "held-out loss": f"{training.loss:.4f} nats per token",
        "perplexity": f"{training.perplexity:.2f}",
        "bits per byte": f"{training.bits_per_byte:.4f}",
        "held-out text": f"{training.held_out:,} tokens, in rows of {training.context:,}",
        "tokens read in training": f"{training.tokens:,}",
        "recipe": training.recipe,
        "data": ", ".join(f"`{source}`" for source in training.data),
    }
    command = f"\n    {training.command}\n" if training.command else ""
    return f"{TRAINING}\n{_table('run', rows)}\n{command}"


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {title} | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    return "\n".join(lines)


def _results(training: TrainingRecord, task: str) -> list[EvalResult]:
    """Return the numbers as the Hub reads them."""
    values = {
        "loss": training.loss,
        "perplexity": training.perplexity,
        "bits_per_byte": training.bits_per_byte,
    }
    return [
        EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name=f"held-out part of {', '.join(training.data)}",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in values.items()
    ]


def _told_before(model: Any) -> str:
    """Return the section about the training from the folder that `model` was loaded from."""
    path = Path(model.config.name_or_path or os.devnull) / CARD
    if not path.is_file() or not _is_ours(path):
        return ""
    _, found, section = path.read_text(encoding="utf-8").partition(TRAINING)
    if not found:
        return ""
    section = section.split("\n## ")[0].removeprefix(f"\n{_UNRECORDED}").strip("\n")
    return f"{TRAINING}\n{_UNRECORDED}\n{section}\n"


def _is_ours(path: Path) -> bool:
    return MARK in path.read_text(encoding="utf-8", errors="replace")
