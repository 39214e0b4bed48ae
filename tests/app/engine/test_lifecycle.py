"""Tests of the states of the engine: start, warm-up, drain, stop and failure."""

import threading
from collections.abc import Callable

import pytest

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.engine import EngineState
from app.engine.interface import DeviceLostError, RunnerError
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
    Gate,
    images,
    new_engine,
    new_job,
    opened,
    running,
    same,
    tick,
    wait_until,
)


def raising(error: BaseException) -> Callable[[object], None]:
    def fail(_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [DeviceLostError("gone"), KeyboardInterrupt(), MemoryError(), SystemExit(1)])
def test_all_jobs_are_answered_when_the_engine_fails(error: BaseException) -> None:
    gate = Gate()
    runner = FakeRunner(on_step=gate)
    is_fatal = not isinstance(error, MemoryError)  # An ordinary exception fails only the row.
    with running(new_engine(runner, max_batch=1)) as engine:
        engine.ready.result(WAIT_SECONDS)
        jobs = [new_job(2, num_steps=50, seed=seed) for seed in range(3)]
        for job in jobs:
            engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        runner.on_step = raising(error)
        gate.released.set()
        kinds = [type(job.future.exception(WAIT_SECONDS)) for job in jobs]
        if not is_fatal:
            assert kinds == [errors.InternalError] * 3
            return
        assert kinds == [errors.EngineFailed] * 3
        wait_until(lambda: engine.state is EngineState.FAILED)
        assert not engine.alive
        assert engine.count_images() == (0, 0)
        with pytest.raises(errors.EngineFailed):
            engine.submit(new_job())
        assert engine.drain().done()
        assert engine.state is EngineState.FAILED


def test_job_is_answered_when_the_device_is_lost_while_images_are_read() -> None:
    with running(new_engine(FakeRunner(on_pixels=raising(DeviceLostError("gone"))))) as engine:
        engine.ready.result(WAIT_SECONDS)
        job = new_job()
        engine.submit(job)
        assert isinstance(job.future.exception(WAIT_SECONDS), errors.EngineFailed)


@pytest.mark.parametrize("error", [RunnerError("no such file"), ZeroDivisionError()])
def test_ready_has_the_error_that_stopped_the_start(error: Exception) -> None:
    with running(new_engine(FakeRunner(on_warm_up=raising(error)))) as engine:
        assert engine.ready.exception(WAIT_SECONDS) is error
        assert engine.state is EngineState.FAILED
        assert not engine.alive
        assert not engine.models
        with pytest.raises(errors.EngineFailed):
            engine.submit(new_job())


def test_jobs_are_refused_before_the_engine_is_ready() -> None:
    engine = new_engine(FakeRunner())
    with pytest.raises(errors.Starting) as starting:
        engine.submit(new_job())
    assert starting.value.retry_after >= 1
    opened(engine).submit(new_job())


def test_stop_ends_warm_up() -> None:
    warm_up_started = threading.Event()

    def warm_up(should_stop: Callable[[], bool]) -> None:
        warm_up_started.set()
        wait_until(should_stop)

    engine = new_engine(FakeRunner(on_warm_up=warm_up))
    engine.loop.start()
    assert warm_up_started.wait(WAIT_SECONDS)
    assert engine.drain().done()
    assert engine.loop.stop(WAIT_SECONDS)
    assert engine.state is EngineState.DRAINING
    with pytest.raises(errors.Draining):
        engine.submit(new_job())


def test_stuck_engine_is_not_alive_and_its_jobs_can_be_answered() -> None:
    gate = Gate()
    with running(new_engine(FakeRunner(on_step=gate), watchdog_seconds=0.01)) as engine:
        engine.ready.result(WAIT_SECONDS)
        job, error = new_job(), errors.DeadlineExceeded()
        engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        wait_until(lambda: not engine.alive)
        assert engine.state is EngineState.OK
        with pytest.raises(errors.EngineFailed):  # A stuck engine would not finish a new job.
            engine.submit(new_job())
        engine.cancel(job, error)
        assert job.future.exception(0) is error
        assert not engine.loop.stop(0.01)
        gate.released.set()


def test_idle_engine_is_alive_after_the_watchdog_timeout() -> None:
    with running(new_engine(FakeRunner(), watchdog_seconds=1e-9)) as engine:
        wait_until(lambda: engine.alive)


def test_drain_completes_when_the_last_job_is_answered() -> None:
    gate = Gate()
    with running(new_engine(FakeRunner(on_step=gate))) as engine:
        engine.ready.result(WAIT_SECONDS)
        job = new_job(2)
        engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        drained = engine.drain()
        assert not drained.done()
        with pytest.raises(errors.Draining) as draining:
            engine.submit(new_job())
        assert draining.value.retry_after >= 1
        gate.released.set()
        drained.result(WAIT_SECONDS)
        assert same(job.future.result(0), images(job))
        assert engine.drain() is drained


def test_caller_cannot_cancel_a_drain() -> None:
    engine = opened(new_engine(FakeRunner()))
    engine.submit(new_job(num_steps=1))
    drained = engine.drain()
    assert not drained.cancel()
    tick(engine)
    assert drained.done()


def test_drain_completes_when_the_last_job_is_cancelled() -> None:
    engine, job = opened(new_engine(FakeRunner())), new_job()
    engine.submit(job)
    drained = engine.drain()
    engine.cancel(job, ClientGoneError())
    assert drained.done()


def test_give_up_answers_all_jobs() -> None:
    engine, error = opened(new_engine(FakeRunner(), max_batch=1)), errors.Draining(1)
    jobs = [new_job(seed=seed) for seed in range(3)]
    for job in jobs:
        engine.submit(job)
    tick(engine)
    engine.give_up(error)
    assert [job.future.exception(0) for job in jobs] == [error] * 3
    assert engine.count_images() == (0, 0)
