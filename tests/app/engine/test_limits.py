"""Tests of the limits of a step: memory shortages, measured step times and UNFOG_MAX_BATCH."""

import pytest

from app import errors
from app.engine.interface import OutOfMemoryError
from app.engine.step_times import StepTimes
from tests.app.fakes import FakeRunner, Rows, images, new_engine, new_job, opened, same, tick


def test_out_of_memory_halves_the_batch_once_per_step_and_loses_no_image() -> None:
    def fail_if_too_many(rows: Rows) -> None:
        if len(rows) > 3:
            raise OutOfMemoryError

    runner = FakeRunner(on_step=fail_if_too_many)
    engine = opened(new_engine(runner, max_batch=16))
    jobs = [new_job(5, num_steps=6, seed=seed) for seed in range(4)]
    for job in jobs:
        engine.submit(job)
    sizes = []
    while not all(job.closed for job in jobs):
        tick(engine)
        sizes.append(engine._admission.max_batch)
    assert all(same(job.future.result(0), images(job)) for job in jobs)
    assert sizes[:4] == [8, 4, 2, 2]
    assert set(sizes[3:]) == {2}
    assert max(map(len, runner.calls)) <= 3


def test_single_memory_shortage_halves_the_batch_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("app.engine.engine.time.monotonic", lambda: now)
    is_short = True

    def fail_if_short(rows: Rows) -> None:
        if is_short:
            raise OutOfMemoryError

    runner = FakeRunner(on_step=fail_if_short)
    engine = opened(new_engine(runner, max_batch=64))
    engine.submit(new_job(64, num_steps=10))
    tick(engine)  # Even a single row does not fit, so the job fails.
    assert engine._admission.max_batch == 32
    is_short, now = False, 60.0
    job = new_job(64, num_steps=10)
    engine.submit(job)
    tick(engine)
    assert len(runner.calls[-1]) == engine._admission.max_batch == 64


@pytest.mark.parametrize("where", ["step", "pixels"])
def test_memory_shortage_with_a_single_image_halves_the_batch_once(where: str) -> None:
    """A shortage with a single row does not show which larger batch fits, so the batch is not lowered further."""

    def fail_if_short(rows: Rows) -> None:
        raise OutOfMemoryError

    runner = FakeRunner(on_step=fail_if_short) if where == "step" else FakeRunner(on_pixels=fail_if_short)
    engine = opened(new_engine(runner, max_batch=64))
    engine.submit(new_job(1, num_steps=1))
    tick(engine)
    assert engine._admission.max_batch == 32


def test_memory_shortage_while_reading_previews_halves_the_batch_once() -> None:
    def fail_if_too_many(rows: Rows) -> None:
        if len(rows) > 8:
            raise OutOfMemoryError

    engine = opened(new_engine(FakeRunner(on_pixels=fail_if_too_many), max_batch=16))
    job = new_job(32, num_steps=1, num_previews=8, listener=lambda event: None)
    engine.submit(job)
    tick(engine)
    assert engine._admission.max_batch == 8
    while not job.closed:
        tick(engine)
    assert same(job.future.result(0), images(job))


def test_auto_steps_are_short_while_a_small_request_runs() -> None:
    step_times = StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})
    runner = FakeRunner(step_times=step_times)
    engine = opened(new_engine(runner, max_batch=None))
    assert engine._admission.max_batch == 16
    engine.submit(new_job(64, num_steps=9))
    tick(engine)
    engine.submit(new_job(1, num_steps=2))
    for _ in range(3):
        tick(engine)
    assert [len(rows) for rows in runner.calls] == [16, 8, 8, 16]


@pytest.mark.parametrize("started", [False, True])
def test_engine_serves_new_jobs_after_the_only_job_was_cancelled(started: bool) -> None:
    engine = opened(new_engine(FakeRunner(step_times=StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})), max_batch=None))
    cancelled = new_job(4, num_steps=9)
    engine.submit(cancelled)
    if started:
        tick(engine)
    engine.cancel(cancelled, errors.DeadlineExceeded())
    tick(engine)
    job = new_job(2, num_steps=3)
    engine.submit(job)
    for _ in range(3):
        tick(engine)
    assert same(job.future.result(0), images(job))


def test_max_batch_of_the_settings_limits_every_step() -> None:
    runner = FakeRunner(step_times=StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0}))
    engine = opened(new_engine(runner, max_batch=3))
    engine.submit(new_job(64))
    tick(engine)
    engine.submit(new_job(1))
    tick(engine)
    assert [len(rows) for rows in runner.calls] == [3, 3]
