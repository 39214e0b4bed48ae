"""Tests of the number of compute threads on a simulated machine with two cores, one of which can be busy."""

import pytest

from app.engine.step_times import StepTimes
from app.runner.threads import BUSY_WINDOWS, LONGEST_PAUSE, SHORTEST_PAUSE, WINDOW_SECONDS, ComputeThreads

TWO, ONE = StepTimes({1: 0.0025, 64: 0.056}), StepTimes({1: 0.004, 64: 0.108})  # measured seconds
NOTICED = (BUSY_WINDOWS + 1) * WINDOW_SECONDS  # a busy core is detected at the end of the first step after this time
STALL = 3.0  # factor by which a step of two threads is slower if one of them has no core
SHARE = 2 / 3  # the share of a core that each of three threads has on two cores


class Machine:
    """Simulates steps on a machine with two cores. `busy` means that another process uses one of them."""

    def __init__(self, *counts: int) -> None:
        self.count, self.now = 0, 0.0
        self.threads = ComputeThreads(counts, self._use, clock=lambda: self.now)
        self.threads.set(counts[0])

    def _use(self, count: int) -> None:
        self.count = count

    def step(self, evaluations: int, *, busy: bool, slowness: float = 1.0) -> tuple[int, float]:
        """Simulates a step. Returns its number of threads and its duration in seconds."""
        count, is_crowded = self.count, busy and self.count == 2
        seconds = slowness * {1: ONE, 2: TWO}[count].step_seconds(evaluations) * (STALL if is_crowded else 1)
        self.now += seconds
        self.threads.observe(seconds, seconds * (SHARE if is_crowded else 1))
        return count, seconds

    def steps(self, seconds: float, evaluations: int, *, busy: bool, slowness: float = 1.0) -> dict[int, float]:
        """Simulates steps for this time. Returns the seconds with each number of threads."""
        spent = {1: 0.0, 2: 0.0}
        while sum(spent.values()) < seconds:
            count, took = self.step(evaluations, busy=busy, slowness=slowness)
            spent[count] += took
        return spent


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_one_thread_fewer_is_used_while_another_process_uses_a_core(evaluations: int) -> None:
    machine = Machine(2, 1)
    assert machine.steps(2, evaluations, busy=False)[1] == 0
    longest = STALL * TWO.step_seconds(evaluations)
    assert machine.steps(NOTICED + 6 * longest, evaluations, busy=True)[1] > 0
    machine.steps(2 * LONGEST_PAUSE, evaluations, busy=True)
    settled = machine.steps(10 * LONGEST_PAUSE, evaluations, busy=True)
    assert settled[2] <= 10 * (longest + WINDOW_SECONDS)  # all threads are used for one window between two pauses
    assert settled[1] > 0


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_all_threads_are_used_again_when_the_core_is_free(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(60, evaluations, busy=True)
    assert machine.steps(2 * LONGEST_PAUSE, evaluations, busy=False)[1] <= LONGEST_PAUSE + ONE.step_seconds(evaluations)
    assert machine.steps(60, evaluations, busy=False)[1] == 0


def test_pause_is_short_after_the_core_was_free_again() -> None:
    machine = Machine(2, 1)
    machine.steps(60, 64, busy=True)  # The pauses are long at the end.
    machine.steps(2 * LONGEST_PAUSE, 64, busy=False)
    busy = 0.0
    while machine.count == 2:
        busy += machine.step(64, busy=True)[1]
    assert busy <= NOTICED + 2 * STALL * TWO.step_seconds(64)
    assert machine.steps(5, 64, busy=False)[1] <= 2 * SHORTEST_PAUSE


def test_pause_ends_while_the_engine_is_idle() -> None:
    machine = Machine(2, 1)
    machine.steps(60, 64, busy=True)
    machine.now += LONGEST_PAUSE
    assert machine.steps(2, 1, busy=False)[1] <= 2 * ONE.step_seconds(1)


def test_single_slow_step_does_not_change_the_number_of_threads() -> None:
    machine = Machine(2, 1)
    machine.step(64, busy=True, slowness=100.0)
    assert machine.steps(10, 64, busy=False)[1] == 0


@pytest.mark.parametrize("evaluations", [1, 64])
def test_all_threads_are_kept_while_the_machine_changes_its_speed(evaluations: int) -> None:
    machine = Machine(2, 1)
    for slowness in (1.0, 4.0, 1.0, 2.5, 10.0):
        assert machine.steps(5, evaluations, busy=False, slowness=slowness)[1] == 0


@pytest.mark.parametrize("evaluations", [1, 32, 64])
def test_short_use_of_a_core_does_not_change_the_number_of_threads(evaluations: int) -> None:
    """Encoding and sending the answers of a large batch uses a core for a short time."""
    machine = Machine(2, 1)
    for _ in range(20):
        assert machine.steps((BUSY_WINDOWS - 1) * WINDOW_SECONDS, evaluations, busy=True)[1] == 0
        assert machine.steps(5, evaluations, busy=False)[1] == 0
    assert machine.steps(20, evaluations, busy=True)[1] > 0


@pytest.mark.parametrize("evaluations", [1, 64])
def test_busy_core_is_detected_after_an_earlier_slow_phase(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(60, evaluations, busy=True, slowness=3.0)
    machine.steps(2 * LONGEST_PAUSE, evaluations, busy=False)
    later = machine.steps(60, evaluations, busy=True)
    assert later[1] > 0.8 * 60


def test_fixed_number_of_threads_is_used_only_within_the_block() -> None:
    machine = Machine(2, 1)
    with machine.threads.fixed(1):
        assert machine.steps(20, 64, busy=False)[2] == 0
    with machine.threads.fixed(2):
        assert machine.steps(20, 64, busy=True)[1] == 0
    assert machine.count == 2
    assert machine.steps(20, 64, busy=False)[1] == 0


def test_single_permitted_number_of_threads_is_kept() -> None:
    machine = Machine(2)
    assert machine.steps(20, 64, busy=True)[1] == 0


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_use_of_a_part_of_a_core_does_not_change_the_number_of_threads(share: float) -> None:
    """A step takes twice as long with one thread. With two threads, only the used part of the core is lost."""
    machine = Machine(2, 1)
    for _ in range(1000):
        seconds = TWO.step_seconds(64) * (1 + share)
        machine.now += seconds
        machine.threads.observe(seconds, seconds / (1 + share))
        assert machine.count == 2
