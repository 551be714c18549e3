"""Usage errors as the library of the command line finds them, told as all others are:

no such command 'trian' (spectral-window): did you mean 'train'?
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from spectral_window.errors import UserError

# Typer is built on click, on its own copy or on the package, as its version wants it.
_click: Any = sys.modules[typer.BadParameter.__module__]
ClickError: type[Exception] = _click.ClickException


class NoSuchCommand(_click.UsageError):  # type: ignore[misc]
    """A command that is not in the table: click has no class for it."""

    def __init__(self, name: str, context: Any) -> None:
        super().__init__(f"No such command '{name}'", ctx=context)
        self.name = name


class Commands(TyperGroup):
    """A table of commands that raises NoSuchCommand."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise NoSuchCommand(args[0], ctx)
        return super().resolve_command(ctx, args)


def explain(error: Any, program: str) -> UserError:
    """A ClickError as what (where): what to do, with the nearest option or command."""
    context: Any = getattr(error, "ctx", None)
    where = program if context is None else context.command_path
    what, wrong, known = error.format_message(), "", []
    if isinstance(error, _click.NoSuchOption):
        what, wrong = error.message, error.option_name
        if context is not None:
            known = [name for parameter in context.command.params for name in parameter.opts]
    elif isinstance(error, NoSuchCommand):
        wrong, known = error.name, context.command.list_commands(context)
    near = get_close_matches(wrong, known, n=1, cutoff=0.5)
    todo = f"did you mean '{near[0]}'?" if near else f"see '{where} --help'"
    what = " ".join(what.split()).rstrip(".?")
    return UserError(f"{what[:1].lower()}{what[1:]} ({where}): {todo}")
