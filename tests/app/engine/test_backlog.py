"""Compares the bound and the admission check with the same rules written as plain loops."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.backlog import LOST_MARGIN, Backlog
from app.engine.job import Job
from app.engine.step_times import Throughput
from tests.app.fakes import new_job

FULL = Throughput(rate=100.0, step_seconds=0.16, lone_seconds=0.02, reserve_seconds=0.3)
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def random_job(choose: random.Random, now: float, *, fresh: bool = False) -> Job:
    """Returns a random job. If it is not `fresh`, its images have finished a random number of steps."""
    num_steps = choose.choice([1, 4, 10, 50])
    guided = range(*sorted(choose.choices(range(num_steps + 1), k=2)))
    timeout = choose.choice([0.5, 2.0, 10.0, 30.0, math.inf])
    job = new_job(choose.randint(1, 9), num_steps, timeout=timeout, guided_steps=guided, submitted_at=now)
    if not fresh:
        # The images with the most finished steps come first.
        steps = sorted((choose.randrange(num_steps) for _ in job.unfinished), reverse=True)
        for row, step in zip(job.unfinished, steps, strict=True):
            row.step, row.started = step, True
        job.num_waiting = 0
    return job


def work(row_step: int, job: Job) -> int:
    return sum(2 if step in job.request.guided_steps else 1 for step in range(row_step, job.request.options.num_steps))


def bounds(jobs: list[Job]) -> dict[Job, float]:
    """Returns the bound of each job that is not reserved, in seconds."""
    finish_in, total = {}, 0
    for job in sorted((job for job in jobs if not job.is_reserved), key=lambda job: job.target):  # sorted() is stable
        longest = min(row.step for row in job.unfinished)
        total += sum(work(row.step, job) for row in job.unfinished)
        others = total - work(longest, job)
        alone = others / FULL.rate + (job.request.options.num_steps - longest) * FULL.step_seconds
        finish_in[job] = (alone + FULL.reserve_seconds) / 0.9  # a tenth of the time is reserved
    return finish_in


def is_lost(job: Job, now: float) -> bool:
    total = sum(work(row.step, job) for row in job.unfinished)
    steps = max(job.request.options.num_steps - row.step for row in job.unfinished)
    return now + LOST_MARGIN * max(total / FULL.rate, steps * FULL.lone_seconds) > job.deadline


def random_backlog(seed: int) -> tuple[random.Random, Backlog, float]:
    choose = random.Random(seed)
    backlog, now = Backlog(10_000), 100.0
    jobs = [random_job(choose, now - choose.uniform(0, 3)) for _ in range(choose.randint(1, 150))]
    for job in jobs:
        backlog.add(job, is_reserved=choose.random() < 0.1)
    for job in choose.sample(jobs, choose.randint(0, len(jobs) - 1)):
        backlog.remove(job)
    return choose, backlog, now


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_reserved_jobs_come_first_and_the_others_are_ordered_by_target_and_then_by_arrival(seed: int) -> None:
    choose = random.Random(seed)
    backlog, jobs = Backlog(10_000), list[Job]()
    for _ in range(choose.randint(1, 200)):
        if jobs and choose.random() < 0.3:
            backlog.remove(jobs.pop(choose.randrange(len(jobs))))
        else:
            jobs.append(random_job(choose, now=0.0))
            backlog.add(jobs[-1], is_reserved=choose.random() < 0.2)
        reserved = [job for job in jobs if job.is_reserved]
        others = sorted((job for job in jobs if not job.is_reserved), key=lambda job: job.target)  # sorted() is stable.
        assert (backlog.jobs, backlog.reserved) == ([*reserved, *others], reserved)
    assert len(backlog) == len(jobs)
    assert backlog.work == sum(job.evaluations_left for job in jobs)


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_slack_is_the_smallest_time_between_bound_and_target(seed: int) -> None:
    _, backlog, now = random_backlog(seed)
    expected = [
        job.target - now - FULL.step_seconds - bound
        for job, bound in bounds(backlog.jobs).items()
        if not is_lost(job, now)
    ]
    assert backlog.slack(FULL, now) == pytest.approx(min(expected, default=math.inf))


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_job_is_admitted_if_it_and_all_delayed_jobs_meet_their_targets(seed: int) -> None:
    choose, backlog, now = random_backlog(seed)
    candidate = random_job(choose, now, fresh=True)
    after = bounds([*backlog.jobs, candidate])
    others = [job for job in backlog if not job.is_reserved]
    delayed = [job for job in others if job.target > candidate.target and not is_lost(job, now)]
    expected = all(now + FULL.step_seconds + after[job] <= job.target for job in [candidate, *delayed])
    assert backlog.admits(candidate, FULL, FULL, now) is expected
    assert candidate not in backlog


def test_random_jobs_are_both_admitted_and_refused() -> None:
    decisions = set()
    for seed in range(60):
        choose, backlog, now = random_backlog(seed)
        decisions.add(backlog.admits(random_job(choose, now, fresh=True), FULL, FULL, now))
    assert decisions == {True, False}


def test_lost_job_does_not_prevent_the_admission_of_other_jobs() -> None:
    backlog = Backlog(10_000)
    lost = new_job(64, num_steps=100, timeout=10.0, submitted_at=0.0)  # 64 s of work
    backlog.add(lost)
    assert backlog.slack(FULL, 0.0) == math.inf
    assert backlog.admits(new_job(1, num_steps=10, timeout=5.0, submitted_at=0.0), FULL, FULL, 0.0)


def test_job_with_another_model_delays_all_jobs() -> None:
    """The call of another model makes every step longer, also for jobs with earlier targets."""
    backlog = Backlog(10_000)
    backlog.add(new_job(1, num_steps=50, timeout=11.0, submitted_at=0.0))  # its bound is 9.2 s, its target 9.9 s
    slower = Throughput(rate=80.0, step_seconds=0.2, lone_seconds=0.02)  # The bound at this speed is 11.1 s.
    same, other = (new_job(1, num_steps=1, timeout=100.0, submitted_at=0.0, model=name) for name in ("default", "fast"))
    assert backlog.admits(same, slower, slower, 0.0)
    assert not backlog.admits(other, slower, slower, 0.0)


def test_job_is_not_lost_because_a_new_job_would_make_its_steps_longer() -> None:
    backlog = Backlog(10_000)
    backlog.add(new_job(1, num_steps=50, timeout=11.0, submitted_at=0.0))
    slower = Throughput(rate=20.0, step_seconds=0.8, lone_seconds=0.4)  # 50 steps would take 20 s
    other = new_job(1, num_steps=1, timeout=100.0, submitted_at=0.0, model="fast")
    assert not backlog.admits(other, slower, FULL, 0.0)
    assert backlog.admits(other, slower, slower, 0.0)


def test_admission_after_a_wait_includes_the_work_that_finishes_before() -> None:
    backlog = Backlog(10_000)
    backlog.add(new_job(50, num_steps=20, timeout=15.0, submitted_at=0.0))  # 1,000 evaluations take 10 s
    candidate = new_job(10, num_steps=50, timeout=20.0, submitted_at=0.0)  # it takes 12.5 s alone, its target is 18 s
    # It is admitted if (10 - wait + 12.5 + 0.3) / 0.9 + 0.16 <= 18. Therefore waits of 0 to 6 s are too short.
    assert [wait for wait in range(12) if not backlog.admits(candidate, FULL, FULL, 0.0, wait)] == list(range(7))


def test_jobs_finish_in_order_in_the_prediction() -> None:
    backlog = Backlog(10_000)
    for job in (new_job(10, num_steps=10, submitted_at=0.0), new_job(10, num_steps=10, submitted_at=1.0)):
        backlog.add(job)
    remaining = [backlog.images_after(seconds, FULL.rate) for seconds in (0, 0.2, 0.4, 1.0, 1.5, 2.0, 3.0)]
    assert remaining == [20, 18, 16, 10, 5, 0, 0]


def test_running_images_finish_before_waiting_images_in_the_prediction() -> None:
    backlog = Backlog(10_000)
    job = new_job(10, num_steps=10, submitted_at=0.0)
    backlog.add(job)
    backlog.start(job.unfinished[:6])
    for row in job.unfinished[:6]:
        row.step = 9  # Four images wait, and six images have one step left.
    backlog._update(job)
    remaining = [backlog.images_after(seconds, FULL.rate) for seconds in (0, 0.03, 0.06, 0.16, 0.46)]
    assert remaining == [10, 7, 4, 3, 0]


def test_table_grows_and_its_slots_are_reused() -> None:
    backlog = Backlog(10_000)
    jobs = [new_job(1, num_steps=2, submitted_at=float(i)) for i in range(300)]
    for job in jobs:
        backlog.add(job)
    places = {job.place for job in jobs}
    assert len(places) == 300
    for job in jobs:
        backlog.remove(job)
    assert len(backlog) == 0
    assert backlog.work == 0
    for job in jobs:
        backlog.add(job)
    assert backlog._table.shape[1] == 512
