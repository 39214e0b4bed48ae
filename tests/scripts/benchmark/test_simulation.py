"""Tests of the simulation with cases computed by hand, and with queueing theory."""

import itertools
import statistics

import pytest

from scripts.benchmark.clients import arrivals
from scripts.benchmark.simulation import (
    Moment,
    SimulatedRequest,
    predicted_p95,
    simulate,
    simulate_batches,
    slowness,
)

NEVER = itertools.repeat(float("inf"))


def of(*times: float) -> "itertools.chain[float]":
    return itertools.chain(times, NEVER)


def test_single_request_takes_the_time_of_its_steps() -> None:
    (request,) = simulate(of(3.0), 10, num_steps=5, most_rows=8, step_seconds=lambda rows: 0.5)
    assert (request.due, request.done, request.latency) == (3.0, 5.5, 2.5)


def test_new_request_joins_the_next_step() -> None:
    requests = simulate(of(0.0, 0.25), 10, num_steps=2, most_rows=8, step_seconds=lambda rows: float(rows))
    assert [(request.due, request.done) for request in requests] == [
        (0.0, 3.0),
        (0.25, 4.0),
    ]  # the steps take 1, 2 and 1 seconds


def test_oldest_requests_run_first_if_a_step_is_full() -> None:
    requests = simulate(of(0.0, 0.0, 0.0), 10, num_steps=2, most_rows=2, step_seconds=lambda rows: 1.0)
    assert [request.done for request in requests] == [2.0, 2.0, 4.0]


def test_later_requests_slow_down_the_counted_ones() -> None:
    alone = simulate(of(0.0), 1, num_steps=4, most_rows=8, step_seconds=lambda rows: float(rows))
    crowded = simulate(of(0.0, 1.5, 1.5), 1, num_steps=4, most_rows=8, step_seconds=lambda rows: float(rows))
    assert [request.done for request in alone] == [4.0]
    assert [request.done for request in crowded] == [1 + 1 + 3 + 3]


def test_one_row_per_step_is_a_queue_with_one_server() -> None:
    rate, service = 0.7, 1.0
    requests = simulate(arrivals(rate, seed=3), 200_000, num_steps=1, most_rows=1, step_seconds=lambda rows: service)
    mean = service + rate * service**2 / (
        2 * (1 - rate * service)
    )  # Pollaczek-Khinchine formula for a fixed service time
    assert statistics.mean(request.latency for request in requests) == pytest.approx(mean, rel=0.03)


def test_batch_has_all_requests_that_wait_when_the_last_one_ends() -> None:
    requests = simulate_batches(of(0.0, 0.25, 1.5, 3.0), 10, num_steps=2, most_rows=8, step_seconds=lambda rows: rows)
    assert [(request.due, request.done) for request in requests] == [(0.0, 2.0), (0.25, 6.0), (1.5, 6.0), (3.0, 8.0)]
    full = simulate_batches(of(0.0, 0.0, 0.0), 10, num_steps=2, most_rows=2, step_seconds=lambda rows: 1.0)
    assert [request.done for request in full] == [2.0, 2.0, 4.0]
    late = simulate_batches(of(0.0, 0.5, 1.5), 1, num_steps=2, most_rows=8, step_seconds=lambda rows: rows)
    assert [(request.due, request.done) for request in late] == [
        (0.0, 2.0),
        (0.5, 6.0),
    ]  # a request after the window is in the same batch


def test_batches_of_one_request_take_the_time_of_steps_of_one_row() -> None:
    def varying(at: float) -> float:
        return 1 + at % 1

    one_by_one = simulate(arrivals(0.5, seed=4), 200, 3, most_rows=1, step_seconds=lambda rows: 0.2, slowness=varying)
    assert one_by_one == simulate_batches(
        arrivals(0.5, seed=4), 200, 3, most_rows=1, step_seconds=lambda rows: 0.2, slowness=varying
    )


def test_step_time_is_multiplied_by_the_slowness_at_its_start() -> None:
    (request,) = simulate(of(1.0), 10, 3, most_rows=8, step_seconds=lambda rows: 1.0, slowness=lambda at: 1 + at)
    assert request.done == 1 + 2 + 4 + 8


def test_slowness_is_the_ratio_of_measured_to_expected_step_times() -> None:
    samples = [Moment(0, 10, 40, 5.0), Moment(2, 12, 48, 9.0), Moment(4, 16, 48 + 8, 17.0)]
    ratio = slowness(samples, lambda rows: rows / 4)  # measured: 2 s per step, first with 4 rows, then with 2
    assert [ratio(at) for at in (0, 1, 2, 3, 9)] == [2, 2, 3, 4, 4]


def test_slowness_is_interpolated_over_times_without_steps() -> None:
    samples = [Moment(0, 0, 0, 0.0), Moment(1, 1, 1, 2.0), Moment(2, 1, 1, 2.0), Moment(3, 2, 2, 6.0)]
    assert slowness(samples, lambda rows: rows)(1.5) == 3
    assert slowness(samples[:1], lambda rows: rows)(1.5) == 1


def test_p95_counts_only_requests_planned_in_the_window() -> None:
    requests = [SimulatedRequest(0.5, 90.0), *(SimulatedRequest(1.0 + k, 2.0 + 2 * k) for k in range(20))]  # 1 to 20 s
    assert predicted_p95(requests, opens=1.0) == 19.0
