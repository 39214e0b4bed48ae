"""Creates the context of each request, writes the access log, and answers with 500 after an unexpected exception."""

import asyncio
import logging

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.http.context import context_of
from app.api.http.problems import error_response
from app.api.middleware.access_log import AccessLog
from app.errors import Draining, InternalError, UnfogError
from app.metrics import Metrics

log = logging.getLogger(__name__)


class RequestContextMiddleware:
    """This is plain ASGI middleware, so that the route handler is informed of a disconnect immediately."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: AccessLog) -> None:
        self._app, self._metrics, self._access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # If the connection has already sent an error, keep the status of that error.
                context.status = context.status or message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = context.request_id
            await send(message)

        async def fail_with(error: UnfogError) -> None:
            self._metrics.count_rejection(error)
            await error_response(error, scope)(scope, receive, send_with_id)

        with self._metrics.requests_in_progress.track_inprogress(), context.answered:
            try:
                await self._app(scope, receive, send_with_id)
            except asyncio.CancelledError:  # uvicorn cancels the remaining requests at the end of a shutdown
                if context.status:
                    context.outcome = Draining.code
                    raise
                await fail_with(Draining(1))
            except Exception:
                log.exception("Request failed", extra={"request_id": context.request_id})
                if not context.status:
                    await fail_with(InternalError())
            finally:
                self._access_log.write(scope, context)
