"""Tests the types of JSON values. tests/model/test_checkpoint.py tests hostile values."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from model.json_fields import MAX_CHARACTERS, MAX_ITEMS, MAX_NUMBER, build

Letter = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, slots=True)
class Outer:
    number: float = 0.5
    name: str = ""
    is_on: bool = False
    letter: Letter = "a"
    sizes: tuple[int, ...] = ()
    inner: Inner = Inner()
    by_letter: dict[Letter, Inner] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def test_build_accepts_values_of_the_right_types() -> None:
    values = {
        "number": 2,
        "name": "x" * MAX_CHARACTERS,
        "is_on": True,
        "letter": "b",
        "sizes": [1, MAX_NUMBER],
        "inner": {"size": 3},
        "by_letter": {"b": {}},
        "facts": {"any": [None]},
    }
    expected = Outer(2, values["name"], True, "b", (1, MAX_NUMBER), Inner(3), {"b": Inner()}, {"any": [None]})
    assert build(Outer, values) == expected
    assert build(Outer, {}) == Outer()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], " must be an object"),
        ({"other": 1}, "unknown field other"),
        ({"inner": {"other": 1}}, "unknown field inner.other"),
        ({"inner": 1}, "inner must be an object"),
        ({"inner": {"size": True}}, "inner.size must be an integer"),
        ({"inner": {"size": 1.0}}, "inner.size must be an integer"),
        ({"inner": {"size": MAX_NUMBER + 1}}, "inner.size must be an integer"),
        ({"number": float("nan")}, "number must be a number"),
        ({"number": float("inf")}, "number must be a number"),
        ({"number": True}, "number must be a number"),
        ({"name": "x" * (MAX_CHARACTERS + 1)}, "name must be a string"),
        ({"name": None}, "name must be a string"),
        ({"is_on": 1}, "is_on must be true or false"),
        ({"letter": "c"}, "letter must be one of a, b"),
        ({"letter": ["a"]}, "letter must be one of a, b"),
        ({"sizes": "12"}, "sizes must be a list"),
        ({"sizes": [0] * (MAX_ITEMS + 1)}, "sizes must be a list"),
        ({"sizes": [1, "2"]}, "sizes[1] must be an integer"),
        ({"by_letter": {"c": {}}}, "a key of by_letter must be one of a, b"),
        ({"by_letter": {"a": {"size": 0.5}}}, "by_letter.size must be an integer"),
        ({"facts": []}, "facts must be an object"),
    ],
)
def test_invalid_value_is_named_in_the_error(values: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(Outer, values)
    assert str(caught.value).startswith(reason)


def test_missing_required_field_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"^letter is missing$"):
        build(Outer, {}, required=("letter",))
