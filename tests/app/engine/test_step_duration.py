"""Tests of the durations of steps that the engine measures."""

import pytest

from app.engine.engine import Engine
from app.errors import InternalError
from tests.app.fakes import FakeRunner, Rows, new_engine, new_job, opened

DEVICE_SECONDS = 1.0  # of a step


class Clock:
    """A device that does one step after the other, and a host that may be ahead of it by some steps."""

    def __init__(self, steps_ahead: int) -> None:
        self.steps_ahead = steps_ahead
        self.now = 100.0
        self.ends: list[float] = []  # of the steps on the device

    def enqueue(self, rows: Rows) -> None:
        self.ends.append(max([self.now, *self.ends[-1:]]) + DEVICE_SECONDS)
        if len(self.ends) > self.steps_ahead:
            self.now = max(self.now, self.ends[-1 - self.steps_ahead])


def observed(engine: Engine, num_ticks: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the durations from which the engine learns in the next ticks."""
    durations: list[float] = []
    monkeypatch.setattr(engine._admission, "observe", lambda calls, seconds: durations.append(seconds))
    for _ in range(num_ticks):
        engine._tick()
    return durations


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_duration_is_that_of_the_device_also_if_the_runner_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    clock = Clock(steps_ahead)
    monkeypatch.setattr("app.engine.engine.time.monotonic", lambda: clock.now)
    engine = opened(new_engine(FakeRunner(steps_ahead=steps_ahead, on_step=clock.enqueue)))
    for _ in range(2):  # The second job begins after idle time.
        engine.submit(new_job(1, num_steps=6))
        durations = observed(engine, 6, monkeypatch)
        assert durations == [DEVICE_SECONDS] * (6 - steps_ahead)
        clock.now += 50.0
        cancelled = new_job(1)
        engine.submit(cancelled)
        engine.cancel(cancelled, InternalError())
        engine._tick()  # has no rows
