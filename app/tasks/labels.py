"""Classes as requests name them: by `label`, a name or a number, or by `digit` if the classes are the digits."""

import unicodedata
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator

from app.engine.interface import ModelInfo
from app.errors import FieldError
from app.tasks.fields import NOT_NULL, WHOLE, may_be_absent
from app.tasks.names import nearest
from model.prompts import is_text
from model.spec import MAX_NAME_LENGTH

MAX_DIGIT = 9
MAX_SHOWN = 40  # characters of an unknown label in an error
LABEL_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH}, {"type": "integer", "minimum": 0}]
}


def _name_or_number(value: Any, handler: ValidatorFunctionWrapHandler) -> str | int:
    """Accepts a name or a number. A union of pydantic would give an error for each of the two."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if is_number or (isinstance(value, str) and is_text(value, MAX_NAME_LENGTH)):
        return value
    raise ValueError("Input should be the name or the number of a class")


Label = Annotated[Annotated[Any, WrapValidator(_name_or_number), WithJsonSchema(LABEL_SCHEMA)] | None, NOT_NULL]
Digit = Annotated[Annotated[int, Field(ge=0, le=MAX_DIGIT), WHOLE] | None, NOT_NULL]


def label_field(description: str) -> Any:
    """Returns the default of a field `label` with this description."""
    return Field(default=None, description=description, json_schema_extra=may_be_absent)


class LabelFields(BaseModel):
    """The fields that name a class. A request has at most one of them."""

    label: Label = label_field("The class: its name, or its number from 0. GET /models lists the names.")
    digit: Digit = Field(
        default=None,
        description="The same as `label`, for a model whose classes are the digits.",
        json_schema_extra=may_be_absent,
    )


def label_of(info: ModelInfo, fields: LabelFields) -> int | None:
    """Returns the number of the class that a request names, or None if it names none.

    A request for a model with one class does not need to name it: its number is then 0. Raises FieldError if the
    request names two classes, or one that the model does not have.
    """
    if fields.digit is None:
        if fields.label is None:
            return 0 if info.num_classes == 1 else None
        return number_of(info, fields.label)
    if fields.label is not None:
        raise FieldError("label", "Send either label or digit, not both")
    if not info.has_digits:
        raise FieldError("digit", f"The classes of model '{info.name}' are not digits. Send label. {_listed(info)}")
    if fields.digit >= info.num_classes:
        largest = info.num_classes - 1
        raise FieldError("digit", f"Input should be less than or equal to {largest} for model '{info.name}'")
    return fields.digit


def required_label_of(info: ModelInfo, fields: LabelFields) -> int:
    """Returns the number of the class that a request names. Raises the errors of `label_of`, and if it names none."""
    label = label_of(info, fields)
    if label is None:
        raise missing_label(info, "Field required")
    return label


def missing_label(info: ModelInfo, message: str) -> FieldError:
    """Returns the error for a request that names no class: at the field that the classes of the model need."""
    return FieldError("digit" if info.has_digits else "label", message)


def number_of(info: ModelInfo, label: str | int, field: str = "label") -> int:
    """Returns the number of a class, given its name or its number. `field` is the field of a request that names it.

    A text is a name, exactly or without regard to case, or otherwise a number in decimal notation, as in a form. Raises
    FieldError if the model has no such class. The error names the nearest class.
    """
    names = info.class_names
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        folded = [folded_name(name) for name in names]
        if folded_name(label) in folded:
            return folded.index(folded_name(label))
        if label.isascii() and label.isdecimal():
            label = int(label)
    if isinstance(label, int) and label < len(names):
        return label
    raise FieldError(field, unknown_label(info, label))


def folded_name(text: str) -> str:
    """Returns a name without regard to case, and to the way in which Unicode composes its characters."""
    return unicodedata.normalize("NFC", text.lower())


def unknown_label(info: ModelInfo, label: str | int) -> str:
    """Returns the message for a class that the model does not have."""
    if isinstance(label, int):
        return f"Unknown label {_shown(str(label))}: the model '{info.name}' has the labels 0 to {info.num_classes - 1}"
    by_folded = {folded_name(name): name for name in info.class_names}
    near = nearest(folded_name(label), by_folded)
    hint = f". Did you mean '{by_folded[near]}'?" if near else "."
    return f"Unknown label '{_shown(label)}'{hint} {_listed(info)}"


def _shown(label: str) -> str:
    return label if len(label) <= MAX_SHOWN else f"{label[:MAX_SHOWN]}..."


def _listed(info: ModelInfo) -> str:
    if info.num_classes == 1:
        return f"The only class of model '{info.name}' is '{info.class_names[0]}'"
    return f"GET /models lists all {info.num_classes} names of model '{info.name}'"
