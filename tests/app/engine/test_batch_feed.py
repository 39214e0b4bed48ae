"""Tests of the batches that the engine publishes for viewers."""

import pytest

from app import errors
from app.engine.batch_feed import MAX_ROWS, Batch
from app.engine.engine import Engine
from app.engine.interface import DeviceLostError
from app.engine.job import Trajectory
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
    Rows,
    backlog_of,
    new_engine,
    new_job,
    new_recognition,
    new_search,
    opened,
    running,
    tick,
)

Row = tuple[int, int, bool]  # number of the job, index of the image, and whether the row is a search


def listen(engine: Engine) -> list[Batch | errors.UnfogError]:
    """Returns a list to which the feed adds all messages."""
    messages: list[Batch | errors.UnfogError] = []
    engine.feed.receiver = messages.append
    return messages


def published(engine: Engine) -> Batch | None:
    """Runs one step of the engine and returns the batch that it publishes."""
    messages = listen(engine)
    engine.feed.is_wanted = True
    tick(engine)
    assert not messages or not engine.feed.is_wanted
    (batch,) = messages or [None]
    assert batch is None or isinstance(batch, Batch)
    return batch


def name_of(row: Trajectory) -> Row:
    return row.job.number, row.index, row.is_search


@pytest.mark.parametrize("max_batch", [1, 2, 5, 64])
def test_batch_has_the_running_rows_and_the_rows_of_the_step(max_batch: int) -> None:
    """The expected values are counted from the calls of the runner."""
    runner = FakeRunner()
    engine = opened(new_engine(runner, max_batch=max_batch))
    jobs = [new_job(3, num_steps=4, seed=1), new_search(2, seed=2), new_recognition(5, seed=3), new_job(1, seed=4)]
    for job in jobs:
        engine.submit(job)
    finished: dict[Row, int] = {}  # number of finished steps of each row that has started
    num_steps = 0
    while any(engine.count_images()):
        before = finished.copy()
        batch = published(engine)
        assert batch is not None
        called = [name_of(row) for row in runner.calls[num_steps]]
        num_steps += 1
        assert batch.step == num_steps
        assert [name_of(row) for row in batch.selected] == called
        for name in called:
            finished[name] = finished.get(name, 0) + 1
        shown = {name_of(row): step for row, step, _ in batch.rows}
        assert set(called) <= set(shown)
        assert shown == {name: before.get(name, 0) for name in (*before, *called)}
        assert batch.running == sum(not is_search for _, _, is_search in shown)
        unfinished = {name_of(row) for job in backlog_of(engine).jobs for row in job.unfinished}
        finished = {name: step for name, step in finished.items() if name in unfinished}
    assert num_steps == len(runner.calls)


def test_rows_are_in_order_of_the_jobs_and_their_number_is_limited() -> None:
    engine = opened(new_engine(FakeRunner(), max_batch=1000, capacity=1000))
    urgent = new_job(10, timeout=50.0)
    for job in (new_job(MAX_ROWS, timeout=100.0), urgent):
        engine.submit(job)
    batch = published(engine)
    assert batch is not None
    assert [row.job for row, _, _ in batch.rows[:11]] == [urgent] * 10 + [batch.rows[10][0].job]
    assert (len(batch.rows), batch.running) == (MAX_ROWS, MAX_ROWS + 10)


def test_jobs_are_numbered_in_the_order_of_admission() -> None:
    engine = opened(new_engine(FakeRunner()))
    jobs = [new_job(timeout=timeout) for timeout in (90.0, 50.0, 70.0)]
    for job in jobs:
        engine.submit(job)
    assert [job.number for job in jobs] == [1, 2, 3]


def test_nothing_is_published_unless_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(new_engine(FakeRunner()))
    messages = listen(engine)
    engine.submit(new_job(3))
    while any(engine.count_images()):
        tick(engine)
    assert messages == []


def test_one_batch_is_published_each_time_it_is_wanted() -> None:
    engine = opened(new_engine(FakeRunner()))
    messages = listen(engine)
    engine.submit(new_job(num_steps=10))
    engine.feed.is_wanted = True
    for _ in range(3):
        tick(engine)
    engine.feed.is_wanted = True
    for _ in range(3):
        tick(engine)
    assert [message.step for message in messages if isinstance(message, Batch)] == [1, 4]


def test_engine_that_becomes_idle_publishes_a_batch_without_rows() -> None:
    steps: list[int] = []

    def want(rows: Rows) -> None:
        steps.append(len(rows))
        engine.feed.is_wanted = len(steps) == 3  # The last step is in progress.

    messages: list[Batch | errors.UnfogError] = []
    with running(new_engine(FakeRunner(on_step=want))) as engine:
        engine.ready.result(WAIT_SECONDS)
        engine.feed.receiver = messages.append
        job = new_job(2, num_steps=3)
        engine.submit(job)
        job.future.result(WAIT_SECONDS)
    (batch,) = messages
    assert batch == Batch(step=3, waiting=0, running=0, rows=[], selected=())


def test_feed_ends_when_the_engine_drains_or_fails_or_gives_up() -> None:
    engine = opened(new_engine(FakeRunner()))
    messages = listen(engine)
    engine.drain()
    engine.give_up(errors.EngineFailed(1))
    assert [type(message) for message in messages] == [errors.Draining, errors.EngineFailed]

    def fail(rows: Rows) -> None:
        raise DeviceLostError

    with running(new_engine(FakeRunner(on_step=fail))) as failing:
        failing.ready.result(WAIT_SECONDS)
        messages = listen(failing)
        job = new_job()
        failing.submit(job)
        assert job.future.exception(WAIT_SECONDS) is not None
    assert [type(message) for message in messages] == [errors.EngineFailed]
