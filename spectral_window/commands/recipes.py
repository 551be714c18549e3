"""`spectral-window recipes`: the recipes, and every setting of one with its range."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectral_window.cli.options import Debug, Json, Overrides
from spectral_window.cli.output import print_json, print_table

if TYPE_CHECKING:
    from spectral_window.nn.options import Option

EXAMPLE = "recipes memory window=128"


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them; none: all, a line each.")
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
    yaml: Annotated[
        bool, typer.Option("--yaml", help="As a file that `train FILE.yaml` takes.")
    ] = False,
    debug: Debug = False,
) -> None:
    """What can be trained: every setting of a recipe with its value, its range and a line."""
    from yaml import safe_dump as dump

    from spectral_window.nn.options import all_options
    from spectral_window.training.recipes import MODEL, RECIPES, SETTINGS, resolve

    if name is None:
        lines = {each: _first_line(make) for each, make in RECIPES.items()}
        if json:
            return print_json(lines)
        return print_table("recipes", ("name", "what it is"), list(lines.items()), numbers=False)
    values = resolve(name, overrides or []).to_dict()
    if yaml:
        return print(dump(values, sort_keys=False, allow_unicode=True), end="")
    options = {**all_options(MODEL), **SETTINGS}
    rows = [
        {"setting": key, "value": value, "range": _range(options[key]), "help": options[key].help}
        for key, value in values.items()
    ]
    if json:
        return print_json({"recipe": name, "settings": rows})
    head = ("setting", "value", "range", "what it is")
    cells = [(r["setting"], _text(r["value"]), r["range"], r["help"]) for r in rows]
    return print_table(f"recipe {name}: key=value after its name", head, cells, numbers=False)


def _first_line(make: Any) -> str:
    return (inspect.getdoc(make) or "").split("\n\n")[0].replace("\n", " ")


def _range(option: Option) -> str:
    """Say which values are allowed."""
    allowed = ", ".join(option.choices) if option.choices else option.range()
    return f"{allowed}, or none" if option.optional else allowed


def _text(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list) else str(value)
