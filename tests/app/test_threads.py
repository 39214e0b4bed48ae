"""The number of compute threads against a machine whose second core comes and goes."""

import pytest

from app.pace import Pace
from app.threads import RETRY_STEPS, ComputeThreads

TWO, ONE = Pace({1: 1.0, 64: 20.0}), Pace({1: 1.5, 64: 38.0})
STALL = 3.0  # times as long does a step of two threads take where one of them has no core


class Machine:
    """Makes steps with as many threads as were set last."""

    def __init__(self, *counts: int) -> None:
        self.count = 0
        self.threads = ComputeThreads(counts, self._use)
        self.threads.set(counts[0])
        self.threads.learn({count: {1: ONE, 2: TWO}[count].copy() for count in counts})

    def _use(self, count: int) -> None:
        self.count = count

    def step(self, evaluations: int, *, busy: bool, noise: float = 1.0) -> int:
        """How many threads made it."""
        count = self.count
        seconds = {1: ONE, 2: TWO}[count].step_seconds(evaluations)
        self.threads.observe(evaluations, noise * seconds * (STALL if busy and count == 2 else 1))
        return count

    def steps(self, number: int, evaluations: int, *, busy: bool) -> list[int]:
        return [self.step(evaluations, busy=busy) for _ in range(number)]


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_one_fewer_steps_while_another_process_keeps_a_core(evaluations: int) -> None:
    machine = Machine(2, 1)
    assert machine.steps(20, evaluations, busy=False) == [2] * 20
    busy = machine.steps(10 * RETRY_STEPS, evaluations, busy=True)
    assert busy[:1] == [2]
    assert set(busy[10:RETRY_STEPS]) == {1}
    assert busy.count(2) <= 20  # the first ones, then one in so many


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_all_step_again_when_the_core_is_free(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(5 * RETRY_STEPS, evaluations, busy=True)
    free = machine.steps(3 * RETRY_STEPS, evaluations, busy=False)
    assert set(free[RETRY_STEPS + 1 :]) == {2}


def test_a_single_slow_step_changes_nothing() -> None:
    machine = Machine(2, 1)
    machine.step(64, busy=False, noise=100.0)
    assert machine.steps(100, 64, busy=False) == [2] * 100


def test_a_machine_that_is_slower_as_a_whole_keeps_all_of_them() -> None:
    machine = Machine(2, 1)
    counts = [machine.step(64, busy=False, noise=4.0) for _ in range(20 * RETRY_STEPS)]
    assert counts[-10 * RETRY_STEPS :].count(2) > 9 * RETRY_STEPS


def test_a_number_that_was_asked_for_is_kept() -> None:
    machine = Machine(2)
    assert machine.steps(200, 64, busy=True) == [2] * 200
