"""Recipes: everything that decides a training run, in one frozen object.

A recipe is made by a Python function (`demo`, `tiny`, `small`, `paper_lm`, ...), so it can be read,
diffed and composed like any code; the command line overrides single settings with `key=value`.
Where things are (the output folder, the prepared data) is no part of a recipe, because that must
not change a result.

Two choices are worth knowing before reading the numbers:

- **Equal size.** An SWH layer has two projections more than an attention layer, so at equal width
  it is the larger model and a comparison would flatter it. By default (`match="spectral_window"`) a
  variant (`mixer=attention`, `branches=window`) gets the feed-forward size at which it has as many
  parameters as the recipe's SWH.
- **Batch.** `batch_size` is the number of sequences in one optimiser step over all processes;
  `micro_batch_size` is how many of them one process takes through the model at a time. The rest is
  accumulation. So the same recipe means the same optimisation on one process or on two.

    recipe = resolve("small", ["mixer=attention", "lr=5e-4"])
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from spectral_window.errors import UserError, unknown
from spectral_window.hf.config import CORE
from spectral_window.nn.memory import recommended
from spectral_window.nn.mixers import MIXERS
from spectral_window.nn.options import Option, all_options, recorded, reserve
from spectral_window.training.parallel import COLLECTIVE_TIMEOUT

# What may differ between a run and its resumption: it changes the record, not what is learned.
FREE_ON_RESUME = frozenset(
    {"device", "compile", "cuda_graphs", "shard", "context_parallel", "collective_timeout", "track"}
    | {"log_every", "eval_every", "eval_tokens", "save_every", "keep_checkpoints"}
)


# Fields of SWHConfig as a recipe has them: its models are small, and the text decides how many
# tokens there are.
_LARGEST = 2**62
_OWN: dict[str, dict[str, Any]] = {
    "vocab_size": {"default": None, "optional": True},
    "hidden_size": {"default": 256},
    "num_hidden_layers": {"default": 6},
    "num_attention_heads": {
        "default": 4,
        "optional": False,
        "help": "H, heads; divides hidden_size",
    },
}
MODEL = tuple(
    dataclasses.replace(option, **_OWN.get(option.name, {})) for option in CORE if option.in_recipes
)


DTYPES = ("float32", "bfloat16")
SHARDS = ("none", "full", "hybrid")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
DEVICES = ("auto", "cpu", "cuda")
# PyTorch's names for how float32 products may be computed, in the order in which "auto" tries them
MATMUL_SETTINGS = ("medium", "high", "highest")
MATMUL_PRECISIONS = ("auto", *MATMUL_SETTINGS)


def _setting(default: Any, help: str, **rules: Any) -> Any:
    """A field of `Recipe`; rules: as `Option` has them, but settings are `always` traced unless
    they say otherwise, as later ones do. An Option of each is in `SETTINGS`."""
    return dataclasses.field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True, init=False)
class Recipe:
    """Every setting of a training run; sizes are counts, lengths are in tokens.

    Keywords are flat, fields of the model among the others: `Recipe(name=..., window=64, lr=1e-3)`
    (or together, as `model`).
    Raises UserError on a value outside its range, naming the field.
    """

    name: str = _setting(dataclasses.MISSING, "what the recipe is called")
    data: tuple[str, ...] = _setting(
        dataclasses.MISSING, "text to learn from: files, folders, globs, stdlib, hub:NAME:CONFIG"
    )
    valid: tuple[str, ...] = _setting(
        (), "text to evaluate on; none: whole documents of data are held out"
    )
    valid_fraction: float = _setting(
        0.02, "part of the text that is held out where valid names none", above=0, below=1
    )
    split_seed: int = _setting(
        0,
        "seed of what is held out: runs that differ in seed read the same text",
        at_least=0,
        at_most=2**32 - 1,
    )
    tokenizer: str = _setting(
        "bpe:4096", "bpe:SIZE (trained on the text), bytes, gpt2, or a tokenizer's folder"
    )
    txt_documents: str = _setting(
        "file", "what a document of a .txt file is", choices=("file", "paragraph")
    )
    max_bytes: int | None = _setting(None, "read at most this many bytes of text")
    errors: str = _setting(
        "strict", "a byte that is not UTF-8 is an error, or replaced", choices=("strict", "replace")
    )
    skip_bad: bool = _setting(False, "skip records that cannot be read")
    drop_shared: bool = _setting(False, "leave out of training what valid holds too")
    chat: bool = _setting(
        False, "data holds conversations, of which the assistant's turns are learned", always=False
    )
    # Fields of SWHConfig, read-only: those of every model, and those of its parts.
    # vocab_size None: the tokenizer's.
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    match: str | None = _setting(
        "spectral_window",
        "size the MLP so that the model has as many parameters as with this mixer",
    )
    parameters: int | None = _setting(None, "size the MLP so that the model has about this many")
    # Optimisation
    sequence_length: int = _setting(256, "tokens of a training sequence")
    batch_size: int = _setting(16, "sequences per optimiser step, over all processes")
    micro_batch_size: int = _setting(16, "sequences that a process computes at once")
    steps: int = _setting(1000, "optimiser steps")
    lr: float = _setting(1e-3, "highest learning rate of AdamW", above=0)
    lr_min_ratio: float = _setting(
        0.1, "learning rate at the end of the cosine, as a part of lr", at_least=0, at_most=1
    )
    warmup_steps: int = _setting(100, "steps of linear warm-up", at_least=0)
    schedule: str = _setting(
        "cosine", "learning rate after the warm-up", choices=("cosine", "constant")
    )
    weight_decay: float = _setting(0.1, "of AdamW, for matrices and embeddings alone", at_least=0)
    beta1: float = _setting(0.9, "of AdamW", at_least=0, below=1)
    beta2: float = _setting(0.95, "of AdamW", at_least=0, below=1)
    clip: float = _setting(1.0, "largest norm of the gradient; 0: any", at_least=0)
    seed: int = _setting(
        0, "seed of the weights and the order of the text", at_least=0, at_most=2**32 - 1
    )
    # Numbers and machine
    dtype: str = _setting(
        "float32", "bfloat16: products under autocast, weights in float32", choices=DTYPES
    )
    matmul_precision: str = _setting(
        "auto",
        "how float32 products are computed; auto: the fastest that is float32 on this machine",
        choices=MATMUL_PRECISIONS,
    )
    device: str = _setting("auto", "auto: a GPU if there is one", choices=DEVICES)
    gradient_checkpointing: bool = _setting(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    compile: bool = _setting(
        False,
        "torch.compile for layers and loss: faster on a GPU, after a minute of compiling",
        always=False,
    )
    cuda_graphs: bool = _setting(
        True, "on one GPU: replay the recorded kernels of a step", always=False
    )
    shard: str = _setting(
        "none",
        "what several processes hold of weights, gradients and Adam's moments; none: each all, "
        "full: each a part, hybrid: the processes of each machine together all",
        choices=SHARDS,
        always=False,
    )
    context_parallel: int = _setting(
        1, "processes that share each sequence, with a span of it each", always=False
    )
    collective_timeout: int = _setting(
        COLLECTIVE_TIMEOUT,
        "seconds that a process waits for the others before it ends",
        at_least=1,
        at_most=1_000_000,
        always=False,
    )
    # What is recorded, and when
    track: str = _setting(
        "none",
        "where metrics are shown too, in the run's folder: a tracker that is installed",
        choices=TRACKERS,
        always=False,
    )
    log_every: int = _setting(10, "steps between lines of metrics")
    eval_every: int = _setting(200, "steps between evaluations")
    eval_tokens: int | None = _setting(None, "held-out tokens per evaluation; none: all")
    save_every: int = _setting(200, "steps between checkpoints")
    keep_checkpoints: int = _setting(2, "newest checkpoints that are kept", at_least=2)

    def __init__(self, *, model: Mapping[str, Any] = MappingProxyType({}), **values: Any) -> None:
        values = {**model, **values}
        _check_keys(values)
        for each in dataclasses.fields(self):
            value = values.get(each.name, each.default)
            if value is dataclasses.MISSING and each.name != "model":
                raise UserError(f"a recipe needs a {each.name} (recipe): give {each.name}=")
            object.__setattr__(self, each.name, value)
        object.__setattr__(self, "model", _model(values))
        for name, option in SETTINGS.items():
            option.check(getattr(self, name), "recipe")
        self._check()

    def _check(self) -> None:
        """Raise UserError for settings that do not fit together."""

        def require(good: bool, name: str, rule: str) -> None:
            if not good:
                raise UserError(f"{name}={getattr(self, name)} (recipe): {rule}")

        steps, batch, micro = self.steps, self.batch_size, self.micro_batch_size
        require(self.warmup_steps <= steps, "warmup_steps", f"must not exceed steps ({steps})")
        require(batch % micro == 0, "micro_batch_size", f"must divide batch_size ({batch})")
        require(steps * batch < 2**62, "steps", f"times batch_size ({batch}) must be below 2**62")
        if self.context_parallel > 1:
            length = self.sequence_length
            fits = self.context_parallel <= length
            require(fits, "context_parallel", f"must not exceed sequence_length ({length})")
            require(not self.compile, "compile", "leave it out with context_parallel")
            MIXERS.find(self.model["mixer"]).check_in_spans()
        if not self.data:
            raise UserError("data= (recipe): name at least one source, for example data=book.txt")

    def __reduce__(self) -> tuple[Any, ...]:
        return Recipe.from_dict, (self.to_dict(),)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step, over all processes."""
        return self.batch_size * self.sequence_length

    @property
    def eval_batch_size(self) -> int:
        """Blocks evaluated at a time: tokens enough to fill the processor, whatever the length."""
        return max(self.micro_batch_size, 4096 // self.sequence_length)

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some settings changed. Raises UserError on an unknown or bad one."""
        return Recipe(**self._flat() | changes.pop("model", {}) | changes)

    def _flat(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        del values["model"]
        return values | dict(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the model's fields among them; `Recipe.from_dict` reads it back."""
        return _plain(self._flat())

    def traces(self) -> dict[str, Any]:
        """What names the run: `to_dict` without the defaults of options that are later than the
        first runs (see `Option.traced`)."""
        fields = {**SETTINGS, **all_options(MODEL)}
        return {k: v for k, v in self.to_dict().items() if fields[k].traced(v)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises UserError on an unknown key."""
        _check_keys(values)
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)


def _options() -> dict[str, Option]:
    hints = typing.get_type_hints(Recipe)
    options = {}
    for each in dataclasses.fields(Recipe):
        if each.name != "model":
            hint = hints[each.name]
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            (kind,) = (typing.get_origin(k) or k for k in kinds if k is not types.NoneType)
            rules = {"optional": types.NoneType in kinds, "decides": "use", **each.metadata}
            rules.setdefault("always", True)
            if kind is int:  # what a machine can hold is checked when the model's size is known
                rules.setdefault("at_most", _LARGEST)
            options[each.name] = Option(each.name, kind, each.default, **rules)
    return options


SETTINGS: Mapping[str, Option] = MappingProxyType(_options())
reserve(SETTINGS, "a setting of training")


def _model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's fields out of a recipe's values, checked, each in its default where there is
    none."""
    held = {}
    given = {name: value for name, value in values.items() if name not in SETTINGS}
    for name, option in all_options(MODEL).items():
        held[name] = option.normal(given.get(name, option.default))
        option.check(held[name], "recipe")
    return MappingProxyType({o.name: held[o.name] for o in recorded(MODEL, held)})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def defaults() -> dict[str, Any]:
    """Every key of a recipe that has a default, with it, as `Recipe.to_dict` has it."""
    of_settings = {each.name: each.default for each in dataclasses.fields(Recipe)}
    of_model = {name: option.default for name, option in all_options(MODEL).items()}
    values = of_settings | of_model
    return _plain({k: v for k, v in values.items() if v is not dataclasses.MISSING})


def keys() -> list[str]:
    """Every key that a recipe takes."""
    return sorted({*SETTINGS, *all_options(MODEL)})


def _check_keys(given: Iterable[str]) -> None:
    for key in given:
        if key not in keys():
            raise unknown("recipe key", key, keys())


# -------------------------------------------------------------------------------------- the recipes


def demo() -> Recipe:
    """Two minutes on two CPU cores, on the source of the running Python's standard library."""
    return Recipe(
        name="demo",
        data=("stdlib",),
        tokenizer="bpe:2048",
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        window=32,
        initializer_range=0.05,
        sequence_length=256,
        batch_size=16,
        micro_batch_size=16,
        steps=300,
        lr=2e-3,
        warmup_steps=30,
        log_every=5,
        eval_every=50,
        eval_tokens=32_768,
        save_every=150,
    )


def tiny() -> Recipe:
    """Seconds: for trying the commands and for tests."""
    return demo().replace(
        name="tiny",
        tokenizer="bpe:512",
        hidden_size=64,
        num_hidden_layers=2,
        window=16,
        sequence_length=64,
        batch_size=8,
        micro_batch_size=8,
        steps=60,
        warmup_steps=6,
        eval_every=30,
        eval_tokens=8192,
        save_every=30,
    )


def small() -> Recipe:
    """Half an hour or more on two CPU cores: give it some 25 MB of prose as `data=`, `valid=`."""
    return Recipe(
        name="small",
        data=("stdlib",),
        tokenizer="bpe:4096",
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        window=64,
        initializer_range=0.04,
        sequence_length=512,
        batch_size=8,
        micro_batch_size=8,
        steps=1600,
        lr=2e-3,
        warmup_steps=50,
        log_every=10,
        eval_every=50,
        eval_tokens=65_536,
        save_every=50,
    )


def memory() -> Recipe:
    """`small` with the layer that we recommend, a memory beside the branches; a little slower."""
    return small().replace(name="memory", **recommended(256))


def paper_lm() -> Recipe:
    """The paper's language model (arXiv 2601.01313): 12 x 768, FineWeb-Edu, GPT-2's tokens.

    As the text says (cosine, 16 000 steps); its code used a constant rate and 2000 optimiser steps
    (schedule=constant steps=2000). It needs a GPU.
    """
    return Recipe(
        name="paper-lm",
        data=("hub:HuggingFaceFW/fineweb-edu:sample-10BT",),
        valid_fraction=0.001,
        max_bytes=5_000_000_000,  # about the billion tokens that 16 000 steps read
        tokenizer="gpt2",
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        window=32,
        initializer_range=0.02,
        sequence_length=1024,
        batch_size=64,
        micro_batch_size=4,
        steps=16_000,
        lr=6e-4,
        lr_min_ratio=0.1,
        warmup_steps=500,
        weight_decay=0.1,
        clip=1.0,
        dtype="bfloat16",
        eval_every=500,
        eval_tokens=1_048_576,
        save_every=500,
    )


def paper_lm_small() -> Recipe:
    """The paper's comparison at a size that a CPU core trains in half an hour, on any text.

    As `paper_lm`, but 3.1 million parameters and 20 million tokens in rows of 512. The learning
    rate and the width of the initial weights are those that a sweep found best for SWH; in a short
    training attention wants narrower ones (see `spectral-window reproduce lm`).
    """
    return paper_lm().replace(
        name="paper-lm-small",
        data=("stdlib",),
        valid_fraction=0.02,
        max_bytes=None,
        tokenizer="bpe:4096",
        vocab_size=None,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.05,
        sequence_length=512,
        batch_size=8,
        micro_batch_size=8,
        steps=4883,
        lr=4e-3,
        warmup_steps=50,
        log_every=20,
        eval_every=250,
        eval_tokens=65_536,
        save_every=250,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "tiny": tiny,
    "small": small,
    "memory": memory,
    "paper-lm": paper_lm,
    "paper-lm-small": paper_lm_small,
}


FILES = (".yaml", ".yml")


def resolve(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe called `name` with `key=value` overrides applied in order.

    Values are read by the key's type: `steps=2000`, `steps=2e3`, `lr=6e-4`, `skip_bad=true`,
    `vocab_size=none`, `data=a.txt,b.txt`. Raises UserError naming the nearest recipe or key, or the
    field and what it expects.
    """
    if Path(name).suffix in FILES:
        return read_file(Path(name)).replace(**read_overrides(overrides))
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]().replace(**read_overrides(overrides))


def read_file(path: Path) -> Recipe:
    """The recipe in a YAML file, as `spectral-window recipes NAME --yaml` prints it.

    Settings that it leaves out have their defaults, and its name is the file's unless it gives one.
    Raises UserError for a file that cannot be read or is no recipe.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).replace("\n", " ")
        raise UserError(f"cannot read the recipe ({path}): {why}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"no recipe ({path}): expected lines of the form 'setting: value'")
    _check_keys(values)
    options = {**all_options(MODEL), **SETTINGS}
    for key, value in values.items():  # YAML reads 1e-3 as a text
        if isinstance(value, str) and options[key].kind in (int, float, bool):
            values[key] = options[key].parse(value, f"recipe {path}")
    return Recipe.from_dict({"name": path.stem} | values)


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as values by key; raises as `resolve` does."""
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"'{text}' (recipe override): write key=value, for example steps=2000")
        key = key.strip().replace("-", "_")
        _check_keys([key])
        if key == "name":
            raise UserError(
                "name (recipe override): a recipe keeps its name; choose the folder with --out"
            )
        if key in SETTINGS:
            changes[key] = SETTINGS[key].parse(value, "recipe")
        else:
            changes[key] = all_options(MODEL)[key].parse(value, "recipe")
    return changes
