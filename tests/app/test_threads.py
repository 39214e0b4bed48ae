"""The number of compute threads against a machine whose second core comes and goes."""

import pytest

from app.pace import Pace
from app.threads import RELAXATION, WINDOW_SECONDS, ComputeThreads

TWO, ONE = Pace({1: 1.0, 64: 20.0}), Pace({1: 1.5, 64: 38.0})
FORGOTTEN = round(1 / RELAXATION)  # steps after which what is not in use is tried again, about
STALL = 3.0  # times as long does a step of two threads take where one of them has no core
SHARE = 2 / 3  # of two cores' time each of three that want them has


class Machine:
    """Makes steps with as many threads as were set last."""

    def __init__(self, *counts: int) -> None:
        self.count = 0
        self.threads = ComputeThreads(counts, self._use)
        self.threads.set(counts[0])
        self.threads.learn({count: {1: ONE, 2: TWO}[count].copy() for count in counts})

    def _use(self, count: int) -> None:
        self.count = count

    def step(self, evaluations: int, *, busy: bool, slowness: float = 1.0) -> int:
        """How many threads made it."""
        count, is_crowded = self.count, busy and self.count == 2
        seconds = slowness * {1: ONE, 2: TWO}[count].step_seconds(evaluations) * (STALL if is_crowded else 1)
        self.threads.observe([evaluations], seconds, seconds * (SHARE if is_crowded else 1))
        return count

    def steps(self, number: int, evaluations: int, *, busy: bool, slowness: float = 1.0) -> list[int]:
        return [self.step(evaluations, busy=busy, slowness=slowness) for _ in range(number)]


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_one_fewer_steps_while_another_process_keeps_a_core(evaluations: int) -> None:
    machine = Machine(2, 1)
    assert machine.steps(20, evaluations, busy=False) == [2] * 20
    busy = machine.steps(10 * FORGOTTEN, evaluations, busy=True)
    assert busy[:1] == [2]
    assert busy[:10].count(2) < 10
    assert busy[10:].count(2) <= 0.05 * len(busy)


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_all_step_again_when_the_core_is_free(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(5 * FORGOTTEN, evaluations, busy=True)
    free = machine.steps(3 * FORGOTTEN, evaluations, busy=False)
    assert set(free[2 * FORGOTTEN :]) == {2}


def test_a_step_of_two_models_takes_two_calls_and_is_no_slow_one() -> None:
    machine = Machine(2, 1)
    for _ in range(5 * FORGOTTEN):
        assert machine.count == 2
        seconds = 2 * TWO.step_seconds(1)  # as one call of two rows it would take half
        machine.threads.observe([1, 1], seconds, SHARE * seconds)


def test_a_single_slow_step_changes_nothing() -> None:
    machine = Machine(2, 1)
    machine.step(64, busy=False, slowness=100.0)
    assert machine.steps(100, 64, busy=False) == [2] * 100


@pytest.mark.parametrize("evaluations", [1, 64])
def test_a_machine_that_is_now_slow_and_now_quick_keeps_all_of_them(evaluations: int) -> None:
    machine = Machine(2, 1)
    for slowness in (1.0, 4.0, 1.0, 2.5, 10.0):
        assert set(machine.steps(3 * FORGOTTEN, evaluations, busy=False, slowness=slowness)) == {2}


def test_a_rival_of_a_moment_is_told_from_one_that_stays() -> None:
    machine, seconds = Machine(2, 1), WINDOW_SECONDS / 10
    machine.threads.learn({1: Pace({1: 1.5 * seconds}), 2: Pace({1: seconds})})
    for step in range(100):
        machine.threads.observe([1], STALL * seconds, STALL * seconds * (SHARE if step % 10 == 0 else 1))
        assert machine.count == 2
    for _ in range(20):
        if machine.count == 2:
            machine.threads.observe([1], STALL * seconds, STALL * seconds * SHARE)
    assert machine.count == 1


@pytest.mark.parametrize("evaluations", [1, 64])
def test_what_was_slow_for_all_is_no_reason_to_stay_when_a_core_is_taken_later(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(5 * FORGOTTEN, evaluations, busy=True, slowness=3.0)
    machine.steps(1, evaluations, busy=False)
    later = machine.steps(5 * FORGOTTEN, evaluations, busy=True)
    assert later[2 * FORGOTTEN :].count(1) > 0.9 * 3 * FORGOTTEN


def test_a_number_that_was_asked_for_is_kept() -> None:
    machine = Machine(2)
    assert machine.steps(200, 64, busy=True) == [2] * 200
