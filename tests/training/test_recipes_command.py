"""`spectral-window recipes`: nothing that can be set is left out."""

from __future__ import annotations

import json

import pytest

from spectral_window.cli import main
from spectral_window.commands.recipes import _text
from spectral_window.training.recipes import RECIPES, resolve


def test_all_recipes_are_named(capsys):
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == RECIPES.keys()


@pytest.mark.parametrize("name", ["tiny", "memory"])
def test_every_setting_has_its_value_range_and_line_and_can_be_typed_again(name, capsys):
    assert main(["recipes", name, "window=12", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    wanted = resolve(name, ["window=12"])
    assert {row["setting"]: row["value"] for row in rows} == wanted.to_dict()
    assert all(row["range"] and row["help"] for row in rows)
    typed = [f"{r['setting']}={_text(r['value'])}" for r in rows if r["setting"] != "name"]
    assert resolve(name, typed) == wanted
    assert main(["recipes", name, "window=12"]) == 0
    shown = capsys.readouterr().out
    assert "write_gate" in shown or name == "tiny"
    assert "batch_size" in shown


def test_a_misspelt_recipe_is_exit_2(capsys):
    assert main(["recipes", "memroy"]) == 2
    assert "did you mean 'memory'" in capsys.readouterr().err
