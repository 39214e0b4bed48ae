"""Compares the route with FastAPI's own route: both have the same endpoint."""

import asyncio
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response

from app.api.http.direct_route import DirectRoute
from app.main import WORK_ROUTERS


async def _address(request: Request, x_name: Annotated[str, Header(min_length=2)] = "default") -> str:
    return f"{x_name} at {request.url.path}"


async def _number(n: Annotated[int, Query(ge=0)] = 3) -> int:
    return n


async def _constant() -> str:
    return "constant"


async def endpoint(
    asked: Request,
    address: Annotated[str, Depends(_address)],
    number: Annotated[int, Depends(_number)],
    constant: Annotated[str, Depends(_constant)],
) -> Response:
    if b"fail" in await asked.body():
        raise ValueError
    return JSONResponse({"address": address, "number": number, "constant": constant}, headers={"X-Own": "1"})


async def answer_of(route_class: type[APIRoute], **request: Any) -> tuple[int, dict[str, str], Any]:
    app, router = FastAPI(), APIRouter(route_class=route_class)
    router.post("/path", response_class=JSONResponse)(endpoint)
    app.router.routes.extend(router.routes)

    @app.exception_handler(ValueError)
    async def failed(request: Request, error: ValueError) -> Response:
        return JSONResponse({"failed": request.url.path}, status_code=418)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.request(**{"method": "POST", "url": "/path", **request})
        return answer.status_code, dict(answer.headers), answer.json()


@pytest.mark.parametrize(
    ("request_", "status"),
    {
        "no parameters": ({}, 200),
        "an error of the endpoint": ({"content": b"fail"}, 418),
        "an error of the endpoint with parameters": ({"content": b"fail", "params": {"n": "4"}}, 418),
        "a query parameter": ({"params": {"n": "4"}}, 200),
        "an invalid query parameter": ({"params": {"n": "-4"}}, 422),
        "an unknown query parameter": ({"params": {"m": "-4"}}, 200),
        "a header": ({"headers": {"X-Name": "somebody"}}, 200),
        "an invalid header": ({"headers": {"x-name": "s"}}, 422),
        "an empty header": ({"headers": {"x-name": ""}}, 422),
        "another method": ({"method": "PUT"}, 405),
    }.values(),
)
def test_answer_is_the_same_as_with_the_route_of_fastapi(request_: dict[str, Any], status: int) -> None:
    found = asyncio.run(answer_of(DirectRoute, **request_))
    assert found == asyncio.run(answer_of(APIRoute, **request_))
    assert found[0] == status


def test_route_with_path_parameters_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot have a DirectRoute"):
        DirectRoute("/path/{name}", endpoint)


def test_direct_routes_declare_only_parameters_that_dependencies_have() -> None:
    routes = [route for router in WORK_ROUTERS for route in router.routes if isinstance(route, DirectRoute)]
    assert "/generate" in {route.path for route in routes}
    for route in routes:
        own = route.dependant
        assert not (own.query_params or own.header_params or own.cookie_params or own.body_params), route.path
        for each in own.dependencies:
            assert not (each.dependencies or each.path_params or each.cookie_params or each.body_params), route.path
            assert not any(field.field_info.is_required() for field in (*each.query_params, *each.header_params)), (
                route.path
            )
