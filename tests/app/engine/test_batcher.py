import random

import pytest

from app.engine.backlog import Backlog
from app.engine.batcher import StepLimits, select_rows
from app.engine.job import Job, StepKind, Trajectory
from app.engine.step_times import StepTimes
from tests.app.fakes import fixed_limits, image, new_job, step_backlog

# 16 evaluations have the best rate, so that they are a full step. 8 evaluations take three times as long as 1, so that
# they are a short step.
PLAIN = StepKind(models=("default",), widest_row=2, has_clip=False)
STEP_TIMES = StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 4.0, 32: 9.0})
AUTO = StepLimits.of(STEP_TIMES, None, PLAIN, auto=True)


def backlog_with(*jobs: Job, capacity: int = 1024) -> Backlog:
    backlog = Backlog(capacity)
    for job in jobs:
        backlog.add(job)
    return backlog


def names(rows: list[Trajectory], *jobs: Job) -> list[tuple[int, int]]:
    """Returns (number of the job, index of the image) for each row."""
    return [(jobs.index(row.job), row.index) for row in rows]


def state(backlog: Backlog) -> tuple[int, int, float, int]:
    return backlog.waiting, backlog.running, backlog.work, len(backlog)


def select(backlog: Backlog, max_rows: int) -> list[Trajectory]:
    return select_rows(backlog.jobs, fixed_limits(max_rows), at_risk=False)


def evaluations(rows: list[Trajectory]) -> int:
    return sum(row.evaluations for row in rows)


def test_each_job_gets_one_row_and_the_oldest_jobs_get_the_others() -> None:
    jobs = new_job(3), new_job(1), new_job(2)
    backlog = backlog_with(*jobs)
    assert names(select(backlog, 5), *jobs) == [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2)]
    assert names(select(backlog, 100), *jobs) == [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (2, 1)]
    assert names(select(backlog, 2), *jobs) == [(0, 0), (1, 0)]


def test_row_that_compares_the_classes_begins_in_the_first_half_of_a_full_step() -> None:
    limits = fixed_limits(20)  # a full step has 40 evaluations
    assert [n for n in range(40) if limits.fits_first_round(10, n)] == list(range(20))
    assert [n for n in range(40) if limits.fits_first_round(2, n)] == list(range(19))


def test_jobs_with_earlier_targets_come_first() -> None:
    jobs = new_job(3, timeout=30.0, submitted_at=0.0), new_job(3, timeout=10.0, submitted_at=5.0), new_job(1)
    backlog = backlog_with(*jobs)
    assert names(select(backlog, 5), *jobs) == [(1, 0), (0, 0), (2, 0), (1, 1), (1, 2)]


def test_job_with_the_earliest_target_gets_all_rows_while_a_target_is_at_risk() -> None:
    jobs = new_job(20, timeout=30.0, submitted_at=0.0), new_job(20, timeout=40.0, submitted_at=0.0)
    backlog = backlog_with(*jobs)
    assert {row.job for row in select_rows(backlog.jobs, AUTO, at_risk=True)} == {jobs[0]}
    assert {row.job for row in select_rows(backlog.jobs, AUTO, at_risk=False)} == set(jobs)


def test_no_row_is_selected_from_an_empty_backlog() -> None:
    assert select(Backlog(4), 8) == []


def test_selection_does_not_change_the_backlog() -> None:
    backlog = backlog_with(new_job(3), new_job(2))
    before = state(backlog)
    assert select(backlog, 4) == select(backlog, 4)
    assert state(backlog) == before


def test_new_job_is_in_the_next_step_and_in_every_step_until_it_is_finished() -> None:
    backlog = backlog_with(new_job(64, num_steps=30))
    for _ in range(7):
        step_backlog(backlog, 16)
    added = new_job(1, num_steps=10)
    backlog.add(added)
    for _ in range(10):
        assert not added.closed
        rows = step_backlog(backlog, 16)
        assert [row.job for row in rows].count(added) == 1
        assert len(rows) == 16
    assert added.closed


def test_every_job_is_in_every_step_with_as_many_jobs_as_rows() -> None:
    jobs = [new_job(5, num_steps=4, seed=i) for i in range(8)]
    backlog = backlog_with(*jobs)
    for _ in range(5 * 4):
        assert [row.job for row in step_backlog(backlog, 8)] == jobs
    assert all(job.closed for job in jobs)


def test_oldest_jobs_run_to_their_end_with_more_jobs_than_rows() -> None:
    jobs = [new_job(1, num_steps=5, seed=i) for i in range(7)]
    backlog = backlog_with(*jobs)
    ran = [[jobs.index(row.job) for row in step_backlog(backlog, 3)] for _ in range(15)]
    assert ran == [[0, 1, 2]] * 5 + [[3, 4, 5]] * 5 + [[6]] * 5


def test_started_images_of_a_job_come_before_images_that_have_not_started() -> None:
    job = new_job(4, num_steps=3)
    backlog = backlog_with(job)
    seen = [[row.index for row in step_backlog(backlog, 2)] for _ in range(6)]
    assert seen == [[0, 1]] * 3 + [[2, 3]] * 3


def test_capacity_limits_the_waiting_images() -> None:
    backlog = backlog_with(new_job(6), capacity=8)
    with pytest.raises(AssertionError):
        backlog.add(new_job(5))
    assert state(backlog) == (6, 0, 18, 1)  # A job is added with all its images or not added.
    backlog.add(new_job(2))
    assert backlog.waiting == 8
    step_backlog(backlog, 5)  # Five images start, so that they no longer wait.
    backlog.add(new_job(5))
    with pytest.raises(AssertionError):
        backlog.add(new_job(1))


def test_counts_are_right_after_every_step_of_a_job() -> None:
    job = new_job(2, num_steps=2)
    backlog = backlog_with(job)
    assert state(backlog) == (2, 0, 4, 1)
    step_backlog(backlog, 1)
    assert state(backlog) == (1, 1, 3, 1)
    step_backlog(backlog, 1)
    assert state(backlog) == (1, 0, 2, 1)
    step_backlog(backlog, 1)
    step_backlog(backlog, 1)
    assert state(backlog) == (0, 0, 0, 0)
    assert backlog.jobs == []


@pytest.mark.parametrize("steps_before", range(9))
def test_job_can_be_removed_after_any_number_of_steps(steps_before: int) -> None:
    other, job = new_job(1, num_steps=100, seed=1), new_job(3, num_steps=2, seed=2)
    backlog = backlog_with(other, job)
    for _ in range(steps_before):
        step_backlog(backlog, 2)  # `job` has one row in each step, so that it is finished after six steps.
    assert backlog.remove(job) is (steps_before < 6)
    assert backlog.remove(job) is False
    waiting = int(steps_before == 0)  # `other` starts in the first step.
    assert state(backlog) == (waiting, 1 - waiting, 100 - steps_before, 1)
    assert backlog.jobs == [other]
    assert all(row.job is other for row in select(backlog, 8))


def test_removing_an_unknown_job_does_not_change_the_backlog() -> None:
    backlog = backlog_with(new_job(2))
    before = state(backlog)
    assert backlog.remove(new_job(2)) is False
    assert state(backlog) == before


def test_removing_a_job_makes_room_for_another() -> None:
    job = new_job(4)
    backlog = backlog_with(job, capacity=4)
    backlog.remove(job)
    backlog.add(new_job(4))
    assert backlog.waiting == 4


def test_first_round_uses_half_of_a_full_step() -> None:
    jobs = [new_job(4, num_steps=10, seed=seed) for seed in range(30)]
    rows = select_rows(backlog_with(*jobs).jobs, AUTO, at_risk=False)
    assert [row.job.request.options.seed for row in rows if row.index == 0] == [*range(8)]
    assert len(rows) == 16


def test_guided_row_counts_as_two_evaluations() -> None:
    guided = [new_job(1, num_steps=10, seed=seed, guided_steps=range(10)) for seed in range(30)]
    assert len(select_rows(backlog_with(*guided).jobs, AUTO, at_risk=False)) == 8
    odd = backlog_with(new_job(1, num_steps=10), *guided)  # Another guided row would make 17 evaluations.
    assert evaluations(select_rows(odd.jobs, AUTO, at_risk=False)) == 15


def test_step_is_short_while_a_small_job_runs_with_a_large_one() -> None:
    large, small = new_job(64, num_steps=100), new_job(1, num_steps=100)
    assert len(select_rows(backlog_with(large).jobs, AUTO, at_risk=False)) == 16
    assert len(select_rows(backlog_with(large, small).jobs, AUTO, at_risk=False)) == 8
    assert len(select_rows(backlog_with(large, small).jobs, AUTO, at_risk=True)) == 16
    assert len(select_rows(backlog_with(large, new_job(4)).jobs, AUTO, at_risk=False)) == 8
    # With five images, the smaller job does not fit into half of a short step.
    assert len(select_rows(backlog_with(large, new_job(5)).jobs, AUTO, at_risk=False)) == 16


def test_several_small_jobs_use_half_of_a_short_step() -> None:
    jobs = [new_job(64, num_steps=100), *(new_job(1, num_steps=100, seed=seed) for seed in range(1, 6))]
    rows = select_rows(backlog_with(*jobs).jobs, AUTO, at_risk=False)
    assert len(rows) == 12  # The first round has six rows. The first job gets six further rows.
    assert {row.job for row in rows} == set(jobs)


def test_single_small_job_gets_full_steps() -> None:
    assert len(select_rows(backlog_with(new_job(16)).jobs, AUTO, at_risk=False)) == 16


@pytest.mark.parametrize(
    ("curve", "evaluations", "short"),
    [
        ({1: 1.0, 64: 64.0}, 2, 2),  # Larger batches are not faster, but a guided row needs two evaluations.
        ({1: 1.0, 64: 1.0}, 64, 64),
        ({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0}, 16, 8),
        ({1: 1.0, 2: 1.5, 4: 2.6, 8: 5.2}, 8, 4),  # The batches 4 and 8 have the same rate.
        ({1: 1.0, 16: 16.0, 32: 32.0}, 16, 3),  # 32 evaluations take more than 20 times as long as 1.
    ],
)
def test_auto_limits_follow_from_the_measured_step_times(curve: dict[int, float], evaluations: int, short: int) -> None:
    limits = StepLimits.of(StepTimes(curve), None, PLAIN, auto=True)
    assert (limits.evaluations, limits.rows, limits.short) == (evaluations, evaluations, short)


def test_models_do_not_lower_the_rate_of_steps_of_one_row() -> None:
    one, three = (
        StepLimits.of(STEP_TIMES, 1, StepKind(models, 2, has_clip=False), auto=False)
        for models in (("default",), ("default", "fast", "letters"))
    )
    assert three.full == one.full


def test_second_model_adds_the_time_of_another_call() -> None:
    one, two = (
        StepLimits.of(STEP_TIMES, None, StepKind(("default", "fast")[:num_models], 2, has_clip=False), auto=True)
        for num_models in (1, 2)
    )
    assert (one.short, two.short) == (8, 4)  # 4 evaluations take 2 s and the other call takes 1 s.
    assert two.full.step_seconds == one.full.step_seconds + 1.0
    assert two.full.rate < one.full.rate


@pytest.mark.parametrize("max_rows", [1, 3, 8, 64])
def test_fixed_limit_is_the_number_of_rows(max_rows: int) -> None:
    limits = StepLimits.of(STEP_TIMES, max_rows, PLAIN, auto=False)
    backlog = backlog_with(new_job(100, num_steps=10, guided_steps=range(10)), new_job(1))
    assert len(select_rows(backlog.jobs, limits, at_risk=False)) == max_rows
    # If all rows are guided, there are two evaluations per row.
    assert limits.full.step_seconds == STEP_TIMES.step_seconds(2 * max_rows)
    slowest = min(n / STEP_TIMES.step_seconds(n) for n in (max_rows, 2 * max_rows))
    assert limits.full.rate == pytest.approx(slowest, rel=0.5)
    assert limits.full.rate <= slowest


def test_rate_of_a_full_step_allows_for_one_empty_place() -> None:
    """If one place is left and the next row is guided, the place stays empty. The step then has 15 evaluations."""
    staircase = StepTimes({1: 16.0, 16: 16.0, 17: 32.0})
    assert StepLimits.of(staircase, None, PLAIN, auto=True).full.rate == 15 / 16


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_job_stay_sorted_by_progress(seed: int) -> None:
    choose = random.Random(seed)
    backlog, jobs = Backlog(1000), list[Job]()
    for _ in range(300):
        if choose.random() < 0.2:
            guided_steps = range(choose.randint(0, 5), choose.randint(5, 10))
            jobs.append(new_job(choose.randint(1, 20), num_steps=10, guided_steps=guided_steps))
            backlog.add(jobs[-1])
        rows = select_rows(backlog.jobs, AUTO, at_risk=choose.random() < 0.3)
        assert evaluations(rows) <= AUTO.evaluations
        backlog.replace_batch(rows)
        backlog.start_batch()
        backlog.finish([(row, image(0, row.index, row.step)) for row in backlog.advance()])
        for job in backlog.jobs:
            steps = [row.step for row in job.unfinished]
            assert steps == sorted(steps, reverse=True)
            assert job.num_waiting == sum(not row.started for row in job.unfinished)
            assert job.evaluations_left == sum(row.evaluations_left for row in job.unfinished)
