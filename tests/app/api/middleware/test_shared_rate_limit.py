"""Tests of the rate limit that several processes share, with a real Redis server."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from app import errors
from app.api.middleware import shared_rate_limit
from app.api.middleware.shared_rate_limit import CALL_SECONDS, RETRY_SECONDS, SharedRateLimiter
from app.settings import RateLimit, Settings
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]

Work = Callable[..., Awaitable[None]]


def parsed(text: str) -> tuple[RateLimit, ...]:
    return Settings.model_validate({"rate_limit": text}).rate_limit


class Clock:
    """A clock that tests can put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a request wait longer for Redis, so that a busy machine does not look like a server that does not answer."""
    monkeypatch.setattr(shared_rate_limit, "CALL_SECONDS", 20.0)


def run(work: Work, limits: str, *urls: str, clock: Clock | None = None) -> None:
    """Calls `work` with one limiter for each URL, as in several processes."""

    async def call() -> None:
        async with AsyncExitStack() as stack:
            limiters = [SharedRateLimiter(parsed(limits), url, clock or Clock()) for url in urls]
            for limiter in limiters:
                stack.push_async_callback(limiter.close)
            await work(*limiters)

    asyncio.run(call())


async def accepted(limiter: SharedRateLimiter, number: int, caller: str = "a") -> int:
    """Returns how many of `number` requests are accepted."""
    count = 0
    for _ in range(number):
        try:
            await limiter.hit(caller)
            count += 1
        except errors.RateLimited as limited:
            assert limited.retry_after >= 1
    return count


def test_two_processes_share_the_limit_of_each_caller(redis_server: RedisServer) -> None:
    async def work(one: SharedRateLimiter, other: SharedRateLimiter) -> None:
        assert await accepted(one, 2) == 2
        assert await accepted(other, 5) == 1
        assert await accepted(one, 5) == 0
        assert await accepted(other, 5, "b") == 3

    run(work, "3/hour", redis_server.url, redis_server.url)


def test_concurrent_requests_do_not_exceed_the_limit(redis_server: RedisServer) -> None:
    async def work(*limiters: SharedRateLimiter) -> None:
        counts = await asyncio.gather(*(accepted(limiter, 1) for limiter in limiters for _ in range(50)))
        assert sum(counts) == 40

    run(work, "40/hour", *[redis_server.url] * 2)


def test_every_limit_applies_and_rejected_requests_are_not_counted(redis_server: RedisServer) -> None:
    async def work(limiter: SharedRateLimiter) -> None:
        assert await accepted(limiter, 10) == 2
        await asyncio.sleep(2.05)  # two windows of the first limit
        assert await accepted(limiter, 10) == 1
        with pytest.raises(errors.RateLimited) as limited:
            await limiter.hit("a")
        assert limited.value.retry_after > 60

    run(work, "2/second,3/hour", redis_server.url)


def test_next_request_is_accepted_after_retry_after(redis_server: RedisServer) -> None:
    async def work(limiter: SharedRateLimiter) -> None:
        assert await accepted(limiter, 10) == 4
        for _ in range(2):  # first the requests of the current window, then those of the previous one
            with pytest.raises(errors.RateLimited) as limited:
                await limiter.hit("a")
            await asyncio.sleep(limited.value.retry_after + 0.01)
            assert await accepted(limiter, 4) >= 1
            await accepted(limiter, 4)

    run(work, "4/2 seconds", redis_server.url)


def test_each_process_counts_alone_after_redis_was_killed(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()

    async def work(one: SharedRateLimiter, other: SharedRateLimiter) -> None:
        assert await accepted(one, 2) + await accepted(other, 2) == 3
        redis_server.kill()
        for limiter in (one, other):
            assert await accepted(limiter, 10) == 3
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # one for each process
        redis_server.start()
        assert await accepted(one, 1) == 0  # Redis is not tried yet.
        clock.ahead += RETRY_SECONDS + 1
        assert await accepted(one, 2) + await accepted(other, 2) == 3
        assert [record.message for record in caplog.records][2:] == ["Redis answers again"] * 2

    caplog.set_level("INFO", logger=shared_rate_limit.__name__)
    run(work, "3/hour", *[redis_server.url] * 2, clock=clock)


def test_restart_of_redis_between_two_requests_is_not_noticed(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(limiter: SharedRateLimiter) -> None:
        assert await accepted(limiter, 2) == 2
        redis_server.kill()
        redis_server.start()
        assert await accepted(limiter, 2) == 2

    run(work, "2/hour", redis_server.url)
    assert not caplog.records


def test_paused_redis_delays_one_request_and_blocks_nothing_else(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(limiter: SharedRateLimiter) -> None:
        redis_server.pause()
        first = asyncio.create_task(accepted(limiter, 1))
        turns = 0
        while not first.done():  # The event loop goes on.
            await asyncio.sleep(CALL_SECONDS / 20)
            turns += 1
        assert await first == 1
        assert turns > 2
        waited = time.monotonic()
        assert await accepted(limiter, 100) == 100
        assert time.monotonic() - waited < 50 * CALL_SECONDS  # the others did not wait

    monkeypatch.setattr(shared_rate_limit, "CALL_SECONDS", CALL_SECONDS)
    run(work, "1000/hour", redis_server.url)


def test_server_that_cannot_be_used_is_like_one_that_does_not_answer() -> None:
    async def work(*limiters: SharedRateLimiter) -> None:
        for limiter in limiters:
            assert await accepted(limiter, 5) == 2

    run(work, "2/hour", "redis://127.0.0.1:1", "redis://no-such-host.invalid", "rediss://:password@[::1]/2")


def test_counts_expire(redis_server: RedisServer) -> None:
    async def work(limiter: SharedRateLimiter) -> None:
        await limiter.hit("a")
        assert redis_server.keys()
        await asyncio.sleep(2.1)
        assert not redis_server.keys()

    run(work, "5/second", redis_server.url)


def test_redis_is_not_used_without_limits(redis_server: RedisServer) -> None:
    async def work(limiter: SharedRateLimiter) -> None:
        assert await accepted(limiter, 100) == 100
        assert not redis_server.keys()

    run(work, "off", redis_server.url)


def test_packages_are_not_imported_without_a_url() -> None:
    program = """
import sys
from app.api.middleware.auth import Auth
from app.settings import RateLimit
Auth(None, [], [RateLimit(5, 60)], None, None)
print(sorted({"limits", "redis"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
