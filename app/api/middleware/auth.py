"""Who gets in: by key, and how often. Probes, metrics and the API's description stand outside."""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from limits import RateLimitItem
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.context import notes_of
from app.api.middleware.client_address import address_name, key_name
from app.api.middleware.rate_limit import Rates
from app.api.problems import problem_response
from app.errors import Forbidden, Unauthorized, UnfogError
from app.metrics import Metrics


class Keys:
    """The keys that open, each as good as another, so that a new one can be handed out before the old one goes."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value().encode("ascii")) for key in keys]

    def check(self, headers: Headers) -> int | None:
        """The place of the key that was shown, from 1; None where none is asked for.

        Unauthorized without one, Forbidden with none that opens. Every key is compared, in full, whatever was found.
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


class Doors:
    """Plain ASGI around all routes but those in `open_paths`; what nobody routes needs a key, too."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[SecretStr],
        rates: Sequence[RateLimitItem],
        metrics: Metrics,
        open_paths: frozenset[str],
    ) -> None:
        self._app, self._metrics, self._open_paths = app, metrics, open_paths
        self._keys, self._rates = Keys(keys), Rates(rates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or says why not, before a byte of its body is read."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                self._let_in(scope)
            except UnfogError as error:
                self._metrics.count_rejection(error)
                await problem_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _let_in(self, scope: Scope) -> None:
        """Checks the key and counts the request: under the key, or under the address if no key is valid.

        Refused requests are counted too, since each costs some work.
        """
        address = address_name(scope)
        try:
            key = self._keys.check(Headers(scope=scope))
        except UnfogError:
            self._rates.spend(address)
            raise
        notes_of(scope).key = key
        self._rates.spend(key_name(key) if key else address)


def _shown(headers: Headers) -> list[str]:
    bearers = [value.split(None, 1) for value in headers.getlist("authorization")]
    tokens = [parts[1].strip() for parts in bearers if len(parts) == 2 and parts[0].lower() == "bearer"]
    return tokens + [value.strip() for value in headers.getlist("x-api-key") if value.strip()]


def _digest(key: bytes) -> bytes:
    """Of one length for all keys: the time that a comparison takes says nothing of theirs."""
    return sha256(key).digest()
