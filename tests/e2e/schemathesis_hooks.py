"""Adapts the requests that schemathesis generates for the routes with pictures or prompts.

A JSON schema cannot describe a picture, or a prompt that names one digit: every string is valid for the schema. The
hooks replace the strings by pictures and prompts. They leave out multipart bodies, in which a wrong type can be valid,
because the number 7 and the text 7 are the same bytes. They also leave out streams, because schemathesis compares each
event with the schema of the whole text. Other tests of this folder test both.
"""

import base64
from typing import Any, get_args

import schemathesis

from app.api.openai.schemas import MAX_PROMPT, Quality
from tests.app.api.openai.samples import mask
from tests.e2e.picture_requests import IMAGE, MASK

PICTURES = {"image": IMAGE, "mask": MASK}
TRANSPARENT_MASK = mask()
OPENAI = "/v1/"


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            operation.get("requestBody", {"content": {}})["content"].pop("multipart/form-data", None)
    for schema in raw_schema["components"]["schemas"].values():
        # Schemathesis takes long to generate any value. Other tests send every kind of value in ignored fields.
        fields = schema.get("properties", {})
        for name in [name for name, field in fields.items() if "whatever its value" in field.get("description", "")]:
            if not {"type", "anyOf", "$ref"} & set(fields[name]):
                del fields[name]


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if not isinstance(case.body, dict):
        return
    is_openai = case.path.startswith(OPENAI)
    prompt = case.body.get("prompt")
    if is_openai and isinstance(prompt, str) and 1 <= len(prompt) <= MAX_PROMPT:
        case.body["prompt"] = "a handwritten seven, please"
    if is_openai:
        if case.body.get("quality") in (None, *get_args(Quality)):
            case.body["quality"] = "medium"  # The default takes much longer.
        if case.body.get("stream") is True:
            case.body["stream"] = False
    if "image" not in case.body:
        return
    if not is_openai:  # The default numbers take much longer.
        case.body.setdefault("num_pairs" if case.path == "/recognize" else "num_steps", 1)
    for name, picture in (PICTURES | ({"mask": TRANSPARENT_MASK} if is_openai else {})).items():
        if isinstance(case.body.get(name), str):
            case.body[name] = base64.b64encode(picture).decode()
