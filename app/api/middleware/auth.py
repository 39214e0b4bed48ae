"""Auth: API keys and the rate limit. Probes, metrics and the API's description need neither."""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from limits import RateLimitItem
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.context import context_of
from app.api.middleware.client_address import address_name, key_name
from app.api.middleware.rate_limit import RateLimiter
from app.api.problems import problem_response
from app.errors import Forbidden, Unauthorized, UnfogError
from app.metrics import Metrics


class Keys:
    """The valid API keys. There can be several, so that a new key can be handed out before the old one is removed."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value().encode("ascii")) for key in keys]

    def check(self, headers: Headers) -> int | None:
        """Returns the place of the request's key, from 1; None if no key is required.

        Unauthorized if the request has no key, Forbidden if it has no valid key. Every key is compared in full, so that
        the time does not tell which one matched.
        """
        if not self._digests:
            return None
        shown = [_digest(key.encode("latin-1")) for key in _shown(headers)]
        opens = [hmac.compare_digest(ours, theirs) for theirs in shown for ours in self._digests]
        if not shown:
            raise Unauthorized
        if not any(opens):
            raise Forbidden
        return 1 + opens.index(True) % len(self._digests)


class Auth:
    """Applies API keys and the rate limit to all paths except `open_paths`. Paths without a route need a key, too."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[SecretStr],
        rates: Sequence[RateLimitItem],
        metrics: Metrics,
        open_paths: frozenset[str],
    ) -> None:
        self._app, self._metrics, self._open_paths = app, metrics, open_paths
        self._keys, self._limiter = Keys(keys), RateLimiter(rates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it, before any byte of its body is read."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                self._admit(scope)
            except UnfogError as error:
                self._metrics.count_rejection(error)
                await problem_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Checks the key and counts the request: under the key, or under the address if no key is valid.

        Requests without a valid key are counted too, since each costs some work.
        """
        address = address_name(scope)
        try:
            key = self._keys.check(Headers(scope=scope))
        except UnfogError:
            self._limiter.spend(address)
            raise
        context_of(scope).key = key
        self._limiter.spend(key_name(key) if key else address)


def _shown(headers: Headers) -> list[str]:
    bearers = [value.split(None, 1) for value in headers.getlist("authorization")]
    tokens = [parts[1].strip() for parts in bearers if len(parts) == 2 and parts[0].lower() == "bearer"]
    return tokens + [value.strip() for value in headers.getlist("x-api-key") if value.strip()]


def _digest(key: bytes) -> bytes:
    """Returns a digest. All have one length, so that the time of a comparison does not tell the length of a key."""
    return sha256(key).digest()
