"""Tests that the loop and the callers use the state of an engine only while they hold its lock."""

import random
import threading
from collections.abc import Callable

import pytest

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.engine import Engine, EngineState
from app.engine.interface import DeviceLostError, OutOfMemoryError
from tests.app.engine.lock_guard import LockGuard
from tests.app.engine.test_threads import (
    NUM_THREADS,
    Client,
    check_clients,
    new_fast_engine,
    run_in_threads,
)
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
    Gate,
    Rows,
    backlog_of,
    new_engine,
    new_job,
    new_recognised_search,
    new_search,
    opened,
    running,
)

NUM_JOBS = 150


def test_threads_that_submit_cancel_stream_and_watch_hold_the_lock() -> None:
    engine, is_over, batches = new_fast_engine(), threading.Event(), list[object]()
    guard = LockGuard(engine)
    engine.feed.receiver = batches.append
    clients = [Client(engine, number, NUM_JOBS) for number in range(NUM_THREADS)]

    def submit() -> None:
        try:
            run_in_threads(*(client.run for client in clients))
        finally:
            is_over.set()

    def watch() -> None:
        while not is_over.is_set():
            engine.feed.is_wanted = True
            engine.publish_if_idle()
            assert sum(engine.count_images()) >= 0
            assert engine.apparent_state is EngineState.OK

    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        run_in_threads(submit, watch)
        assert engine.drain().done()
    assert guard.violations == set()
    check_clients(clients, NUM_JOBS)
    assert len(batches) > 1


@pytest.mark.parametrize("seed", range(4))
def test_engine_holds_the_lock_while_rows_fail(seed: int) -> None:
    choose, runner = random.Random(seed), FakeRunner()
    engine = opened(new_engine(runner, max_batch=8))
    guard = LockGuard(engine)

    def fail(rows: Rows) -> None:
        if choose.random() < 0.05:
            raise choose.choice([RuntimeError, OutOfMemoryError])

    runner.on_step = runner.on_pixels = runner.on_errors = fail
    runner.not_finite = lambda row: choose.random() < 0.01
    jobs = [
        choose.choice([new_job, new_search, new_recognised_search])(
            choose.randint(1, 4), choose.randint(1, 6), is_background=choose.random() < 0.3
        )
        for _ in range(30)
    ]
    for job in jobs:
        engine.submit(job)
        engine.loop._tick()
    while not all(job.closed for job in jobs):
        engine.loop._tick()
    assert guard.violations == set()
    assert {type(job.future.exception(0)) for job in jobs} == {errors.InternalError, type(None)}


@pytest.mark.parametrize("error", [None, DeviceLostError("gone")])
def test_engine_holds_the_lock_when_it_ends(error: Exception | None) -> None:
    gate = Gate()

    def wait(rows: Rows) -> None:
        gate(rows)
        if error:
            raise error

    engine = new_engine(FakeRunner(on_step=wait), max_batch=2)
    guard, jobs = LockGuard(engine), [new_job(3) for _ in range(3)]
    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        for job in jobs:
            engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        engine.cancel(jobs[0], ClientGoneError())
        drained = engine.drain()
        with pytest.raises(errors.Draining):
            engine.submit(new_job())
        if not error:
            engine.give_up(errors.Draining(1))
        gate.released.set()
        drained.result(WAIT_SECONDS)
    assert guard.violations == set()
    kinds = [type(job.future.exception(0)) for job in jobs]
    assert kinds == [ClientGoneError, *[errors.EngineFailed if error else errors.Draining] * 2]


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda engine: backlog_of(engine), "EngineWithLoop._backlog"),
        (lambda engine: engine._admission.max_batch, "Admission._limits"),
        (lambda engine: backlog_of(engine).waiting, "Backlog.waiting"),
        (lambda engine: backlog_of(engine).batch.rows, "Batch.rows"),
        (lambda engine: list(backlog_of(engine).with_previews), "with_previews"),
        (lambda engine: engine._abandoned.clear(), "EngineWithLoop._abandoned"),
        (lambda engine: setattr(engine, "_state", EngineState.OK), "EngineWithLoop._state"),
    ],
)
def test_use_without_the_lock_is_found(use: Callable[[Engine], object], name: str) -> None:
    engine = opened(new_engine(FakeRunner()))
    guard = LockGuard(engine)
    engine.submit(new_job())
    with engine._condition:
        use(engine)
    assert guard.violations == set()
    use(engine)
    assert name in guard.violations


def test_iteration_that_continues_without_the_lock_is_found() -> None:
    engine = opened(new_engine(FakeRunner()))
    guard = LockGuard(engine)
    for _ in range(2):
        engine.submit(new_job())
    with engine._condition:
        jobs = iter(backlog_of(engine).jobs)
        next(jobs)
    assert guard.violations == set()
    next(jobs)
    assert guard.violations == {"jobs"}
