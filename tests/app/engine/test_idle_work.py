"""Tests of the work that the runner does while no rows take steps."""

import threading
from dataclasses import dataclass, field

import pytest

from app.engine import step_loop
from tests.app.fakes import FakeRunner, Gate, images, new_engine, new_job, opened, running, same, wait_until


@dataclass
class RunnerWithIdleWork(FakeRunner):
    pieces: int = 3
    done: list[int] = field(default_factory=list)
    all_done: threading.Event = field(default_factory=threading.Event)

    has_idle_work: bool = True

    def idle(self) -> None:
        self.done.append(len(self.calls))
        if len(self.done) == self.pieces:
            self.has_idle_work = False
            self.all_done.set()


def test_idle_engine_does_all_work_that_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "IDLE_SECONDS", 0.0)
    runner = RunnerWithIdleWork()
    with running(new_engine(runner)) as engine:
        engine.ready.result()
        assert runner.all_done.wait(60)
        job = new_job(2)
        engine.submit(job)
        assert same(job.future.result(60), images(job))
    assert len(runner.done) == 3


def test_steps_come_before_work_that_can_wait() -> None:
    runner = RunnerWithIdleWork()
    engine = opened(new_engine(runner))
    job = new_job(1, num_steps=4)
    engine.submit(job)
    while any(engine.count_images()):
        engine.loop._tick()
    assert runner.done == []


def test_engine_stops_while_there_is_work_that_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "IDLE_SECONDS", 0.0)
    runner = RunnerWithIdleWork(pieces=10**9)
    with running(new_engine(runner)) as engine:
        engine.ready.result()
    assert not any(engine.count_images())


def test_engine_that_hangs_in_idle_work_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "IDLE_SECONDS", 0.0)
    gate = Gate()

    class HangingRunner(RunnerWithIdleWork):
        def idle(self) -> None:
            gate([])
            self.has_idle_work = False

    with running(new_engine(HangingRunner(), watchdog_seconds=0.01)) as engine:
        assert gate.entered.wait(60)
        wait_until(lambda: not engine.alive)
        gate.released.set()
        wait_until(lambda: engine.alive)
