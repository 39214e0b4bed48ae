"""Checks API keys and rate limits.

Health, metrics, the GET routes below /v2, /docs, /openapi.json and the web page are exempt from both.
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.http.client_address import address_name, client_name
from app.api.http.context import context_of
from app.api.http.paths import Paths
from app.api.http.problems import error_response
from app.api.middleware.rate_limit import RateLimiter
from app.errors import Forbidden, Unauthorized, UnfogError
from app.metrics import Metrics
from app.settings import RateLimit

if TYPE_CHECKING:
    from app.api.middleware.shared_rate_limit import SharedRateLimiter  # imports `limits`, which is an extra

OWNER_DIGITS = 32


class Keys:
    """The valid API keys. During a rotation, the old and the new key are valid."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value().encode("ascii")) for key in keys]

    def check(self, headers: Headers) -> int | None:
        """Returns the position of the request's valid key, from 1, or None if auth is off.

        Raises Unauthorized if the request has no key, and Forbidden if none of its keys is valid. Always compares with
        all keys, so that the time does not depend on which one matches.
        """
        if not self._digests:
            return None
        sent = [_digest(key.encode("latin-1")) for key in _sent_keys(headers)]
        matches = [hmac.compare_digest(valid, candidate) for candidate in sent for valid in self._digests]
        if not sent:
            raise Unauthorized
        if not any(matches):
            raise Forbidden
        return 1 + matches.index(True) % len(self._digests)

    def owner_of(self, key: int | None) -> str:
        """Returns the owner of the files and batches of a key: a digest, which is the same after a rotation of others.

        Returns an empty string if auth is off.
        """
        return self._digests[key - 1].hex()[:OWNER_DIGITS] if key else ""


class Auth:
    """Applies auth and the rate limit to all paths except `open_paths`, also to paths without a route."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[SecretStr],
        rates: Sequence[RateLimit],
        metrics: Metrics,
        open_paths: Paths,
        rate_limit_url: SecretStr | None = None,
    ) -> None:
        """`rate_limit_url` is that of a Redis server, in which all processes count the requests together."""
        self._app, self._metrics, self._open_paths = app, metrics, open_paths
        self._keys, self._limiter = Keys(keys), RateLimiter(rates)
        self._shared = _shared_limiter(rates, rate_limit_url) if rate_limit_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects a request before any byte of its body is read, or passes it on."""
        if scope["type"] == "lifespan" and self._shared:
            try:
                await self._app(scope, receive, send)
            finally:
                await self._shared.close()
            return
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                await self._admit(scope)
            except UnfogError as error:
                self._metrics.count_rejection(error)
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        """Checks the key, then counts the request for the key, or for the client address if no key is valid.

        Requests without a valid key also count, because each of them costs some work.
        """
        try:
            key = self._keys.check(Headers(scope=scope))
        except UnfogError:
            await self._count(address_name(scope))
            raise
        context = context_of(scope)
        context.key, context.owner = key, self._keys.owner_of(key)
        await self._count(client_name(scope, key))

    async def _count(self, caller: str) -> None:
        """Counts a request of the caller. Raises RateLimited if it would exceed a limit."""
        if self._shared:
            await self._shared.hit(caller)
        else:
            self._limiter.hit(caller)


def _shared_limiter(rates: Sequence[RateLimit], url: SecretStr) -> "SharedRateLimiter":
    from app.api.middleware.shared_rate_limit import SharedRateLimiter

    return SharedRateLimiter(rates, url.get_secret_value())


def _sent_keys(headers: Headers) -> list[str]:
    bearers = [value.split(None, 1) for value in headers.getlist("authorization")]
    tokens = [parts[1].strip() for parts in bearers if len(parts) == 2 and parts[0].lower() == "bearer"]
    return tokens + [value.strip() for value in headers.getlist("x-api-key") if value.strip()]


def _digest(key: bytes) -> bytes:
    """Hashes a key. Digests have equal lengths, so that the comparison time does not reveal the length of a key."""
    return sha256(key).digest()
