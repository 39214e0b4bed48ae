"""What surrounds every request: its id, its metrics, its line in the log, and the answer to a bug."""

import asyncio
import logging
import re
import time
import uuid
from contextlib import ExitStack, suppress

from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import Draining, InternalError, UnfogError
from app.metrics import Metrics

log = logging.getLogger("unfog.access")

CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LINGER_SECONDS, LINGER_BYTES = 1.0, 16 * 1024 * 1024  # for a client that goes on sending after its answer
PROBLEM_JSON = "application/problem+json"


def problem_response(error: UnfogError, request_id: str) -> JSONResponse:
    """The answer that tells a client of the error."""
    return JSONResponse(error.problem(request_id), error.status, error.headers, media_type=PROBLEM_JSON)


class RequestContext:
    """Plain ASGI, so that disconnects reach the handler as they come.

    Leaves in the request's state its `request_id`, and `answered`, a stack that is closed when the
    answer has been sent or the client is gone. `plain_paths` are those of routes that are not FastAPI's.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, plain_paths: frozenset[str]) -> None:
        self._app, self._metrics, self._plain_paths = app, metrics, plain_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, answered = _request_id(scope), ExitStack()
        scope.setdefault("state", {}).update(request_id=request_id, answered=answered)
        status, start = 0, time.perf_counter()
        body = _Body(scope, receive)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await body.send(message, send)

        async def fail_with(error: UnfogError) -> None:
            self._metrics.count_rejection(error)
            await problem_response(error, request_id)(scope, receive, send_with_id)

        with self._metrics.requests_in_progress.track_inprogress(), answered:
            try:
                await self._app(scope, body.receive, send_with_id)
            except asyncio.CancelledError:  # uvicorn's, when the time for the last answers is over
                if status:
                    raise
                await fail_with(Draining(1))
            except Exception:
                log.exception("a request failed", extra={"request_id": request_id})
                if not status:
                    await fail_with(InternalError())
            finally:
                self._record(scope, status, time.perf_counter() - start, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        plain = scope["path"] if scope["path"] in self._plain_paths else "other"
        route = getattr(scope.get("route"), "path", plain)
        code = str(status or 499)  # 499: the client left before there was an answer
        self._metrics.requests.labels(route, code).inc()
        self._metrics.request_duration.labels(route).observe(seconds)
        log.info(
            "%s %s %s %.0f ms",
            scope["method"],
            scope["raw_path"].decode("ascii", "backslashreplace"),  # as it came: decoded it could forge a line
            code,
            seconds * 1000,
            extra={"request_id": request_id, "route": route, "status": int(code), "seconds": round(seconds, 6)},
        )


class _Body:
    """The request's body, which may be refused before it has ended, and may never end.

    Then the connection is closed after the answer; not at once, as that would take the answer
    from a client that still sends.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = dict(scope["headers"])
        self._unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        self._receive = receive

    async def receive(self) -> Message:
        """The next piece, for the handler."""
        message = await self._receive()
        self._unread = self._unread and message.get("more_body", False)
        return message

    async def send(self, message: Message, send: Send) -> None:
        """Sends the handler's message."""
        if self._unread and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        elif self._unread and not message.get("more_body"):
            await send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body"}
        await send(message)

    async def _discard(self) -> None:
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread and num_bytes < LINGER_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))


def _request_id(scope: Scope) -> str:
    """The caller's id if it is one that a log can hold, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CALLERS_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return uuid.uuid4().hex
