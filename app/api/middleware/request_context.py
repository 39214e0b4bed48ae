"""What surrounds every request: its id, its record, what a browser may do with the answer, and the answer to a bug."""

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.context import Notes
from app.api.middleware.access_log import Recorder
from app.api.problems import problem_response
from app.errors import Draining, InternalError, UnfogError
from app.metrics import Metrics

log = logging.getLogger(__name__)

CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LINGER_SECONDS, LINGER_BYTES = 1.0, 16 * 1024 * 1024  # for a client that goes on sending after its answer
# An answer is data: no browser is to guess another type, to run it, to frame it or to tell others where it came from.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestContext:
    """Plain ASGI, so that disconnects reach the handler as they come; leaves the request's Notes in its state.

    `policies` are the content security policies of paths that a browser shows as pages.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, recorder: Recorder, policies: Mapping[str, str]) -> None:
        self._app, self._metrics, self._recorder, self._policies = app, metrics, recorder, policies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = noted(scope)
        body = _Body(scope, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = notes.status or message["status"]  # the connection may have answered by itself
                self._add_headers(message, scope["path"], notes.request_id)
            await body.send(message, send)

        async def fail_with(error: UnfogError) -> None:
            self._metrics.count_rejection(error)
            await problem_response(error, scope)(scope, receive, send_with_headers)

        with self._metrics.requests_in_progress.track_inprogress(), notes.answered:
            try:
                await self._app(scope, body.receive, send_with_headers)
            except asyncio.CancelledError:  # uvicorn's, when the time for the last answers is over
                if notes.status:
                    notes.outcome = Draining.code
                    raise
                await fail_with(Draining(1))
            except Exception:
                log.exception("a request failed", extra={"request_id": notes.request_id})
                if not notes.status:
                    await fail_with(InternalError())
            finally:
                self._recorder.record(scope, notes)

    def _add_headers(self, message: Message, path: str, request_id: str) -> None:
        headers = MutableHeaders(scope=message)
        headers["X-Request-ID"] = request_id
        for name, value in SECURITY_HEADERS.items():
            headers[name] = value
        if path in self._policies:
            headers["Content-Security-Policy"] = self._policies[path]


class HeadAsGet:
    """Answers HEAD as GET without the body (RFC 9110, section 9.3.2), also for routes that name GET alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes other methods on unchanged."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


class _Body:
    """The request's body, which may be refused before it has ended, and may never end.

    Then the connection is closed after the answer; not at once, as that would take the answer
    from a client that still sends.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = dict(scope["headers"])
        self._unread = b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > 0
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
        """Waits for the end of the body or of the connection, which drops what arrives (app/server/connection.py)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread:
                    await self.receive()


def noted(scope: Scope) -> Notes:
    """The request's notes, begun by whoever is first."""
    notes: Notes = scope.setdefault("state", {}).setdefault("notes", Notes(_request_id(scope)))
    return notes


def _request_id(scope: Scope) -> str:
    """The caller's id if it is one that a log can hold, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CALLERS_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return uuid.uuid4().hex
