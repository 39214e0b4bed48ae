"""Handles requests whose body is not read completely.

The connection is closed after the response, because the rest of the body can be arbitrarily long. It is not closed
immediately: this would reset the connection, and a client that is still sending could lose the response.
"""

import asyncio
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_SECONDS, LINGER_BYTES = 1.0, 16 * 1024 * 1024  # limits for the input that is discarded after the response


class UnreadBody:
    """Closes the connection after a response that was sent before the end of the request body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, send)
        await self._app(scope, body.receive, body.send)


class _Body:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._unread = b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > 0
        self._receive, self._send = receive, send

    async def receive(self) -> Message:
        message = await self._receive()
        self._unread = self._unread and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._unread and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        elif self._unread and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard(self) -> None:
        """Reads and discards input until the body or the connection ends.

        It stops after LINGER_SECONDS or LINGER_BYTES, because a client can send without end.
        """
        remaining = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread and remaining > 0:
                    remaining -= len((await self.receive()).get("body", b""))
