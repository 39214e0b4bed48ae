"""The formats of error responses. The path of a request determines the format."""

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from app.api.http.media_types import PROBLEM_JSON
from app.errors import DeadlineExceeded, InvalidFields, UnfogError

OPENAI_PATH, INFERENCE_PATH = "/v1", "/v2"
OPENAI_TYPES = {  # status -> type of the error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

ErrorFormat = Callable[[UnfogError, str], JSONResponse]  # an error and the request id -> response


def format_of(path: str) -> ErrorFormat:
    """Returns the format of the errors of a path."""
    for prefix, error_format in ((OPENAI_PATH, _openai_response), (INFERENCE_PATH, _inference_response)):
        if path == prefix or path.startswith(f"{prefix}/"):
            return error_format
    return _problem_response


def data_of_error(path: str, error: UnfogError, request_id: str) -> dict[str, Any]:
    """Returns the data of the event `error`, which ends a stream of this path."""
    return {"error": openai_error(error)} if path.startswith(f"{OPENAI_PATH}/") else error.problem(request_id)


def place_of_fields(path: str) -> tuple[str, ...]:
    """Returns the location of the fields of a task in a request to this path."""
    return ("body", "parameters") if path.startswith(f"{INFERENCE_PATH}/") else ("body",)


def _problem_response(error: UnfogError, request_id: str) -> JSONResponse:
    return JSONResponse(error.problem(request_id), error.status, error.headers, media_type=PROBLEM_JSON)


def _openai_response(error: UnfogError, request_id: str) -> JSONResponse:
    headers = error.headers
    if isinstance(error, DeadlineExceeded):
        headers = {**headers, "x-should-retry": "false"}  # The clients of OpenAI otherwise send the request again.
    return JSONResponse({"error": openai_error(error)}, _status_of(error), headers)


def openai_error(error: UnfogError) -> dict[str, Any]:
    """Returns the object that describes an error in the OpenAI API."""
    message, param = error.detail, None
    if isinstance(error, InvalidFields):
        location, reason = error.errors[0]["loc"][1:], error.errors[0]["msg"]
        if location:
            param = ".".join(map(str, location))
            message = f"{param}: {reason}"
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = OPENAI_TYPES.get(error.status, default)
    return {"message": message, "type": kind, "param": param, "code": error.code}


def _inference_response(error: UnfogError, request_id: str) -> JSONResponse:
    return JSONResponse({"error": error.detail}, _status_of(error), error.headers)


def _status_of(error: UnfogError) -> int:
    """Returns the status of an error in both protocols. They use 400 instead of 422."""
    return 400 if isinstance(error, InvalidFields) else error.status
