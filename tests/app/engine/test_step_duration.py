"""Tests of the durations of steps that the engine measures."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from app.engine.engine import Engine
from app.engine.step_times import StepTimes
from app.errors import InternalError
from tests.app.fakes import INFO, FakeRunner, Rows, new_engine, new_job, opened

DEVICE_SECONDS = 1.0  # duration of a step on the device
HOST_SECONDS = 0.1  # between two steps; meanwhile the device computes the steps that are enqueued
SECONDS_BY_ROWS = {512: 40.0}  # the same for steps of this number of rows


class Clock:
    """The time of a host that enqueues up to `steps_ahead` steps before it waits for the device."""

    def __init__(self, steps_ahead: int) -> None:
        self.steps_ahead = steps_ahead
        self.now = 100.0
        self.ends: list[float] = []  # of the steps on the device

    def enqueue(self, rows: Rows) -> None:
        self.ends.append(max([self.now, *self.ends[-1:]]) + SECONDS_BY_ROWS.get(len(rows), DEVICE_SECONDS))
        if len(self.ends) > self.steps_ahead:
            self.now = max(self.now, self.ends[-1 - self.steps_ahead])


def engine_with(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("app.engine.engine.time.monotonic", lambda: clock.now)
    return opened(new_engine(FakeRunner(steps_ahead=clock.steps_ahead, on_step=clock.enqueue)))


def observed(engine: Engine, num_ticks: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs some iterations of the engine. Returns the durations that it uses for its predictions."""
    durations: list[float] = []
    monkeypatch.setattr(engine._admission, "observe", lambda calls, seconds: durations.append(seconds))
    for _ in range(num_ticks):
        engine.loop._tick()
    return durations


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_step_duration_is_that_of_the_device_with_steps_ahead(
    monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    clock = Clock(steps_ahead)
    engine = engine_with(clock, monkeypatch)
    for _ in range(2):  # The second job begins after idle time.
        engine.submit(new_job(1, num_steps=6))
        durations = list[float]()
        for _ in range(6):
            clock.now += HOST_SECONDS
            durations += observed(engine, 1, monkeypatch)
        assert durations[1:] == pytest.approx([DEVICE_SECONDS] * (5 - steps_ahead))
        assert durations[0] == pytest.approx(DEVICE_SECONDS, abs=1.01 * HOST_SECONDS)  # the device began in the past
        clock.now += 50.0
        cancelled = new_job(1)
        engine.submit(cancelled)
        engine.cancel(cancelled, InternalError())
        engine.loop._tick()  # This iteration has no rows.


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_time_in_which_the_engine_waits_for_work_is_no_duration(
    monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    clock = Clock(steps_ahead)
    engine = engine_with(clock, monkeypatch)

    def wait(has_work: Callable[[], bool], timeout: float | None) -> bool:
        clock.now += 50.0
        engine.submit(new_job(1, num_steps=6))
        return has_work()

    monkeypatch.setattr(engine._condition, "wait_for", wait)
    for _ in range(2):
        num_ticks = 1 + 6  # The engine waits in the first one.
        assert observed(engine, num_ticks, monkeypatch) == [DEVICE_SECONDS] * (6 - steps_ahead)


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_duration_is_divided_by_the_prediction_for_the_same_step(
    monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    """Steps of 1 row and of 512 rows alternate, and take as long as predicted. So the slowdown stays 1."""
    clock = Clock(steps_ahead)
    monkeypatch.setattr("app.engine.engine.time.monotonic", lambda: clock.now)
    times = StepTimes({1: DEVICE_SECONDS, **SECONDS_BY_ROWS})
    runner = FakeRunner(times, steps_ahead=steps_ahead, on_step=clock.enqueue)
    engine, slowdowns = opened(new_engine(runner, max_batch=512)), list[float]()
    for step in range(40):
        engine.submit(new_job(512 if step % 2 else 1, num_steps=1))
        engine.loop._tick()
        slowdowns.append(engine._admission.step_times.slowdown)
    assert engine.num_steps == 40
    assert slowdowns == pytest.approx([1.0] * 40)


def test_duration_of_a_step_of_another_model_is_divided_by_its_own_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def step(rows: Rows) -> None:
        now[0] += 3.0 if rows[0].options.model == "fast" else 1.0

    monkeypatch.setattr("app.engine.engine.time.monotonic", lambda: now[0])
    times = StepTimes({1: 1.0}, of_models={"fast": {1: 3.0}})
    runner = FakeRunner(times, on_step=step, models={"default": INFO, "fast": replace(INFO, name="fast")})
    engine, slowdowns = opened(new_engine(runner)), list[float]()
    for model in ("default", "fast", "fast", "default"):
        engine.submit(new_job(1, num_steps=1, model=model))
        engine.loop._tick()
        slowdowns.append(engine._admission.step_times.slowdown)
    assert slowdowns == pytest.approx([1.0] * 4)


def test_durations_of_the_parts_of_a_failed_batch_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def step(rows: Rows) -> None:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("device error")

    engine = opened(new_engine(FakeRunner(on_step=step)))
    engine.submit(new_job(4, num_steps=2))
    assert observed(engine, 1, monkeypatch) == []
    assert sizes == [4, 2, 2]
