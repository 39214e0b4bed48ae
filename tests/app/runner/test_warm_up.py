"""Tests of the measured step times, with a simulated clock."""

from collections.abc import Callable

import pytest

from app.engine.interface import OutOfMemoryError
from app.engine.job import StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner import warm_up
from app.runner.warm_up import (
    FEWEST_ROUNDS,
    HOT_ROWS,
    LONGEST_TIMING_SECONDS,
    MOST_ROUNDS,
    TIMING_SECONDS,
    measure_step_times,
)
from tests.app.fakes import FakeRunner, Rows

BATCHES = (1, 8, 64)
ROUND = [1] * HOT_ROWS + [8, 64]  # the batch sizes of the steps of a round
SECONDS = 1e-3 * sum(ROUND)  # duration of a round


class Clock:
    """A simulated clock. A step takes `slowness` milliseconds per row."""

    def __init__(self) -> None:
        self.now, self.waited, self.slowness, self.batches = 0.0, 0.0, 1.0, list[int]()

    def step(self, rows: Rows) -> None:
        self.batches.append(len(rows))
        self.now += self.slowness * 1e-3 * len(rows)

    def wait_for_the_core(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now - self.waited

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(warm_up, "time", made)
    return made


def measure(clock: Clock, runner: FakeRunner, should_stop: Callable[[], bool] = lambda: False) -> StepTimes:
    def time_step(trajectories: list[Trajectory]) -> tuple[float, float]:
        start, waited = clock.now, clock.waited
        runner.step(StepRows.of(trajectories))
        seconds = clock.now - start
        return seconds, seconds - (clock.waited - waited)

    return StepTimes(measure_step_times(runner, "default", time_step, BATCHES, should_stop))


def test_slow_first_round_does_not_change_the_step_times(clock: Clock) -> None:
    def step(rows: Rows) -> None:
        clock.slowness = 2.0 if clock.now < 0.1 else 1.0  # the machine is slow for most of the first round
        clock.step(rows)

    step_times = measure(clock, FakeRunner(on_step=step))
    assert [step_times.step_seconds(rows) for rows in BATCHES] == pytest.approx([0.001, 0.008, 0.064])


def test_single_fast_step_does_not_make_its_batch_size_look_better(clock: Clock) -> None:
    def step(rows: Rows) -> None:
        is_first = len(clock.batches) == 1
        clock.slowness = 0.5 if is_first and len(rows) == 8 else 1.0
        clock.step(rows)

    step_times = measure(clock, FakeRunner(on_step=step))
    assert step_times.step_seconds(64) == pytest.approx(8 * step_times.step_seconds(8), rel=0.01)


def test_waiting_for_the_core_does_not_make_a_large_batch_look_worse(clock: Clock) -> None:
    def step(rows: Rows) -> None:
        clock.step(rows)
        clock.wait_for_the_core(0.1 if len(rows) == 64 else 0.0)  # A short step does not wait.

    step_times = measure(clock, FakeRunner(on_step=step))
    assert step_times.step_seconds(64) == pytest.approx(64 * step_times.step_seconds(1))
    assert sum(map(step_times.step_seconds, BATCHES)) == pytest.approx(0.173)  # the total time is unchanged


@pytest.mark.parametrize(("share", "seconds"), [(0.95, TIMING_SECONDS), (0.5, LONGEST_TIMING_SECONDS)])
def test_measurement_is_longer_while_another_process_uses_the_core(clock: Clock, share: float, seconds: float) -> None:
    def step(rows: Rows) -> None:
        clock.step(rows)
        clock.wait_for_the_core(1e-3 * len(rows) * (1 - share) / share)

    measure(clock, FakeRunner(on_step=step))
    assert seconds < clock.now < seconds + SECONDS / share  # The measurement ends after a complete round.


def test_small_batch_is_measured_after_steps_of_the_same_size(clock: Clock) -> None:
    """After a large step the weights are not in the caches, and a single row takes longer than it does in practice."""

    def step(rows: Rows) -> None:
        clock.slowness = 1.5 if len(rows) == 1 and clock.batches[-1:] != [1] else 1.0
        clock.step(rows)

    step_times = measure(clock, FakeRunner(on_step=step))
    assert [step_times.step_seconds(rows) for rows in BATCHES] == pytest.approx([0.001, 0.008, 0.064])


def test_smaller_batch_never_takes_longer_than_a_larger_one(clock: Clock) -> None:
    def step(rows: Rows) -> None:
        clock.now += 0.05 if len(rows) == 1 else 0.02

    step_times = measure(clock, FakeRunner(on_step=step))
    assert step_times.step_seconds(1) == step_times.step_seconds(64) == pytest.approx(0.02)


def test_no_round_starts_after_the_time_limit(clock: Clock) -> None:
    runner = FakeRunner(on_step=clock.step)
    measure(clock, runner)
    rounds = len(clock.batches) // len(ROUND)
    assert clock.batches == ROUND * rounds
    assert FEWEST_ROUNDS < rounds < MOST_ROUNDS
    assert not runner.held


@pytest.mark.parametrize(("seconds_a_round", "rounds"), [(0.5, FEWEST_ROUNDS), (1.5, 2), (20.0, 1)])
def test_slow_machine_runs_few_rounds(clock: Clock, seconds_a_round: float, rounds: int) -> None:
    clock.slowness = seconds_a_round / (SECONDS)
    measure(clock, FakeRunner(on_step=clock.step))
    assert len(clock.batches) == rounds * len(ROUND)


def test_batch_that_does_not_fit_into_memory_is_left_out(clock: Clock) -> None:
    def step(rows: Rows) -> None:
        if len(rows) > 8:
            raise OutOfMemoryError
        clock.step(rows)

    runner = FakeRunner(on_step=step)
    step_times = measure(clock, runner)
    assert step_times.of("default").best_batch(0.0, 1.0) <= 8
    assert not runner.held


def test_measurement_stops_when_asked_and_releases_all_rows(clock: Clock) -> None:
    runner = FakeRunner(on_step=clock.step)
    measure(clock, runner, lambda: len(clock.batches) == HOT_ROWS + 1)
    assert clock.batches == ROUND[: HOT_ROWS + 1]
    assert not runner.held
