"""HTTP/1.1 connections with timeouts and limits.

Closes connections that do not send or accept data in time. api/requests.py limits the time of a body. uvicorn limits
the time between two requests (5 s).
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.context import CLIENT_GONE, RequestContext, context_of
from app.api.middleware.security_headers import SECURITY_HEADERS
from app.api.middleware.unread_body import LINGER_BYTES, LINGER_SECONDS
from app.api.problems import PROBLEM_JSON
from app.errors import RequestTimeout, UnfogError
from app.logs import PROTOCOL_LOGGER
from app.metrics import Metrics
from app.server.framing import MAX_HEAD_BYTES, LimitedConnection
from app.settings import Settings

log = logging.getLogger("unfog.access")
_ERRORS_ONLY = logging.getLogger(PROTOCOL_LOGGER)
_ERRORS_ONLY.setLevel(logging.ERROR)  # requests that are not HTTP get their own line in the access log

MAX_AHEAD_BYTES = 64 * 1024  # sent before the present request is answered; the largest request fits
# Bounds the work for one read. asyncio would read up to 256 KiB at once. The loop uses it for one connection at a time.
_BUFFER = memoryview(bytearray(16 * 1024))


class Deadline:
    """A timer that calls a function once, unless it is cleared before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]) -> None:
        self._loop, self._seconds, self._callback = loop, seconds, callback
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """Starts the timer if it is not running."""
        self._timer = self._timer or self._loop.call_later(self._seconds, self._callback)

    def clear(self) -> None:
        """Stops the timer."""
        if self._timer:
            self._timer.cancel()
        self._timer = None


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """An HTTP/1.1 connection with timeouts and limits. Buffers little data for a client that does not read."""

    conn: LimitedConnection
    read_timeout: float
    write_timeout: float
    max_ahead_bytes: int
    metrics: Metrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = LimitedConnection(self.max_ahead_bytes)
        self.logger = _ERRORS_ONLY
        self._discards = False  # after a refusal: further input is dropped without parsing
        self._num_discarded = 0
        self._linger = Deadline(self.loop, LINGER_SECONDS, lambda: self.transport.close())
        self._head = Deadline(self.loop, self.read_timeout, self._give_up_reading)
        self._taking = Deadline(self.loop, self.write_timeout, lambda: self.transport.abort())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the read timeout of the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that any data that the client does not accept starts the timeout
        self._head.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all timeouts. If an answer was not sent completely, the outcome of the request is CLIENT_GONE."""
        if (context := self._context()) and context.status:
            context.outcome = context.outcome or CLIENT_GONE
        super().connection_lost(exc)
        self._head.clear()
        self._taking.clear()
        self._linger.clear()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Returns the buffer for the next read."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Handles the bytes that were read into the buffer."""
        self.data_received(bytes(_BUFFER[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parses the bytes that were read. The read timeout of a head starts with its first byte."""
        if self._discards or self._answers_early():
            self._discard(data)
            return
        super().data_received(data)
        if self._reads_head():
            self._head.set()
        else:
            self._head.clear()

    def pause_writing(self) -> None:
        """Starts the write timeout."""
        super().pause_writing()
        self._taking.set()

    def resume_writing(self) -> None:
        """Ends the write timeout: the client has accepted all data."""
        super().resume_writing()
        self._taking.clear()

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is not valid HTTP, or exceeds a limit, with a problem document."""
        self._refuse(self.conn.refusal)

    def _reads_head(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.timeout_keep_alive_task and not self._discards

    def _give_up_reading(self) -> None:
        if self.conn.has_part_of_head:
            self._refuse(RequestTimeout())
        else:  # no byte has arrived
            self.transport.close()

    def _refuse(self, error: UnfogError) -> None:
        """Answers with the error, without the application and unless an answer has begun. Closes the connection."""
        self._unset_keepalive_if_required()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        own = self._context()
        context = own or RequestContext(uuid.uuid4().hex)
        problem = error.problem(context.request_id)
        body = json.dumps(problem).encode()
        headers = {
            "X-Request-ID": context.request_id,
            **SECURITY_HEADERS,
            "Content-Type": PROBLEM_JSON,
            "Content-Length": len(body),
            "Connection": "close",
        }
        lines = [f"HTTP/1.1 {error.status} {problem['title']}", *(f"{name}: {headers[name]}" for name in headers)]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        context.status, context.outcome = error.status, error.code
        if not own:
            self._log(context)
        self._close_slowly()

    def _close_slowly(self) -> None:
        """Closes the connection when the client closes it, at the latest after LINGER_SECONDS.

        Closing it at once, with unread input, would reset the connection, and the client could lose the answer.
        """
        self._discards = True
        self.connections.discard(self)  # a shutdown need not wait for it
        if self.cycle and not self.cycle.response_complete:  # tells the handler that the client has left
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        with suppress(OSError):  # the client has reset the connection
            self.transport.write_eof()
        self._linger.set()

    def _answers_early(self) -> bool:
        """True if the answer has begun before the request is complete. The connection then closes after the answer."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    def _discard(self, data: bytes) -> None:
        self._num_discarded += len(data)
        if self._num_discarded > LINGER_BYTES:
            self.transport.close()

    def _context(self) -> RequestContext | None:
        """Returns the context of the request that is being answered."""
        if not self.cycle or self.cycle.response_complete:
            return None
        return context_of(cast(Scope, self.cycle.scope))

    def _log(self, context: RequestContext) -> None:
        self.metrics.requests.labels("other", str(context.status)).inc()
        client = self.client[0] if self.client else ""
        facts = {
            "request_id": context.request_id,
            "status": context.status,
            "outcome": context.outcome,
            "client": client,
        }
        log.info("no request", extra=facts)


def connection_class(settings: Settings, metrics: Metrics) -> type[H11Protocol]:
    """Returns the connection class for uvicorn, with these settings."""
    own = {
        "read_timeout": settings.read_timeout,
        "write_timeout": settings.write_timeout,
        "max_ahead_bytes": max(MAX_AHEAD_BYTES, MAX_HEAD_BYTES + settings.max_body_bytes),
        "metrics": metrics,
    }
    return type("Connection", (Connection,), own)
