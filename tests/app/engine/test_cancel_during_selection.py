"""Tests of jobs that another thread cancels shortly before or after the selection of the rows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from app.engine.batch import Batch
from app.engine.engine import Step
from app.engine.job import StepRows
from app.errors import InternalError
from tests.app.fakes import FakeRunner, Rows, backlog_of, images, new_engine, new_job, opened, same


@dataclass
class RunnerWithRelease(FakeRunner):
    """The engine releases abandoned rows before the selection."""

    on_release: Callable[[], None] = lambda: None

    def release(self, rows: Rows) -> None:
        self.on_release()
        super().release(rows)


@pytest.mark.parametrize("has_other", [False, True])
def test_job_that_is_cancelled_before_the_selection_takes_no_step(has_other: bool) -> None:
    runner = RunnerWithRelease()
    engine = opened(new_engine(runner))
    cancelled, other = new_job(2), new_job(1, num_steps=2)
    engine.submit(cancelled)
    if has_other:
        engine.submit(other)
    runner.on_release = lambda: engine.cancel(cancelled, InternalError())
    while any(engine.count_images()):
        engine.loop._tick()
    assert engine.loop._num_failed_rows == 0
    assert all(row.job is other for rows in runner.calls for row in rows)
    if has_other:
        assert same(other.future.result(0), images(other))


def test_job_that_is_cancelled_after_the_selection_takes_at_most_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, error = FakeRunner(), InternalError()
    engine = opened(new_engine(runner))
    cancelled, other = new_job(2, seed=1), new_job(1, num_steps=2)
    select = engine.select

    def select_and_cancel() -> Step | None:
        step = select()
        engine.cancel(cancelled, error)
        return step

    monkeypatch.setattr(engine, "select", select_and_cancel)
    for job in (cancelled, other):
        engine.submit(job)
    while engine._abandoned or any(engine.count_images()):
        engine.loop._tick()
    assert [Counter(row.job for row in rows) for rows in runner.calls] == [{cancelled: 2, other: 1}, {other: 1}]
    assert cancelled.future.exception(0) is error
    assert same(other.future.result(0), images(other))
    assert (engine.loop._num_failed_rows, runner.held, backlog_of(engine).work) == (0, {}, 0)


def test_batch_is_read_while_no_other_thread_can_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, step_rows, is_owned = opened(new_engine(FakeRunner())), Batch.step_rows, list[bool]()

    def read(batch: Batch) -> StepRows:
        is_owned.append(engine._condition._is_owned())  # type: ignore[attr-defined]
        return step_rows(batch)

    monkeypatch.setattr(Batch, "step_rows", read)
    engine.submit(new_job(1, num_steps=2))
    while any(engine.count_images()):
        engine.loop._tick()
    assert is_owned == [True] * 2
