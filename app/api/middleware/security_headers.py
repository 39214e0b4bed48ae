"""Adds security headers that forbid content sniffing, scripts, framing, referrers and cross-origin embedding."""

from collections.abc import Collection, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# A web page loads files only from this service and has no inline scripts or styles. Images are data: URLs on the web
# page and blob: URLs in Swagger UI.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


_ENCODED = _encoded(SECURITY_HEADERS)
_ENCODED_OF_PAGES = _encoded({**SECURITY_HEADERS, "Content-Security-Policy": PAGE_POLICY})
_NAMES = frozenset(name for name, _ in _ENCODED)


class SecurityHeaders:
    """Sets the security headers of every response."""

    def __init__(self, app: ASGIApp, pages: Collection[str]) -> None:
        """`pages` are the paths of web pages."""
        self._app, self._pages = app, pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [header for header in message["headers"] if header[0] not in _NAMES]
                own = _ENCODED_OF_PAGES if scope["path"] in self._pages else _ENCODED
                message["headers"] = others + own
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
