"""Converts errors to responses, in the format of the protocol that the path belongs to."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from app import errors
from app.api.http.context import CLIENT_CLOSED_REQUEST, CLIENT_GONE, context_of
from app.api.http.error_formats import format_of, place_of_fields
from app.api.http.paths import DOCS_PATH, methods_of, named_routes
from app.api.http.requests import ClientGoneError
from app.metrics import Metrics
from app.tasks.names import nearest


def error_response(error: errors.UnfogError, scope: Scope) -> Response:
    """Returns the response for an error, and sets the outcome of the request to the error's code."""
    context = context_of(scope)
    context.outcome = error.code
    return format_of(scope["path"])(error, context.request_id)


def client_gone(scope: Scope) -> Response:
    """Returns the response for a client that has disconnected. It is not sent. Only the access log uses it."""
    context = context_of(scope)
    context.outcome = context.outcome or CLIENT_GONE
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _from_framework(error: HTTPException, path: str, app: FastAPI, named: Mapping[str, str]) -> errors.UnfogError:
    """Returns the error for an exception of the web framework. `named` has the routes as in `named_routes`."""
    if error.status_code == 405 and (allow := (error.headers or {}).get("Allow")):
        # The framework names only the methods of one route.
        methods = {method.strip() for method in allow.split(",")} | methods_of(path, app.routes)
        # HeadAsGet adds HEAD to every route that supports GET.
        return errors.MethodNotAllowed(", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set()))))
    if error.status_code == 404:
        return errors.NotFound(_no_route(path, named))
    return errors.HTTPError(error.status_code, error.detail, error.headers)


def _no_route(path: str, routes: Mapping[str, str]) -> str:
    """Returns the detail for a path without a route. It does not contain the path."""
    hints = []
    if intended := nearest(path, routes):
        hints.append(f"Did you mean {routes[intended]}?")
    if DOCS_PATH in routes:
        hints.append(f"{DOCS_PATH} lists all routes")
    return ". ".join(filter(None, [errors.NotFound.detail, " ".join(hints)]))


def handle_errors(app: FastAPI, metrics: Metrics) -> None:
    """Adds handlers that send responses for the errors of the routes and of the web framework."""
    named = named_routes(app.routes)

    @app.exception_handler(errors.UnfogError)
    async def unfog_error(request: Request, error: errors.UnfogError) -> Response:
        metrics.count_rejection(error)
        return error_response(error, request.scope)

    @app.exception_handler(errors.FieldError)
    async def field_error(request: Request, error: errors.FieldError) -> Response:
        location = [*place_of_fields(request.scope["path"]), error.field]
        return error_response(errors.InvalidRequest([{"loc": location, "msg": error.message}]), request.scope)

    @app.exception_handler(HTTPException)
    async def framework_error(request: Request, error: HTTPException) -> Response:
        if error.status_code < 400:
            return Response(status_code=error.status_code, headers=error.headers)
        return error_response(_from_framework(error, request.scope["path"], app, named), request.scope)

    @app.exception_handler(RequestValidationError)
    async def invalid_query(request: Request, error: RequestValidationError) -> Response:
        invalid = [{"loc": list(item["loc"]), "msg": item["msg"]} for item in error.errors()]
        return error_response(errors.InvalidRequest(invalid), request.scope)

    @app.exception_handler(ClientDisconnect)  # while the body arrives
    @app.exception_handler(ClientGoneError)  # while pictures are decoded or images are generated
    async def client_disconnected(request: Request, error: Exception) -> Response:
        return client_gone(request.scope)
