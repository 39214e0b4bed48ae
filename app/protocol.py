"""uvicorn's HTTP/1.1, with an end to its patience: nobody holds a connection by saying, or taking, nothing.

Bodies have their time in http.py, connections between two requests in uvicorn (5 s).
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from typing import Any, cast

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.config import Settings
from app.errors import MalformedRequest, RequestTimeout, UnfogError
from app.logs import PROTOCOL_LOGGER
from app.metrics import Metrics
from app.middleware import SECURITY_HEADERS, noted
from app.notes import CLIENT_GONE, Notes
from app.problems import PROBLEM_JSON

log = logging.getLogger("unfog.access")
_ERRORS_ONLY = logging.getLogger(PROTOCOL_LOGGER)
_ERRORS_ONLY.setLevel(logging.ERROR)  # what is no HTTP has a line of ours, with more in it


class Deadline:
    """Calls, once, when its time is over, unless it is cleared before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]) -> None:
        self._loop, self._seconds, self._callback = loop, seconds, callback
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """The time begins, if it has not."""
        self._timer = self._timer or self._loop.call_later(self._seconds, self._callback)

    def clear(self) -> None:
        """It does not count any more."""
        if self._timer:
            self._timer.cancel()
        self._timer = None


class PatientProtocol(H11Protocol):
    """A connection. What is sent must be taken piece by piece: little is kept for a client that does not read."""

    read_timeout: float
    write_timeout: float
    metrics: Metrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _ERRORS_ONLY
        self._head = Deadline(self.loop, self.read_timeout, self._give_up_reading)
        self._taking = Deadline(self.loop, self.write_timeout, lambda: self.transport.abort())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is awaited from now on."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that all that a client leaves untaken is noticed
        self._head.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more; an answer that was not taken whole is none."""
        if (notes := self._notes()) and notes.status:
            notes.outcome = notes.outcome or CLIENT_GONE
        super().connection_lost(exc)
        self._head.clear()
        self._taking.clear()

    def data_received(self, data: bytes) -> None:
        """A head's time counts from its first byte, in however many pieces it comes."""
        super().data_received(data)
        if self._reads_head():
            self._head.set()
        else:
            self._head.clear()

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        self._taking.set()

    def resume_writing(self) -> None:
        """It has taken all of it."""
        super().resume_writing()
        self._taking.clear()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP: a problem document like all others."""
        self._refuse(MalformedRequest())

    def _reads_head(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.timeout_keep_alive_task

    def _give_up_reading(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(RequestTimeout())
        else:  # it never said a word
            self.transport.close()

    def _refuse(self, error: UnfogError) -> None:
        """By hand, as there is no request to answer, or only a part of one; not at all in the midst of an answer."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            own = self._notes()
            notes = own or Notes(uuid.uuid4().hex)
            problem = error.problem(notes.request_id)
            body = json.dumps(problem).encode()
            headers = {
                "X-Request-ID": notes.request_id,
                **SECURITY_HEADERS,
                "Content-Type": PROBLEM_JSON,
                "Content-Length": len(body),
                "Connection": "close",
            }
            lines = [f"HTTP/1.1 {error.status} {problem['title']}", *(f"{name}: {headers[name]}" for name in headers)]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            notes.status, notes.outcome = error.status, error.code
            if not own:
                self._record(notes)
        self.transport.close()

    def _notes(self) -> Notes | None:
        """Of the request that is being answered."""
        if not self.cycle or self.cycle.response_complete:
            return None
        return noted(cast(Scope, self.cycle.scope))

    def _record(self, notes: Notes) -> None:
        self.metrics.requests.labels("other", str(notes.status)).inc()
        client = self.client[0] if self.client else ""
        facts = {"request_id": notes.request_id, "status": notes.status, "outcome": notes.outcome, "client": client}
        log.info("no request", extra=facts)


def patient(settings: Settings, metrics: Metrics) -> type[H11Protocol]:
    """The class of connections with these settings, as uvicorn wants it."""
    own = {"read_timeout": settings.read_timeout, "write_timeout": settings.write_timeout, "metrics": metrics}
    return type("Connection", (PatientProtocol,), own)
