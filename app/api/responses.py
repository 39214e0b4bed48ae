"""The media types of responses, and the descriptions of responses that the OpenAPI document contains."""

from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from app.api.schemas import Problem
from app.api.uploads import MULTIPART

JSON, PNG, ZIP, EVENTS = "application/json", "image/png", "application/zip", "text/event-stream"
GIF, WEBP = "image/gif", "image/webp"
OCTETS = "application/octet-stream"
ANIMATIONS = (WEBP, GIF)
FORMATS = (JSON, PNG, ZIP, EVENTS, *ANIMATIONS)  # If q values in Accept are equal, the first of these types is chosen.

BINARY = {"schema": {"type": "string", "format": "binary"}}
PNG_FORMAT = {PNG: BINARY}
IMAGE_FORMATS = {PNG: BINARY, ZIP: BINARY, EVENTS: {"schema": {"type": "string"}}, **dict.fromkeys(ANIMATIONS, BINARY)}
_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text, "content": _PROBLEM}
    for status, text in {
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
        503: "starting, draining or engine_failed, with Retry-After",
        504: "deadline_exceeded: the images were not finished before the deadline",
    }.items()
}
READ_ERRORS: dict[int | str, dict[str, Any]] = {  # of a GET route that needs an API key
    **{status: ERRORS[status] for status in (401, 403, 500, 503)},
    429: {**ERRORS[429], "description": "rate_limited: the rate limit is exceeded, with Retry-After"},
}
PICTURE_ERRORS = ERRORS | {
    413: {**ERRORS[413], "description": "body_too_large: the body exceeds UNFOG_MAX_IMAGE_BYTES"},
    415: {**ERRORS[415], "description": "unsupported_media_type: Content-Type is neither JSON nor multipart/form-data"},
    422: {
        **ERRORS[422],
        "description": "invalid_request: a field is missing, unknown or invalid. invalid_image: a picture cannot be "
        "decoded, is animated, or is larger than 4,096 x 4,096 pixels",
    },
}
CLIP_ERRORS: dict[int | str, dict[str, Any]] = {
    501: {"model": Problem, "description": "not_available: the service runs without CLIP", "content": _PROBLEM}
}


def picture_route(
    path: str,
    name: str,
    request: type[BaseModel],
    response: type[BaseModel],
    formats: dict[str, Any] = IMAGE_FORMATS,
    *,
    needs_clip: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a route for pictures, with the schemas of both content types of its body.

    `formats` are the media types of the response besides JSON.
    """
    schema = {"schema": {"$ref": f"#/components/schemas/{request.__name__}"}}
    content = {JSON: schema, MULTIPART: {"schema": {"$ref": f"#/components/schemas/{request.__name__}Form"}}}
    return {
        "path": path,
        "operation_id": name,
        "response_class": JSONResponse,
        "responses": {
            200: {
                "model": response,
                "description": "the result, in the format that Accept selects",
                "content": formats,
            },
            **PICTURE_ERRORS,
            **(CLIP_ERRORS if needs_clip else {}),
        },
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }
