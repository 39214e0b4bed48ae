"""Adapts the requests that schemathesis generates for the routes with pictures.

A JSON schema cannot describe a picture: every string is valid for the schema. The hooks replace the strings by
pictures. They leave out multipart bodies, in which a wrong type can be valid, because the number 7 and the text 7 are
the same bytes. tests/e2e/test_picture_tasks.py tests multipart bodies.
"""

import base64
from functools import cache
from typing import Any

import httpx
import schemathesis

from tests.e2e.picture_requests import IMAGE, MASK
from tests.e2e.process import TIMEOUT

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
    pictures = PICTURES
    if case.path == "/reproduce":
        pictures = {"image": own_picture(case.operation.base_url)}
    else:  # The default numbers take much longer.
        case.body.setdefault("num_pairs" if case.path == "/recognize" else "num_steps", 1)
    for name in pictures.keys() & case.body.keys():
        if isinstance(case.body[name], str):
            case.body[name] = base64.b64encode(pictures[name]).decode()


@cache
def own_picture(base_url: str) -> bytes:
    """Returns a picture that the service has drawn, which is the only kind that it draws again."""
    url = f"{base_url.rstrip('/')}/generate"
    body, headers = {"digit": 7, "num_steps": 1}, {"accept": "image/png"}
    return httpx.post(url, json=body, headers=headers, timeout=TIMEOUT).raise_for_status().content
