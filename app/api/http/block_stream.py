"""Sends the blocks of a generator that reads the database, as the body of a response."""

from collections.abc import Generator, Mapping

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.http.context import CLIENT_GONE, context_of
from app.api.http.events import send_part
from app.api.http.requests import ClientGoneError, cancel_on_disconnect
from app.batches.database import Database
from app.errors import InternalError, UnfogError


class BlockStream(Response):
    """A response whose body is the blocks. Threads of the database's pool compute each of them when it can be sent.

    If the client disconnects, the generator is closed. If the generator raises an error, the connection is closed
    before the end of the body, so that the client notices it. HEAD computes no block.
    """

    def __init__(
        self,
        blocks: Generator[bytes, None, None],
        database: Database,
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        """An empty block is not sent. A generator yields one if the next bytes can take long."""
        super().__init__(headers={**headers, "Cache-Control": "no-store"}, media_type=media_type)
        del self.headers["content-length"]
        self._blocks, self._database = blocks, database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        request, context = Request(scope, receive), context_of(scope)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not context.is_head:
            try:
                await cancel_on_disconnect(request, self._send_blocks(send))
            except ClientGoneError:
                context.outcome = CLIENT_GONE
                return
            except UnfogError as error:
                context.outcome = error.code
                return
            except Exception:
                context.outcome = InternalError.code
                raise
        await send({"type": "http.response.body", "body": b""})

    async def _send_blocks(self, send: Send) -> None:
        try:
            while (block := await self._database.next_of(self._blocks)) is not None:
                if block:
                    await send_part(send, block)
        finally:
            await self._database.run(self._blocks.close)
