import pytest

from app.batches import rates
from app.batches.rates import WINDOW_SECONDS, Rates


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rates, "time", clock)
    return clock


def test_rate_of_a_new_batch_counts_from_its_start(clock: Clock) -> None:
    measured = Rates()
    measured.start("a")
    clock.now += 10
    measured.add("a", lines=5, images=20)
    measured.start("a")  # changes nothing
    assert measured.of("a") == (0.5, 2.0)


def test_rate_counts_the_last_minute(clock: Clock) -> None:
    measured = Rates()
    measured.start("a")
    measured.add("a", lines=1000, images=1000)
    clock.now += WINDOW_SECONDS
    measured.add("a", lines=30, images=60)
    assert measured.of("a") == (0.5, 1.0)


def test_rate_is_none_without_answers_in_the_last_minute(clock: Clock) -> None:
    measured = Rates()
    assert measured.of("a") is None
    measured.start("a")
    assert measured.of("a") is None
    measured.add("a", lines=1, images=1)
    assert measured.of("a") is not None
    clock.now += WINDOW_SECONDS
    assert measured.of("a") is None


def test_rate_of_an_ended_batch_is_forgotten(clock: Clock) -> None:
    measured = Rates()
    measured.start("a")
    measured.end("a")
    measured.add("a", lines=1, images=1)
    assert measured.of("a") is None


def test_rates_of_batches_are_separate(clock: Clock) -> None:
    measured = Rates()
    for name in ("a", "b"):
        measured.start(name)
    clock.now += 1
    measured.add("a", lines=1, images=1)
    assert measured.of("a") == (1.0, 1.0)
    assert measured.of("b") is None
