"""The types of the fields of requests, with their limits. Every protocol uses them for its own fields too."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from model.prompts import MAX_PROMPT_LENGTH, is_prompt
from model.spec import MAX_GUIDANCE_SCALE, MOST_DEFAULT_STEPS, MOST_STEPS, Sampler

OWN_PREFIX = "Value error, "  # pydantic adds it to the messages of our own validators


def _whole(value: Any) -> Any:
    """Converts 7.0 to 7, because both are integers in JSON Schema (validation draft 2020-12, section 6.1.1)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_null(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Rejects null with the error for a value of the wrong type. The field can be omitted, but not be null."""
    return handler(object() if value is None else value)


def may_be_absent(schema: dict[str, Any]) -> None:
    """Edits the JSON schema of a field that can be omitted, but not be null."""
    schema.pop("default")
    kinds = [kind for kind in schema.pop("anyOf") if kind != {"type": "null"}]
    schema.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


WHOLE = BeforeValidator(_whole)  # Use WHOLE after the bounds. Otherwise the JSON schema lacks them.
NOT_NULL = WrapValidator(_refuse_null)
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[Annotated[Number, Field(gt=0)] | None, NOT_NULL]
SamplerName = Annotated[Sampler | None, NOT_NULL]
GuidanceScale = Annotated[Annotated[Number, Field(ge=1, le=MAX_GUIDANCE_SCALE)] | None, NOT_NULL]
NumSteps = Annotated[Annotated[int, Field(ge=1, le=MOST_STEPS), WHOLE] | None, NOT_NULL]
# Fewer for a path from a picture: it can start at every timestep, and the table of plans keeps each path.
NumStepsOfPath = Annotated[Annotated[int, Field(ge=1, le=MOST_DEFAULT_STEPS), WHOLE] | None, NOT_NULL]
AppliedFit = Literal["resize", "digit"]  # how a picture became an image


def _check_prompt(text: str) -> str:
    if not is_prompt(text):
        raise ValueError("Input should have a character that is not white space")
    return text


# Matches a character that str.strip() keeps. \s of JSON Schema does not match the control characters in the brackets.
NOT_BLANK = r"[^\s\x1c-\x1f\x85]"
Prompt = Annotated[  # a text for CLIP
    str,
    Field(min_length=1, max_length=MAX_PROMPT_LENGTH, json_schema_extra={"pattern": NOT_BLANK}),
    AfterValidator(_check_prompt),
]


def problems_of(error: ValidationError) -> list[tuple[str, tuple[int | str, ...], str]]:
    """Returns the type, the location and the message of each invalid field.

    The input is left out, because it can be long or invalid Unicode.
    """
    items = error.errors(include_url=False, include_input=False, include_context=False)
    return [(item["type"], item["loc"], item["msg"].removeprefix(OWN_PREFIX)) for item in items]
