"""Answers the lines of batches with the routes of the service, within the process and without a socket.

A line is a request with the Idempotency-Key `Line.key`, so that it gets the same images whenever it is answered. It has
no deadline. An answer that says when to retry, such as 429 while the queue is full, is not stored: the line is tried
again until it gets another answer or its task is cancelled.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Message, Scope

from app.api.http.context import CLIENT_CLOSED_REQUEST, RequestContext, new_request_id
from app.api.http.idempotency import HEADER
from app.api.http.media_types import JSON
from app.api.http.paths import ExactRoutes
from app.api.http.problems import error_response, handle_errors
from app.api.operations import Router
from app.api.service import Service
from app.batches.records import Line, LineAnswer
from app.errors import InternalError
from app.metrics import Metrics

log = logging.getLogger(__name__)
LONGEST_WAIT = 30.0  # seconds after which a line is tried again at the latest


class LineRequests:
    """An application with the routes that lines may name. Only the event loop may use it.

    It has no middleware, because authentication, rate limits, the access log and the count of requests do not apply to
    lines.
    """

    def __init__(
        self,
        service: Service,
        routers: Iterable[Router],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`routers` have the routes that lines may name. `sleep` waits for a number of seconds."""
        self._sleep = sleep
        self._app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._app.state.service = service
        self._app.router.routes.append(ExactRoutes(_routes_of(routers)))
        handle_errors(self._app, Metrics())  # Refusals of lines do not count as rejected requests.

    @staticmethod
    def endpoints_of(routers: Iterable[Router]) -> frozenset[str]:
        """Returns the paths that lines may name if the routers have these routes."""
        return frozenset(route.path for route in _routes_of(routers))

    async def answer(self, line: Line) -> LineAnswer:
        """Returns the answer of a line. If the task is cancelled, the work on the line is cancelled too."""
        request_id = new_request_id()
        while True:
            context = RequestContext(request_id, is_background=True)
            response = await self._respond(line, context)
            if response.status == CLIENT_CLOSED_REQUEST:  # All tasks were cancelled, at the end of the event loop.
                raise asyncio.CancelledError
            retry_after = response.headers.get("retry-after")
            if retry_after is None:
                return _answer_of(response, context)
            await self._sleep(min(float(retry_after), LONGEST_WAIT))

    async def _respond(self, line: Line, context: RequestContext) -> "_Response":
        """Calls the route of a line once."""
        scope, receive, response = _scope_of(line, context), _Body(line.body).receive, _Response()
        with context.answered:
            try:
                await self._app(scope, receive, response.send)
            except Exception:
                extra = {"request_id": context.request_id, "batch": line.batch_id, "line": line.number}
                log.exception("Line of a batch failed", extra=extra)
                await error_response(InternalError(), scope)(scope, receive, response.send)
        return response


def _routes_of(routers: Iterable[Router]) -> list[Route]:
    """Returns the POST routes whose paths have no parameters."""
    routes = (route for router in routers for route in router.routes)
    return [
        route
        for route in routes
        if isinstance(route, Route) and "POST" in (route.methods or ()) and not route.param_convertors
    ]


class _Body:
    """The body of a request whose client does not disconnect."""

    def __init__(self, content: bytes) -> None:
        self._messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive(self) -> Message:
        """Returns the body in the first call. Further calls wait until they are cancelled."""
        if not self._messages:
            await asyncio.get_running_loop().create_future()
        return self._messages.pop()


class _Response:
    """Collects a response."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 0, Headers(), b""

    async def send(self, message: Message) -> None:
        """Adds a message. If a second response begins, as after an unexpected exception, it replaces the first one."""
        if message["type"] == "http.response.start":
            self.status, self.headers, self.body = message["status"], Headers(raw=message["headers"]), b""
        else:
            self.body += message.get("body", b"")


def _scope_of(line: Line, context: RequestContext) -> Scope:
    headers = {"content-type": JSON, "accept": JSON, HEADER.lower(): line.key}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.endpoint,
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "state": {"context": context},
    }


def _answer_of(response: _Response, context: RequestContext) -> LineAnswer:
    images = evaluations = 0
    if context.job:
        request = context.job.request
        evaluations = request.count * request.network_evaluations
        if response.status == 200 and not request.comparison:  # The result of a comparison is no image.
            images = request.count
    return LineAnswer(response.status, context.request_id, response.body, images, evaluations)
