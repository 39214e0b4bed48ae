"""Tests of the durations of steps that the engine measures."""

import pytest

from app.engine.engine import Engine
from app.errors import InternalError
from tests.app.fakes import FakeRunner, Rows, new_engine, new_job, opened

DEVICE_SECONDS = 1.0  # duration of a step on the device


class Clock:
    """The time of a host that enqueues up to `steps_ahead` steps before it waits for the device."""

    def __init__(self, steps_ahead: int) -> None:
        self.steps_ahead = steps_ahead
        self.now = 100.0
        self.ends: list[float] = []  # of the steps on the device

    def enqueue(self, rows: Rows) -> None:
        self.ends.append(max([self.now, *self.ends[-1:]]) + DEVICE_SECONDS)
        if len(self.ends) > self.steps_ahead:
            self.now = max(self.now, self.ends[-1 - self.steps_ahead])


def observed(engine: Engine, num_ticks: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs some iterations of the engine. Returns the durations that it uses for its predictions."""
    durations: list[float] = []
    monkeypatch.setattr(engine._admission, "observe", lambda calls, seconds: durations.append(seconds))
    for _ in range(num_ticks):
        engine._tick()
    return durations


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_step_duration_is_that_of_the_device_with_steps_ahead(
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
        engine._tick()  # This iteration has no rows.
