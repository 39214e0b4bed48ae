"""Limits the request rate of each caller in all processes that use the same Redis server.

Needs the extra `redis`. Import this module only if UNFOG_RATE_LIMIT_URL is set.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from limits import RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.api.middleware.rate_limit import RateLimiter, seconds_until_permitted
from app.errors import RateLimited
from app.settings import RateLimit

log = logging.getLogger(__name__)

CALL_SECONDS = 0.5  # how long a request waits for Redis
RETRY_SECONDS = 5.0  # time between two attempts while Redis does not answer
MAX_CONNECTIONS = 16
PREFIX = "unfog"  # of the keys in Redis


class SharedRateLimiter:
    """Applies the same limits to each caller, as a sliding window counter in Redis.

    While Redis does not answer, each process applies the limits to its own requests. Requests then do not fail, and do
    not wait for Redis, except for one in RETRY_SECONDS. The methods must be called in one event loop.
    """

    def __init__(self, limits: Sequence[RateLimit], url: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Does not connect. `clock` returns seconds and must be monotonic."""
        self._limits = [(limit, RateLimitItemPerSecond(limit.amount, limit.seconds)) for limit in limits]
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=CALL_SECONDS,
            socket_timeout=CALL_SECONDS,
            socket_connect_timeout=CALL_SECONDS,
            retry=Retry(NoBackoff(), 1),  # for connections that a restart of Redis has closed
        )
        # The pool has the address. RedisStorage would refuse a URL without a port.
        options: Any = {"connection_pool": self._pool}  # The package declares only the types of simple options.
        self._storage = RedisStorage("redis://", implementation="redispy", key_prefix=PREFIX, **options)
        self._windows = SlidingWindowCounterRateLimiter(self._storage)
        self._local, self._clock = RateLimiter(limits, clock), clock
        self._retry_at: float | None = None  # when Redis is tried again; None if the last attempt succeeded

    async def hit(self, caller: str) -> None:
        """Counts one request. If it would exceed a limit, raises RateLimited without counting it."""
        if not self._limits:
            return
        now = self._clock()
        if self._retry_at is not None:
            if now < self._retry_at:
                self._local.hit(caller)
                return
            self._retry_at = now + RETRY_SECONDS  # Other requests do not try at the same time.
        try:
            async with asyncio.timeout(CALL_SECONDS):
                wait = await self._count(caller)
        except (RedisError, OSError, TimeoutError) as error:
            if self._retry_at is None:
                log.warning("Redis does not answer, each process limits its own requests", extra={"error": repr(error)})
            self._retry_at = now + RETRY_SECONDS
            self._local.hit(caller)
            return
        if self._retry_at is not None:
            log.info("Redis answers again")
            self._retry_at = None
        if wait:
            raise RateLimited(math.ceil(wait))

    async def close(self) -> None:
        """Closes the connections."""
        await self._pool.disconnect()

    async def _count(self, caller: str) -> float:
        """Counts one request and returns 0, or returns the seconds until the limits permit one more request.

        With several limits, Redis is asked for all of them before the request is counted in any. If another process
        counts a request in between, a refused request can count in some of them.
        """
        items = [item for _, item in self._limits]
        tests = (self._windows.test(item, caller) for item in items) if len(items) > 1 else ()
        if all(await asyncio.gather(*tests)):
            hits = (self._windows.hit(item, caller) for item in items)
            if all(await asyncio.gather(*hits)):
                return 0.0
        waits = await asyncio.gather(*(self._wait(limit, item, caller) for limit, item in self._limits))
        return max(*waits, 1e-3)

    async def _wait(self, limit: RateLimit, item: RateLimitItemPerSecond, caller: str) -> float:
        """Returns the seconds until the limit permits one more request. Windows begin with a request of the caller."""
        key = item.key_for(caller)
        previous, previous_left, current, current_left = await self._storage.get_sliding_window(key, limit.seconds)
        # The counter of the current window expires one window after its end, when its weight is 0.
        left = previous_left if previous else max(current_left - limit.seconds, 0.0)
        return seconds_until_permitted(limit, previous, current, left)
