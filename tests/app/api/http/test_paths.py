import asyncio

import httpx
import pytest
from fastapi import APIRouter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match, Route

from app.api.http.paths import ExactRoutes, Paths, methods_of, named_routes

router, other = APIRouter(), APIRouter()
for path in ("/health", "/v2", "/v2/models/{name}", "/v2/models/{name}/ready", "/static/{name}"):
    router.add_api_route(path, lambda: None)
other.add_api_route("/generate", lambda: None, methods=["POST"])


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/health", "/health"),
        ("/generate", "/generate"),
        ("/icon.svg", "/icon.svg"),
        ("/v2", "/v2"),
        ("/v2/models/default", "/v2/models/{name}"),
        ("/v2/models/{name}", "/v2/models/{name}"),
        ("/v2/models/a b\n", "/v2/models/{name}"),
        ("/v2/models/default/ready", "/v2/models/{name}/ready"),
        ("/static/main.js", "/static/{name}"),
    ],
)
def test_path_has_the_template_of_its_route(path: str, template: str) -> None:
    paths = Paths(router.routes, other.routes, exact=["/icon.svg"])
    assert paths.template_of(path) == template
    assert path in paths


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/health/", "/Health", "/healthz", "health", "/v2/", "/v2/models", "/v2/models/"),
        *("/v2/models/a/b", "/v2/models//ready", "/v2/models/default/ready/", "/static/a/b", "/icon.svg/"),
    ],
)
def test_path_without_a_route_has_no_template(path: str) -> None:
    paths = Paths(router.routes, other.routes, exact=["/icon.svg"])
    assert paths.template_of(path) is None
    assert path not in paths


def test_templates_are_the_paths_of_the_routes() -> None:
    assert Paths(router.routes, exact=["/icon.svg"]).templates == {route.path for route in router.routes}  # type: ignore[attr-defined]


def test_paths_without_routes_contain_nothing() -> None:
    assert "/" not in Paths()
    assert Paths().templates == frozenset()


async def answers_of(routes: list[BaseRoute]) -> list[tuple[int, str, str | None]]:
    """Returns the status, the body and the header Allow of some requests."""
    requests = [
        ("GET", "/same"),
        ("POST", "/same"),
        ("PUT", "/same"),
        ("GET", "/posted"),
        ("POST", "/posted"),
        ("GET", "/named/a"),
        ("GET", "/named/fixed"),
        ("GET", "/same/"),
        ("GET", "/SAME"),
        ("GET", "/"),
    ]
    transport = httpx.ASGITransport(Starlette(routes=routes))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [await client.request(method, path) for method, path in requests]
    return [(answer.status_code, answer.text, answer.headers.get("allow")) for answer in answers]


def test_exact_routes_do_not_change_the_answers() -> None:
    def route(path: str, method: str) -> Route:
        async def endpoint(request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"{method} {path} {request.path_params}")

        return Route(path, endpoint, methods=[method])

    routes: list[BaseRoute] = [
        route("/same", "GET"),
        route("/same", "POST"),
        route("/posted", "POST"),
        route("/named/fixed", "GET"),
        route("/named/{name}", "GET"),
    ]
    answers = asyncio.run(answers_of([ExactRoutes(routes), *routes]))
    assert answers == asyncio.run(answers_of(routes))
    # The framework redirects /same/ to /same.
    assert [status for status, _, _ in answers] == [200, 200, 405, 405, 200, 200, 200, 307, 404, 404]
    assert [text.split()[0] for _, text, _ in answers[:2]] == ["GET", "POST"]


def test_exact_routes_match_only_paths_of_routes_without_parameters() -> None:
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.url.path)

    routes: list[BaseRoute] = [Route("/a", endpoint), Route("/{name}", endpoint)]
    assert [route.matches({"type": "http", "method": "GET", "path": "/a"})[0] for route in routes] == [Match.FULL] * 2
    exact = ExactRoutes(routes)
    assert exact.matches({"type": "http", "method": "GET", "path": "/a"})[0] is Match.FULL
    assert exact.matches({"type": "http", "method": "GET", "path": "/b"})[0] is Match.NONE


def test_methods_of_a_path_are_those_of_all_its_routes() -> None:
    routes = APIRouter()
    for method, path in (("GET", "/files"), ("POST", "/files"), ("GET", "/files/{file}"), ("DELETE", "/files/{file}")):
        routes.add_api_route(path, lambda: None, methods=[method])
    assert methods_of("/files", routes.routes) == {"GET", "POST"}
    assert methods_of("/files/a", routes.routes) == {"GET", "DELETE"}
    assert methods_of("/files/a/b", routes.routes) == set()
    assert named_routes(routes.routes) == {"/files": "GET, POST /files", "/files/{file}": "DELETE, GET /files/{file}"}
