"""Recipes: typed overrides, clear refusals, equal sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spectral_window.cli import main
from spectral_window.errors import UserError
from spectral_window.hf.model import count_parameters
from spectral_window.training.recipes import RECIPES, Recipe, keys, resolve
from spectral_window.training.trainer import model_config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_named_as_it_is_called_and_survives_json(name):
    recipe = resolve(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_is_a_value():
    recipe = resolve("tiny", ["window=7", "mixer=memory"])
    copies = [
        copy.deepcopy(recipe),
        pickle.loads(pickle.dumps(recipe)),
        dataclasses.replace(recipe),
    ]
    for same in copies:
        assert same == recipe
        assert hash(same) == hash(recipe)
    assert recipe != recipe.replace(window=8)
    assert dataclasses.replace(recipe, window=8) == recipe.replace(window=8)
    with pytest.raises(TypeError):
        recipe.model["window"] = 8
    assert recipe.replace(model={"window": 8}) == recipe.replace(window=8)
    with pytest.raises(UserError, match="unknown recipe key 'model'"):
        Recipe.from_dict(recipe.to_dict() | {"model": {"window": 8}})
    with pytest.raises(UserError, match="a recipe needs a data"):
        Recipe(name="empty")


def test_paper_lm_holds_the_papers_numbers():
    r = resolve("paper-lm")
    shape = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
    assert r.model.items() >= (shape | {"vocab_size": 50304}).items()
    assert (r.sequence_length, r.batch_size, r.lr, r.weight_decay, r.clip) == (
        1024,
        64,
        6e-4,
        0.1,
        1.0,
    )
    assert (r.tokenizer, r.schedule, r.data) == (
        "gpt2",
        "cosine",
        ("hub:HuggingFaceFW/fineweb-edu:sample-10BT",),
    )


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps=2000", "steps", 2000),
        ("steps=2_000", "steps", 2000),
        ("steps=2e3", "steps", 2000),
        ("lr=6e-4", "lr", 6e-4),
        ("lr=1", "lr", 1.0),
        ("skip_bad=yes", "skip_bad", True),
        ("skip-bad=false", "skip_bad", False),
        ("data=a.txt, b.txt", "data", ("a.txt", "b.txt")),
        ("branches=window", "branches", ("window",)),
        ("match=none", "match", None),
        ("tokenizer=bpe:2048", "tokenizer", "bpe:2048"),
        ("data=a=b.txt", "data", ("a=b.txt",)),
    ],
)
def test_an_override_is_read_by_the_type_of_its_knob(text, key, value):
    recipe = resolve("tiny", [text])
    found = recipe.model[key] if key in recipe.model else getattr(recipe, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["windw=64"], "did you mean 'window'"),
        (["steps"], "write key=value"),
        (["steps=many"], "steps=many .*whole number"),
        (["steps=1.5"], "steps=1.5 .*whole number"),
        (["steps=inf"], "steps=inf .*whole number"),
        (["lr=nan"], "lr=nan .*finite"),
        (["lr=1e400"], "lr=1e400 .*finite"),
        (["lr=-1"], "lr is -1.0 .*above 0"),
        (["skip_bad=maybe"], "skip_bad=maybe .*true or false"),
        (["window=0"], r"window is 0 \(recipe\): use a whole number, 1 to"),
        (["steps=none"], "steps=none"),
        (["warmup_steps=61"], "must not exceed steps"),
        (["micro_batch_size=3"], "must divide batch_size"),
        (["dtype=float8"], "did you mean .float32"),
        (["schedule=step"], "constant, cosine"),
        (["keep_checkpoints=1"], "a whole number, 2 to"),
        (["data="], "at least one source"),
        (["valid_fraction=1"], "above 0 and below 1"),
        (["name=x"], "keeps its name"),
    ],
)
def test_a_bad_override_names_the_field_and_what_it_expects(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve("tiny", overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'small'"):
        resolve("smal")


def test_the_python_face_refuses_wrong_types_too():
    for change in (
        {"steps": "10"},
        {"steps": True},
        {"lr": "fast"},
        {"skip_bad": 1},
        {"data": "a.txt"},
        {"seed": 1.5},
    ):
        with pytest.raises(UserError, match=next(iter(change))):
            resolve("tiny").replace(**change)
    with pytest.raises(UserError, match="did you mean 'window'"):
        resolve("tiny").replace(windw=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve("tiny").steps = 3  # type: ignore[misc]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(keys()), st.text(max_size=12))
@example("device", "0\n0")
def test_any_text_for_any_knob_gives_a_recipe_or_one_line(key, text):
    try:
        found = resolve("tiny", [f"{key}={text}"])
    except UserError as error:
        said = str(error)
    else:
        said = key
        assert isinstance(found, Recipe)
    assert key.split("_")[0] in said
    assert "\n" not in said


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "variant",
    [
        ["mixer=attention"],
        ["mixer=spectral_window", "branches=window"],
        ["mixer=spectral_window", "branches=spectral"],
        ["mixer=memory"],
    ],
)
def test_variants_get_the_recipes_number_of_parameters_within_one_percent(name, variant):
    whole = count_parameters(model_config(resolve(name), 4096))
    other = count_parameters(model_config(resolve(name, variant), 4096))
    assert abs(other - whole) <= 0.01 * whole


def test_match_none_keeps_the_width_and_parameters_sets_the_size():
    plain = model_config(resolve("tiny", ["mixer=attention", "match=none"]), 512)
    assert plain.intermediate_size == 8 * plain.hidden_size // 3
    sized = model_config(resolve("tiny", ["parameters=300000"]), 512)
    assert abs(count_parameters(sized) - 300_000) <= 3000


def test_the_model_of_a_recipe_has_its_fields():
    config = model_config(resolve("tiny", ["window=7", "hidden_size=96", "rope_theta=500"]), 777)
    assert (config.window, config.hidden_size, config.rope_theta, config.vocab_size) == (
        7,
        96,
        500.0,
        777,
    )


# ------------------------------------------------------------------------------ in a file


def test_a_recipe_printed_as_yaml_and_read_back_is_the_same(tmp_path, capsys):
    for name in RECIPES:
        assert main(["recipes", name, "lr=1e-4", "--yaml"]) == 0
        path = tmp_path / f"{name}.yaml"
        path.write_text(capsys.readouterr().out)
        assert resolve(str(path)) == resolve(name, ["lr=1e-4"])
        assert resolve(str(path), ["steps=7", "warmup_steps=1"]).steps == 7


def test_a_recipe_in_a_file_needs_only_what_differs_and_is_called_after_it(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("data: [a.txt]\nmixer: memory\nlr: 2e-3\n")
    recipe = resolve(str(path))
    assert (recipe.name, recipe.data, recipe.lr) == ("mine", ("a.txt",), 0.002)
    assert recipe.model["mixer"] == "memory"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the recipe"),
        ("lr: [1", "cannot read the recipe"),
        ("- lr", "no recipe"),
        ("data: [a.txt]\nlearning_rate: 1", "unknown recipe key 'learning_rate'"),
        ("data: [a.txt]\nlr: fast", "lr"),
        ("lr: 0.1", "a recipe needs a data"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
