"""Classes by name and by number: what `label` and `digit` mean for models of digits and of other classes."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from app.errors import FieldError
from app.tasks.fields import problems_of
from app.tasks.labels import LabelFields, label_of, required_label_of
from tests.app.fakes import INFO

NAMES = ("cat", "dog", "truck", "Fire Truck", "7", "CAT", "caf\xe9")
VEHICLES = replace(INFO, name="vehicles", class_names=NAMES)
FIVE_DIGITS = replace(INFO, class_names=tuple("01234"))


def found(info: Any = VEHICLES, **fields: Any) -> int | None:
    return label_of(info, LabelFields.model_validate(fields, strict=True))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("truck", 2),
        ("TRUCK", 2),
        ("fire truck", 3),
        ("CAT", 5),  # An exact name has priority over one that differs in case.
        ("Cat", 0),
        ("CAFE\u0301", 6),  # another way to write the same characters
        ("7", 4),  # A text is first of all a name.
        ("0", 0),
        ("3", 3),
        (5, 5),
        (2.0, 2),
    ],
)
def test_label_is_a_name_or_a_number(label: str | int, number: int) -> None:
    assert found(label=label) == number


def test_request_without_a_class_has_no_label() -> None:
    assert found() is found(INFO) is None


@pytest.mark.parametrize("label", ["7", 7])
def test_label_and_digit_are_the_same_for_digits(label: str | int) -> None:
    assert found(INFO, label=label) == found(INFO, digit=7) == 7


@pytest.mark.parametrize(
    ("info", "fields", "field", "message"),
    [
        (
            VEHICLES,
            {"label": "trukc"},
            "label",
            "Unknown label 'trukc'. Did you mean 'truck'? GET /models lists all 7 names",
        ),
        (VEHICLES, {"label": "zebra"}, "label", "Unknown label 'zebra'. GET /models lists all 7 names"),
        (VEHICLES, {"label": 7}, "label", "Unknown label 7: the model 'vehicles' has the labels 0 to 6"),
        (VEHICLES, {"label": "8"}, "label", "Unknown label 8: the model 'vehicles' has the labels 0 to 6"),
        (VEHICLES, {"digit": 4}, "digit", "The classes of model 'vehicles' are not digits. Send label"),
        (VEHICLES, {"label": "cat", "digit": 1}, "label", "Send either label or digit, not both"),
        (INFO, {"label": "seven"}, "label", "Unknown label 'seven'. GET /models lists all 10 names"),
        (INFO, {"label": 7, "digit": 7}, "label", "Send either label or digit, not both"),
        (FIVE_DIGITS, {"digit": 5}, "digit", "Input should be less than or equal to 4 for model 'default'"),
        (FIVE_DIGITS, {"label": 5}, "label", "Unknown label 5: the model 'default' has the labels 0 to 4"),
    ],
)
def test_class_that_the_model_does_not_have_is_refused(
    info: Any, fields: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(FieldError) as error:
        found(info, **fields)
    assert error.value.field == field
    assert error.value.message.startswith(message)


def test_long_unknown_label_is_shortened_in_the_error() -> None:
    with pytest.raises(FieldError, match=r"Unknown label 'x{40}\.\.\.'"):
        found(label="x" * 100)
    with pytest.raises(FieldError, match=r"Unknown label 10{39}\.\.\.: "):
        found(label=10**300)


@pytest.mark.parametrize(("info", "field"), [(INFO, "digit"), (VEHICLES, "label")])
def test_missing_class_is_reported_at_the_field_of_the_model(info: Any, field: str) -> None:
    with pytest.raises(FieldError) as error:
        required_label_of(info, LabelFields())
    assert (error.value.field, error.value.message) == (field, "Field required")


@pytest.mark.parametrize("label", [None, True, -1, 1.5, "", "a" * 101, "\ud800", "a\udfff", [], {}])
def test_label_of_another_type_or_length_is_refused_with_one_error(label: Any) -> None:
    with pytest.raises(ValidationError) as error:
        LabelFields.model_validate({"label": label}, strict=True)
    ((_, location, message),) = problems_of(error.value)
    assert (location, message) == (("label",), "Input should be the name or the number of a class")


def test_schema_of_a_label_has_a_text_and_an_integer() -> None:
    label = LabelFields.model_json_schema()["properties"]["label"]
    assert [kind["type"] for kind in label["anyOf"]] == ["string", "integer"]
    assert "default" not in label
