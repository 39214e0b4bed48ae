"""How many rows a step has, against the turns that the batcher really deals."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.batcher import Batcher
from app.limits import Limits
from app.pace import Pace
from tests.app.fakes import new_job, step_batcher

PACE = Pace({1: 2.65, 2: 3.6, 4: 5.3, 8: 8.8, 16: 15.4, 32: 29.3, 64: 56.0})  # milliseconds, as once measured
AUTO = Limits.auto(PACE)


@pytest.mark.parametrize(
    ("images", "rows"),
    [
        ([64], 64),  # alone, or among its like: throughput is all that counts
        ([64, 64], 64),
        ([32, 32], 64),
        ([40] * 10, 64),
        ([64, 1], 7),  # somebody small is there
        ([1, 64, 64], 7),
        ([64, 20], 7),  # whose twenty turns and the other's are sooner made in small steps
        ([64, 30], 64),
        ([12, 64, 64, 64, 64, 64], 7),  # its last turn would be in a second large step
        ([20, 64, 64, 64, 64, 64], 64),
        ([1] * 5, 7),
        ([1] * 20, 20),  # more jobs than rows: each has one
        ([1] * 500, 64),
        ([], 7),
    ],
)
def test_a_step_grows_while_nobody_is_slowed_down_by_it(images: list[int], rows: int) -> None:
    assert AUTO.rows(images) == rows


def seconds_until_done(smallest: int, company: list[int], rows: int) -> float:
    """Of the job of `smallest` images, where every step has so many rows; measured with the batcher."""
    batcher, job = Batcher(10_000), new_job(smallest, num_steps=1)
    batcher.add(job)
    for count in company:
        batcher.add(new_job(count, num_steps=1))
    seconds = 0.0
    while not job.closed:
        seconds += PACE.step_seconds(len(step_batcher(batcher, rows)))
    return seconds


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(smallest=st.integers(1, 64), others=st.integers(1, 5))
def test_the_smallest_job_takes_at_most_twice_as_long_as_with_the_better_of_both(smallest: int, others: int) -> None:
    limits, company = Limits.auto(PACE), [64] * others
    chosen = limits.rows([smallest, *company])
    best = min(seconds_until_done(smallest, company, rows) for rows in (limits.shared, limits.most))
    assert seconds_until_done(smallest, company, chosen) <= 2 * best  # what it loses, all together gain


def test_a_number_of_rows_that_was_asked_for_is_kept() -> None:
    assert {Limits.fixed(7).rows(images) for images in ([1], [64], [64, 1], [1] * 100)} == {7}


def test_auto_bounds_what_company_costs_and_gives_all_the_throughput_that_there_is() -> None:
    limits = Limits.auto(Pace({1: 1.0, 2: 1.5, 4: 2.0, 8: 4.0, 16: 8.0, 32: 15.0, 64: 30.0}))
    assert (limits.shared, limits.most) == (6, 32)  # 3 seconds a step; 2.13 rows a second
    assert limits.break_even == 6 * 15 / 3


def test_where_rows_cost_nothing_they_are_not_limited() -> None:
    limits = Limits.auto(Pace({1: 1.0, 8: 1.0, 64: 1.1}))
    assert (limits.shared, limits.most) == (64, 64)


def test_it_is_never_larger_for_those_who_share_than_at_most() -> None:
    slow = Limits.auto(Pace({1: 1.0, 2: 2.0, 4: 4.0}))
    assert (slow.shared, slow.most) == (1, 1)
    lowered = AUTO.lowered_to(4)
    assert (lowered.shared, lowered.most) == (4, 4)
    assert AUTO.lowered_to(100) == AUTO


def test_an_image_that_comes_while_many_run_is_in_small_steps_until_it_is_done() -> None:
    batcher = Batcher(1024)
    batcher.add(new_job(64, num_steps=20))
    assert len(step_batcher(batcher, AUTO.rows([len(job.unfinished) for job in batcher.jobs]))) == 64
    newcomer = new_job(1, num_steps=10)
    batcher.add(newcomer)
    while not newcomer.closed:
        assert len(step_batcher(batcher, AUTO.rows([len(job.unfinished) for job in batcher.jobs]))) == 7
    assert len(step_batcher(batcher, AUTO.rows([len(job.unfinished) for job in batcher.jobs]))) == 64


def test_guided_rows_count_twice_while_somebody_small_is_there() -> None:
    assert [AUTO.rows([64, 1], evaluations) for evaluations in (1.0, 1.5, 2.0)] == [7, 4, 3]
    assert AUTO.rows([64, 64], evaluations=2.0) == 64
    assert AUTO.rows([1] * 20, evaluations=2.0) == 20  # each has a row all the same
    assert Limits.fixed(7).rows([64, 1], evaluations=2.0) == 7  # rows were asked for
    free = Limits.auto(Pace({1: 1.0, 64: 2.9}))
    assert free.shared == free.most == 64
    assert [free.rows([64, 1], evaluations) for evaluations in (1.0, 2.0)] == [64, 32]
    assert free.lowered_to(16).rows([64, 1], evaluations=2.0) == 8
