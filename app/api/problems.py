"""Turns errors into answers: problem documents (RFC 9457)."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from app import errors
from app.api.context import CLIENT_CLOSED_REQUEST, CLIENT_GONE, context_of
from app.metrics import Metrics

PROBLEM_JSON = "application/problem+json"


def problem_response(error: errors.UnfogError, scope: Scope) -> JSONResponse:
    """Returns the answer for an error. Sets the outcome of the request to the code of the error."""
    context = context_of(scope)
    context.outcome = error.code
    return JSONResponse(error.problem(context.request_id), error.status, error.headers, media_type=PROBLEM_JSON)


def client_gone(scope: Scope) -> Response:
    """Returns the answer for a client that has left. It appears only in the access log."""
    context = context_of(scope)
    context.outcome = context.outcome or CLIENT_GONE
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _routed(error: HTTPException) -> errors.UnfogError:
    allow = (error.headers or {}).get("Allow")
    if error.status_code == 405 and allow:
        methods = {method.strip() for method in allow.split(",")}
        # HeadAsGet answers HEAD for every route that takes GET.
        return errors.MethodNotAllowed(", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set()))))
    if error.status_code == 404:
        return errors.NotFound()
    return errors.HTTPError(error.status_code, error.detail, error.headers)


def handle_errors(app: FastAPI, metrics: Metrics) -> None:
    """Adds handlers that turn the errors of the routes, and of routing itself, into problem documents."""

    @app.exception_handler(errors.UnfogError)
    async def known(request: Request, error: errors.UnfogError) -> Response:
        metrics.count_rejection(error)
        return problem_response(error, request.scope)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        if error.status_code < 400:
            return Response(status_code=error.status_code, headers=error.headers)
        return problem_response(_routed(error), request.scope)

    @app.exception_handler(RequestValidationError)
    async def wrong_query(request: Request, error: RequestValidationError) -> Response:
        wrong = [{"loc": list(item["loc"]), "msg": item["msg"]} for item in error.errors()]
        return problem_response(errors.InvalidRequest(wrong), request.scope)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return client_gone(request.scope)
