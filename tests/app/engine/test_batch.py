"""Compares the batch with the same rules written as plain loops over the rows."""

import gc
import random
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.admission import Admission
from app.engine.backlog import Backlog
from app.engine.batch import Batch
from app.engine.job import ClipTarget, Job, Trajectory
from app.engine.step_times import StepTimes
from tests.app.fakes import image, new_job, new_recognition

PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=100)


def random_job(choose: random.Random) -> Job:
    if choose.random() < 0.2:
        return new_recognition()
    num_steps = choose.choice([1, 2, 5, 9])
    guided_steps = range(*sorted(choose.choices(range(num_steps + 1), k=2)))
    clip = ClipTarget(1.0, np.zeros(1, np.float32), frozenset({0, 3}), 3) if choose.random() < 0.3 else None
    model = choose.choice(["default", "default", "fast"])
    return new_job(choose.randint(1, 6), num_steps, guided_steps=guided_steps, clip=clip, model=model)


def calls_of(rows: list[Trajectory]) -> tuple[list[int], list[int]]:
    evaluations, with_clip = Counter[str](), Counter[str]()
    for row in rows:
        evaluations[row.job.request.options.model] += row.network_evaluations
        with_clip[row.job.request.options.model] += row.clip is not None
    return sorted(evaluations.values()), sorted(filter(None, with_clip.values()))


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_batch_follows_its_rows_through_random_steps(seed: int) -> None:
    choose, backlog = random.Random(seed), Backlog(10_000)
    batch = backlog.batch
    jobs = [random_job(choose) for _ in range(8)]
    for job in jobs:
        backlog.add(job)
    waiting = [row for job in jobs for row in job.unfinished]
    expected, steps = set[Trajectory](), Counter[Trajectory]()
    for _ in range(30):
        joining = [row for row in waiting if choose.random() < 0.3]
        leaving = [row for row in expected if choose.random() < 0.05]
        batch.add(joining)
        batch.remove(leaving)
        waiting = [row for row in waiting if row not in joining] + leaving
        expected = expected - set(leaving) | set(joining)
        assert set(batch.rows) == expected
        assert len(batch.rows) == len(expected)
        assert batch.size == sum(row.evaluations for row in expected)
        if batch.rows:
            evaluations, with_clip = batch.calls(backlog.step_kind())
            assert (sorted(evaluations.values()), sorted(with_clip.values())) == calls_of(batch.rows)
        decreases = batch.decreases(64)
        for job in jobs:
            own = [row for row in expected if row.job is job]
            tail = [row for row in own if row is job.unfinished[-1]]
            sums = sum(row.evaluations for row in own), sum(row.evaluations for row in tail), len(tail)
            assert tuple(decreases[:, job.place]) == sums
        steps.update(expected)
        left = batch.advance()
        assert set(left) == {row for row in expected if row.comparison or not row.steps_left}
        expected -= set(left)
        assert all(row.step == steps[row] for job in jobs for row in job.unfinished)


def test_list_of_rows_is_a_new_one_only_after_a_change() -> None:
    backlog = Backlog(100)
    job = new_job(3, num_steps=5)
    backlog.add(job)
    batch = backlog.batch
    batch.add(job.unfinished)
    rows = batch.rows
    batch.advance()
    assert batch.rows is rows
    batch.remove(job.unfinished[:1])
    assert batch.rows is not rows
    assert batch.take_joined() == job.unfinished
    assert batch.take_joined() == []


def count_calls(function: Callable[[], object]) -> int:
    """Returns the number of Python and C functions that the function calls."""
    count = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # A collection could call functions of objects of other tests.
    sys.setprofile(count_call)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("size", [1, 64])
def test_number_of_function_calls_of_a_step_does_not_grow_with_the_number_of_rows(size: int) -> None:
    """No Python code runs for each row or job while no row starts, ends or changes its size."""

    def calls(num_jobs: int) -> int:
        admission = Admission(10_000, 4096)
        admission.open(StepTimes({1: 1.0, 4096: 1.0}))
        for _ in range(num_jobs):
            admission.admit(new_job(size, num_steps=100, guided_steps=range(50, 70)), 0.0)

        def step() -> None:
            admission.select(1.0)
            admission.backlog.start_batch()
            admission.observe(admission.backlog.calls(), 1.0)
            admission.backlog.advance()

        step()
        step()
        return count_calls(step)

    assert calls(512 // size) == calls(2)


def test_rows_that_join_and_end_in_each_step_have_a_constant_cost_each() -> None:
    """The number of function calls grows with the rows that start and end, and not with the other rows."""

    def calls(num_others: int) -> int:
        admission = Admission(10_000, 4096)
        admission.open(StepTimes({1: 1.0, 4096: 1.0}))
        for _ in range(num_others):
            admission.admit(new_job(1, num_steps=1000), 0.0)

        def step() -> None:
            admission.admit(new_job(1, num_steps=2), 0.0)
            admission.select(1.0)
            admission.backlog.start_batch()
            ended = admission.backlog.advance()
            admission.backlog.finish([(row, image(0, 0, 2)) for row in ended])

        for _ in range(4):
            step()
        return count_calls(step)

    assert calls(500) <= calls(10) + 5


def test_empty_batch_has_no_rows_and_no_size() -> None:
    batch = Batch()
    assert (batch.rows, batch.size, batch.advance()) == ([], 0, [])
