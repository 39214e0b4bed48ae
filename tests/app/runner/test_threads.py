"""The number of compute threads against a machine whose second core comes and goes."""

import pytest

from app.engine.step_times import Pace
from app.runner.threads import LONGEST_PAUSE, RIVAL_WINDOWS, SHORTEST_PAUSE, WINDOW_SECONDS, ComputeThreads

TWO, ONE = Pace({1: 0.0025, 64: 0.056}), Pace({1: 0.004, 64: 0.108})  # seconds, as once measured
NOTICED = (
    RIVAL_WINDOWS + 1
) * WINDOW_SECONDS  # seconds after which a rival is known, but for the step that is under way
STALL = 3.0  # times as long does a step of two threads take where one of them has no core
SHARE = 2 / 3  # of two cores' time each of three that want them has


class Machine:
    """Makes steps with as many threads as were set last."""

    def __init__(self, *counts: int) -> None:
        self.count, self.now = 0, 0.0
        self.threads = ComputeThreads(counts, self._use, clock=lambda: self.now)
        self.threads.set(counts[0])
        self.threads.learn({count: {1: ONE, 2: TWO}[count].copy() for count in counts})

    def _use(self, count: int) -> None:
        self.count = count

    def step(self, evaluations: int, *, busy: bool, slowness: float = 1.0) -> tuple[int, float]:
        """How many threads made it, and the seconds that it took."""
        count, is_crowded = self.count, busy and self.count == 2
        seconds = slowness * {1: ONE, 2: TWO}[count].step_seconds(evaluations) * (STALL if is_crowded else 1)
        self.now += seconds
        self.threads.observe([evaluations], seconds, seconds * (SHARE if is_crowded else 1))
        return count, seconds

    def steps(self, seconds: float, evaluations: int, *, busy: bool, slowness: float = 1.0) -> dict[int, float]:
        """For so long; how much of it with each number of threads."""
        spent = {1: 0.0, 2: 0.0}
        while sum(spent.values()) < seconds:
            count, took = self.step(evaluations, busy=busy, slowness=slowness)
            spent[count] += took
        return spent


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_one_fewer_steps_while_another_process_keeps_a_core(evaluations: int) -> None:
    machine = Machine(2, 1)
    assert machine.steps(2, evaluations, busy=False)[1] == 0
    longest = STALL * TWO.step_seconds(evaluations)
    assert machine.steps(NOTICED + 6 * longest, evaluations, busy=True)[1] > 0
    machine.steps(2 * LONGEST_PAUSE, evaluations, busy=True)
    settled = machine.steps(10 * LONGEST_PAUSE, evaluations, busy=True)
    assert settled[2] <= 10 * (longest + STALL * TWO.step_seconds(1))  # a step a pause
    assert settled[1] > 0


@pytest.mark.parametrize("evaluations", [1, 16, 64, 200])
def test_all_step_again_when_the_core_is_free(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(60, evaluations, busy=True)
    assert machine.steps(2 * LONGEST_PAUSE, evaluations, busy=False)[1] <= LONGEST_PAUSE + ONE.step_seconds(evaluations)
    assert machine.steps(60, evaluations, busy=False)[1] == 0


def test_a_rival_that_leaves_soon_costs_little_and_its_past_is_forgotten() -> None:
    machine = Machine(2, 1)
    machine.steps(60, 64, busy=True)  # pauses are long by now
    machine.steps(2 * LONGEST_PAUSE, 64, busy=False)
    machine.steps(2 * NOTICED, 64, busy=True)
    assert machine.count == 1
    assert machine.steps(5, 64, busy=False)[1] <= 2 * SHORTEST_PAUSE


def test_a_pause_goes_on_while_there_is_nothing_to_do() -> None:
    machine = Machine(2, 1)
    machine.steps(60, 64, busy=True)
    machine.now += LONGEST_PAUSE
    assert machine.steps(2, 1, busy=False)[1] <= 2 * ONE.step_seconds(1)


def test_a_step_of_two_models_takes_two_calls_and_is_no_slow_one() -> None:
    machine = Machine(2, 1)
    for _ in range(500):
        assert machine.count == 2
        seconds = 2 * TWO.step_seconds(1)  # as one call of two rows it would take half
        machine.threads.observe([1, 1], seconds, SHARE * seconds)


def test_a_single_slow_step_changes_nothing() -> None:
    machine = Machine(2, 1)
    machine.step(64, busy=True, slowness=100.0)
    assert machine.steps(10, 64, busy=False)[1] == 0


@pytest.mark.parametrize("evaluations", [1, 64])
def test_a_machine_that_is_now_slow_and_now_quick_keeps_all_of_them(evaluations: int) -> None:
    machine = Machine(2, 1)
    for slowness in (1.0, 4.0, 1.0, 2.5, 10.0):
        assert machine.steps(5, evaluations, busy=False, slowness=slowness)[1] == 0


@pytest.mark.parametrize("evaluations", [1, 32, 64])
def test_a_rival_of_a_moment_is_told_from_one_that_stays(evaluations: int) -> None:
    """As many answers are, that are encoded and sent when a large batch ends."""
    machine = Machine(2, 1)
    for _ in range(20):
        assert machine.steps((RIVAL_WINDOWS - 1) * WINDOW_SECONDS, evaluations, busy=True)[1] == 0
        assert machine.steps(5, evaluations, busy=False)[1] == 0
    assert machine.steps(20, evaluations, busy=True)[1] > 0


@pytest.mark.parametrize("evaluations", [1, 64])
def test_what_was_slow_for_all_is_no_reason_to_stay_when_a_core_is_taken_later(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(60, evaluations, busy=True, slowness=3.0)
    machine.steps(2 * LONGEST_PAUSE, evaluations, busy=False)
    later = machine.steps(60, evaluations, busy=True)
    assert later[1] > 0.8 * 60


@pytest.mark.parametrize("evaluations", [1, 64])
def test_how_slow_one_fewer_was_when_last_in_use_is_forgotten(evaluations: int) -> None:
    machine = Machine(2, 1)
    machine.steps(60, evaluations, busy=True, slowness=3.0)
    while machine.count == 1:
        machine.step(evaluations, busy=False, slowness=3.0)
    assert machine.steps(20, evaluations, busy=False)[1] == 0
    assert machine.steps(60, evaluations, busy=True)[1] > 0.8 * 60


def test_a_number_that_was_asked_for_is_kept() -> None:
    machine = Machine(2)
    assert machine.steps(20, 64, busy=True)[1] == 0
