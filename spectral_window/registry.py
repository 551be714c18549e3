"""Registries: things of one kind by name, with an error that suggests the nearest name.

    TASKS: Registry[type[Task]] = Registry("task")

    @TASKS.register("recall")
    class Recall(Task): ...

Tests parametrise over registries, so whatever is registered is also checked by the contract suite
of its kind (tests/contracts, tests/data/test_tasks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from spectral_window.errors import UserError, unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dict of the things of one kind by name.

    Args:
        kind: what one of them is called in errors, for example "task".
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class under `name` and sets its attribute `name`.

        Raises:
            UserError: the name is registered already.
        """

        def add(part: T) -> T:
            if name in self:
                raise UserError(f"{self.kind} '{name}' is registered already: choose another name")
            part.name = name  # type: ignore[attr-defined]
            self[name] = part
            return part

        return add

    def find(self, name: str) -> T:
        """Return what is registered under `name`.

        Raises:
            UserError: there is no such name; the message suggests the nearest one.
        """
        if name not in self:
            raise unknown(self.kind, name, self)
        return self[name]
