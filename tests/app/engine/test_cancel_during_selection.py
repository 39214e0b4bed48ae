"""Tests of jobs that another thread cancels between the selection of the rows and their step."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from app.engine.batch import Batch
from app.engine.job import StepRows
from app.errors import InternalError
from tests.app.fakes import FakeRunner, Rows, images, new_engine, new_job, opened, same


@dataclass
class RunnerWithRelease(FakeRunner):
    """The engine releases abandoned rows between the selection and the step."""

    on_release: Callable[[], None] = lambda: None

    def release(self, rows: Rows) -> None:
        self.on_release()
        super().release(rows)


@pytest.mark.parametrize("has_other", [False, True])
def test_job_that_is_cancelled_after_the_selection_takes_no_step(has_other: bool) -> None:
    runner = RunnerWithRelease()
    engine = opened(new_engine(runner))
    cancelled, other = new_job(2), new_job(1, num_steps=2)
    engine.submit(cancelled)
    if has_other:
        engine.submit(other)
    runner.on_release = lambda: engine.cancel(cancelled, InternalError())
    while engine.backlog.jobs:
        engine._tick()
    assert engine._num_failed_rows == 0
    assert all(row.job is other for rows in runner.calls for row in rows)
    if has_other:
        assert same(other.future.result(0), images(other))


def test_batch_is_read_while_no_other_thread_can_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, step_rows, is_owned = opened(new_engine(FakeRunner())), Batch.step_rows, list[bool]()

    def read(batch: Batch) -> StepRows:
        is_owned.append(engine._condition._is_owned())  # type: ignore[attr-defined]
        return step_rows(batch)

    monkeypatch.setattr(Batch, "step_rows", read)
    engine.submit(new_job(1, num_steps=2))
    while engine.backlog.jobs:
        engine._tick()
    assert is_owned == [True] * 2
