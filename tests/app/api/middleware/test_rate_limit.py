"""How often a caller may come, on a clock of its own."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import parse_many

from app import errors
from app.api.middleware.rate_limit import Rates


class Clock:
    """Stands where time.time() stood."""

    def __init__(self) -> None:
        self.now = 1_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time", clock)
    return clock


def test_a_caller_has_its_own_number_of_requests(clock: Clock) -> None:
    rates = Rates(parse_many("3/minute"))
    for caller in ("a", "b"):
        for _ in range(3):
            rates.spend(caller)
        with pytest.raises(errors.RateLimited):
            rates.spend(caller)
    clock.now += 121
    rates.spend("a")


def test_what_was_refused_is_not_counted(clock: Clock) -> None:
    rates = Rates(parse_many("2/minute;3/hour"))
    for _ in range(2):
        rates.spend("a")
    for _ in range(50):
        with pytest.raises(errors.RateLimited):
            rates.spend("a")
    clock.now += 121  # the minute is over; of the hour one is left
    rates.spend("a")
    with pytest.raises(errors.RateLimited) as limited:
        rates.spend("a")
    assert limited.value.retry_after > 60


@settings(max_examples=60, deadline=None)
@given(
    limits=st.sampled_from(["1/second", "3/10 seconds", "5/minute", "2/second;20/minute"]),
    gaps=st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_retry_after_is_when_the_next_request_is_let_in(limits: str, gaps: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr("time.time", clock)
        rates = Rates(parse_many(limits))
        for gap in gaps:
            clock.now += gap
            try:
                rates.spend("a")
            except errors.RateLimited as limited:
                refused_at, wait = clock.now, limited.retry_after
                clock.now = refused_at + wait - 1.001  # whole seconds, rounded up: not a second earlier
                if wait > 1:
                    with pytest.raises(errors.RateLimited):
                        rates.spend("a")
                clock.now = refused_at + wait + 0.001
                rates.spend("a")


def test_callers_beyond_number_are_forgotten_but_not_who_comes_often(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.middleware.rate_limit.MOST_WINDOWS", 100)
    rates = Rates(parse_many("1000/day"))
    for number in range(1000):
        rates.spend(f"address {number}")
        rates.spend("a regular")
        assert len(rates.windows) <= 100
    with pytest.raises(errors.RateLimited):
        rates.spend("a regular")


def test_nothing_runs_beside_it(clock: Clock) -> None:
    before = threading.active_count()
    rates = Rates(parse_many("600/minute"))
    for number in range(100):
        rates.spend(f"address {number}")
    assert threading.active_count() == before


def test_a_limit_of_nothing_is_no_limit() -> None:
    rates = Rates([])
    for _ in range(1000):
        rates.spend("a")
