"""Tests of consecutive failed batches. The engine fails if it then cannot generate the probe image."""

import pytest

from app import errors
from app.engine.engine import EngineState
from app.engine.interface import OutOfMemoryError, RunnerError
from app.engine.step_loop import MAX_FAILED_BATCHES
from tests.app.fakes import (
    FakeRunner,
    Rows,
    backlog_of,
    images,
    new_engine,
    new_job,
    opened,
    running,
    same,
    tick,
    wait_until,
)


def fail(rows: Rows) -> None:
    raise RuntimeError("the device does not compute")


def fail_check() -> None:
    raise RunnerError("the probe image is wrong")


@pytest.mark.parametrize("fault", ["step", "memory", "nan", "pixels"])
def test_engine_fails_if_every_batch_and_the_probe_image_fail(fault: str) -> None:
    runner = FakeRunner(on_check=fail_check)
    if fault == "step":
        runner.on_step = fail
    elif fault == "memory":

        def no_memory(rows: Rows) -> None:
            raise OutOfMemoryError

        runner.on_step = no_memory
    elif fault == "nan":
        runner.not_finite = lambda row: True
    else:
        runner.on_pixels = fail
    with running(new_engine(runner)) as engine:
        engine.ready.result(60)
        jobs = [new_job(2, num_steps=1) for _ in range(MAX_FAILED_BATCHES)]
        for job in jobs:
            engine.submit(job)
            assert isinstance(job.future.exception(60), errors.InternalError)
        wait_until(lambda: engine.state is EngineState.FAILED)
        assert runner.num_checks == 1
        with pytest.raises(errors.EngineFailed):
            engine.submit(new_job())


def test_other_jobs_are_answered_when_the_engine_fails() -> None:
    runner = FakeRunner(on_step=fail, on_check=fail_check)
    engine = new_engine(runner, max_batch=1)
    runner.on_warm_up = lambda should_stop: [backlog_of(engine).add(job) for job in jobs] and None  # type: ignore[func-returns-value]
    jobs = [new_job(1) for _ in range(10)]
    with running(engine):
        found = [type(job.future.exception(60)) for job in jobs]
    assert found == [errors.InternalError] * MAX_FAILED_BATCHES + [errors.EngineFailed] * 7


def test_error_of_the_probe_image_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with running(new_engine(FakeRunner(on_step=fail, on_check=fail_check))) as engine:
        engine.ready.result(60)
        for _ in range(MAX_FAILED_BATCHES):
            job = new_job(1)
            engine.submit(job)
            job.future.exception(60)
        wait_until(lambda: engine.state is EngineState.FAILED)
    assert "the probe image is wrong" in caplog.text


def test_failing_requests_do_not_stop_the_engine_if_the_probe_image_succeeds() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    for k in range(1, 3 * MAX_FAILED_BATCHES + 1):
        runner.on_step = fail
        engine.submit(new_job(1))
        tick(engine)
        assert runner.num_checks == k // MAX_FAILED_BATCHES
    runner.on_step = lambda rows: None
    job = new_job(2)
    engine.submit(job)
    while not job.closed:
        tick(engine)
    assert same(job.future.result(0), images(job))
    assert engine.state is EngineState.OK


def test_surviving_row_resets_the_count_of_failed_batches() -> None:
    runner = FakeRunner(on_check=fail_check)
    engine = opened(new_engine(runner))
    for k in range(3 * MAX_FAILED_BATCHES):
        failing = new_job(1, seed=1)
        engine.submit(failing)
        if k % MAX_FAILED_BATCHES == 0:
            engine.submit(new_job(1, num_steps=1, seed=2))
        runner.on_step = lambda rows: fail(rows) if any(row.job.request.options.seed == 1 for row in rows) else None
        tick(engine)
        assert failing.closed
    assert runner.num_checks == 0


def test_batches_of_cancelled_jobs_are_not_failed_batches() -> None:
    runner = FakeRunner(on_check=fail_check)
    engine = opened(new_engine(runner))
    for _ in range(3 * MAX_FAILED_BATCHES):
        job = new_job(1)
        engine.submit(job)
        runner.on_step = lambda rows: engine.cancel(rows[0].job, errors.DeadlineExceeded())
        tick(engine)
    assert runner.num_checks == 0
