"""Settings: every named policy is one, and every mistake is told in a line that says what would do."""

from __future__ import annotations

import dataclasses

import pytest

from polyserve.core.settings import POLICIES, SettingError, Settings, policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_being_written_down(name: str) -> None:
    assert Settings().replaced(policy(name).to_dict()) == policy(name)


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"promotion": "eager"}, "promotion", "eager"),
        ({"test_pace": "off"}, "test_pace", False),
        ({"test_pace": "Yes"}, "test_pace", True),
        ({"head_walk": "3"}, "head_walk", 3),
        ({"head_walk": 3.0}, "head_walk", 3),
        ({"guest_reserve": "0.25"}, "guest_reserve", 0.25),
        ({"guest_reserve": 0}, "guest_reserve", 0.0),
    ],
)
def test_values_are_read_as_their_field_wants_them(values: dict[str, object], field: str, value: object) -> None:
    replaced = getattr(policy("polyserve", values), field)
    assert replaced == value
    assert type(replaced) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promotin": "lazy"}, r"unknown setting 'promotin'; there are: .*promotion"),
        ({"promotion": "sometimes"}, r"'promotion' is one of off, lazy, eager, not 'sometimes'"),
        ({"test_pace": "maybe"}, r"'test_pace' is true or false, not 'maybe'"),
        ({"test_pace": 1}, r"'test_pace' is true or false, not 1"),
        ({"head_walk": "many"}, r"'head_walk' is a whole number, not 'many'"),
        ({"head_walk": 2.5}, r"'head_walk' is a whole number, not 2.5"),
        ({"head_walk": True}, r"'head_walk' is a whole number, not True"),
        ({"look_s": "soon"}, r"'look_s' is a number, not 'soon'"),
        ({"look_s": None}, r"'look_s' is a number, not None"),
        ({"look_s": -1}, r"'look_s' is finite and not negative, not -1"),
        ({"look_s": "inf"}, r"'look_s' is finite and not negative, not 'inf'"),
        ({"look_s": "nan"}, r"'look_s' is finite and not negative, not 'nan'"),
    ],
)
def test_a_mistake_is_named_with_what_would_do(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        policy("polyserve", values)


def test_an_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(SettingError, match=r"unknown policy 'polysrv'; there are: polyserve, polyserve-paper, random"):
        policy("polysrv")


def test_settings_are_plain_values() -> None:
    """A journal keeps them, and only JSON's own types come back as they were."""
    for field in dataclasses.fields(Settings):
        assert isinstance(getattr(Settings(), field.name), bool | int | float | str)
