"""Adapts the requests that schemathesis generates for the routes with pictures.

A JSON schema cannot describe a picture: every string is valid for the schema. The hooks replace the strings by
pictures. They leave out multipart bodies, in which a wrong type can be valid, because the number 7 and the text 7 are
the same bytes. tests/e2e/test_picture_tasks.py tests multipart bodies.
"""

import base64
from typing import Any

import schemathesis

from tests.e2e.picture_requests import IMAGE, MASK

PICTURES = {"image": IMAGE, "mask": MASK}


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            operation.get("requestBody", {"content": {}})["content"].pop("multipart/form-data", None)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if not isinstance(case.body, dict) or "image" not in case.body:
        return
    # The default numbers take much longer.
    case.body.setdefault("num_pairs" if case.path == "/recognize" else "num_steps", 1)
    for name in PICTURES.keys() & case.body.keys():
        if isinstance(case.body[name], str):
            case.body[name] = base64.b64encode(PICTURES[name]).decode()
