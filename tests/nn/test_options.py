"""Options: complete declarations, valid defaults, errors of one line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spectral_window.errors import UserError
from spectral_window.hf import SWHConfig
from spectral_window.hf.config import CORE
from spectral_window.nn.options import Option, PartRegistry, all_options, recorded
from spectral_window.training.recipes import MODEL

FIELDS = [*all_options(CORE).values(), *(option for option in MODEL if option not in CORE)]
each = pytest.mark.parametrize("option", FIELDS, ids=lambda option: option.name)


@each
def test_a_field_says_what_it_is_and_takes_its_default(option: Option) -> None:
    assert option.help
    assert "\n" not in option.help
    assert option.decides in ("state", "function", "weights", "tokens", "use")
    if option.default is not None:
        option.check(option.default, "test")
        assert option.normal(option.default) == option.default
    else:
        assert option.optional or option.kind is object


@each
def test_what_is_written_is_read_back(option: Option) -> None:
    if option.default is not None:
        value = option.default
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        assert option.parse(text, "test") == value
        assert type(option.parse(text, "test")) is type(value)
    if option.optional:
        assert option.parse("none", "test") is None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FIELDS),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=3).map(tuple),
    ),
)
@example(all_options(CORE)["rope_theta"], 10**400)
@example(all_options(CORE)["mixer"], "0\n0")
@example(all_options(CORE)["branches"], (["spectral"],))
def test_any_value_is_taken_or_refused_in_one_line_that_names_the_field(
    option: Option, value: Any
) -> None:
    try:
        option.check(option.normal(value), "test")
        said = option.name
    except UserError as error:
        said = str(error)
    assert option.name in said
    assert "\n" not in said


def test_a_config_of_numbers_beyond_every_float_is_refused() -> None:
    with pytest.raises(UserError, match="rope_theta is 1000"):
        SWHConfig(rope_theta=10**400)


def test_every_field_of_every_part_is_a_keyword_and_an_attribute() -> None:
    config = SWHConfig()
    for name, option in SWHConfig.fields().items():
        assert (name in config.recorded()) == option.always  # the paper's layer is told no other
        if name not in ("intermediate_size", "num_attention_heads"):  # which are filled in
            assert getattr(SWHConfig(**{name: option.default}), name) == option.default
    with pytest.raises(AttributeError, match="windw"):
        config.windw  # noqa: B018


def test_a_subclass_inherits_what_its_base_declares() -> None:
    parts: PartRegistry[Any] = PartRegistry("thing")
    one, two = Option("thing_one", int, 1, help=""), Option("thing_two", int, 2, help="")
    base = type("Base", (), {"options": ()})
    derived = parts.register("derived", two)(
        type("Derived", (parts.register("base", one)(base),), {})
    )
    try:
        assert (base.options, derived.options) == ((one,), (one, two))
        assert recorded([Option("thing", str, "derived", choices=parts, help="")], {})[1:] == [
            one,
            two,
        ]
    finally:
        parts.clear()
