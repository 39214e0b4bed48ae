"""Tests of the scheduler on a virtual clock with measured step times: no admitted job misses its deadline."""

import random
import statistics
from collections import Counter
from contextlib import suppress

import pytest

from app import errors
from app.engine.job import Job
from app.engine.step_times import StepTimes
from tests.app.engine.virtual_service import MEASURED, MEASURED_WITH_AMX, VirtualService, clients, random_mix

MAX_SLOWDOWN = 1.1  # maximum duration of a step, in multiples of the measured time
CURVES = {
    "measured": MEASURED,
    "padded to 16 rows": {1: 5e-3, 16: 5e-3, 32: 10e-3, 64: 20e-3},
    "flat": {1: 2e-3, 64: 2.2e-3, 128: 3e-3, 256: 5e-3, 512: 9e-3},
    "proportional": {1: 2e-3, 64: 128e-3},
}
BATCHES = (None, 1, 8, 64)  # UNFOG_MAX_BATCH


def serve_mix(
    seed: int, seconds: float, clip_seconds: float = 0.0, larger: float = 0.0
) -> tuple[Counter[str], list[Job]]:
    """Simulates a random mix of clients. With `clip_seconds`, the duration of a call of CLIP, some use CLIP guidance.

    With `larger`, there is a second model whose steps take this multiple of the time of the default model.

    Returns the number of requests by outcome, and the jobs that missed their deadlines although admission predicted
    that they would meet them.
    """
    choose = random.Random(seed)
    max_batch, measured = choose.choice(BATCHES), choose.choice(list(CURVES.values()))
    is_always_slow = choose.random() < 0.3
    service = VirtualService(
        max_batch,
        capacity=choose.choice([64, 1024]),
        measured=measured,
        noise=lambda: MAX_SLOWDOWN if is_always_slow else choose.uniform(1.0, MAX_SLOWDOWN),
        clip_seconds=clip_seconds,
        of_models={"large": {rows: larger * time for rows, time in measured.items()}} if larger else None,
    )
    clip_evaluations = StepTimes(measured, clip_seconds).clip_evaluations
    mix = random_mix(seed, clip_evaluations, second="large" if larger else "fast")
    result = service.run(mix, seconds)
    outcomes: Counter[str] = Counter()
    for (_, outcome), number in result.outcomes.items():
        outcomes[outcome] += number
    return outcomes, result.late


def test_no_admitted_job_is_late_in_random_mixes() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(16):
        found, late = serve_mix(seed, seconds=5.0)
        assert late == [], seed
        outcomes += found
    assert outcomes["200"] > 1000
    assert outcomes["429"] > 100


@pytest.mark.parametrize("clip_seconds", [1e-3, 11e-3, 0.1])
def test_no_admitted_job_is_late_in_random_mixes_with_clip_guidance(clip_seconds: float) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(2000, 2010):
        found, late = serve_mix(seed, seconds=5.0, clip_seconds=clip_seconds)
        assert late == [], seed
        outcomes += found
    assert outcomes["200"] > 100
    assert outcomes["429"] > 100


def test_no_admitted_job_is_late_beside_a_second_network_that_is_ten_times_as_large() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(5000, 5016):
        found, late = serve_mix(seed, seconds=8.0, larger=10.0)
        assert late == [], seed
        outcomes += found
    assert outcomes["200"] > 300
    assert outcomes["429"] > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_admitted_job_is_late_in_many_random_mixes_with_a_larger_second_network() -> None:
    for seed in range(6000, 6200):
        assert serve_mix(seed, seconds=15.0, larger=10.0)[1] == [], seed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_admitted_job_is_late_in_many_random_mixes() -> None:
    for seed in range(1000, 1400):
        assert serve_mix(seed, seconds=15.0)[1] == [], seed


def serve_slowed_mix(seed: int, factor: float, seconds: float) -> tuple[list[Job], list[Job], float]:
    """Simulates a random mix on a machine that becomes slower by this factor after half of the time.

    Considers the second half without its first second, in which the scheduler notices the change. Returns the jobs of
    this time that were late, the small jobs that were refused although they could finish in a third of their timeouts
    in full steps, and the share of all evaluations that small jobs had.
    """
    choose = random.Random(seed)
    change, noticed = seconds / 2, seconds / 2 + 1.0
    service = VirtualService(
        choose.choice(BATCHES),
        measured=choose.choice(list(CURVES.values())),
        noise=lambda: choose.uniform(1.0, MAX_SLOWDOWN),
        slowness=lambda now: factor if now > change else 1.0,
    )
    mix = random_mix(seed)
    service.run(mix, seconds)
    late = [job for job in service.result.late if job.timings.submitted_at > noticed]
    one = service.actual_times.step_seconds(1)

    def can_finish(job: Job) -> bool:
        full = service.admission._limits_for(service.admission.backlog.step_kind(job)).full
        return factor * (job.evaluations_left * one + job.tail[1] * full.step_seconds) < job.request.timeout / 3

    refused = [
        job for job in service.refused if job.is_small and job.timings.submitted_at > noticed and can_finish(job)
    ]
    work = [(size, small) for now, size, small in service.work if now > noticed]
    share = sum(small for _, small in work) / max(1, sum(size for size, _ in work))
    return late, refused, share


@pytest.mark.parametrize("factor", [2, 4, 10])
def test_small_requests_keep_their_share_in_random_mixes_on_a_slower_machine(factor: float) -> None:
    num_refused = 0
    for seed in range(3000, 3006):
        late, refused, share = serve_slowed_mix(seed, factor, seconds=10.0)
        assert late == [], seed
        assert not refused or share >= 0.08, seed
        num_refused += len(refused)
    assert num_refused > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("factor", [2, 4, 10])
def test_small_requests_keep_their_share_in_many_random_mixes_on_a_slower_machine(factor: float) -> None:
    for seed in range(4000, 4134):
        late, refused, share = serve_slowed_mix(seed, factor, seconds=20.0)
        assert late == [], seed
        assert not refused or share >= 0.08, seed


@pytest.mark.parametrize("num_small", [4, 15, 40])
@pytest.mark.parametrize("timeout", [9.0, 10.3, 30.0])
def test_large_request_among_small_requests_is_finished_in_time_or_refused(num_small: int, timeout: float) -> None:
    choose = random.Random(num_small)
    service = VirtualService(noise=lambda: choose.uniform(1.0, MAX_SLOWDOWN))
    large = clients(1, name="large", count=64, timeout=timeout, start=1.0, think=0.5)
    result = service.run([*clients(num_small, name="small"), *large], until=40.0)
    assert result.late == []
    assert result.of("large").get("504", 0) == 0
    assert sum(result.of("large").values()) >= 3
    assert result.of("small")["200"] > 100


def test_latency_of_a_single_image_at_most_triples_while_a_large_request_runs() -> None:
    def latency(*others: int) -> float:
        large = [client for count in others for client in clients(1, name="large", count=count)]
        lone = clients(1, name="lone", start=0.5, think=0.3)
        result = VirtualService().run([*large, *lone], until=20.0)
        return statistics.median(result.latencies["lone"])

    assert latency(64) <= 3.0 * latency()


@pytest.mark.parametrize(("number", "count"), [(64, 1), (2, 64), (16, 8)])
def test_throughput_is_at_least_95_percent_of_the_best_rate(number: int, count: int) -> None:
    service = VirtualService()
    result = service.run(clients(number, name="each", count=count), until=30.0)
    evaluations_an_image = 146
    unfinished = service.admission.backlog.jobs
    done = result.num_images * evaluations_an_image
    done += sum(job.request.count * evaluations_an_image - job.evaluations_left for job in unfinished)
    best = max(n / seconds for n, seconds in MEASURED.items())
    assert done / result.seconds >= 0.95 * best


def refused_and_actual_wait(seed: int, measured: dict[int, float]) -> tuple[int, float] | None:
    """Returns the Retry-After of a refused request, and the time after which it would have been admitted.

    No other request arrives in this time. Returns None if the request is not refused.
    """
    choose = random.Random(seed)
    max_batch, capacity = choose.choice([None, None, 16]), choose.choice([64, 128, 1024])
    service = VirtualService(max_batch, capacity, measured)
    for _ in range(choose.randint(1, 4)):
        kind = {
            "count": choose.choice([1, 4, 16, 64]),
            "timeout": choose.choice([5.0, 10.0, 30.0, 60.0]),
            "guided": choose.random() < 0.7,
            "num_steps": choose.choice([100, 100, 10]),
        }
        for client in clients(choose.choice([1, 4, 16]), name="earlier", **kind):
            with suppress(errors.Overloaded):
                service.submit(client.job(service.now))
        for _ in range(choose.randrange(100)):
            if service.admission.backlog.jobs:
                service.step()
    count, timeout, num_steps = (
        choose.choice([1, 16, 64]),
        choose.choice([2.0, 5.0, 30.0]),
        choose.choice([100, 100, 10]),
    )
    (client,) = clients(1, name="refused", count=count, timeout=timeout, num_steps=num_steps)
    start, waits = service.now, list[int]()
    while True:
        try:
            service.submit(client.job(service.now))
        except errors.Overloaded as refused:
            waits.append(refused.retry_after)
            service.step()
        else:
            return (waits[0], service.now - start) if waits else None


@pytest.mark.parametrize("slowness", [1, 3])
@pytest.mark.parametrize("measured", [MEASURED, MEASURED_WITH_AMX], ids=["without AMX", "with AMX"])
def test_retry_after_equals_the_needed_time_within_a_factor_of_two(measured: dict[int, float], slowness: int) -> None:
    """Retry-After is a whole number of seconds, so that times below one second are rounded up."""
    measured = {evaluations: slowness * seconds for evaluations, seconds in measured.items()}
    seeds = (*range(80), *range(1000, 1030))
    found = [pair for seed in seeds if (pair := refused_and_actual_wait(seed, measured))]
    assert len(found) >= 25
    assert max(actual for _, actual in found) > 5
    for retry_after, actual in found:
        assert retry_after <= 2 * actual + 1
        assert actual <= 2 * retry_after
