import json
from http import HTTPStatus

import pytest

from app import errors
from app.errors import UnfogError

# Python before 3.13 has older phrases for these statuses.
RFC_9110_PHRASES = {413: "Content Too Large", 422: "Unprocessable Content"}
EVERY_ERROR: list[tuple[UnfogError, int, str]] = [
    (errors.MalformedJSON(), 400, "malformed_json"),
    (errors.MalformedRequest(), 400, "malformed_request"),
    (errors.Unauthorized(), 401, "unauthorized"),
    (errors.Forbidden(), 403, "forbidden"),
    (errors.QuotaExceeded("There are already 1000 files"), 403, "quota_exceeded"),
    (errors.OriginNotAllowed("Disallowed CORS origin"), 400, "origin_not_allowed"),
    (errors.NotFound(), 404, "not_found"),
    (errors.MethodNotAllowed("POST"), 405, "method_not_allowed"),
    (errors.NotAcceptable(("image/png",)), 406, "not_acceptable"),
    (errors.RequestTimeout(), 408, "request_timeout"),
    (errors.Conflict(), 409, "conflict"),
    (errors.BodyTooLarge(10), 413, "body_too_large"),
    (errors.UnsupportedMediaType(), 415, "unsupported_media_type"),
    (errors.InvalidRequest.of("digit", "too large"), 422, "invalid_request"),
    (errors.InvalidImage.of("image", "The file is empty"), 422, "invalid_image"),
    (errors.HeadersTooLarge(), 431, "headers_too_large"),
    (errors.Overloaded(3), 429, "overloaded"),
    (errors.RateLimited(3), 429, "rate_limited"),
    (errors.InternalError(), 500, "internal_error"),
    (errors.NotAvailable("CLIP is turned off"), 501, "not_available"),
    (errors.Starting(3), 503, "starting"),
    (errors.Draining(3), 503, "draining"),
    (errors.EngineFailed(3), 503, "engine_failed"),
    (errors.ReplicaLost(3), 502, "replica_lost"),
    (errors.NoReplica(3), 503, "no_replica"),
    (errors.StorageUnavailable(3), 503, "storage_unavailable"),
    (errors.StorageFull(), 507, "storage_full"),
    (errors.DeadlineExceeded(), 504, "deadline_exceeded"),
    (errors.HTTPError(426, "Use HTTP/2"), 426, "http_error"),
]
cases = pytest.mark.parametrize(
    ("error", "status", "code"), [pytest.param(*case, id=f"{case[1]}-{case[2]}") for case in EVERY_ERROR]
)


def leaf_classes(kind: type[UnfogError]) -> set[type[UnfogError]]:
    children = kind.__subclasses__()
    return set.union(*map(leaf_classes, children)) if children else {kind}


@cases
def test_each_error_has_its_status_and_code(error: UnfogError, status: int, code: str) -> None:
    assert (error.status, error.code) == (status, code)


def test_table_contains_every_error_class() -> None:
    assert {type(error) for error, _, _ in EVERY_ERROR} == leaf_classes(UnfogError)


@cases
def test_problem_document_has_the_members_of_rfc_9457(error: UnfogError, status: int, code: str) -> None:
    problem = json.loads(json.dumps(error.problem("an-id")))
    extra = problem.pop("errors", None)
    assert problem == {
        "type": "about:blank",
        "title": RFC_9110_PHRASES.get(status, HTTPStatus(status).phrase),
        "status": status,
        "detail": error.detail,
        "code": code,
        "request_id": "an-id",
    }
    assert (extra is not None) is (status == 422)
    assert error.detail
    assert str(error) == error.detail


@cases
def test_retry_after_is_sent_with_429_502_and_503_only(error: UnfogError, status: int, code: str) -> None:
    assert error.headers.get("Retry-After") == ("3" if status in (429, 502, 503) else None)


def test_unauthorized_sends_www_authenticate() -> None:
    assert errors.Unauthorized().headers == {"WWW-Authenticate": 'Bearer realm="unfog"'}


def test_method_not_allowed_lists_the_supported_methods() -> None:
    error = errors.MethodNotAllowed("GET, HEAD")
    assert error.headers == {"Allow": "GET, HEAD"}
    assert error.detail == "This route supports only GET, HEAD"


def test_invalid_request_names_the_field() -> None:
    problem = errors.InvalidRequest.of("count", "Input should be less").problem("an-id")
    assert problem["errors"] == [{"loc": ["body", "count"], "msg": "Input should be less"}]
    assert problem["detail"] == "body.count: Input should be less"


def test_detail_replaces_the_default_and_states_when_to_retry() -> None:
    assert errors.Overloaded(1, "Too long").problem("an-id")["detail"] == "Too long. Retry after 1 s"
    assert errors.Overloaded(4).detail == "The queue has no room for this request. Retry after 4 s"
