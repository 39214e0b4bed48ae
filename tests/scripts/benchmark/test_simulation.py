"""The simulation against cases that can be reckoned by hand, and against queueing theory."""

import itertools
import statistics

import pytest

from scripts.benchmark.clients import arrivals
from scripts.benchmark.simulation import Fate, Moment, predicted_p95, simulate, simulate_batches, slowness, step_times

NEVER = itertools.repeat(float("inf"))


def of(*times: float) -> "itertools.chain[float]":
    return itertools.chain(times, NEVER)


def test_a_lone_request_takes_its_steps() -> None:
    (fate,) = simulate(of(3.0), 10, num_steps=5, most_rows=8, step_seconds=lambda rows: 0.5)
    assert (fate.due, fate.done, fate.latency) == (3.0, 5.5, 2.5)


def test_a_newcomer_joins_at_the_next_step() -> None:
    fates = simulate(of(0.0, 0.25), 10, num_steps=2, most_rows=8, step_seconds=lambda rows: float(rows))
    assert [(fate.due, fate.done) for fate in fates] == [(0.0, 3.0), (0.25, 4.0)]  # steps of 1, 2 and 1 seconds


def test_of_more_than_a_step_has_rows_the_oldest_run_first() -> None:
    fates = simulate(of(0.0, 0.0, 0.0), 10, num_steps=2, most_rows=2, step_seconds=lambda rows: 1.0)
    assert [fate.done for fate in fates] == [2.0, 2.0, 4.0]


def test_those_who_come_too_late_to_count_are_in_the_way_all_the_same() -> None:
    alone = simulate(of(0.0), 1, num_steps=4, most_rows=8, step_seconds=lambda rows: float(rows))
    crowded = simulate(of(0.0, 1.5, 1.5), 1, num_steps=4, most_rows=8, step_seconds=lambda rows: float(rows))
    assert [fate.done for fate in alone] == [4.0]
    assert [fate.done for fate in crowded] == [1 + 1 + 3 + 3]


def test_one_row_a_step_is_a_queue_with_one_server() -> None:
    rate, service = 0.7, 1.0
    fates = simulate(arrivals(rate, seed=3), 200_000, num_steps=1, most_rows=1, step_seconds=lambda rows: service)
    mean = service + rate * service**2 / (2 * (1 - rate * service))  # Pollaczek and Khinchine, of fixed service
    assert statistics.mean(fate.latency for fate in fates) == pytest.approx(mean, rel=0.03)


def test_a_batch_of_whole_requests_takes_all_that_wait_when_the_last_one_ends() -> None:
    fates = simulate_batches(of(0.0, 0.25, 1.5, 3.0), 10, num_steps=2, most_rows=8, step_seconds=lambda rows: rows)
    assert [(fate.due, fate.done) for fate in fates] == [(0.0, 2.0), (0.25, 6.0), (1.5, 6.0), (3.0, 8.0)]
    full = simulate_batches(of(0.0, 0.0, 0.0), 10, num_steps=2, most_rows=2, step_seconds=lambda rows: 1.0)
    assert [fate.done for fate in full] == [2.0, 2.0, 4.0]
    late = simulate_batches(of(0.0, 0.5, 1.5), 1, num_steps=2, most_rows=8, step_seconds=lambda rows: rows)
    assert [(fate.due, fate.done) for fate in late] == [(0.0, 2.0), (0.5, 6.0)]  # in company that does not count


def test_batches_of_one_request_are_steps_of_one_row() -> None:
    def paced(at: float) -> float:
        return 1 + at % 1

    one_by_one = simulate(arrivals(0.5, seed=4), 200, 3, most_rows=1, step_seconds=lambda rows: 0.2, slowness=paced)
    assert one_by_one == simulate_batches(
        arrivals(0.5, seed=4), 200, 3, most_rows=1, step_seconds=lambda rows: 0.2, slowness=paced
    )


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (3, 2.0), (4, 2.5), (6, 2.75), (8, 3.0), (16, 6.0)])
def test_step_times_are_linear_between_those_measured(rows: int, seconds: float) -> None:
    assert step_times({1: 1.0, 4: 2.5, 8: 3.0})(rows) == pytest.approx(seconds)


def test_a_step_takes_as_much_longer_as_the_machine_is_slower_when_it_begins() -> None:
    (fate,) = simulate(of(1.0), 10, 3, most_rows=8, step_seconds=lambda rows: 1.0, slowness=lambda at: 1 + at)
    assert fate.done == 1 + 2 + 4 + 8


def test_the_pace_is_what_the_steps_between_two_looks_took() -> None:
    looks = [Moment(0, 10, 40, 5.0), Moment(2, 12, 48, 9.0), Moment(4, 16, 48 + 8, 17.0)]
    pace = slowness(looks, lambda rows: rows / 4)  # steps of 4 rows that took 2 s each, then of 2 rows and 2 s
    assert [pace(at) for at in (0, 1, 2, 3, 9)] == [2, 2, 3, 4, 4]


def test_a_time_without_steps_has_the_pace_of_those_around_it() -> None:
    looks = [Moment(0, 0, 0, 0.0), Moment(1, 1, 1, 2.0), Moment(2, 1, 1, 2.0), Moment(3, 2, 2, 6.0)]
    assert slowness(looks, lambda rows: rows)(1.5) == 3
    assert slowness(looks[:1], lambda rows: rows)(1.5) == 1


def test_only_those_that_are_due_in_the_window_count() -> None:
    fates = [Fate(0.5, 90.0), *(Fate(1.0 + k, 2.0 + 2 * k) for k in range(20))]  # 1 to 20 s
    assert predicted_p95(fates, opens=1.0) == 19.0
