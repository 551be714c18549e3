"""Recipes: everything that decides a training run, in one frozen object.

A recipe is made by a Python function (`demo`, `tiny`, `small`, `paper_lm`, ...), so it can be read,
diffed and composed like any code; the command line changes single knobs with `key=value`. What a
recipe does not hold is where things live (the output folder, the prepared data), because that must
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
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from spectral_window.errors import UserError, unknown
from spectral_window.hf.config import CORE
from spectral_window.nn.memory import recommended
from spectral_window.nn.options import known, recorded, reserve
from spectral_window.training.knobs import check, parse

# What may differ between a run and its resumption: it changes the record, not what is learned.
FREE_ON_RESUME = frozenset(
    {"device", "log_every", "eval_every", "eval_tokens", "save_every", "keep_checkpoints"}
)


# Fields of SWHConfig as a recipe has them: its models are small, and the text decides how many
# tokens there are.
_OWN: dict[str, dict[str, Any]] = {
    "vocab_size": {"default": None, "optional": True},
    "hidden_size": {"default": 256},
    "num_hidden_layers": {"default": 6},
    "num_attention_heads": {"default": 4},
}
MODEL = tuple(
    dataclasses.replace(option, **_OWN.get(option.name, {})) for option in CORE if option.in_recipes
)


@dataclass(frozen=True, init=False)
class Recipe:
    """Every knob of a training run: sizes are counts, lengths are in tokens.

    Keywords are flat, fields of the model among the others: `Recipe(name=..., window=64, lr=1e-3)`
    (or together, as `model`).
    Raises UserError on a value outside its range, naming the field.
    """

    name: str
    # Data: sources as `data.text.prepare` takes them; an empty `valid` holds out whole documents of
    # `data`.
    data: tuple[str, ...]
    valid: tuple[str, ...] = ()
    valid_fraction: float = 0.02
    split_seed: int = 0  # of what is held out: runs that differ in `seed` read the same text
    tokenizer: str = "bpe:4096"
    txt_documents: str = "file"
    max_bytes: int | None = None
    errors: str = "strict"
    skip_bad: bool = False
    drop_shared: bool = False  # leave out of training what `valid` holds too
    # Fields of SWHConfig, read-only: those of every model, and what its parts are told.
    # vocab_size None: the tokenizer's.
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    # Equal size: give this variant as many parameters as the recipe has with the mixer `match` as
    # it is by default (none turns it off), or about `parameters`.
    match: str | None = "spectral_window"
    parameters: int | None = None
    # Optimisation
    sequence_length: int = 256
    batch_size: int = 16
    micro_batch_size: int = 16
    steps: int = 1000
    lr: float = 1e-3
    lr_min_ratio: float = 0.1
    warmup_steps: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    # Numbers and machine
    dtype: str = "float32"
    matmul_precision: str = "auto"  # the fastest that is float32 here; see `machine.fastest`
    device: str = "auto"
    gradient_checkpointing: bool = False
    # What is written down, and when (steps)
    log_every: int = 10
    eval_every: int = 200
    eval_tokens: int | None = None
    save_every: int = 200
    keep_checkpoints: int = 2

    def __init__(self, *, model: Mapping[str, Any] = MappingProxyType({}), **values: Any) -> None:
        values = {**model, **values}
        _check_keys(values)
        for each in dataclasses.fields(self):
            value = values.get(each.name, each.default)
            if value is dataclasses.MISSING and each.name != "model":
                raise UserError(f"a recipe needs a {each.name} (recipe): give {each.name}=")
            object.__setattr__(self, each.name, value)
        object.__setattr__(self, "model", _model(values))
        check(vars(self), KNOBS)

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
        """The same recipe with some knobs changed. Raises UserError on an unknown or bad one."""
        return Recipe(**self._flat() | changes.pop("model", {}) | changes)

    def _flat(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        del values["model"]
        return values | dict(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the model's fields among them; `Recipe.from_dict` reads it back."""
        return _plain(self._flat())

    def traces(self) -> dict[str, Any]:
        """What names the run: `to_dict` without the defaults of options that parts were given
        later than the first runs (see `Option.traced`)."""
        fields = known(MODEL)
        return {k: v for k, v in self.to_dict().items() if k not in fields or fields[k].traced(v)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises UserError on an unknown key."""
        _check_keys(values)
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)


KNOBS: dict[str, Any] = {k: v for k, v in typing.get_type_hints(Recipe).items() if k != "model"}
reserve(KNOBS, "a knob of a recipe")


def _model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's fields out of a recipe's values, checked, each in its default where there is
    none."""
    held = {}
    given = {name: value for name, value in values.items() if name not in KNOBS}
    for name, option in known(MODEL).items():
        held[name] = option.normal(given.get(name, option.default))
        option.check(held[name], "recipe")
    return MappingProxyType({o.name: held[o.name] for o in recorded(MODEL, held)})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def defaults() -> dict[str, Any]:
    """Every key of a recipe that has a default, with it, as `Recipe.to_dict` has it."""
    of_knobs = {each.name: each.default for each in dataclasses.fields(Recipe)}
    of_model = {name: option.default for name, option in known(MODEL).items()}
    values = of_knobs | of_model
    return _plain({k: v for k, v in values.items() if v is not dataclasses.MISSING})


def keys() -> list[str]:
    """Every key that a recipe takes."""
    return sorted({*KNOBS, *known(MODEL)})


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


def resolve(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe called `name` with `key=value` overrides applied in order.

    Values are read by the key's type: `steps=2000`, `steps=2e3`, `lr=6e-4`, `skip_bad=true`,
    `vocab_size=none`, `data=a.txt,b.txt`. Raises UserError naming the nearest recipe or key, or the
    field and what it expects.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]().replace(**read_overrides(overrides))


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
        if key in KNOBS:
            changes[key] = parse(key, value, KNOBS[key])
        else:
            changes[key] = known(MODEL)[key].parse(value, "recipe")
    return changes
