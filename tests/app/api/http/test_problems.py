"""Tests of the responses to errors that the web framework raises."""

import asyncio

import httpx
import pytest
from starlette.exceptions import HTTPException

from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeRunner


def response_to(error: HTTPException, method: str = "GET") -> httpx.Response:
    """Returns the response of the application if a route raises the error."""
    app = create_app(Settings(), FakeRunner)

    @app.get("/raises")
    async def raises() -> None:
        raise error

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, "/raises")

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("status", "title", "code"),
    [
        (400, "Bad Request", "malformed_request"),
        (401, "Unauthorized", "unauthorized"),
        (403, "Forbidden", "forbidden"),
        (404, "Not Found", "not_found"),
        (405, "Method Not Allowed", "method_not_allowed"),
        (406, "Not Acceptable", "not_acceptable"),
        (408, "Request Timeout", "request_timeout"),
        (413, "Content Too Large", "body_too_large"),
        (415, "Unsupported Media Type", "unsupported_media_type"),
        (426, "Upgrade Required", "http_error"),
        (418, "I'm a Teapot", "http_error"),
        (499, "Error", "http_error"),
        (500, "Internal Server Error", "internal_error"),
        (503, "Service Unavailable", "http_error"),
        (599, "Error", "http_error"),
    ],
)
def test_framework_error_keeps_its_status_and_headers(status: int, title: str, code: str) -> None:
    answer = response_to(HTTPException(status, "a message", {"X-More": "1"}))
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["title"] == title
    assert problem["request_id"] == answer.headers["x-request-id"]
    if status != 404:
        assert answer.headers["x-more"] == "1"
        assert ("a message" in problem["detail"]) is (status < 500)


def detail_of(path: str, **settings: str) -> str:
    """Returns the detail of the error for a path without a route, in the format of any of the protocols."""
    app = create_app(Settings(**settings), FakeRunner)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path)

    answer = asyncio.run(ask())
    assert answer.status_code == 404
    match answer.json():
        case {"detail": str(detail), "code": "not_found"}:
            return detail
        case {"error": {"message": str(message), "type": "not_found_error", "param": None, "code": "not_found"}}:
            return message
        case {"error": str(message)}:
            return message
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize(
    ("path", "intended"),
    [
        ("/recognise", "POST /recognize"),
        ("/generate/", "POST /generate"),
        ("/Generate", "POST /generate"),
        ("/api/generate", "POST /generate"),
        ("/model", "GET /models"),
        ("/v1/image/generations", "POST /v1/images/generations"),
        ("/v2/models/default/inferr", "POST /v2/models/{name}/infer"),
        ("/v1/file", "GET, POST /v1/files"),
        ("/v1/batche", "GET, POST /v1/batches"),
    ],
)
def test_unknown_path_is_answered_with_the_most_similar_route(path: str, intended: str) -> None:
    assert detail_of(path) == f"No route has this path. Did you mean {intended}? /docs lists all routes"


@pytest.mark.parametrize("path", ["/xyz", "/static/", f"/generate/{'generate/' * 10}", "/%00%ff<b>"])
def test_unknown_path_that_is_similar_to_no_documented_route_is_answered_with_the_documents(path: str) -> None:
    assert detail_of(path) == "No route has this path. /docs lists all routes"


def test_documents_that_are_turned_off_are_not_named() -> None:
    assert detail_of("/recognise", docs="off") == "No route has this path. Did you mean POST /recognize?"
    assert detail_of("/openapi.json", docs="off") == "No route has this path"


def test_framework_response_without_a_body_keeps_its_status() -> None:
    answer = response_to(HTTPException(304, headers={"ETag": '"a"'}))
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", '"a"')


ALLOWED = {
    "/health": "GET, HEAD",
    "/generate": "POST",
    "/v1/files": "GET, HEAD, POST",
    "/v1/files/file-1": "DELETE, GET, HEAD",
    "/v1/files/file-1/content": "GET, HEAD",
    "/v1/batches": "GET, HEAD, POST",
    "/v1/batches/batch_1": "GET, HEAD",
    "/v1/batches/batch_1/cancel": "POST",
}


@pytest.mark.parametrize("path", ALLOWED)
def test_allow_header_lists_the_methods_of_all_routes_with_the_path(path: str) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Settings(), FakeRunner))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request("PATCH", path)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["allow"]) == (405, ALLOWED[path])


def test_head_has_the_headers_of_get_and_no_body() -> None:
    for method in ("GET", "HEAD"):
        answer = response_to(HTTPException(426, "a message"), method)
        assert answer.status_code == 426
        assert bool(answer.content) is (method == "GET")
        assert int(answer.headers["content-length"]) > 0
