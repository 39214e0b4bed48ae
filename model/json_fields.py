"""Builds dataclasses from untrusted JSON values. Checks types and sizes first."""

from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_NUMBER = 2**53  # larger integers are not exact in JSON
MAX_CHARACTERS = 100
MAX_ITEMS = 1000


def build(kind: type[T], values: Any, name: str = "", required: Collection[str] = ()) -> T:
    """Returns an instance of the dataclass `kind` with these fields. Fields that are not given have their defaults.

    `name` is the path of `values` in the JSON document, for error messages. Raises ValueError if a field is unknown,
    has the wrong type or size, or is listed in `required` and missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be an object")
    hints, prefix = get_type_hints(kind), f"{name}." if name else ""
    for field in values:
        if field not in hints:
            raise ValueError(f"unknown field {prefix}{ascii(field)[1:-1][:MAX_CHARACTERS]}")
    for field in required:
        if field not in values:
            raise ValueError(f"{prefix}{field} is missing")
    return kind(**{field: _checked(value, hints[field], f"{prefix}{field}") for field, value in values.items()})


def _checked(value: Any, kind: Any, name: str) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, name)
    origin = get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise ValueError(f"{name} must be a list of at most {MAX_ITEMS} values")
        return tuple(_checked(item, get_args(kind)[0], f"{name}[{place}]") for place, item in enumerate(value))
    if origin is dict:
        return _checked_dict(value, get_args(kind), name)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}")
        return value
    description, is_valid = _SCALARS[kind]
    if not is_valid(value):
        raise ValueError(f"{name} must be {description}")
    return value


def _checked_dict(value: Any, kinds: tuple[Any, ...], name: str) -> dict[Any, Any]:
    key_kind, value_kind = kinds
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object")
    if value_kind is Any:
        return value
    return {_checked(k, key_kind, f"a key of {name}"): _checked(item, value_kind, name) for k, item in value.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # False for NaN


_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: (f"an integer of at most {MAX_NUMBER}", lambda value: type(value) is int and _is_number(value)),
    float: (f"a number of at most {MAX_NUMBER}", _is_number),
    bool: ("true or false", lambda value: type(value) is bool),
    str: (
        f"a string of at most {MAX_CHARACTERS} characters",
        lambda value: isinstance(value, str) and len(value) <= MAX_CHARACTERS,
    ),
}
