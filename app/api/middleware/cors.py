"""Adds CORS headers with Starlette's middleware. Errors are problem documents."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from app.api.http.problems import error_response
from app.api.inference.tensors import LENGTH_HEADER
from app.errors import OriginNotAllowed

# The headers that web pages of other origins may send and read. OpenAI's JavaScript client sends the request headers
# from OpenAI-Organization to X-Stainless-Timeout. It sends them in web pages too.
REQUEST_HEADERS = (
    *("Authorization", "X-API-Key", "X-Request-ID", "Content-Type", "Idempotency-Key", LENGTH_HEADER),
    *("OpenAI-Organization", "OpenAI-Project", "User-Agent", "X-Stainless-Arch", "X-Stainless-Lang", "X-Stainless-OS"),
    *("X-Stainless-Package-Version", "X-Stainless-Retry-Count", "X-Stainless-Runtime", "X-Stainless-Runtime-Version"),
    "X-Stainless-Timeout",
)
RESPONSE_HEADERS = (
    *("X-Request-ID", "X-Seed", "X-Identical", "Server-Timing", "Retry-After", "X-Should-Retry"),
    LENGTH_HEADER,
)


class CORS(CORSMiddleware):
    """Answers preflight requests and adds the CORS headers to other responses."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls Starlette's middleware, but answers a rejected preflight request with a problem document."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
            if {"origin", "access-control-request-method"} <= set(headers):
                preflight = self.preflight_response(headers)
                if preflight.status_code != 200:
                    error = OriginNotAllowed(bytes(preflight.body).decode())
                    await error_response(error, scope)(scope, receive, send)
                    return
        await super().__call__(scope, receive, send)
