import pytest

from app.batcher import Batcher, QueueFullError
from app.trajectory import Job, Trajectory
from tests.app.fakes import new_job, step_batcher


def batcher_with(*jobs: Job, capacity: int = 1024) -> Batcher:
    batcher = Batcher(capacity)
    for job in jobs:
        batcher.add(job)
    return batcher


def names(rows: list[Trajectory], *jobs: Job) -> list[tuple[int, int]]:
    """(which job, which image) of each row."""
    return [(jobs.index(row.job), row.index) for row in rows]


def state(batcher: Batcher) -> tuple[int, int, int, int]:
    return batcher.waiting, batcher.running, batcher.steps_left, batcher.num_jobs


def test_rows_go_round_the_jobs_oldest_first() -> None:
    jobs = new_job(3), new_job(1), new_job(2)
    batcher = batcher_with(*jobs)
    assert names(batcher.select(5), *jobs) == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]
    assert names(batcher.select(100), *jobs) == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]
    assert names(batcher.select(2), *jobs) == [(0, 0), (1, 0)]


def test_a_job_without_more_images_passes_its_turn_on() -> None:
    jobs = new_job(1), new_job(1), new_job(5)
    batcher = batcher_with(*jobs)
    assert names(batcher.select(4), *jobs) == [(0, 0), (1, 0), (2, 0), (2, 1)]


def test_nothing_is_selected_where_nothing_is() -> None:
    assert Batcher(4).select(8) == []


def test_selecting_changes_nothing() -> None:
    batcher = batcher_with(new_job(3), new_job(2))
    before = state(batcher)
    assert batcher.select(4) == batcher.select(4)
    assert state(batcher) == before


def test_a_newcomer_is_in_the_next_step_and_in_every_step_until_it_is_done() -> None:
    batcher = batcher_with(new_job(64, num_steps=30))
    for _ in range(7):
        step_batcher(batcher, 16)
    newcomer = new_job(1, num_steps=10)
    batcher.add(newcomer)
    for _ in range(10):
        assert not newcomer.closed
        rows = step_batcher(batcher, 16)
        assert [row.job for row in rows].count(newcomer) == 1
        assert len(rows) == 16
    assert newcomer.closed


def test_as_many_jobs_as_rows_are_all_in_every_step() -> None:
    jobs = [new_job(5, num_steps=4, seed=i) for i in range(8)]
    batcher = batcher_with(*jobs)
    for _ in range(5 * 4):
        assert [row.job for row in step_batcher(batcher, 8)] == jobs
    assert all(job.closed for job in jobs)


def test_of_more_jobs_than_rows_the_oldest_run_to_their_end() -> None:
    jobs = [new_job(1, num_steps=5, seed=i) for i in range(7)]
    batcher = batcher_with(*jobs)
    ran = [[jobs.index(row.job) for row in step_batcher(batcher, 3)] for _ in range(15)]
    assert ran == [[0, 1, 2]] * 5 + [[3, 4, 5]] * 5 + [[6]] * 5


def test_images_of_a_job_that_began_stay_before_those_that_did_not() -> None:
    job = new_job(4, num_steps=3)
    batcher = batcher_with(job)
    seen = [[row.index for row in step_batcher(batcher, 2)] for _ in range(6)]
    assert seen == [[0, 1]] * 3 + [[2, 3]] * 3


def test_capacity_counts_the_images_that_wait() -> None:
    batcher = batcher_with(new_job(6), capacity=8)
    with pytest.raises(QueueFullError) as full:
        batcher.add(new_job(5))
    assert full.value.missing == 3
    assert state(batcher) == (6, 0, 18, 1)  # admitted whole or not at all
    batcher.add(new_job(2))
    assert batcher.waiting == 8
    step_batcher(batcher, 5)  # five wait no longer
    batcher.add(new_job(5))
    with pytest.raises(QueueFullError):
        batcher.add(new_job(1))


def test_the_counts_follow_an_image_through_its_life() -> None:
    job = new_job(2, num_steps=2)
    batcher = batcher_with(job)
    assert state(batcher) == (2, 0, 4, 1)
    step_batcher(batcher, 1)
    assert state(batcher) == (1, 1, 3, 1)
    step_batcher(batcher, 1)
    assert state(batcher) == (1, 0, 2, 1)
    step_batcher(batcher, 1)
    step_batcher(batcher, 1)
    assert state(batcher) == (0, 0, 0, 0)
    assert batcher.jobs == []


@pytest.mark.parametrize("steps_before", range(9))
def test_a_job_can_be_removed_at_every_stage(steps_before: int) -> None:
    other, job = new_job(1, num_steps=100, seed=1), new_job(3, num_steps=2, seed=2)
    batcher = batcher_with(other, job)
    for _ in range(steps_before):
        step_batcher(batcher, 2)  # `job` has one row a step: it is done after six
    assert batcher.remove(job) is (steps_before < 6)
    assert batcher.remove(job) is False
    waiting = int(steps_before == 0)  # `other` is in every step
    assert state(batcher) == (waiting, 1 - waiting, 100 - steps_before, 1)
    assert batcher.jobs == [other]
    assert all(row.job is other for row in batcher.select(8))


def test_removing_a_stranger_changes_nothing() -> None:
    batcher = batcher_with(new_job(2))
    before = state(batcher)
    assert batcher.remove(new_job(2)) is False
    assert state(batcher) == before


def test_removing_makes_room() -> None:
    job = new_job(4)
    batcher = batcher_with(job, capacity=4)
    batcher.remove(job)
    batcher.add(new_job(4))
    assert batcher.waiting == 4
