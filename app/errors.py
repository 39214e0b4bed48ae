"""Every error that a client can be told, each with its status and code.

UnfogError
├── MalformedJSON         400  the body is not JSON
├── MalformedRequest      400  not even HTTP
├── OriginNotAllowed      400  a page asks that no UNFOG_CORS_ORIGINS lists
├── Unauthorized          401  a key is asked for and none came
├── Forbidden             403  a wrong key came
├── NotFound              404
├── MethodNotAllowed      405
├── NotAcceptable         406  none of the formats asked for can be given
├── RequestTimeout        408  the head or the body did not arrive in time
├── BodyTooLarge          413
├── UnsupportedMediaType  415
├── InvalidRequest        422  understood, but not possible; says which field
├── HeadersTooLarge       431  a header, or all of them, over the limit
├── InternalError         500  a bug; tells nothing of it
├── DeadlineExceeded      504
├── HTTPError                  raised by the web framework; keeps its status
└── Unavailable                comes with Retry-After
    ├── Overloaded        429  no room
    ├── RateLimited       429  this caller came too often
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
    """What a client is told: a problem document (RFC 9457)."""

    status: int = 500
    code: str = "internal_error"
    detail: str = "something went wrong on our side"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or self.detail)
        self.detail = detail or self.detail

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside the body."""
        return {}

    def problem(self, request_id: str) -> dict[str, Any]:
        """The body, application/problem+json."""
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
    """No HTTP request that can be understood."""

    status, code, detail = 400, "malformed_request", "this is no HTTP request that can be understood"


class Unauthorized(UnfogError):
    """A key is asked for, and none came."""

    status, code = 401, "unauthorized"
    detail = "a key is needed, in Authorization: Bearer or in X-API-Key"

    @property
    def headers(self) -> dict[str, str]:
        """How to show one."""
        return {"WWW-Authenticate": 'Bearer realm="unfog"'}


class Forbidden(UnfogError):
    """A key came that opens nothing."""

    status, code, detail = 403, "forbidden", "this key is not, or no longer, valid"


class OriginNotAllowed(UnfogError):
    """A browser asks whether a page may call, and it may not."""

    status, code = 400, "origin_not_allowed"  # no 403, which is somebody with a wrong key


class NotFound(UnfogError):
    """No such route."""

    status, code, detail = 404, "not_found", "there is nothing at this path"


class MethodNotAllowed(UnfogError):
    """The route exists, the method does not."""

    status, code, detail = 405, "method_not_allowed", "this path does not take this method"

    def __init__(self, allow: str) -> None:
        super().__init__()
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        """The methods that the path takes."""
        return {"Allow": self.allow}


class NotAcceptable(UnfogError):
    """The Accept header rules out every format."""

    status, code = 406, "not_acceptable"

    def __init__(self, available: tuple[str, ...]) -> None:
        super().__init__(f"Accept must allow one of {', '.join(available)}")


class RequestTimeout(UnfogError):
    """The client took too long to say what it wants."""

    status, code, detail = 408, "request_timeout", "the request did not arrive in time"


class BodyTooLarge(UnfogError):
    """The body passed the limit while it arrived."""

    status, code = 413, "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes")


class UnsupportedMediaType(UnfogError):
    """The body is not declared as JSON."""

    status, code, detail = 415, "unsupported_media_type", "Content-Type must be application/json"


class InvalidRequest(UnfogError):
    """Understood, but not possible; `errors` says where: [{"loc": [...], "msg": ...}]."""

    status, code = 422, "invalid_request"

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        first = errors[0]
        super().__init__(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
        self.errors = errors

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidRequest":
        """One field that is wrong."""
        return cls([{"loc": ["body", field], "msg": message}])

    def problem(self, request_id: str) -> dict[str, Any]:
        """The problem with every wrong field."""
        return {**super().problem(request_id), "errors": self.errors}


class HeadersTooLarge(UnfogError):
    """A header or all headers together exceed the limit (app/server/framing.py)."""

    status, code, detail = 431, "headers_too_large", "The headers are too large"


class InternalError(UnfogError):
    """A bug. What it was stands in the log, never in the answer."""


class DeadlineExceeded(UnfogError):
    """The request's time ran out before its last image was done."""

    status, code, detail = 504, "deadline_exceeded", "the request's time ran out"


class HTTPError(UnfogError):
    """An error that the web framework raised, with its status and headers.

    The code is that of our error with the same status, or `http_error` where we have none.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        # What a framework says about a failure of the server may name internals.
        super().__init__(detail if status < 500 else None)
        self.status, self.code = status, _CODES.get(status, "http_error")
        self._headers = dict(headers or {})

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the framework set."""
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
    """Not now; `retry_after` says in whole seconds when to come back."""

    def __init__(self, retry_after: int, detail: str | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """When to come back."""
        return {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable):
    """The queue is full, or too long for the request's own deadline."""

    status, code, detail = 429, "overloaded", "the queue has no room for this request"


class RateLimited(Unavailable):
    """The caller has come as often as it may."""

    status, code, detail = 429, "rate_limited", "too many requests from this caller"


class Starting(Unavailable):
    """The checkpoint is being loaded and warmed up."""

    status, code, detail = 503, "starting", "the service is starting"


class Draining(Unavailable):
    """The service is about to stop and finishes what it has."""

    status, code, detail = 503, "draining", "the service is shutting down"


class EngineFailed(Unavailable):
    """The engine died; only a restart helps."""

    status, code, detail = 503, "engine_failed", "the engine has failed"
