"""Options of the parts of a model, each declared once; and the registries of parts.

    @register("toy", Option("toy_width", int, 3, at_least=1, help="channels of the toy"))
    class Toy(Mixer):
        def __init__(self, *, toy_width: int = 3, **core: Any): ...

This declaration makes `toy_width` a field of every config, of every recipe and of the command line,
with parsing, checks and help; the part receives it as a keyword. A subclass inherits the options of
its bases. An option whose choices are a registry names another part (`kernel`, `fusion`), and the
options of that part apply as well.

A file contains the options of the parts that were chosen (`recorded`). So a file that was written
where more parts are registered can be loaded where they are not.
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
from spectral_window.registry import Registry

LARGEST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Option:
    """One field: its name, type, default and range, and what depends on it.

    Two parts share an option by declaring the same object.

    Attributes:
        name: the field's name.
        kind: int, float, bool, str, or tuple (of strings); object for a value that is checked
            elsewhere.
        default: the default value.
        help: one line.
        choices: the allowed strings; a `PartRegistry` where the value names a part.
        at_least: the smallest value; 1 for an int without a bound.
        above: the value must be greater than this.
        at_most: the largest value; 2**31 - 1 for an int without a bound.
        below: the value must be less than this.
        optional: None is allowed.
        decides: "state": two models must agree in it to exchange states; "function": it decides
            what a model computes otherwise; "weights": how weights are initialised; "tokens": a
            token id; "use": none of these.
        in_recipes: it can be set in a recipe.
        always: it is written to files whichever parts are chosen (it is older than this rule).

    Example:
        >>> Option("width", int, 3, help="channels").parse("2e3", "recipe")
        2000
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
        """Raise UserError, one line, unless `value` is allowed; `where` is named in the message."""
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
        """Return in words which values `check` accepts."""
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
        """Return whether a fingerprint includes `value`.

        It does not include defaults (except of options that are `always` written). So a part can
        get another option without changing the fingerprints of existing models.
        """
        return self.always or self.normal(value) != self.default

    def normal(self, value: Any) -> Any:
        """Return `value` as it is stored: a list of strings as a tuple in the order of choices."""
        if self.kind is not tuple or isinstance(value, str) or not isinstance(value, Iterable):
            return value
        texts = tuple(value)
        ordered = [name for name in self.choices or () if name in texts]
        return tuple(ordered) if len(ordered) == len(texts) else texts

    def parse(self, text: str, where: str) -> Any:
        """Parse a value: 4096, 2e6, 6e-4, true, none, `a,b`. The range is not checked.

        Raises:
            UserError: `text` is not a value of this kind; `where` is named in the message.
        """
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
    """Return `value` as a float, or NaN if it is not a number."""
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
    """Return `value` on one line, for an error message."""
    return " ".join(str(value).split())


# -------------------------------------------------------------------------------- parts by name


class Part:
    """Base class of registered parts: a class with options that its constructor takes by name."""

    options: ClassVar[tuple[Option, ...]] = ()

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Raise UserError if values do not fit together.

        Args:
            values: the config's fields; each is valid by itself.
        """


P = TypeVar("P", bound=Part)
_registries: list[PartRegistry[Any]] = []
_reserved: dict[str, str] = {}


class PartRegistry(Registry[type[P]]):
    """The parts of one kind by name: `KERNELS["log_spaced"]`. Registering one declares its options.

    Args:
        kind: what one is called in errors, for example "kernel".
    """

    def __init__(self, kind: str):
        super().__init__(kind)
        _registries.append(self)

    def register(self, name: str, *options: Option) -> Callable[[type[P]], type[P]]:
        """Return a decorator that registers a class and declares options beside those of its bases.

        Raises:
            UserError: the name is registered already, or an option has the name of another option,
                of a core field of the config or of a setting of training.
        """
        add = super().register(name)

        def add_with_options(part: type[P]) -> type[P]:
            for option in options:
                _check_name(option, f"{self.kind} '{name}'")
            part = add(part)
            new = [option for option in options if option not in part.options]
            part.options = (*part.options, *new)
            return part

        return add_with_options

    def make(self, values: Mapping[str, Any], name: str, *args: Any, **more: Any) -> P:
        """Construct the part called `name`.

        Args:
            values: values of options by name; those that the part does not take are ignored, and
                those that are missing have their defaults.
            name: a registered name.
            args, more: further arguments of the constructor.

        Raises:
            UserError: there is no part of this name.
        """
        part = self.find(name)
        options = {o.name: values.get(o.name, o.default) for o in chosen(part.options, values)}
        return part(*args, **more, **options)


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
    """Forbid `names` as names of options; `whose` is named in the message of the error."""
    for name in names:
        _reserved.setdefault(name, whose)
    for registry in _registries:
        for name, part in registry.items():
            for option in part.options:
                _check_name(option, f"{registry.kind} '{name}'")


# ------------------------------------------------------------------------- options that apply


def chosen(options: Iterable[Option], values: Mapping[str, Any]) -> list[Option]:
    """Return `options` and those of every part that their values name.

    Args:
        options: options to start from.
        values: values by name; a missing one is the default. A name without a part adds nothing.
    """
    result: dict[str, Option] = {}
    for option in options:
        result[option.name] = option
        if isinstance(option.choices, PartRegistry):
            part = option.choices.get(values.get(option.name, option.default))
            if part is not None:
                result |= {o.name: o for o in chosen(part.options, values)}
    return list(result.values())


def all_options(options: Iterable[Option]) -> Mapping[str, Option]:
    """Return `options` and those of all registered parts that they can name, by name."""
    if is_recorded():  # torch.compile traces this function, but not a cached one
        return _collect(tuple(options))
    # cached, because libraries read fields of a config at every token
    parts = tuple(part.options for registry in _registries for part in registry.values())
    return _collect_cached(tuple(options), parts)


@lru_cache(maxsize=64)
def _collect_cached(options: tuple[Option, ...], parts: tuple[Any, ...]) -> Mapping[str, Option]:
    return MappingProxyType(_collect(options))


def _collect(options: tuple[Option, ...]) -> dict[str, Option]:
    result: dict[str, Option] = {}
    pending = list(options)
    while pending:
        option = pending.pop(0)
        if option.name not in result:
            result[option.name] = option
            pending += _of_parts(option)
    return result


def _of_parts(option: Option) -> Iterator[Option]:
    if isinstance(option.choices, PartRegistry):
        for part in option.choices.values():
            yield from part.options


def settings(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `part` by name, with the values `given` or their defaults.

    Raises:
        UserError: `given` has an option that does not apply, or a bad value.
    """
    name = type(part).__name__
    options = {option.name: option for option in chosen(part.options, given)}
    for key in given:
        if key not in options:
            raise unknown(f"option of {name}", key, options)
    values = {key: o.normal(given.get(key, o.default)) for key, o in options.items()}
    for key, option in options.items():
        option.check(values[key], name)
    return values


def recorded(options: Iterable[Option], values: Mapping[str, Any]) -> list[Option]:
    """Return the options that a file contains.

    These are `options`, the options of the chosen parts, the options that are `always` written, and
    every option whose value is not its default.
    """
    options = list(options)
    applying = {option.name for option in chosen(options, values)}
    return [
        option
        for option in all_options(options).values()
        if option.always
        or option.name in applying
        or values.get(option.name, option.default) != option.default
    ]
