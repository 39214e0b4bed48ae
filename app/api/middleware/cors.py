"""CORS by Starlette, with refusals as problem documents."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from app.api.problems import problem_response
from app.errors import OriginNotAllowed

# The headers that a page of another origin may send and read.
CALLERS_HEADERS = ("Authorization", "X-API-Key", "X-Request-ID", "Content-Type")
ANSWERS_HEADERS = ("X-Request-ID", "X-Seed", "Server-Timing", "Retry-After")


class CORS(CORSMiddleware):
    """Answers preflight requests, and adds the CORS headers to answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers as Starlette does, except for a preflight request that is refused."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
            if {"origin", "access-control-request-method"} <= set(headers):
                refusal = self.preflight_response(headers)
                if refusal.status_code != 200:
                    error = OriginNotAllowed(bytes(refusal.body).decode())
                    await problem_response(error, scope)(scope, receive, send)
                    return
        await super().__call__(scope, receive, send)
