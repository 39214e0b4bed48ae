"""Defines every error that a client can receive, with its HTTP status and its code.

UnfogError
├── MalformedJSON         400  the body is empty or not JSON
├── MalformedRequest      400  the request is not valid HTTP
├── OriginNotAllowed      400  CORS preflight from an origin that is not in UNFOG_CORS_ORIGINS
├── Unauthorized          401  an API key is required and the request has none
├── Forbidden             403  the API key is invalid
├── QuotaExceeded         403  the files of an API key would exceed a limit
├── NotFound              404  no route has this path, or nothing with this id exists
├── MethodNotAllowed      405  the route does not support the method
├── NotAcceptable         406  the Accept header allows none of the available formats
├── RequestTimeout        408  the headers or the body did not arrive in time
├── Conflict              409  the state of a batch does not permit the request
├── BodyTooLarge          413  the body exceeds UNFOG_MAX_BODY_BYTES or UNFOG_MAX_IMAGE_BYTES
├── UnsupportedMediaType  415  the route does not support the Content-Type
├── InvalidFields              lists the fields that are wrong
│   ├── InvalidRequest    422  a field is missing, unknown or invalid
│   └── InvalidImage      422  a field is not a picture that can be decoded
├── HeadersTooLarge       431  the headers exceed a size limit
├── InternalError         500  a bug; the response has no details
├── NotAvailable          501  the service runs without the optional part that the route needs
├── DeadlineExceeded      504  the images were not finished before the deadline
├── StorageFull           507  there is no room for files and results
├── HTTPError                  raised by the web framework; keeps its status
└── Unavailable                has a Retry-After header
    ├── Overloaded        429  the queue is full or a deadline cannot be met
    ├── RateLimited       429  the caller exceeded its rate limit
    ├── Starting          503  the checkpoints are being loaded and warmed up
    ├── Draining          503  the service is shutting down
    ├── StorageUnavailable 503  the database does not answer
    ├── EngineFailed      503  the engine has failed; the service must be restarted
    ├── ReplicaLost       502  the replica that had the request has stopped; only Ray's proxy sends it
    └── NoReplica         503  no replica runs; only Ray's proxy sends it
"""

from collections.abc import Mapping
from http.client import responses
from typing import Any, Self

# The reason phrases of RFC 9110, section 15. Python before 3.13 has older phrases for these statuses.
TITLES = {**responses, 413: "Content Too Large", 422: "Unprocessable Content"}


class FieldError(Exception):
    """The value of a field is not permitted. A protocol converts it to its own error, which says where the field is."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


class UnfogError(Exception):
    """An error whose response is a problem document (RFC 9457)."""

    status: int = 500
    code: str = "internal_error"
    detail: str = "Internal error. Retry, or report the request id (X-Request-ID) to the operator"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or self.detail)
        self.detail = detail or self.detail

    @property
    def headers(self) -> dict[str, str]:
        """The headers that this error adds to the response."""
        return {}

    def problem(self, request_id: str) -> dict[str, Any]:
        """Returns the body of the response (application/problem+json)."""
        return {
            "type": "about:blank",
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
        }


class MalformedJSON(UnfogError):
    status, code, detail = 400, "malformed_json", "The body is not valid JSON in UTF-8"


class MalformedRequest(UnfogError):
    status, code, detail = 400, "malformed_request", "The request is not valid HTTP"


class Unauthorized(UnfogError):
    status, code = 401, "unauthorized"
    detail = "An API key is required. Send it as Authorization: Bearer <key> or as X-API-Key: <key>"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Bearer realm="unfog"'}


class Forbidden(UnfogError):
    status, code, detail = 403, "forbidden", "The API key is invalid or has been removed"


class QuotaExceeded(UnfogError):
    """The files and results of an API key would exceed a limit of the settings."""

    status, code = 403, "quota_exceeded"


class OriginNotAllowed(UnfogError):
    status, code = 400, "origin_not_allowed"  # 400 is used, because 403 means an invalid API key


class NotFound(UnfogError):
    status, code, detail = 404, "not_found", "No route has this path"


class MethodNotAllowed(UnfogError):
    """`allow` is the value of the Allow header: the supported methods, separated by commas."""

    status, code = 405, "method_not_allowed"

    def __init__(self, allow: str) -> None:
        super().__init__(f"This route supports only {allow}")
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow}


class NotAcceptable(UnfogError):
    status, code = 406, "not_acceptable"

    def __init__(self, available: tuple[str, ...]) -> None:
        super().__init__(f"The Accept header must allow one of {', '.join(available)}")


class RequestTimeout(UnfogError):
    status, code, detail = 408, "request_timeout", "The request line and headers did not arrive in time"


class Conflict(UnfogError):
    """The state of a batch does not permit the request."""

    status, code, detail = 409, "conflict", "The batch has ended"


class BodyTooLarge(UnfogError):
    status, code = 413, "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body exceeds the limit of {limit} bytes")


class UnsupportedMediaType(UnfogError):
    status, code, detail = 415, "unsupported_media_type", "Content-Type must be application/json"


class InvalidFields(UnfogError):
    """Fields of the request are wrong. `errors` lists them as [{"loc": [...], "msg": ...}]."""

    status, code = 422, "invalid_request"

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        first = errors[0]
        super().__init__(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
        self.errors = errors

    @classmethod
    def of(cls, field: str, message: str, *index: int) -> Self:
        """Creates the error for one field of the body, or for the element of a list with this index."""
        return cls([{"loc": ["body", field, *index], "msg": message}])

    def problem(self, request_id: str) -> dict[str, Any]:
        """Returns the body of the response, with the list of fields."""
        return {**super().problem(request_id), "errors": self.errors}


class InvalidRequest(InvalidFields):
    """One or more fields are missing, unknown or invalid."""


class InvalidImage(InvalidFields):
    """A field is not a picture in a permitted format, or the picture is damaged, animated or too large."""

    code = "invalid_image"


class HeadersTooLarge(UnfogError):
    """The limits are defined in app/server/framing.py."""

    status, code = 431, "headers_too_large"
    detail = "The headers exceed a limit: 8 KiB per header, 32 KiB in total, fewer than 1,000 headers"


class InternalError(UnfogError):
    """A bug. Its details are logged, but not sent to the client."""


class NotAvailable(UnfogError):
    """The service runs without an optional part. The detail says how the operator adds it."""

    status, code = 501, "not_available"


class StorageFull(UnfogError):
    """The disk or the database has no room for files and results."""

    status, code, detail = (
        507,
        "storage_full",
        "The storage of files and results is full. Tell the operator, or retry later",
    )


class DeadlineExceeded(UnfogError):
    status, code = 504, "deadline_exceeded"
    detail = "The images were not finished before the deadline. Request fewer images or steps, or a longer timeout"


class HTTPError(UnfogError):
    """An error raised by the web framework. It keeps its status and headers.

    Its code is the code of the error in this module with the same status, or `http_error` if there is none.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        # Do not send the framework's message about a server error: it could reveal internals.
        super().__init__(detail if status < 500 else None)
        self.status, self.code = status, _CODES.get(status, "http_error")
        self._headers = dict(headers or {})

    @property
    def headers(self) -> dict[str, str]:
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
    """The request cannot be processed now. The client should retry after `retry_after` seconds."""

    def __init__(self, retry_after: int, detail: str | None = None) -> None:
        super().__init__(f"{detail or self.detail}. Retry after {retry_after} s")
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable):
    """The queue is full, or a request would miss its deadline if this one were admitted."""

    status, code, detail = 429, "overloaded", "The queue has no room for this request"


class RateLimited(Unavailable):
    status, code, detail = 429, "rate_limited", "The rate limit is exceeded"


class Starting(Unavailable):
    status, code, detail = 503, "starting", "The service is starting"


class Draining(Unavailable):
    """The service is shutting down and finishes only admitted requests."""

    status, code, detail = 503, "draining", "The service is shutting down"


class StorageUnavailable(Unavailable):
    """The database of files and batches does not answer."""

    status, code, detail = 503, "storage_unavailable", "The database of files and batches does not answer"


class EngineFailed(Unavailable):
    """The engine has failed and does not recover without a restart of the service."""

    status, code, detail = 503, "engine_failed", "The engine has failed and the service must be restarted"


class ReplicaLost(Unavailable):
    """The replica that had the request has stopped. Other replicas may accept it."""

    status, code, detail = 502, "replica_lost", "The replica that worked on this request has stopped"


class NoReplica(Unavailable):
    """No replica runs."""

    status, code, detail = 503, "no_replica", "No replica is ready"
