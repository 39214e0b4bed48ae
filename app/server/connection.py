"""HTTP/1.1 connections with timeouts and limits.

Read timeout: a connection that does not send a complete request head in time is answered with 408 or closed. Write
timeout: a connection that does not accept the data of an answer in time is closed. Two more timeouts are elsewhere:
api/http/requests.py limits the time in which a body arrives, and uvicorn limits the time between two requests (5 s).
"""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.http.context import CLIENT_GONE, RequestContext, context_of, new_request_id
from app.api.http.media_types import PROBLEM_JSON
from app.api.middleware.security_headers import SECURITY_HEADERS
from app.api.middleware.unread_body import LINGER_BYTES, LINGER_SECONDS
from app.errors import RequestTimeout, UnfogError
from app.logs import PROTOCOL_LOGGER
from app.metrics import Metrics
from app.server.framing import MAX_HEAD_BYTES, LimitedConnection
from app.settings import Settings

log = logging.getLogger("unfog.access")
_protocol_log = logging.getLogger(PROTOCOL_LOGGER)
_protocol_log.setLevel(logging.ERROR)  # uvicorn's warnings about malformed requests would duplicate our access log

# Limit for bytes of later requests that arrive before the current request is answered. Requests with pictures can be
# larger, but no known client pipelines them, and with a higher limit every connection could use more memory.
MAX_AHEAD_BYTES = 64 * 1024
# The read buffer bounds the work of one read: asyncio's default is 256 KiB. All connections share it, because the event
# loop reads from one connection at a time and the bytes are copied before the next read.
_BUFFER = memoryview(bytearray(16 * 1024))


class Deadline:
    """A timer that calls a function once after `seconds`, unless it is cleared before."""

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
    """An HTTP/1.1 connection with read and write timeouts, which enforces the limits of framing.py."""

    conn: LimitedConnection
    read_timeout: float
    write_timeout: float
    max_ahead_bytes: int
    metrics: Metrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = LimitedConnection(self.max_ahead_bytes)
        self.logger = _protocol_log
        self._is_discarding = False  # True after a rejected request: further input is dropped without parsing
        self._num_discarded = 0
        self._close_deadline = Deadline(self.loop, LINGER_SECONDS, lambda: self.transport.close())
        self._head_deadline = Deadline(self.loop, self.read_timeout, self._on_read_timeout)
        self._write_deadline = Deadline(self.loop, self.write_timeout, lambda: self.transport.abort())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the read timeout of the first request head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # Any data that the client does not accept starts the write timeout.
        self._head_deadline.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all timeouts. If an answer was not sent completely, sets the outcome of the request to CLIENT_GONE."""
        if (context := self._context()) and context.status:
            context.outcome = context.outcome or CLIENT_GONE
        super().connection_lost(exc)
        self._head_deadline.clear()
        self._write_deadline.clear()
        self._close_deadline.clear()

    def shutdown(self) -> None:
        """Ends the connection at shutdown: now if it is idle, otherwise after its answer.

        An answer that may be aborted does not delay the shutdown if the client does not read it.
        """
        context = self._context()
        if context and context.may_abort and self.flow.write_paused:
            self.transport.abort()
        else:
            super().shutdown()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Returns the buffer for the next read."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Handles the bytes that were read into the buffer."""
        self.data_received(bytes(_BUFFER[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parses the bytes that were read. Starts the read timeout at the first byte of a head."""
        if self._is_discarding or self._answers_early():
            self._discard(data)
            return
        super().data_received(data)
        if self._expects_head():
            self._head_deadline.set()
        else:
            self._head_deadline.clear()

    def pause_writing(self) -> None:
        """Starts the write timeout."""
        super().pause_writing()
        self._write_deadline.set()

    def resume_writing(self) -> None:
        """Stops the write timeout, because the client has accepted all data."""
        super().resume_writing()
        self._write_deadline.clear()

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is not valid HTTP, or that exceeds a limit, with a problem document.

        uvicorn calls this when `conn.next_event` raises RemoteProtocolError. `msg` is not used.
        """
        self._reject(self.conn.refusal)

    def _expects_head(self) -> bool:
        """True if a head must arrive within the read timeout. Between two requests, uvicorn's own timeout applies."""
        return self.conn.their_state is h11.IDLE and not self.timeout_keep_alive_task and not self._is_discarding

    def _on_read_timeout(self) -> None:
        if self.conn.has_part_of_head:
            self._reject(RequestTimeout())
        else:  # No byte has arrived, so there is no request to answer.
            self.transport.close()

    def _reject(self, error: UnfogError) -> None:
        """Answers with the error, without calling the application, and closes the connection.

        If an answer has already started, only closes the connection.
        """
        self._unset_keepalive_if_required()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        own = self._context()
        context = own or RequestContext(new_request_id())
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
        """Ends the output, discards further input, and closes the connection after LINGER_SECONDS at the latest.

        If a connection is closed while input is unread, the operating system resets it. The client could then lose the
        answer before it has read it.
        """
        self._is_discarding = True
        self.connections.discard(self)  # A shutdown does not wait for this connection.
        if self.cycle and not self.cycle.response_complete:  # Tells the route handler that the client has disconnected.
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        with suppress(OSError):  # The client may have reset the connection.
            self.transport.write_eof()
        self._close_deadline.set()

    def _answers_early(self) -> bool:
        """True if the answer has started before the whole request arrived. The connection is then closed after it."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    def _discard(self, data: bytes) -> None:
        self._num_discarded += len(data)
        if self._num_discarded > LINGER_BYTES:
            self.transport.close()

    def _context(self) -> RequestContext | None:
        """Returns the context of the request that is being answered, or None."""
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
        log.info("Request rejected before parsing", extra=facts)


def connection_class(settings: Settings, metrics: Metrics) -> type[H11Protocol]:
    """Returns the connection class for uvicorn with these settings."""
    attributes = {
        "read_timeout": settings.read_timeout,
        "write_timeout": settings.write_timeout,
        "max_ahead_bytes": max(MAX_AHEAD_BYTES, MAX_HEAD_BYTES + settings.max_body_bytes),
        "metrics": metrics,
    }
    return type("Connection", (Connection,), attributes)
