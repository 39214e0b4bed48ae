"""Tests of the simulated replicas with cases computed by hand, with queueing theory and with another simulation."""

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from app import errors
from app.engine.admission import Admission
from app.engine.job import Job, JobRequest, Options
from app.engine.step_times import StepTimes
from scripts.benchmark.clients import arrivals
from scripts.benchmark.cluster_simulation import LATE, OK, REFUSED, Arrival, Cluster, Outcome, Pace, ReplicaModel
from scripts.benchmark.routers import ROUTERS, View, at_random, round_robin, two_by_requests
from scripts.benchmark.simulation import simulate

CURVE = {1: 0.25, 2: 0.375, 4: 0.5, 8: 1.0}


def request(num_steps: int, count: int = 1, timeout: float | None = 1e6) -> JobRequest:
    return JobRequest(Options(0, 0, num_steps, "ddpm", 1.0), count, timeout=timeout)


def endless(planned: Iterable[Arrival]) -> Iterator[Arrival]:
    return itertools.chain(planned, itertools.repeat(Arrival(float("inf"), request(1))))


def run(model: ReplicaModel, *planned: Arrival, num_replicas: int = 1) -> list[Outcome]:
    return Cluster(model, num_replicas, round_robin(0)).run(endless(planned), 1e9)


def test_single_request_takes_its_steps_and_the_time_outside_of_the_engine() -> None:
    model = ReplicaModel({1: 0.5}, request_seconds=8.0, delay_seconds=0.25)
    (outcome,) = run(model, Arrival(3.0, request(4)))
    assert outcome == Outcome(3.0, 3.0 + 4 * 0.5 + 0.25, images=1, status=OK, replica=0)


def test_requests_make_the_steps_of_other_requests_longer() -> None:
    model = ReplicaModel({1: 1.0, 2: 1.0}, request_seconds=0.5)
    first, second = run(model, Arrival(0.0, request(1)), Arrival(0.5, request(1)))
    assert first.done == 1.0 + 0.25  # The second request arrives during this step.
    assert second.done == 1.25 + 1.0 + 0.25  # The answer of the first request leaves during this step.


def test_time_outside_of_the_engine_does_not_delay_other_requests() -> None:
    model = ReplicaModel({1: 1.0}, delay_seconds=4.0)
    outcomes = run(model, Arrival(0.0, request(1)), Arrival(1.0, request(1)))
    assert [outcome.done for outcome in outcomes] == [5.0, 6.0]


def test_each_replica_has_a_pace_of_its_own() -> None:
    model = ReplicaModel({1: 1.0}, request_seconds=0.5)
    slow, steady = Pace(2.0, (1.0, 3.0)), Pace(2.0, (1.0,))
    planned = [Arrival(0.0, request(3)), Arrival(0.0, request(3))]
    outcomes = Cluster(model, 2, round_robin(0), paces=[slow, steady]).run(endless(planned), 1e9)
    assert sorted((outcome.replica, outcome.done) for outcome in outcomes) == [(0, 1.0 + 1.0 + 3.0), (1, 3.0)]


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_one_replica_with_single_images_equals_the_simulation_of_a_service(max_batch: int) -> None:
    def planned() -> Iterator[float]:
        return arrivals(0.9, seed=7)

    model = ReplicaModel(CURVE, max_batch=max_batch)
    num_steps, until = 3, 300.0
    expected = simulate(planned(), until, num_steps, max_batch, StepTimes(CURVE).of("default").seconds)
    outcomes = Cluster(model, 1, round_robin(0)).run((Arrival(at, request(num_steps)) for at in planned()), until)
    found = sorted((outcome.at, outcome.done) for outcome in outcomes)
    for outcome, each in zip(found, sorted((each.due, each.done) for each in expected), strict=True):
        assert outcome == pytest.approx(each)
    assert len(found) > 200


def test_random_routing_divides_the_load_into_independent_queues() -> None:
    rate, count = 0.7, 4
    model = ReplicaModel({1: 1.0}, max_batch=1)
    coming = (Arrival(at, request(1)) for at in arrivals(count * rate, seed=3))
    outcomes = Cluster(model, count, at_random(5)).run(coming, 3000.0)
    mean = 1 + rate / (2 * (1 - rate))  # Pollaczek-Khinchine formula for a fixed service time
    assert statistics.mean(outcome.latency for outcome in outcomes) == pytest.approx(mean, rel=0.06)
    assert {outcome.replica for outcome in outcomes} == set(range(count))


def test_two_choices_have_the_mean_latency_of_the_theory() -> None:
    """Mitzenmacher 1996: among many queues with exponential service times, the mean time in the system with two choices
    is the sum of rate ** (2 ** i - 2) over i >= 1. A random number of short steps replaces the exponential time."""
    rate, count, mean_steps = 0.8, 50, 20
    steps = random.Random(2)
    requests = {k: request(k) for k in range(1, 1000)}

    def coming() -> Iterator[Arrival]:
        for at in arrivals(count * rate, seed=4):
            yield Arrival(at, requests[min(999, 1 + int(steps.expovariate(1 / mean_steps)))])

    model = ReplicaModel({1: 1 / mean_steps}, max_batch=1)
    outcomes = Cluster(model, count, two_by_requests(1)).run(coming(), 200.0)
    settled = [outcome.latency for outcome in outcomes if outcome.at >= 40]
    expected = sum(rate ** (2**i - 2) for i in range(1, 20))
    assert statistics.mean(settled) == pytest.approx(expected, rel=0.08)


def test_refusals_are_those_of_admission() -> None:
    planned = [Arrival(0.1 * k, request(10, 8, timeout=60.0)) for k in range(40)]
    model = ReplicaModel({1: 0.1, 8: 0.4}, queue_capacity=1000)
    outcomes = run(model, *planned)
    admission, admitted = Admission(1000, None), 0
    admission.open(StepTimes(model.seconds_by_rows))
    for at, each in planned:  # without any step, so that fewer requests are admitted than in the simulation
        try:
            admission.admit(Job(each, at), at)
            admitted += 1
        except errors.Overloaded:
            break
    counts = Counter(outcome.status for outcome in outcomes)
    assert counts[LATE] == 0
    assert 0 < admitted <= counts[OK] < len(planned)
    assert counts[OK] + counts[REFUSED] == len(planned)
    assert all(outcome.latency <= 60.0 for outcome in outcomes)


def test_request_of_an_idle_replica_that_cannot_meet_its_deadline_is_late() -> None:
    (outcome,) = run(ReplicaModel({1: 1.0}), Arrival(0.0, request(10, timeout=3.0)))
    assert (outcome.status, outcome.done) == (LATE, 3.0)


def test_late_request_frees_its_replica() -> None:
    model = ReplicaModel({1: 1.0})
    late, served = run(model, Arrival(0.0, request(10, timeout=2.5)), Arrival(4.0, request(2)))
    assert (late.status, served.status) == (LATE, OK)
    assert served.done == 6.0


def test_router_sees_the_images_of_the_last_report() -> None:
    seen = list[list[int]]()

    def route(view: View) -> int:
        seen.append(view.images[:])
        return 0

    planned = [Arrival(at, request(4)) for at in (0.2, 0.6, 1.2, 1.6, 2.2)]
    Cluster(ReplicaModel({1: 1.0, 8: 1.0}), 2, route, report_seconds=1.0).run(endless(planned), 1e3)
    assert seen == [[0, 0], [0, 0], [2, 0], [2, 0], [4, 0]]
    seen.clear()
    Cluster(ReplicaModel({1: 1.0, 8: 1.0}), 2, route).run(endless(planned), 1e3)
    assert seen == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_answered_once(router: str) -> None:
    choose = random.Random(3)
    planned = [Arrival(at, request(5, choose.choice([1, 8]))) for at in itertools.islice(arrivals(4.0, 1), 300)]
    model = ReplicaModel(CURVE, request_seconds=0.02)
    outcomes = Cluster(model, 3, ROUTERS[router](2)).run(endless(planned), 1e9)
    assert sorted((outcome.at, outcome.images) for outcome in outcomes) == [(at, each.count) for at, each in planned]
    assert all(outcome.status == OK and outcome.latency > 0 for outcome in outcomes)


def test_capacity_is_the_rate_at_which_a_replica_is_saturated() -> None:
    model = ReplicaModel({1: 0.1, 4: 0.2, 8: 0.4}, request_seconds=0.05)
    assert model.capacity(10) == pytest.approx(1 / (10 / 20 + 0.05))


def test_least_connections_is_better_than_random() -> None:
    def mean(router: str) -> float:
        coming = (Arrival(at, request(5)) for at in arrivals(2.0, seed=6))
        outcomes = Cluster(ReplicaModel(CURVE, max_batch=4), 2, ROUTERS[router](1)).run(coming, 500.0)
        return statistics.mean(outcome.latency for outcome in outcomes)

    assert mean("least connections") < mean("random")
