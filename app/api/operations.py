"""Declares the operations of the API, both for the routes and for the OpenAPI document.

A protocol declares an operation next to its route. FastAPI writes most of the document from the declaration (see
`Operation.arguments`). openapi.py adds what depends on the settings and on the served models.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from app import errors
from app.api.http.error_formats import format_of
from app.api.http.media_types import JSON, MULTIPART, PROBLEM_JSON
from app.api.http.picture_fields import multipart_schema
from app.errors import UnfogError
from app.settings import Settings
from model.clip import ClipNotInstalledError
from model.spec import ModelSpec

Schema = dict[str, Any]
BINARY: Schema = {"schema": {"type": "string", "format": "binary"}}
REF = "#/components/schemas/{model}"
REQUEST_ID = "5f1c7a9be0d34b6c8a2f4e6d7c9b0a18"  # in examples of errors
FILE = "(content of the file)"  # a file in an example of a multipart body
PICTURES = Path(__file__).parent / "example_pictures"

GROUPS = {  # name -> description, in the order of the document
    "Generate": "New images of a class.",
    "Pictures": "Tasks that start from a picture: as a file in multipart/form-data, or in base64 in JSON.",
    "Models": "What the served models can do.",
    "Operations": "The state of the service, its running images and its metrics.",
    "OpenAI": "The OpenAI Images API. Errors have its format.",
    "Batches": "Large jobs: files of requests, and batches that answer them.",
    "Open Inference": "The Open Inference Protocol, for clients of Triton and KServe. Errors have its format.",
}
# The description of each status of an error. The error codes that it contains select the examples of the status.
STATUS = {
    400: "malformed_json or malformed_request",
    401: "unauthorized: UNFOG_API_KEYS is set and the request has no API key",
    403: "forbidden: the API key is invalid",
    406: "not_acceptable: the Accept header allows none of the formats",
    408: "request_timeout: the body did not arrive within UNFOG_READ_TIMEOUT seconds",
    413: "body_too_large: the body exceeds UNFOG_MAX_BODY_BYTES",
    415: "unsupported_media_type: Content-Type is not application/json",
    422: "invalid_request: a field is missing, unknown or invalid, or the model does not support its value",
    429: "overloaded (the queue is full or a deadline could not be met) or rate_limited, with Retry-After",
    431: "headers_too_large: a header exceeds 8 KiB, all headers exceed 32 KiB, or there are 1,000 or more",
    500: "internal_error: a bug in the service",
    501: "not_available: the service runs without CLIP",
    503: "starting, draining or engine_failed, with Retry-After",
    504: "deadline_exceeded: the images were not finished before the deadline",
}
READ_STATUSES = {  # of a GET operation that needs an API key
    **{status: STATUS[status] for status in (401, 403, 429, 500, 503)},
    429: "rate_limited: the rate limit is exceeded, with Retry-After",
}
IMAGE_TOO_LARGE = "body_too_large: the body exceeds UNFOG_MAX_IMAGE_BYTES"


def picture(name: str) -> str:
    """Returns the picture of an example in base64."""
    return base64.b64encode((PICTURES / f"{name}.png").read_bytes()).decode()


def default_of(setting: str) -> Any:
    """Returns the default of a setting."""
    return Settings.model_fields[setting].default


# Examples of the errors that every operation can send. `Operation.errors` has further examples.
ERRORS: tuple[UnfogError, ...] = (
    errors.MalformedJSON(),
    errors.MalformedRequest(),
    errors.Unauthorized(),
    errors.Forbidden(),
    errors.QuotaExceeded("The limit of 1000 files is reached. Delete some of them first"),
    errors.RequestTimeout(f"The body did not arrive within {default_of('read_timeout'):g} s"),
    errors.Conflict(),
    errors.Overloaded(4),
    errors.HeadersTooLarge(),
    errors.RateLimited(12),
    errors.InternalError(),
    errors.NotAvailable(str(ClipNotInstalledError())),
    errors.Starting(10),
    errors.Draining(10),
    errors.EngineFailed(10),
    errors.StorageUnavailable(5),
    errors.DeadlineExceeded(),
    errors.StorageFull(),
)


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """The settings and the served models, which limit what requests may contain.

    `models` is empty if the checkpoints cannot be read yet.
    """

    settings: Settings
    models: Mapping[str, ModelSpec]

    @property
    def names(self) -> list[str]:
        """The names of the models."""
        return list(self.models or self.settings.model_paths)


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of events. `name` is the name of the schema of an event, and `events` has the schemas of their data."""

    name: str
    order: str
    events: Mapping[str, type[BaseModel]]

    @property
    def schemas(self) -> dict[str, Schema]:
        """The schema of one event, as in OpenAPI 3.2."""
        kinds = [_event_schema(name, data.__name__) for name, data in self.events.items()]
        return {self.name: {"title": self.name, "description": f"One event {self.order}", "oneOf": kinds}}

    def content(self, example: str) -> Schema:
        """Returns the media type object of the stream.

        OpenAPI 3.1 can describe a stream only as text. `x-itemSchema` has the meaning of `itemSchema` in OpenAPI 3.2.
        """
        text = f"Server-sent events, each with a line `event: name` and a line `data: JSON` (schema {self.name})."
        item = {"$ref": REF.format(model=self.name)}
        return {"schema": {"type": "string", "description": text}, "x-itemSchema": item, "example": example}


def _event_schema(name: str, model: str) -> Schema:
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"$ref": REF.format(model=model)}}
    return {
        "title": name,
        "type": "object",
        "properties": {"event": {"const": name}, "data": data},
        "required": ["event", "data"],
    }


def _nothing_more(operation: Schema, offer: Offer) -> dict[str, Schema]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """The declaration of an operation. Its route and its part of the OpenAPI document follow from it."""

    path: str
    name: str  # the operation id
    group: str  # of GROUPS
    summary: str
    method: str = "GET"
    answer: type[BaseModel] | None = None  # the schema of the JSON answer
    example: Any = None  # of the JSON answer
    description: str = "Successful Response"  # of the answer
    formats: Mapping[str, Schema] = field(default_factory=dict)  # the other media types of the answer
    stream: Stream | None = None
    body: Mapping[str, Schema] | None = None  # the media types of the request
    error: type[BaseModel] = Problem
    statuses: Mapping[int, str] = field(default_factory=dict)  # the statuses of errors -> description
    errors: Iterable[UnfogError] = ()  # examples besides ERRORS
    others: Mapping[int, Schema] = field(default_factory=dict)  # status -> a response that is not an error
    # Adds what depends on the settings and on the models. Returns the schemas of the request.
    complete: Callable[[Schema, Offer], dict[str, Schema]] = _nothing_more

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of FastAPI's route."""
        content = dict(self.formats)
        if self.answer:
            content = {JSON: {"example": self.example}, **content}
        answered: Schema = {"description": self.description, "content": content}
        if self.answer:
            answered["model"] = self.answer
        return {
            "path": self.path,
            "methods": [self.method],
            "operation_id": self.name,
            "tags": [self.group],
            "summary": self.summary,
            "response_class": JSONResponse if self.answer else Response,
            "responses": {200: answered, **self._refused, **self.others},
            "openapi_extra": {"requestBody": {"required": True, "content": self.body}} if self.body else None,
        }

    @property
    def models(self) -> list[type[BaseModel]]:
        """The schemas that FastAPI does not know: of the errors, and of the events of the stream."""
        return [self.error, *(self.stream.events.values() if self.stream else ())]

    @property
    def _refused(self) -> dict[int, Schema]:
        """The responses with the statuses of errors."""
        refused = {}
        for status, text in self.statuses.items():
            # The HTTP server itself refuses large headers, with a problem document on every path.
            is_problem = self.error is Problem or status == errors.HeadersTooLarge.status
            sent = [(error.code, *_sent(error, "/" if is_problem else self.path)) for error in (*ERRORS, *self.errors)]
            schema = Problem if is_problem else self.error
            described = {
                "schema": {"$ref": REF.format(model=schema.__name__)},
                "examples": {code: {"value": body} for code, at, body in sent if at == status and code in text},
            }
            refused[status] = {"description": text, "content": {PROBLEM_JSON if is_problem else JSON: described}}
        return refused


def unavailable(answer: type[BaseModel], example: Schema) -> dict[int, Schema]:
    """Returns the response of a probe with the status 503, which has the schema of the response with 200."""
    content = {JSON: {"example": example}}
    return {503: {"model": answer, "description": "Service Unavailable", "content": content}}


def _sent(error: UnfogError, path: str) -> tuple[int, Any]:
    """Returns the status and the body of the response for an error."""
    response = format_of(path)(error, REQUEST_ID)
    return response.status_code, json.loads(bytes(response.body))


def body_of(
    request: type[BaseModel], examples: Mapping[str, tuple[str, Schema]], pictures: Iterable[str] = ()
) -> dict[str, Schema]:
    """Returns the media types of a request. `examples` maps names to a summary and a JSON body.

    `pictures` has the names of the fields with pictures. If there are any, the body can also be multipart/form-data.
    """
    content = {JSON: _body(request.__name__, examples)}
    if fields := set(pictures):
        as_files = {
            name: (summary, {**body, **{each: _file(body[each]) for each in fields & set(body)}})
            for name, (summary, body) in examples.items()
        }
        content[MULTIPART] = _body(f"{request.__name__}Form", as_files)
    return content


def _body(schema: str, examples: Mapping[str, tuple[str, Schema]]) -> Schema:
    named = {name: {"summary": summary, "value": body} for name, (summary, body) in examples.items()}
    return {"schema": {"$ref": REF.format(model=schema)}, "examples": named}


def _file(value: Any) -> Any:
    return [FILE] * len(value) if isinstance(value, list) else FILE


def change_examples(operation: Schema, change: Callable[[Schema], Schema]) -> None:
    """Replaces the bodies in the examples of a request by changed copies, for a default model of other classes."""
    for content in operation["requestBody"]["content"].values():
        examples = content.get("examples", {})
        content["examples"] = {name: {**each, "value": change(each["value"])} for name, each in examples.items()}


def form_schema(schema: Schema) -> Schema:
    """Returns the schema of a multipart body, with an empty example for each optional field without a default.

    Without an example, Swagger UI fills in a made-up value, and sends it unless the user removes it.
    """
    form = multipart_schema({**schema, "title": f"{schema['title']}Form"})
    for name, schema in form["properties"].items():
        if "default" not in schema and name not in form["required"]:
            schema["examples"] = [""]
    return form


class Router(APIRouter):
    """A router that keeps the declarations of its operations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.operations: list[Operation] = []

    def operation(self, operation: Operation) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Returns a decorator that makes a function the endpoint of the operation."""
        self.operations.append(operation)
        return self.api_route(**operation.arguments)
