"""The forecasts against what the batcher does when its steps are really made."""

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.batcher import Batcher, QueueFullError
from app.forecast import retry_after, seconds_to_finish, seconds_to_room
from app.pace import Pace
from tests.app.fakes import new_job, step_batcher

ONE_SECOND = Pace({1: 1.0, 1024: 1.0})  # a step, whatever its rows
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=80)


def busy_batcher(seed: int, max_batch: int) -> Batcher:
    """A batcher in the midst of its work: jobs of all sizes came at all times."""
    choose = random.Random(seed)
    batcher = Batcher(capacity=choose.choice([32, 64, 256]))
    counts = choose.choice([[1], [32, 64], [1, 1, 1, 4, 16, 64]])
    for _ in range(choose.randint(1, 60)):
        with suppress(QueueFullError):
            batcher.add(new_job(choose.choice(counts), choose.choice([100, 100, 20, 10])))
        for _ in range(choose.choice([0, 1, 3, 20])):
            step_batcher(batcher, max_batch)
    return batcher


busy = given(
    seed=st.integers(0, 2**32), max_batch=st.sampled_from([1, 4, 8, 16, 64]), count=st.sampled_from([1, 4, 16, 64])
)


@PROFILE
@busy
def test_room_is_there_when_it_was_promised(seed: int, max_batch: int, count: int) -> None:
    batcher = busy_batcher(seed, max_batch)
    missing = min(count, batcher.waiting)
    promised = seconds_to_room(batcher, missing, max_batch, ONE_SECOND)
    room_at, num_steps = batcher.waiting - missing, 0
    while batcher.waiting > room_at:
        step_batcher(batcher, max_batch)
        num_steps += 1
    actual = max(0, num_steps - 1)  # an image waits no longer when its first step begins
    assert retry_after(actual) / 2 <= retry_after(promised) <= 2 * retry_after(actual)


@PROFILE
@busy
def test_a_job_ends_when_it_was_promised(seed: int, max_batch: int, count: int) -> None:
    batcher = busy_batcher(seed, max_batch)
    batcher.capacity = 10**6
    job = new_job(count, num_steps=random.Random(seed).choice([10, 50, 100]))
    promised = seconds_to_finish(batcher, job, max_batch, ONE_SECOND)
    batcher.add(job)
    actual = 0
    while not job.closed:
        step_batcher(batcher, max_batch)
        actual += 1
    assert actual / 2 <= promised <= 2 * actual


def test_alone_a_job_takes_its_own_steps() -> None:
    assert seconds_to_finish(Batcher(8), new_job(4, num_steps=10), 8, ONE_SECOND) == 10
    assert seconds_to_finish(Batcher(8), new_job(8, num_steps=10), 4, ONE_SECOND) == 20


def test_time_is_counted_at_the_pace_of_that_many_rows() -> None:
    pace = Pace({1: 1.0, 8: 3.0})
    assert seconds_to_finish(Batcher(8), new_job(1, num_steps=10), 8, pace) == 10
    assert seconds_to_finish(Batcher(8), new_job(8, num_steps=10), 8, pace) == 30
    pace.slowdown = 2.0
    assert seconds_to_finish(Batcher(8), new_job(1, num_steps=10), 8, pace) == 20


@pytest.mark.parametrize("max_batch", [64, 8])
def test_guided_steps_count_twice(max_batch: int) -> None:
    pace = Pace({1: 1.0, 64: 64.0})  # a second an evaluation
    job = new_job(64, num_steps=10, guided_steps=range(3, 8))
    assert seconds_to_finish(Batcher(64), job, max_batch, pace) == pytest.approx(64 * (10 + 5))


def test_a_backlog_that_is_guided_makes_room_later() -> None:
    pace, waits = Pace({1: 1.0, 8: 8.0}), []
    for guided_steps in (range(0), range(10)):
        batcher = Batcher(16)
        batcher.add(new_job(16, num_steps=10, guided_steps=guided_steps))
        waits.append(seconds_to_room(batcher, 16, 8, pace))
    assert waits[1] == pytest.approx(2 * waits[0])


def test_a_single_image_does_not_wait_for_a_crowd() -> None:
    batcher = Batcher(1024)
    batcher.add(new_job(64, num_steps=100))
    assert seconds_to_finish(batcher, new_job(1, num_steps=100), 8, ONE_SECOND) == 100


def test_with_more_jobs_than_rows_it_waits_only_for_the_first_that_ends() -> None:
    batcher = Batcher(1024)
    batcher.add(new_job(1, num_steps=10))
    batcher.add(new_job(64, num_steps=100))
    assert seconds_to_finish(batcher, new_job(1, num_steps=5), 2, ONE_SECOND) == 15


def test_looking_ahead_changes_nothing() -> None:
    batcher = busy_batcher(seed=3, max_batch=8)
    before = batcher.waiting, batcher.running, batcher.steps_left, batcher.select(100)
    assert batcher.waiting
    seconds_to_room(batcher, 1, 8, ONE_SECOND)
    seconds_to_finish(batcher, new_job(4), 8, ONE_SECOND)
    assert (batcher.waiting, batcher.running, batcher.steps_left, batcher.select(100)) == before


@pytest.mark.parametrize(("seconds", "header"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.01, 2), (59.5, 60)])
def test_retry_after_is_whole_seconds_and_at_least_one(seconds: float, header: int) -> None:
    assert retry_after(seconds) == header
