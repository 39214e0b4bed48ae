"""Tests docs/openai.md. test_api_document.py runs its examples."""

import re
from typing import Any

import pytest

from app.api.http.error_formats import OPENAI_TYPES, openai_error
from app.api.native.edit import EditRequest
from app.api.openai.images import EDITS_PATH, GENERATIONS_PATH
from app.api.openai.plans import OPENAI_MODELS
from app.api.openai.prompt import OTHER_NAMES, digit_of
from app.api.openai.schemas import UNSUPPORTED
from model.prompts import DIGIT_WORDS
from tests.app.api.examples import OPERATIONS
from tests.app.test_errors import EVERY_ERROR
from tests.docs.document import Row, codes, tables_in
from tests.docs.test_api_document import OPENAI, SCHEMAS, by, events_of, fields_of, types_in

REQUESTS = {"/v1/images/generations": "ImageGenerationRequest", "/v1/images/edits": "ImageEditRequest"}  # schemas
OWN = by("Field", OPENAI.table(f"POST {GENERATIONS_PATH}", "Field", "Default"))
EDIT = OWN | by("Field", OPENAI.table(f"POST {EDITS_PATH}", "Field", "Default"))


@pytest.mark.parametrize(("path", "rows"), [(GENERATIONS_PATH, OWN), (EDITS_PATH, EDIT)])
def test_tables_have_every_field_with_its_type_default_and_limits(path: str, rows: dict[str, Row]) -> None:
    schema = SCHEMAS[REQUESTS[path]]
    ignored = {name for name, field in schema["properties"].items() if not {"type", "anyOf"} & set(field)}
    assert set(rows) | ignored == set(schema["properties"])
    for name, row in rows.items():
        field: dict[str, Any] = schema["properties"][name]
        value = field.get("anyOf", [field])[0]
        assert row["Type"] == value["type"]
        assert (row["Default"] == "required") == (name in schema["required"])
        if "default" in field:
            assert row["Default"].strip("`") == str(field["default"]).lower()
        bounds = [value[key] for key in ("minLength", "maxLength", "minimum", "maximum") if key in value]
        if bounds and name != "model":  # its names are listed
            assert list(map(int, re.findall(r"\d+", row["Allowed values"].partition("(")[0]))) == bounds
        named = value.get("enum", [value["const"]] if "const" in value else [])
        named = value["anyOf"][0]["enum"] if name == "model" else named
        assert value["type"] == "boolean" or codes(row["Allowed values"]) == named


def test_ignored_and_refused_fields_are_named() -> None:
    generation, edit = OPENAI.section(f"POST {GENERATIONS_PATH}"), OPENAI.section(f"POST {EDITS_PATH}")
    (sentence,) = re.findall(r"The fields (.*) are ignored, whatever", generation)
    for path, named in (
        (GENERATIONS_PATH, set(codes(sentence))),
        (EDITS_PATH, set(codes(sentence)) - {"moderation", "style"} | {"input_fidelity"}),
    ):
        fields = SCHEMAS[REQUESTS[path]]["properties"]
        assert {name for name, field in fields.items() if not {"type", "anyOf"} & set(field)} == named
    assert "`moderation` and `style` are unknown, and `input_fidelity` is ignored. `markup` is refused" in edit
    assert "markup" in UNSUPPORTED


def test_names_of_openai_models_are_those_of_the_code() -> None:
    assert set(OPENAI_MODELS) <= set(codes(OWN["model"]["Meaning"]))


def test_strength_of_an_edit_is_the_default() -> None:
    default = EditRequest.model_fields["strength"].default
    assert f"the `strength` {default}." in OPENAI.section(f"POST {EDITS_PATH}")


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        (f"POST {GENERATIONS_PATH}", "CreatedImages"),
        ("GET /v1/models", "OpenAIModels"),
        ("Errors in the format of OpenAI", "OpenAIError"),
    ],
)
def test_field_table_has_exactly_the_fields_of_its_schema(heading: str, schema: str) -> None:
    (rows,) = (table for table in tables_in(OPENAI.section(heading)) if [*table[0]] == ["Field", "Type", "Meaning"])
    assert types_in(rows) == fields_of(SCHEMAS[schema])


def test_event_table_has_exactly_the_fields_of_each_event() -> None:
    documented = events_of(OPENAI.table("Image events", "Event"))
    both = documented.pop("both")
    stream = OPERATIONS[GENERATIONS_PATH].stream
    assert stream
    fields = {name: fields_of(SCHEMAS[model.__name__]) for name, model in stream.events.items()}
    assert fields.pop("error") == fields_of(SCHEMAS["OpenAIError"])
    assert {name: both | own for name, own in documented.items()} == fields


@pytest.mark.parametrize("row", OPENAI.table("Prompt", "Prompt"), ids=lambda row: str(row["Prompt"]))
def test_prompt_of_the_table_names_its_digit_or_is_refused(row: Row) -> None:
    (prompt,) = codes(row["Prompt"])
    if row["Digit"].isdigit():
        assert digit_of(prompt) == int(row["Digit"])
        return
    reasons = {"no digit": "names no digit", "two digits": "several digits", "single": "not a single", "contains": ": "}
    (expected,) = (reason for part, reason in reasons.items() if part in row["Digit"])
    with pytest.raises(ValueError, match=expected):
        digit_of(prompt)


def test_names_of_numbers_are_documented() -> None:
    named = set(codes(OPENAI.section("Prompt").split("These words are numbers")[1].split("in any case")[0]))
    powers = {"hundred", "thousand", "million", "billion", "trillion"}
    assert named == {"zero", "nineteen", "twenty", "thirty", "ninety", "dozen"} | powers
    assert len(OTHER_NAMES) == 10 + 8 + 6
    assert named <= {*DIGIT_WORDS, *OTHER_NAMES}


def test_types_of_errors_are_documented() -> None:
    rows = by("Field", OPENAI.table("Errors in the format of OpenAI", "Field"))
    types = {openai_error(error)["type"] for error, _, _ in EVERY_ERROR}
    assert types == set(codes(rows["error.type"]["Meaning"]))
    for status, kind in OPENAI_TYPES.items():
        assert f"`{kind}` ({status})" in rows["error.type"]["Meaning"]
