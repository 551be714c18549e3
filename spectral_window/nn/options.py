"""What a part of a model can be told, declared once; and the registries of parts.

    @register("toy", Option("toy_width", int, 3, at_least=1, help="channels of the toy"))
    class Toy(Mixer):
        def __init__(self, *, toy_width: int = 3, **core: Any): ...

That makes `toy_width` a field of every config, of every recipe and of the command line, read,
checked and explained by the record above; the part receives it by name. A subclass inherits what
its bases declare. An option whose choices are a registry names another part (`kernel`, `fusion`),
and the options of the part it names count as well.

A file holds the options of the parts that were chosen (`recorded`), so one that was made where more
parts are registered loads where they are not.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from spectral_window.errors import UserError, unknown
from spectral_window.ops.tracing import is_recorded

LARGEST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Option:
    """One field: its name, type, default and range, and what depends on it. Two parts share an
    option by declaring the same object.

    kind:              int, float, bool, str, or tuple (of texts); object for a value that whoever
                       declares it checks.
    choices:           the texts there are; a `Registry` where the text names a part.
    at_least, above:   the least value, and what it must exceed; an int is at least 1 otherwise.
    at_most, below:    the same for the largest; an int is at most 2**31 - 1 otherwise.
    optional:          None is a value too.
    decides:           "state": a state means something only to a model that agrees in it;
                       "function": it decides the rest of what a model computes; "weights": how
                       weights begin; "tokens": a token id; "use": none of these.
    in_recipes:        a recipe sets it.
    always:            files hold it whichever parts are chosen: it is older than this rule.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: Collection[str] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    optional: bool = False
    decides: str = "state"
    in_recipes: bool = True
    always: bool = False

    def check(self, value: Any, where: str) -> None:
        """Raise UserError, one line, unless `value` can be this option's; where: "config"."""
        if value is None and self.optional:
            return
        if self.kind is str and self.choices is not None:
            if not isinstance(value, str) or value not in self.choices:
                raise unknown(self.name, _one_line(value), self.choices)
        elif self.kind is tuple:
            self._check_texts(value, where)
        elif not self._fits(value):
            null = ", or null" if self.optional else ""
            raise UserError(f"{self.name} is {value!r} ({where}): use {self.range()}{null}")

    def _fits(self, value: Any) -> bool:
        if self.kind is bool or isinstance(value, bool):
            return self.kind is type(value) or self.kind is object
        if self.kind is int:
            least, most = self._whole_range()
            return isinstance(value, numbers.Integral) and least <= int(value) <= most
        if self.kind is float:
            number = _number(value)
            return (
                math.isfinite(number)
                and (self.above is None or number > self.above)
                and (self.at_least is None or number >= self.at_least)
                and (self.below is None or number < self.below)
                and (self.at_most is None or number <= self.at_most)
            )
        return isinstance(value, self.kind)

    def _whole_range(self) -> tuple[int, int]:
        least = 1 if self.at_least is None else int(self.at_least)
        return least, LARGEST if self.at_most is None else int(self.at_most)

    def range(self) -> str:
        """The values that `check` accepts, in words."""
        if self.kind is bool:
            return "true or false"
        if self.kind is int:
            least, most = self._whole_range()
            return f"a whole number, {least} to {most}"
        if self.kind is float:
            bounds = (
                ("above", self.above),
                ("of at least", self.at_least),
                ("below", self.below),
                ("of at most", self.at_most),
            )
            words = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
            return " ".join(["a finite number", " and ".join(words)]).strip()
        return "text"

    def _check_texts(self, value: Any, where: str) -> None:
        names = self.choices or ()
        some = f"name some of {', '.join(names)}" if names else "use a list of texts"
        if not isinstance(value, tuple) or (names and not value):
            raise UserError(f"{self.name} is {value!r} ({where}): {some}")
        for text in value:
            if not isinstance(text, str) or (names and text not in names):
                raise unknown(f"value of {self.name}", _one_line(text), names)
        if names and len(set(value)) != len(value):
            raise UserError(f"{self.name} is {value!r} ({where}): name each once")

    def traced(self, value: Any) -> bool:
        """Does a fingerprint hold `value`? Not the default, unless it always did: so a part may be
        given one option more, and what was made before still fits."""
        return self.always or self.normal(value) != self.default

    def normal(self, value: Any) -> Any:
        """`value` as it is held: a list of texts as a tuple, in the order of the choices."""
        if self.kind is not tuple or isinstance(value, str) or not isinstance(value, Iterable):
            return value
        texts = tuple(value)
        known = [name for name in self.choices or () if name in texts]
        return tuple(known) if len(known) == len(texts) else texts

    def parse(self, text: str, where: str) -> Any:
        """The value that `text` writes: 4096, 2e6, 6e-4, true, none, `a,b`. Raises UserError where
        it writes none; the range is not checked."""
        text = text.strip()
        if self.optional and text.lower() in ("none", "null", ""):
            return None
        if self.kind is tuple:
            return self.normal(part.strip() for part in text.split(",") if part.strip())
        if self.kind not in _READERS:
            return text
        read, expected = _READERS[self.kind]
        value = read(text)
        if value is None:
            raise UserError(f"{self.name}={_one_line(text)} ({where}): expected {expected}")
        return value


def _number(value: Any) -> float:
    """`value` as a float; NaN where it is none."""
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # a whole number beyond every float
        return math.nan


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        number = _finite_number(text)
        return int(number) if number is not None and number == int(number) else None


def _finite_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _truth(text: str) -> bool | None:
    words = {"true": True, "yes": True, "1": True, "on": True}
    words |= {"false": False, "no": False, "0": False, "off": False}
    return words.get(text.lower())


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_truth, "true or false"),
    int: (_whole_number, "a whole number, such as 4096 or 2e6"),
    float: (_finite_number, "a finite number, such as 6e-4"),
}


def _one_line(value: Any) -> str:
    """An error is one line, whatever was typed."""
    return " ".join(str(value).split())


# ---------------------------------------------------------------------------------- parts by name


class Part:
    """What a registry holds: a class with declared options, which its constructor takes by name."""

    options: ClassVar[tuple[Option, ...]] = ()

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Raise UserError where values do not fit together. values: those of the config's fields,
        each good by itself."""


P = TypeVar("P", bound=Part)
_registries: list[Registry[Any]] = []
_reserved: dict[str, str] = {}


class Registry(dict[str, type[P]]):
    """The parts of one kind by name: `KERNELS["log_spaced"]`.

    kind: what one is called in errors.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        _registries.append(self)

    def register(self, name: str, *options: Option) -> Callable[[type[P]], type[P]]:
        """Class decorator: make a part known under `name` (a name is given once), and declare
        options beside those of its bases.

        Raises UserError for an option whose name another option, a core field of the config or a
        setting of training has.
        """

        def enrol(part: type[P]) -> type[P]:
            if name in self:
                raise UserError(f"{self.kind} '{name}' is registered already: choose another name")
            for option in options:
                _check_name(option, f"{self.kind} '{name}'")
            own = [option for option in options if option not in part.options]
            part.options = (*part.options, *own)
            self[name] = part
            return part

        return enrol

    def make(self, values: Mapping[str, Any], name: str, *args: Any, **more: Any) -> P:
        """The part called `name`, told the options that count for it out of `values` (defaults
        where it has none). Raises UserError for an unknown name."""
        if name not in self:
            raise unknown(self.kind, name, self)
        told = {o.name: values.get(o.name, o.default) for o in chosen(self[name].options, values)}
        return self[name](*args, **more, **told)


def _check_name(option: Option, where: str) -> None:
    if option.name in _reserved:
        raise UserError(
            f"option '{option.name}' ({where}): {_reserved[option.name]} has that name; "
            "choose another"
        )
    for registry in _registries:
        for name, part in registry.items():
            for other in part.options:
                if other.name == option.name and other is not option:
                    raise UserError(
                        f"option '{option.name}' ({where}): {registry.kind} '{name}' has one of "
                        "that name; declare the same Option, or choose another name"
                    )


def reserve(names: Iterable[str], whose: str) -> None:
    """No option may take one of `names`; whose: what has them, as an error says it."""
    for name in names:
        _reserved.setdefault(name, whose)
    for registry in _registries:
        for name, part in registry.items():
            for option in part.options:
                _check_name(option, f"{registry.kind} '{name}'")


# -------------------------------------------------------------------------- the options that count


def chosen(options: Iterable[Option], values: Mapping[str, Any]) -> list[Option]:
    """`options`, and those of every part that their `values` name (defaults where there is no
    value; a name that no part has brings none)."""
    found: dict[str, Option] = {}
    for option in options:
        found[option.name] = option
        if isinstance(option.choices, Registry):
            part = option.choices.get(values.get(option.name, option.default))
            if part is not None:
                found |= {o.name: o for o in chosen(part.options, values)}
    return list(found.values())


def known(options: Iterable[Option]) -> Mapping[str, Option]:
    """`options` and those of all registered parts that they can name, by name."""
    if is_recorded():  # a graph looks into this function, and not into a cache
        return _find(tuple(options))
    # libraries ask a config for its fields at every token: what is registered seldom changes
    parts = tuple(part.options for registry in _registries for part in registry.values())
    return _found(tuple(options), parts)


@lru_cache(maxsize=64)
def _found(options: tuple[Option, ...], parts: tuple[Any, ...]) -> Mapping[str, Option]:
    return MappingProxyType(_find(options))


def _find(options: tuple[Option, ...]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    waiting = list(options)
    while waiting:
        option = waiting.pop(0)
        if option.name not in found:
            found[option.name] = option
            waiting += _of_parts(option)
    return found


def _of_parts(option: Option) -> Iterator[Option]:
    if isinstance(option.choices, Registry):
        for part in option.choices.values():
            yield from part.options


def settings(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that count for `part`, by name, with the values `given` or their defaults.

    Raises UserError for any other and for a bad value.
    """
    name = type(part).__name__
    counted = {option.name: option for option in chosen(part.options, given)}
    for key in given:
        if key not in counted:
            raise unknown(f"option of {name}", key, counted)
    values = {key: o.normal(given.get(key, o.default)) for key, o in counted.items()}
    for key, option in counted.items():
        option.check(values[key], name)
    return values


def recorded(options: Iterable[Option], values: Mapping[str, Any]) -> list[Option]:
    """The options that a file holds, of `options` and those they can lead to: `options`, those of
    the parts chosen, those older than this rule, and whatever is away from its default."""
    options = list(options)
    counted = {option.name for option in chosen(options, values)}
    return [
        option
        for option in known(options).values()
        if option.always
        or option.name in counted
        or values.get(option.name, option.default) != option.default
    ]
