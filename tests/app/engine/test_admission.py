import logging
import random
import sys
from typing import Any

import pytest

from app import errors
from app.engine.admission import RECOVERY_SECONDS, Admission, _shortest_wait
from app.engine.batcher import select_rows
from app.engine.job import Job
from app.engine.step_times import StepTimes
from tests.app.fakes import image, new_job

STEP_TIMES = StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})  # 8 evaluations take three times as long as one
NOW = 50.0


def new_admission(capacity: int = 1024, max_batch: int | None = None) -> Admission:
    admission = Admission(capacity, max_batch)
    admission.open(STEP_TIMES.copy())
    return admission


def job(count: int = 1, **fields: object) -> Job:
    return new_job(count, **{"num_steps": 10, "submitted_at": NOW, **fields})  # type: ignore[arg-type]


def admit_all(admission: Admission, *jobs: Job) -> list[Job]:
    for each in jobs:
        admission.admit(each, NOW)
    return list(jobs)


def position_of(job: Job) -> int:
    assert job.estimate
    return job.estimate.position


def seconds_of(job: Job) -> float:
    assert job.estimate
    return job.estimate.seconds


def test_job_has_its_position_and_expected_time() -> None:
    admission = new_admission()
    first, second = admit_all(admission, job(16), job(1))
    rate = 15 / STEP_TIMES.step_seconds(15)  # A full step with 15 evaluations has the lowest rate.
    assert (position_of(first), seconds_of(first)) == (0, pytest.approx(15 * 10 / rate + 10 * 5.0))
    assert (position_of(second), seconds_of(second)) == (16, 10 * 3.0)  # steps are short while `second` runs


def test_estimate_of_a_single_image_is_the_time_of_its_steps() -> None:
    (alone,) = admit_all(new_admission(), job(1, guided_steps=range(10)))
    assert seconds_of(alone) == pytest.approx(10 * STEP_TIMES.step_seconds(2))


def test_estimate_of_an_image_outside_the_first_round_is_the_bound() -> None:
    admission = new_admission()
    jobs = admit_all(admission, *(job(1) for _ in range(9)))
    assert seconds_of(jobs[7]) == 10 * STEP_TIMES.step_seconds(8)
    rate = 15 / STEP_TIMES.step_seconds(15)
    assert seconds_of(jobs[8]) == pytest.approx(8 * 10 / rate + 10 * 5.0)


@pytest.mark.parametrize("guided", [False, True])
def test_short_step_has_the_same_number_of_evaluations_with_and_without_guidance(guided: bool) -> None:
    admission, steps = new_admission(), range(10 if guided else 0)
    admit_all(admission, job(64, guided_steps=steps), job(1, guided_steps=steps))
    assert sum(row.evaluations for row in admission.select(NOW)) == 8


def test_job_that_cannot_finish_in_time_is_refused() -> None:
    admission = new_admission()
    admit_all(admission, job(16))
    with pytest.raises(errors.Overloaded, match="deadline") as refused:
        admission.admit(job(16, timeout=60), NOW)
    # The job needs 100 s and its target is 54 s after submission. Only an idle engine admits it.
    assert 40 <= refused.value.retry_after <= 60
    assert len(admission.backlog) == 1


def test_job_that_would_be_late_by_a_fraction_of_a_second_is_refused() -> None:
    admission = Admission(1024, None)
    admission.open(StepTimes({1: 0.001, 16: 0.005}))
    admit_all(admission, job(16))
    with pytest.raises(errors.Overloaded, match="deadline"):
        admission.admit(job(16, timeout=0.06), NOW)  # It needs about 0.1 s.


def test_job_that_would_make_an_admitted_job_late_is_refused() -> None:
    admission = new_admission()
    # The bound of this job is 99.4 s, or 104.4 s with a step in progress. Its target is 112.5 s.
    admit_all(admission, job(16, timeout=125))
    with pytest.raises(errors.Overloaded, match="an admitted one would miss its deadline"):
        admission.admit(job(4, timeout=100), NOW)
    admit_all(admission, job(4, timeout=1000), job(1, timeout=100))


def test_idle_engine_admits_a_job_that_cannot_finish_in_time() -> None:
    """Only running steps correct the predicted step times."""
    admit_all(new_admission(), job(16, timeout=1))


def test_retry_after_of_a_full_queue_is_one_second_if_no_image_has_started() -> None:
    admission = new_admission(capacity=16)
    admit_all(admission, job(16))
    with pytest.raises(errors.Overloaded, match="no room") as refused:
        admission.admit(job(1), NOW)
    assert refused.value.retry_after == 1


def test_retry_after_of_a_full_queue_is_the_time_until_an_image_finishes() -> None:
    admission = new_admission(capacity=16)
    admit_all(admission, job(16))
    admission.select(NOW)
    admission.backlog.start_batch()
    admit_all(admission, job(16))
    with pytest.raises(errors.Overloaded, match="no room") as refused:
        admission.admit(job(1), NOW)
    assert refused.value.retry_after == 4  # An image needs 10 evaluations at 3 per second.


def test_job_is_refused_while_too_many_images_are_running() -> None:
    admission = new_admission(capacity=8, max_batch=1)
    for _ in range(2 * (8 + 1)):
        (running,) = admit_all(admission, job(1, timeout=1000))
        admission.backlog.start(running.unfinished)
    with pytest.raises(errors.Overloaded, match="no room") as refused:
        admission.admit(job(1, timeout=1000), NOW)
    assert refused.value.retry_after == 10  # An image needs 10 evaluations at 1 per second.


@pytest.mark.parametrize(
    ("fitting", "longest", "first"),
    [
        ({1, 2, 3, *range(12, 20)}, 20, 1),  # Bisecting the whole range would find 12.
        (set(range(7, 20)), 20, 7),
        (set(range(8, 20)), 20, 8),
        ({19}, 20, 19),
        (set(), 20, 20),
        (set(), 1, 1),
    ],
)
def test_shortest_wait_is_found_even_if_longer_waits_do_not_fit(fitting: set[int], longest: int, first: int) -> None:
    assert _shortest_wait(fitting.__contains__, longest) == first


def test_all_rows_are_of_the_first_job_while_its_target_is_at_risk() -> None:
    admission = new_admission()
    # The bound of the urgent job is 214 s, its target 252 s.
    urgent, patient = admit_all(admission, job(16, timeout=280), job(16, timeout=1000))
    assert {row.job for row in admission.select(NOW)} == {urgent, patient}
    assert {row.job for row in admission.select(NOW + 35)} == {urgent}  # No step ran in these 35 s.
    admission.backlog.remove(urgent)
    assert {row.job for row in admission.select(NOW + 35)} == {patient}


@pytest.mark.parametrize(
    ("fields", "timeout"),
    [
        ({"count": 1, "num_steps": 1}, 60 * 5.0),  # a full step takes 5 s
        # Full steps compute at least 15 evaluations in 4.75 s.
        ({"count": 4, "num_steps": 1}, 60 * (3 * 4.75 / 15 + 5.0)),
        ({"count": 4, "num_steps": 1, "guided_steps": range(1)}, 60 * (6 * 4.75 / 15 + 5.0)),
        ({"count": 64, "num_steps": 100}, 600.0),  # the longest one
    ],
)
def test_default_timeout_is_60_times_the_duration_in_full_steps(fields: dict[str, Any], timeout: float) -> None:
    admission, slow = new_admission(), new_admission()
    slow.step_times.slowdown = 3.0  # has no effect
    for each in (admission, slow):
        (admitted,) = admit_all(each, job(**fields, timeout=None))
        assert admitted.timeout == pytest.approx(timeout)
        assert admitted.deadline == pytest.approx(NOW + timeout)


def test_job_that_makes_steps_longer_is_refused_if_an_admitted_job_would_be_lost() -> None:
    admission = Admission(1024, None)
    admission.open(StepTimes({1: 1.0, 16: 5.0}, of_models={"fast": {1: 40.0, 16: 200.0}}))
    admit_all(admission, job(16, timeout=280))
    with pytest.raises(errors.Overloaded):
        admission.admit(job(2, model="fast", timeout=1e6), NOW)
    admission.admit(job(2, timeout=1e6), NOW)


def test_default_timeout_is_at_least_30_s() -> None:
    admission = Admission(1024, None)
    admission.open(StepTimes({1: 0.01, 16: 0.05}))
    (admitted,) = admit_all(admission, job(1, num_steps=10, timeout=None))
    assert admitted.timeout == 30.0


def test_targets_are_at_risk_when_the_batch_becomes_smaller() -> None:
    """The bound of the urgent job is 42 s with 16 rows a step, and 53 s with 8. Its target is 47 s from now."""
    admission = Admission(1024, max_batch=16)
    admission.open(StepTimes({1: 1.0, 64: 1.0}))
    urgent, patient = admit_all(admission, job(16, timeout=52), job(16, timeout=1000))
    assert {row.job for row in admission.select(NOW)} == {urgent, patient}
    admission.lower_max_batch(NOW)
    assert {row.job for row in admission.select(NOW)} == {urgent}


def test_targets_are_at_risk_when_the_machine_becomes_slower() -> None:
    admission = new_admission()
    urgent, patient = admit_all(admission, job(16, timeout=280), job(16, timeout=1000))
    assert {row.job for row in admission.select(NOW)} == {urgent, patient}
    admission.step_times.slowdown = 1.2
    assert {row.job for row in admission.select(NOW)} == {urgent}


def test_slowdown_is_computed_from_the_calls_of_all_models() -> None:
    admission = new_admission()
    jobs = admit_all(admission, job(4, guided_steps=range(10)), job(1, model="fast"))
    admission.backlog.replace_batch([row for each in jobs for row in each.unfinished])
    predicted = STEP_TIMES.step_seconds(8) + STEP_TIMES.step_seconds(1)
    admission.observe(admission.backlog.calls(), predicted)
    assert admission.step_times.slowdown == pytest.approx(1.0)
    admission.observe(admission.backlog.calls(), 2 * predicted)
    assert admission.step_times.slowdown == pytest.approx(2.0)


def test_memory_shortage_halves_the_batch_and_each_minute_without_one_doubles_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    admission = new_admission(max_batch=16)
    admit_all(admission, job(64))
    with caplog.at_level(logging.INFO):
        admission.lower_max_batch(NOW)
        assert len(admission.select(NOW)) == admission.max_batch == 8
        admission.lower_max_batch(NOW + 1)
        sizes = [len(admission.select(NOW + 1 + seconds * RECOVERY_SECONDS)) for seconds in (0, 0.9, 1, 1.9, 2, 3, 4)]
    assert sizes == [4, 4, 8, 8, 16, 16, 16]
    assert caplog.text.count("Out of device memory") == 2
    assert caplog.text.count("Batch size raised after a memory shortage") == 2


def test_batch_has_at_least_one_row() -> None:
    admission = new_admission(max_batch=2)
    for _ in range(3):
        admission.lower_max_batch(NOW)
    assert admission.max_batch == 1


def test_number_of_started_images_is_limited() -> None:
    """Each job has an earlier deadline than the jobs before it. So each job starts, and no image counts as waiting."""
    admission = new_admission(capacity=4, max_batch=2)
    refused = False
    for k in range(40):
        try:
            admission.admit(job(2, timeout=10**6 - 1000 * k), NOW)
        except errors.Overloaded:
            refused = True
            break
        admission.select(NOW)
        admission.backlog.start_batch()
        admission.backlog.advance()
    assert refused
    assert admission.backlog.running <= 2 * (4 + 2)


def test_retry_after_does_not_exceed_the_time_until_the_engine_is_idle() -> None:
    """An idle engine also admits a job that cannot finish in time."""
    admission = new_admission()
    admit_all(admission, job(16, num_steps=1))  # 5 s of work
    with pytest.raises(errors.Overloaded) as refused:
        admission.admit(job(64, timeout=1), NOW)
    assert refused.value.retry_after == 6


@pytest.mark.parametrize("num_jobs", [300, 3000])
def test_number_of_function_calls_does_not_grow_with_the_number_of_jobs(num_jobs: int) -> None:
    """No Python code runs for each job: the number of calls stays the same."""
    admission = new_admission(capacity=10**6)
    admit_all(admission, *(job(1, timeout=10**7) for _ in range(50)))
    few = count_calls(admission)
    admit_all(admission, *(job(1, timeout=10**7) for _ in range(num_jobs - 50)))
    assert count_calls(admission) <= few + 20


def count_calls(admission: Admission) -> int:
    """Returns the number of Python and C function calls for one refused job and one row selection."""
    count = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    candidate = job(1, timeout=0.1)
    sys.setprofile(count_call)
    try:
        assert not admission._is_within_bounds(candidate, NOW)
        admission.select(NOW)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("seed", range(30))
def test_fast_admission_check_agrees_with_the_exact_one(seed: int) -> None:
    """The known slack never exceeds the true one. A job is admitted if and only if the exact check admits it.

    The first job of an idle engine has enough time. Otherwise it would be lost, and could stop being lost later.
    """
    choose, admission, now = random.Random(seed), new_admission(capacity=1000), NOW
    decisions = set()
    for _ in range(120):
        now += choose.uniform(0, 1)
        candidate = Job(job(choose.randint(1, 8), num_steps=choose.choice([1, 5, 20])).request, submitted_at=now)
        candidate.target = now + (choose.choice([5.0, 20.0, 60.0, 200.0]) if admission.backlog.jobs else 1000.0)
        candidate.deadline = candidate.target / 0.9
        exact = admission._is_within_bounds(candidate, now)
        try:
            admission.admit(candidate, now)
            admitted = True
        except errors.Overloaded:
            admitted = False
        assert (admitted and not candidate.is_reserved) is exact
        decisions.add(admitted)
        true_slack = admission.backlog.slack(admission._full(admission.backlog.step_kind()), now)
        assert admission._slack is None or admission._slack.until - now <= true_slack + 1e-6
        if choose.random() < 0.7 and admission.select(now):
            admission.backlog.start_batch()
            admission.step_times.slowdown = choose.uniform(0.97, 1.03)
            now += admission.step_times.step_seconds(admission.backlog.batch.size)
            ended = admission.backlog.advance()
            admission.backlog.finish([(row, image(0, row.index, row.step)) for row in ended])
    assert decisions == {True, False}


@pytest.mark.parametrize(("max_batch", "expected"), [(None, 6), (4, 4), (64, 6)])
def test_step_has_at_most_the_rows_of_the_runner(max_batch: int | None, expected: int) -> None:
    admission = Admission(1024, max_batch)
    admission.open(STEP_TIMES.copy(), max_rows=6)
    admit_all(admission, job(64, timeout=1e6))
    assert len(admission.select(NOW)) == admission.max_batch == expected


@pytest.mark.parametrize(
    ("counts", "expected"), [((2, 3), 5), ((2, 4), 4), ((5, 6), 5), ((1, 1, 1), 3), ((1, 2), 3), ((2,), 2)]
)
def test_first_step_of_new_jobs_has_the_rows_of_the_rule_of_short_steps(counts: tuple[int, ...], expected: int) -> None:
    admission = Admission(1024, None)
    admission.open(StepTimes({1: 1e-3, 4: 4e-3, 5: 4.1e-3}))  # a full step has 5 evaluations, a short one 3
    jobs = admit_all(admission, *map(job, counts))
    rows = admission.select(0.0)
    assert len(rows) == expected
    limits = admission._limits_for(admission.backlog.step_kind())
    assert set(rows) == set(select_rows(jobs, limits, at_risk=False))
