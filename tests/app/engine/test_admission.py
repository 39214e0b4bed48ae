import logging
import sys

import pytest

from app import errors
from app.engine.admission import RECOVERY_SECONDS, Admission, _first
from app.engine.job import Job
from app.engine.step_times import StepTimes
from tests.app.fakes import new_job

STEP_TIMES = StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})  # 8 evaluations take three times as long as one
NOW = 50.0


def opened(capacity: int = 1024, max_batch: int | None = None) -> Admission:
    admission = Admission(capacity, max_batch)
    admission.open(STEP_TIMES.copy())
    return admission


def job(count: int = 1, **fields: object) -> Job:
    return new_job(count, **{"num_steps": 10, "submitted_at": NOW, **fields})  # type: ignore[arg-type]


def admitted(admission: Admission, *jobs: Job) -> list[Job]:
    for each in jobs:
        admission.admit(each, NOW)
    return list(jobs)


def position_of(job: Job) -> int:
    assert job.estimate
    return job.estimate.position


def seconds_of(job: Job) -> float:
    assert job.estimate
    return job.estimate.seconds


def test_a_job_knows_its_position_and_expected_time() -> None:
    admission = opened()
    first, second = admitted(admission, job(16), job(1))
    rate = 15 / STEP_TIMES.step_seconds(15)  # the rate of the slowest full step
    assert (position_of(first), seconds_of(first)) == (0, pytest.approx(15 * 10 / rate + 10 * 5.0))
    assert (position_of(second), seconds_of(second)) == (16, 10 * 3.0)  # steps stay short for this job


def test_a_lone_image_takes_its_own_steps() -> None:
    (alone,) = admitted(opened(), job(1, guided_steps=range(10)))
    assert seconds_of(alone) == pytest.approx(10 * STEP_TIMES.step_seconds(2))


def test_an_image_that_has_no_row_in_every_step_is_told_the_bound() -> None:
    admission = opened()
    jobs = admitted(admission, *(job(1) for _ in range(9)))
    assert seconds_of(jobs[7]) == 10 * STEP_TIMES.step_seconds(8)
    rate = 15 / STEP_TIMES.step_seconds(15)
    assert seconds_of(jobs[8]) == pytest.approx(8 * 10 / rate + 10 * 5.0)


@pytest.mark.parametrize("guided", [False, True])
def test_a_short_step_has_as_many_evaluations_guided_or_not(guided: bool) -> None:
    admission, steps = opened(), range(10 if guided else 0)
    admitted(admission, job(64, guided_steps=steps), job(1, guided_steps=steps))
    assert sum(row.evaluations for row in admission.select(NOW)) == 8


def test_a_job_that_cannot_finish_in_time_is_refused() -> None:
    admission = opened()
    admitted(admission, job(16))
    with pytest.raises(errors.Overloaded, match="deadline") as refused:
        admission.admit(job(16, timeout=60), NOW)
    assert 40 <= refused.value.retry_after <= 60  # it needs 100 s, its target is 54 s: only an idle engine admits it
    assert len(admission.backlog) == 1


def test_a_job_that_would_make_an_admitted_one_late_is_refused() -> None:
    admission = opened()
    admitted(
        admission, job(16, timeout=125)
    )  # its bound is 99.4 s, with a step in progress 104.4 s, its target 112.5 s
    with pytest.raises(errors.Overloaded, match="earlier one"):
        admission.admit(job(4, timeout=100), NOW)
    admitted(admission, job(4, timeout=1000), job(1, timeout=100))


def test_an_idle_engine_admits_a_job_that_cannot_finish_in_time() -> None:
    """Step times are only corrected by running steps."""
    admitted(opened(), job(16, timeout=1))


def test_a_queue_filled_by_a_job_that_has_not_begun_has_room_after_the_next_step() -> None:
    admission = opened(capacity=16)
    admitted(admission, job(16))
    with pytest.raises(errors.Overloaded, match="no room") as refused:
        admission.admit(job(1), NOW)
    assert refused.value.retry_after == 1


def test_a_queue_behind_a_full_step_has_room_when_an_image_finishes() -> None:
    admission = opened(capacity=16)
    admitted(admission, job(16))
    for row in admission.select(NOW):
        admission.backlog.start(row)
    admitted(admission, job(16))
    with pytest.raises(errors.Overloaded, match="no room") as refused:
        admission.admit(job(1), NOW)
    assert refused.value.retry_after == 4  # an image is 10 evaluations of 3 a second


def test_too_many_running_images_are_refused_until_one_finishes() -> None:
    admission = opened(capacity=8, max_batch=1)
    for _ in range(2 * (8 + 1)):
        (running,) = admitted(admission, job(1, timeout=1000))
        admission.backlog.start(running.unfinished[0])
        admission.backlog._update(running.unfinished)
    with pytest.raises(errors.Overloaded, match="no room") as refused:
        admission.admit(job(1, timeout=1000), NOW)
    assert refused.value.retry_after == 10  # an image is 10 evaluations of 1 a second


@pytest.mark.parametrize(
    ("fitting", "longest", "first"),
    [
        ({1, 2, 3, *range(12, 20)}, 20, 1),  # not 12
        (set(range(7, 20)), 20, 7),
        (set(range(8, 20)), 20, 8),
        ({19}, 20, 19),
        (set(), 20, 20),
        (set(), 1, 1),
    ],
)
def test_retry_after_is_a_short_wait_even_if_longer_ones_do_not_fit(
    fitting: set[int], longest: int, first: int
) -> None:
    assert _first(fitting.__contains__, longest) == first


def test_all_rows_serve_the_target_that_is_at_risk() -> None:
    admission = opened()
    urgent, patient = admitted(admission, job(16, timeout=125), job(16, timeout=1000))
    assert {row.job for row in admission.select(NOW)} == {urgent, patient}
    assert {row.job for row in admission.select(NOW + 12)} == {urgent}  # nothing was done meanwhile
    admission.backlog.remove(urgent)
    assert {row.job for row in admission.select(NOW + 12)} == {patient}


def test_a_machine_that_became_slower_puts_targets_at_risk() -> None:
    admission = opened()
    urgent, patient = admitted(admission, job(16, timeout=125), job(16, timeout=1000))
    assert {row.job for row in admission.select(NOW)} == {urgent, patient}
    admission.step_times.slowdown = 1.1
    assert {row.job for row in admission.select(NOW)} == {urgent}


def test_the_time_of_a_step_is_learned_from_each_models_call() -> None:
    admission = opened()
    rows = [*job(4, guided_steps=range(10)).unfinished, *job(1, model="fast").unfinished]
    admission.observe(rows, STEP_TIMES.step_seconds(8) + STEP_TIMES.step_seconds(1))
    assert admission.step_times.slowdown == 1.0
    admission.observe(rows, 2 * (STEP_TIMES.step_seconds(8) + STEP_TIMES.step_seconds(1)))
    assert 1.0 < admission.step_times.slowdown < 2.0


def test_a_memory_shortage_halves_the_batch_and_each_minute_without_one_doubles_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    admission = opened(max_batch=16)
    admitted(admission, job(64))
    with caplog.at_level(logging.INFO):
        admission.lower_max_batch(NOW)
        assert len(admission.select(NOW)) == admission.max_batch == 8
        admission.lower_max_batch(NOW + 1)
        sizes = [len(admission.select(NOW + 1 + seconds * RECOVERY_SECONDS)) for seconds in (0, 0.9, 1, 1.9, 2, 3, 4)]
    assert sizes == [4, 4, 8, 8, 16, 16, 16]
    assert caplog.text.count("Out of device memory") == 2
    assert caplog.text.count("raising the batch") == 2


def test_the_batch_is_at_least_one_row() -> None:
    admission = opened(max_batch=2)
    for _ in range(3):
        admission.lower_max_batch(NOW)
    assert admission.max_batch == 1


def test_images_that_have_begun_are_limited_too() -> None:
    """Requests with ever earlier deadlines start one after the other, and none of them waits any more."""
    admission = opened(capacity=4, max_batch=2)
    refused = False
    for k in range(40):
        try:
            admission.admit(job(2, timeout=10**6 - 1000 * k), NOW)
        except errors.Overloaded:
            refused = True
            break
        rows = admission.select(NOW)
        for row in rows:
            if not row.started:
                admission.backlog.start(row)
        admission.backlog.advance(rows)
    assert refused
    assert admission.backlog.running <= 2 * (4 + 2)


def test_retry_after_does_not_exceed_the_time_until_the_engine_is_idle() -> None:
    """An idle engine admits every job, also one that cannot finish in time."""
    admission = opened()
    admitted(admission, job(16, num_steps=1))  # 5 s of work
    with pytest.raises(errors.Overloaded) as refused:
        admission.admit(job(64, timeout=1), NOW)
    assert refused.value.retry_after == 6


@pytest.mark.parametrize("num_jobs", [300, 3000])
def test_admission_looks_at_every_job_in_arrays(num_jobs: int) -> None:
    """No Python code runs for each job: the number of calls stays the same."""
    admission = opened(capacity=10**6)
    admitted(admission, *(job(1, timeout=10**7) for _ in range(50)))
    few = calls_of(admission)
    admitted(admission, *(job(1, timeout=10**7) for _ in range(num_jobs - 50)))
    assert calls_of(admission) <= few + 20


def calls_of(admission: Admission) -> int:
    """The Python and C functions that one refused request calls."""
    count = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    newcomer = job(1, timeout=0.1)
    sys.setprofile(count_call)
    try:
        assert not admission.backlog.admits(newcomer, admission._full(newcomer), NOW)
        admission.select(NOW)
    finally:
        sys.setprofile(None)
    return count
