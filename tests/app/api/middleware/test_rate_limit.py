"""Tests of the rate limiter, with a fake clock."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import errors
from app.api.middleware.rate_limit import RateLimiter
from app.settings import RateLimit, Settings


def parsed(text: str) -> tuple[RateLimit, ...]:
    return Settings.model_validate({"rate_limit": text}).rate_limit


class Clock:
    """A fake clock. Tests set `now`."""

    def __init__(self) -> None:
        self.now = 1_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_caller_has_its_own_limit(clock: Clock) -> None:
    limiter = RateLimiter(parsed("3/minute"), clock)
    for caller in ("a", "b"):
        for _ in range(3):
            limiter.hit(caller)
        with pytest.raises(errors.RateLimited):
            limiter.hit(caller)
    clock.now += 121
    limiter.hit("a")


def test_rejected_requests_are_not_counted(clock: Clock) -> None:
    limiter = RateLimiter(parsed("2/minute;3/hour"), clock)
    for _ in range(2):
        limiter.hit("a")
    for _ in range(50):
        with pytest.raises(errors.RateLimited):
            limiter.hit("a")
    clock.now += 121  # the minute is over, and 1 request of the hour is left
    limiter.hit("a")
    with pytest.raises(errors.RateLimited) as limited:
        limiter.hit("a")
    assert limited.value.retry_after > 60


@settings(max_examples=60, deadline=None)
@given(
    limits=st.sampled_from(["1/second", "3/10 seconds", "5/minute", "2/second;20/minute"]),
    gaps=st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_next_request_is_accepted_after_retry_after_and_not_earlier(limits: str, gaps: list[float]) -> None:
    clock = Clock()
    limiter = RateLimiter(parsed(limits), clock)
    for gap in gaps:
        clock.now += gap
        try:
            limiter.hit("a")
        except errors.RateLimited as limited:
            refused_at, wait = clock.now, limited.retry_after
            clock.now = refused_at + wait - 1.001  # one second earlier; Retry-After is rounded up
            if wait > 1:
                with pytest.raises(errors.RateLimited):
                    limiter.hit("a")
            clock.now = refused_at + wait + 0.001
            limiter.hit("a")


def test_callers_with_the_oldest_requests_are_removed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.middleware.rate_limit.MAX_CALLERS", 100)
    limiter = RateLimiter(parsed("1000/day"), clock)
    for number in range(1000):
        limiter.hit(f"address {number}")
        limiter.hit("a frequent caller")
        assert len(limiter) <= 100
    with pytest.raises(errors.RateLimited):
        limiter.hit("a frequent caller")


def test_caller_with_the_newest_request_is_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.middleware.rate_limit.MAX_CALLERS", 2)
    limiter = RateLimiter(parsed("1/day"), clock)
    for caller in ("oldest", "older", "newest"):
        limiter.hit(caller)
    with pytest.raises(errors.RateLimited):
        limiter.hit("newest")


def test_limiter_starts_no_thread(clock: Clock) -> None:
    before = threading.active_count()
    limiter = RateLimiter(parsed("600/minute"), clock)
    for number in range(100):
        limiter.hit(f"address {number}")
    assert threading.active_count() == before


def test_requests_are_unlimited_without_limits() -> None:
    limiter = RateLimiter([])
    for _ in range(1000):
        limiter.hit("a")


@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.floats(0, 30), min_size=1, max_size=100))
def test_request_is_accepted_while_the_weighted_sum_is_below_the_limit(gaps: list[float]) -> None:
    (item,) = parsed("5/10 seconds")
    clock = Clock()
    limiter, window = RateLimiter([item], clock), item.seconds
    accepted: list[float] = []
    for gap in gaps:
        clock.now += gap
        start = clock.now // window * window
        present = sum(moment >= start for moment in accepted)
        previous = sum(start - window <= moment < start for moment in accepted)
        weighted = previous * (1 - (clock.now - start) / window) + present
        try:
            limiter.hit("a")
            accepted.append(clock.now)
            assert weighted < item.amount
        except errors.RateLimited:
            assert weighted >= item.amount - 1e-6


def test_no_caller_is_stored_without_limits() -> None:
    limiter = RateLimiter([])
    for number in range(100):
        limiter.hit(f"address {number}")
    assert len(limiter) == 0
