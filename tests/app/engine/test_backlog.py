"""The bound and the admission check against the rule written out in plain loops."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.backlog import LOST_MARGIN, Backlog
from app.engine.job import Job
from app.engine.step_times import Throughput
from tests.app.fakes import new_job

FULL = Throughput(rate=100.0, step_seconds=0.16, lone_seconds=0.02)
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def random_job(choose: random.Random, now: float, *, fresh: bool = False) -> Job:
    """A job of any kind, some of whose images have advanced."""
    num_steps = choose.choice([1, 4, 10, 50])
    guided = range(*sorted(choose.choices(range(num_steps + 1), k=2)))
    timeout = choose.choice([0.5, 2.0, 10.0, 30.0, math.inf])
    job = new_job(choose.randint(1, 9), num_steps, timeout=timeout, guided_steps=guided, submitted_at=now)
    if not fresh:
        steps = sorted((choose.randrange(num_steps) for _ in job.unfinished), reverse=True)  # the furthest first
        for row, step in zip(job.unfinished, steps, strict=True):
            job.evaluations_left -= sum(2 if k in guided else 1 for k in range(step))
            row.step = step
    return job


def work(row_step: int, job: Job) -> int:
    return sum(2 if step in job.request.guided_steps else 1 for step in range(row_step, job.request.options.num_steps))


def bounds(jobs: list[Job]) -> dict[Job, float]:
    """The bound of each job, in seconds from now."""
    found, total = {}, 0
    for job in sorted(jobs, key=lambda job: job.target):  # stable
        longest = min(row.step for row in job.unfinished)
        total += sum(work(row.step, job) for row in job.unfinished)
        others = total - work(longest, job)
        found[job] = others / FULL.rate + (job.request.options.num_steps - longest) * FULL.step_seconds
    return found


def is_lost(job: Job, now: float) -> bool:
    total = sum(work(row.step, job) for row in job.unfinished)
    steps = max(job.request.options.num_steps - row.step for row in job.unfinished)
    return now + LOST_MARGIN * max(total / FULL.rate, steps * FULL.lone_seconds) > job.deadline


def random_backlog(seed: int) -> tuple[random.Random, Backlog, float]:
    choose = random.Random(seed)
    backlog, now = Backlog(10_000), 100.0
    jobs = [random_job(choose, now - choose.uniform(0, 3)) for _ in range(choose.randint(1, 150))]
    for job in jobs:
        backlog.add(job)
    for job in choose.sample(jobs, choose.randint(0, len(jobs) - 1)):
        backlog.remove(job)
    return choose, backlog, now


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_jobs_are_ordered_by_target_and_then_by_arrival(seed: int) -> None:
    choose = random.Random(seed)
    backlog, jobs = Backlog(10_000), list[Job]()
    for _ in range(choose.randint(1, 200)):
        if jobs and choose.random() < 0.3:
            backlog.remove(jobs.pop(choose.randrange(len(jobs))))
        else:
            jobs.append(random_job(choose, now=0.0))
            backlog.add(jobs[-1])
        assert backlog.jobs == sorted(jobs, key=lambda job: job.target)  # stable, and `jobs` are in order of arrival
    assert len(backlog) == len(jobs)
    assert backlog.work == sum(job.evaluations_left for job in jobs)


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_slack_is_the_least_time_between_a_bound_and_its_target(seed: int) -> None:
    _, backlog, now = random_backlog(seed)
    expected = [
        job.target - now - FULL.step_seconds - bound
        for job, bound in bounds(backlog.jobs).items()
        if not is_lost(job, now)
    ]
    assert backlog.slack(FULL, now) == pytest.approx(min(expected, default=math.inf))


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_a_newcomer_is_admitted_if_it_and_all_that_it_delays_meet_their_targets(seed: int) -> None:
    choose, backlog, now = random_backlog(seed)
    newcomer = random_job(choose, now, fresh=True)
    after = bounds([*backlog.jobs, newcomer])
    delayed = [job for job in backlog if job.target > newcomer.target and not is_lost(job, now)]
    expected = all(now + FULL.step_seconds + after[job] <= job.target for job in [newcomer, *delayed])
    assert backlog.admits(newcomer, FULL, now) is expected
    assert newcomer not in backlog


def test_both_answers_occur_among_random_newcomers() -> None:
    answers = set()
    for seed in range(60):
        choose, backlog, now = random_backlog(seed)
        answers.add(backlog.admits(random_job(choose, now, fresh=True), FULL, now))
    assert answers == {True, False}


def test_a_job_that_cannot_finish_in_any_case_does_not_keep_others_out() -> None:
    backlog = Backlog(10_000)
    hopeless = new_job(64, num_steps=100, timeout=10.0, submitted_at=0.0)  # 64 s of work
    backlog.add(hopeless)
    assert backlog.slack(FULL, 0.0) == math.inf
    assert backlog.admits(new_job(1, num_steps=10, timeout=5.0, submitted_at=0.0), FULL, 0.0)


def test_a_newcomer_with_another_model_is_measured_against_every_job() -> None:
    """Its call makes every step longer, also for jobs with earlier targets."""
    backlog = Backlog(10_000)
    backlog.add(new_job(1, num_steps=50, timeout=10.0, submitted_at=0.0))  # its bound is 8 s, its target 9 s
    slower = Throughput(rate=80.0, step_seconds=0.2, lone_seconds=0.02)  # with which the bound is 10 s
    same, other = (new_job(1, num_steps=1, timeout=100.0, submitted_at=0.0, model=name) for name in ("default", "fast"))
    assert backlog.admits(same, slower, 0.0)
    assert not backlog.admits(other, slower, 0.0)


def test_after_a_wait_the_backlog_has_drained_in_order() -> None:
    backlog = Backlog(10_000)
    backlog.add(new_job(50, num_steps=20, timeout=15.0, submitted_at=0.0))  # 1,000 evaluations take 10 s
    newcomer = new_job(10, num_steps=50, timeout=16.0, submitted_at=0.0)  # its own bound is 12.5 s, its target 14.4 s
    # All of it needs (10 - wait) + 12.5 + 0.16 <= 14.4.
    assert [wait for wait in range(12) if not backlog.admits(newcomer, FULL, 0.0, wait)] == list(range(9))


def test_images_finish_in_order() -> None:
    backlog = Backlog(10_000)
    for job in (new_job(10, num_steps=10, submitted_at=0.0), new_job(10, num_steps=10, submitted_at=1.0)):
        backlog.add(job)
    found = [backlog.images_after(seconds, FULL.rate) for seconds in (0, 0.2, 0.4, 1.0, 1.5, 2.0, 3.0)]
    assert found == [20, 18, 16, 10, 5, 0, 0]


def test_running_images_finish_before_waiting_ones_and_by_their_steps_left() -> None:
    backlog = Backlog(10_000)
    job = new_job(10, num_steps=10, submitted_at=0.0)
    backlog.add(job)
    job.num_waiting, job.evaluations_left = 4, 46  # each of the six others has one step left
    backlog._update(job.unfinished)
    found = [backlog.images_after(seconds, FULL.rate) for seconds in (0, 0.03, 0.06, 0.16, 0.46)]
    assert found == [10, 7, 4, 3, 0]


def test_the_table_grows_and_its_slots_are_used_again() -> None:
    backlog = Backlog(10_000)
    jobs = [new_job(1, num_steps=2, submitted_at=float(i)) for i in range(300)]
    for job in jobs:
        backlog.add(job)
    slots = {backlog._entries[job].slot for job in jobs}
    assert len(slots) == 300
    for job in jobs:
        backlog.remove(job)
    assert len(backlog) == 0
    assert backlog.work == 0
    for job in jobs:
        backlog.add(job)
    assert len(backlog._table) == 512
