"""Middleware for Ray's HTTP proxies: clear errors and repetitions for requests whose replica dies.

Ray loads it if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is `app.ray.proxy.middleware` when `ray start` runs. Ray's
proxy answers a request whose replica has died with 500 in plain text, or breaks off the response. This middleware

    repeats      the request, if the response has not begun and the same request has the same result: GET, or a request
                 with a seed or with an Idempotency-Key
    answers      otherwise with 502 and the code `replica_lost`, in the error format of the protocol. A stream that has
                 begun ends with the event `error`
    translates   the answers of the proxy itself, such as 429 when no replica has room, to this format
    removes      the headers with which a client could turn off its own cancellation or set a time limit of the proxy,
                 and the second X-Request-ID, which the proxy adds to that of the service
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.http.context import REQUEST_ID, new_request_id
from app.api.http.error_formats import data_of_error, format_of
from app.api.http.events import event_text
from app.api.http.idempotency import HEADER as IDEMPOTENCY_KEY
from app.api.http.media_types import EVENTS
from app.api.middleware.unread_body import UnreadBody
from app.errors import BodyTooLarge, DeadlineExceeded, NoReplica, Overloaded, ReplicaLost, UnfogError

REMOVED = ("x-request-disconnect-disabled", "x-request-timeout-seconds")  # read by Ray's proxy
ID = "x-request-id"
RAY_PATHS = "/-/"  # the health and the routes of the proxy
STORED_PATHS = ("/v1/files", "/v1/batches")  # POST creates something, so it cannot be repeated
# The proxy reads a body faster than the replica, and keeps the rest in its memory, also before the replica has checked
# the API key. A longer body is answered with 413. If the bodies of all requests in progress are longer, one gets 429.
MOST_BYTES, MOST_FILE_BYTES = 32 * 2**20, 256 * 2**20
MOST_BYTES_OF_ALL = 2**30
MOST_REPEATED_BYTES = 4 * 2**20  # a request with a longer body is not repeated
MOST_ATTEMPTS = 3
LOST_SECONDS = 1  # Retry-After; the other replicas run
BUSY_SECONDS, START_SECONDS = 5, 5
_MULTIPART_SEED = re.compile(rb'\bname="?seed"?[\s;]')


def middleware() -> list[Middleware]:
    """Returns what Ray adds to each proxy. Ray calls the last one first, unlike Starlette."""
    return [Middleware(LostReplicas), Middleware(UnreadBody)]


class LostReplicas:
    """Answers a request whose replica has died, or repeats it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._bodies = app, _Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(RAY_PATHS):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": list(scope["headers"])}  # The headers are changed.
        headers = MutableHeaders(scope=scope)
        for name in REMOVED:
            del headers[name]
        if not REQUEST_ID.fullmatch(headers.get(ID, "")):
            headers[ID] = new_request_id()
        limit = MOST_FILE_BYTES if scope["path"].startswith(STORED_PATHS) else MOST_BYTES
        answer = _Answer(scope, send)
        with _Body(receive, limit, self._bodies, answer.fail) as body:
            for _ in range(MOST_ATTEMPTS):
                await self._app({**scope, "headers": list(scope["headers"])}, body.receive, answer.send)
                if answer.is_complete or body.has_ended:
                    return
                if answer.status or not await asyncio.to_thread(_is_repeatable, scope, body.content):
                    break
                body.rewind()
            await answer.fail(ReplicaLost(LOST_SECONDS))


@dataclass
class _Bodies:
    """What the proxy has received of the bodies of all requests in progress."""

    num_bytes: int = 0


class _Body:
    """The body of a request, which can be read again if it is not too long."""

    def __init__(
        self, receive: Receive, limit: int, bodies: _Bodies, refuse: Callable[[UnfogError], Awaitable[bool]]
    ) -> None:
        """Calls `refuse` if the body has more than `limit` bytes, or if all `bodies` together are too long.

        `refuse` returns False if it is too late, because the replica has begun to answer.
        """
        self._receive, self._limit, self._bodies, self._refuse = receive, limit, bodies, refuse
        self._messages: list[Message] | None = []  # None if the body is too long
        self._num_bytes = self._position = 0
        self._is_cut = False
        self.has_ended = False  # True if the client has left, or if the body was refused

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.num_bytes -= self._num_bytes

    async def receive(self) -> Message:
        if self._messages is not None and self._position < len(self._messages):
            self._position += 1
            return self._messages[self._position - 1]
        if self._is_cut:
            await asyncio.Future()  # Ray reads on until the client leaves or the answer is complete, and cancels this.
        message = await self._receive()
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        self._bodies.num_bytes += num_bytes
        error = self._error() if num_bytes else None
        if error:
            if not await self._refuse(error):
                # For the replica, which would only discard the rest, the body ends here.
                self._is_cut = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self.has_ended = True
            return message
        if self._num_bytes > MOST_REPEATED_BYTES:
            self._messages = None
        if self._messages is not None:
            self._messages.append(message)
            self._position += 1
        return message

    def _error(self) -> UnfogError | None:
        if self._num_bytes > self._limit:
            return BodyTooLarge(self._limit)
        if self._bodies.num_bytes > MOST_BYTES_OF_ALL:
            return Overloaded(BUSY_SECONDS, "The bodies of all requests need too much memory")
        return None

    @property
    def content(self) -> bytes | None:
        """The body, or None if it is too long or has not arrived."""
        if self._messages is None or not self._messages or self._messages[-1].get("more_body"):
            return None
        return b"".join(message.get("body", b"") for message in self._messages)

    def rewind(self) -> None:
        """Makes `receive` return the body again."""
        self._position = 0


class _Answer:
    """The response to a request."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._path, self._id, self._send = scope["path"], Headers(scope=scope)[ID], send
        self._is_stream = False
        self.status = 0  # 0 until the response begins
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if self.is_complete:  # the rest of an answer that was replaced
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            ids = headers.getlist(ID)
            if len(ids) < 2:  # The service did not answer, because its X-Request-ID is missing.
                await self.fail(_error_of_ray(message["status"]))
                return
            headers[ID] = ids[0]
            self.status, self._is_stream = message["status"], headers.get("content-type", "").startswith(EVENTS)
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body")
        await self._send(message)

    async def fail(self, error: UnfogError) -> bool:
        """Ends the response with the error, and returns True.

        Returns False if the response has begun and is no stream. It is then left as it is.
        """
        if not self.status:
            response = format_of(self._path)(error, self._id)
            response.headers[ID] = self._id
            self.status, self.is_complete = response.status_code, True
            await self._send({"type": "http.response.start", "status": self.status, "headers": response.raw_headers})
            await self._send({"type": "http.response.body", "body": bytes(response.body)})
        elif self._is_stream:
            self.is_complete = True
            event = event_text("error", data_of_error(self._path, error, self._id))
            await self._send({"type": "http.response.body", "body": event.encode()})
        else:
            return False
        return True


def _error_of_ray(status: int) -> UnfogError:
    """Returns the error for an answer of the proxy itself."""
    if status == 429:
        return Overloaded(BUSY_SECONDS, "All replicas are busy")
    if status == 408:
        return DeadlineExceeded()
    return NoReplica(START_SECONDS)


def _is_repeatable(scope: Scope, content: bytes | None) -> bool:
    """Returns True if the same request has the same result and changes nothing.

    `content` is the body, or None if it cannot be sent again.
    """
    if content is None:
        return False
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return True
    if scope["path"].startswith(STORED_PATHS):
        return False
    headers = Headers(scope=scope)
    if IDEMPOTENCY_KEY in headers:
        return True
    if headers.get("content-type", "").lower().startswith("multipart/"):
        return bool(_MULTIPART_SEED.search(content))
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(fields, dict):
        return False
    tensors = fields.get("inputs")  # of the Open Inference Protocol
    names = [each.get("name") for each in tensors if isinstance(each, dict)] if isinstance(tensors, list) else []
    return fields.get("seed") is not None or "seed" in names
