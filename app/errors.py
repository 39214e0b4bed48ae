"""All errors that a client can receive, each with its status and code.

UnfogError
├── MalformedJSON         400  the body is not JSON
├── MalformedRequest      400  the request is not valid HTTP
├── OriginNotAllowed      400  a preflight request from an origin that is not in UNFOG_CORS_ORIGINS
├── Unauthorized          401  an API key is required and the request has none
├── Forbidden             403  the API key is not valid
├── NotFound              404
├── MethodNotAllowed      405
├── NotAcceptable         406  the Accept header allows none of the formats
├── RequestTimeout        408  the head or the body did not arrive in time
├── BodyTooLarge          413
├── UnsupportedMediaType  415
├── InvalidRequest        422  a field has a value that is not permitted; names the field
├── HeadersTooLarge       431  a header, or all headers together, exceed the limit
├── InternalError         500  a bug; the answer has no details
├── DeadlineExceeded      504
├── HTTPError                  raised by the web framework; keeps its status
└── Unavailable                has a Retry-After header
    ├── Overloaded        429  the queue has no room
    ├── RateLimited       429  the caller exceeded its rate limit
    ├── Starting          503
    ├── Draining          503
    └── EngineFailed      503
"""

from collections.abc import Mapping
from http.client import responses
from typing import Any

# The names of RFC 9110 section 15. Python before 3.13 has older names for these two.
TITLES = {**responses, 413: "Content Too Large", 422: "Unprocessable Content"}


class UnfogError(Exception):
    """An error that is answered with a problem document (RFC 9457)."""

    status: int = 500
    code: str = "internal_error"
    detail: str = "something went wrong on our side"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or self.detail)
        self.detail = detail or self.detail

    @property
    def headers(self) -> dict[str, str]:
        """Returns the headers that this error adds to the answer."""
        return {}

    def problem(self, request_id: str) -> dict[str, Any]:
        """Returns the body of the answer, which is application/problem+json."""
        return {
            "type": "about:blank",
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
        }


class MalformedJSON(UnfogError):
    """The body is empty or not JSON."""

    status, code, detail = 400, "malformed_json", "the body is not JSON"


class MalformedRequest(UnfogError):
    """The request is not valid HTTP."""

    status, code, detail = 400, "malformed_request", "this is no HTTP request that can be understood"


class Unauthorized(UnfogError):
    """An API key is required and the request has none."""

    status, code = 401, "unauthorized"
    detail = "a key is needed, in Authorization: Bearer or in X-API-Key"

    @property
    def headers(self) -> dict[str, str]:
        """Returns the header that says how to send a key."""
        return {"WWW-Authenticate": 'Bearer realm="unfog"'}


class Forbidden(UnfogError):
    """The API key of the request is not valid."""

    status, code, detail = 403, "forbidden", "this key is not, or no longer, valid"


class OriginNotAllowed(UnfogError):
    """A CORS preflight request comes from an origin that is not permitted."""

    status, code = 400, "origin_not_allowed"  # not 403, which means a wrong API key


class NotFound(UnfogError):
    """No route has this path."""

    status, code, detail = 404, "not_found", "there is nothing at this path"


class MethodNotAllowed(UnfogError):
    """The path has a route, but not for this method."""

    status, code, detail = 405, "method_not_allowed", "this path does not take this method"

    def __init__(self, allow: str) -> None:
        super().__init__()
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        """Returns the header with the methods that the path takes."""
        return {"Allow": self.allow}


class NotAcceptable(UnfogError):
    """The Accept header allows none of the available formats."""

    status, code = 406, "not_acceptable"

    def __init__(self, available: tuple[str, ...]) -> None:
        super().__init__(f"Accept must allow one of {', '.join(available)}")


class RequestTimeout(UnfogError):
    """The head or the body of the request did not arrive in time."""

    status, code, detail = 408, "request_timeout", "the request did not arrive in time"


class BodyTooLarge(UnfogError):
    """The body is larger than the limit."""

    status, code = 413, "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes")


class UnsupportedMediaType(UnfogError):
    """The body is not declared as JSON."""

    status, code, detail = 415, "unsupported_media_type", "Content-Type must be application/json"


class InvalidRequest(UnfogError):
    """A field has a value that is not permitted. `errors` lists the fields: [{"loc": [...], "msg": ...}]."""

    status, code = 422, "invalid_request"

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        first = errors[0]
        super().__init__(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
        self.errors = errors

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidRequest":
        """Returns the error for one field of the body."""
        return cls([{"loc": ["body", field], "msg": message}])

    def problem(self, request_id: str) -> dict[str, Any]:
        """Returns the body of the answer, with a list of all wrong fields."""
        return {**super().problem(request_id), "errors": self.errors}


class HeadersTooLarge(UnfogError):
    """A header, or all headers together, exceed the limit (app/server/framing.py)."""

    status, code, detail = 431, "headers_too_large", "The headers are too large"


class InternalError(UnfogError):
    """A bug of the service. The log has the details, the answer has none."""


class DeadlineExceeded(UnfogError):
    """The timeout of the request ended before its last image was finished."""

    status, code, detail = 504, "deadline_exceeded", "the request's time ran out"


class HTTPError(UnfogError):
    """An error that the web framework raised, with its status and headers.

    The code is that of the error in this module with the same status, or `http_error` if there is none.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        # The framework's message about a server error could reveal internals.
        super().__init__(detail if status < 500 else None)
        self.status, self.code = status, _CODES.get(status, "http_error")
        self._headers = dict(headers or {})

    @property
    def headers(self) -> dict[str, str]:
        """Returns the headers that the framework has set."""
        return self._headers


_CODES: dict[int, str] = {
    error.status: error.code
    for error in (
        MalformedRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        NotAcceptable,
        RequestTimeout,
        BodyTooLarge,
        UnsupportedMediaType,
        InternalError,
    )
}


class Unavailable(UnfogError):
    """The request cannot be answered now. `retry_after` is the number of seconds after which to try again."""

    def __init__(self, retry_after: int, detail: str | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Returns the Retry-After header."""
        return {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable):
    """The queue is full, or too long for the deadline of a request."""

    status, code, detail = 429, "overloaded", "the queue has no room for this request"


class RateLimited(Unavailable):
    """The caller has exceeded its rate limit."""

    status, code, detail = 429, "rate_limited", "too many requests from this caller"


class Starting(Unavailable):
    """The service is loading and warming up its checkpoints."""

    status, code, detail = 503, "starting", "the service is starting"


class Draining(Unavailable):
    """The service is shutting down. It still finishes the admitted requests."""

    status, code, detail = 503, "draining", "the service is shutting down"


class EngineFailed(Unavailable):
    """The engine has failed. Only a restart of the service helps."""

    status, code, detail = 503, "engine_failed", "the engine has failed"
