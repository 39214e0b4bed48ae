"""How often a caller may come, on a clock of its own."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import parse_many

from app import errors
from app.api.middleware.rate_limit import RateLimiter


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_caller_has_its_own_number_of_requests(clock: Clock) -> None:
    limiter = RateLimiter(parse_many("3/minute"), clock)
    for caller in ("a", "b"):
        for _ in range(3):
            limiter.spend(caller)
        with pytest.raises(errors.RateLimited):
            limiter.spend(caller)
    clock.now += 121
    limiter.spend("a")


def test_what_was_refused_is_not_counted(clock: Clock) -> None:
    limiter = RateLimiter(parse_many("2/minute;3/hour"), clock)
    for _ in range(2):
        limiter.spend("a")
    for _ in range(50):
        with pytest.raises(errors.RateLimited):
            limiter.spend("a")
    clock.now += 121  # the minute is over; of the hour one is left
    limiter.spend("a")
    with pytest.raises(errors.RateLimited) as limited:
        limiter.spend("a")
    assert limited.value.retry_after > 60


@settings(max_examples=60, deadline=None)
@given(
    limits=st.sampled_from(["1/second", "3/10 seconds", "5/minute", "2/second;20/minute"]),
    gaps=st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_retry_after_is_when_the_next_request_is_let_in(limits: str, gaps: list[float]) -> None:
    clock = Clock()
    limiter = RateLimiter(parse_many(limits), clock)
    for gap in gaps:
        clock.now += gap
        try:
            limiter.spend("a")
        except errors.RateLimited as limited:
            refused_at, wait = clock.now, limited.retry_after
            clock.now = refused_at + wait - 1.001  # whole seconds, rounded up: not a second earlier
            if wait > 1:
                with pytest.raises(errors.RateLimited):
                    limiter.spend("a")
            clock.now = refused_at + wait + 0.001
            limiter.spend("a")


def test_the_callers_with_the_oldest_requests_are_removed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.middleware.rate_limit.MOST_CALLERS", 100)
    limiter = RateLimiter(parse_many("1000/day"), clock)
    for number in range(1000):
        limiter.spend(f"address {number}")
        limiter.spend("a regular")
        assert len(limiter) <= 100
    with pytest.raises(errors.RateLimited):
        limiter.spend("a regular")


def test_it_starts_no_thread(clock: Clock) -> None:
    before = threading.active_count()
    limiter = RateLimiter(parse_many("600/minute"), clock)
    for number in range(100):
        limiter.spend(f"address {number}")
    assert threading.active_count() == before


def test_a_limit_of_nothing_is_no_limit() -> None:
    limiter = RateLimiter([])
    for _ in range(1000):
        limiter.spend("a")


@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.floats(0, 30), min_size=1, max_size=100))
def test_a_request_is_permitted_while_the_weighted_sum_of_two_windows_is_below_the_limit(gaps: list[float]) -> None:
    (item,) = parse_many("5/10 seconds")
    clock = Clock()
    limiter, window = RateLimiter([item], clock), item.get_expiry()
    accepted: list[float] = []
    for gap in gaps:
        clock.now += gap
        start = clock.now // window * window
        present = sum(moment >= start for moment in accepted)
        previous = sum(start - window <= moment < start for moment in accepted)
        weighted = previous * (1 - (clock.now - start) / window) + present
        try:
            limiter.spend("a")
            accepted.append(clock.now)
            assert weighted < item.amount
        except errors.RateLimited:
            assert weighted >= item.amount - 1e-6


def test_without_limits_no_caller_is_remembered() -> None:
    limiter = RateLimiter([])
    for number in range(100):
        limiter.spend(f"address {number}")
    assert len(limiter) == 0
