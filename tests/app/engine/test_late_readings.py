"""Tests the engine with a runner whose values are known late, as on a GPU."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.interface import DeviceLostError, OutOfMemoryError, Reading
from app.engine.job import Frame, FrameRequest, ImageDone, Job, Progress, StepRows
from tests.app.fakes import (
    FakeRunner,
    Rows,
    backlog_of,
    images,
    new_engine,
    new_job,
    new_recognised_search,
    new_recognition,
    new_search,
    opened,
    recognised_class,
    same,
)

STEPS_LATE = 2
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=150)


class LateReading:
    """Values that are known after STEPS_LATE further steps. Waiting for them finishes all steps."""

    def __init__(self, runner: "LateRunner", values: Sequence[Any]) -> None:
        self.runner, self.values, self.known_at = runner, values, runner.num_steps + STEPS_LATE

    def is_ready(self) -> bool:
        return self.runner.num_steps >= self.known_at

    def wait(self) -> Sequence[Any]:
        self.runner.num_waits += not self.is_ready()
        if self.runner.is_lost:
            raise DeviceLostError("the device is gone")
        return self.values


class LateRunner(FakeRunner):
    """Reports rows with NaN only in its readings."""

    num_steps = num_waits = 0
    is_lost = False

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> Rows:
        super().step(rows, before_call)
        self.num_steps += 1
        return []

    def pixels(self, trajectories: Rows) -> Reading[Sequence[Any]]:
        images_of_rows = super().pixels(trajectories).wait()
        self.num_waits -= 1  # the call above is not one of the engine
        pairs = zip(trajectories, images_of_rows, strict=True)
        return self.read([None if self.not_finite(row) else own for row, own in pairs])

    def read(self, values: list[Any]) -> Reading[Sequence[Any]]:
        return LateReading(self, values)


def random_job(choose: random.Random) -> Job:
    seed, count = choose.randrange(2**16), choose.randint(1, 5)
    kind = choose.choice(["plain", "plain", "plain", "recognition", "search", "recognised search"])
    if kind == "recognition":
        return new_recognition(seed=seed)
    if kind == "search":
        return new_search(count, choose.randint(1, 6), seed)
    if kind == "recognised search":
        return new_recognised_search(count, choose.randint(1, 6), seed)
    events: list[Progress | ImageDone] = []
    frames: list[Frame] = []
    num_steps = choose.randint(1, 9)
    return new_job(
        count,
        num_steps,
        seed,
        frames=FrameRequest(choose.randint(1, num_steps), frames.append) if choose.random() < 0.3 else None,
        num_previews=choose.randint(0, 4),
        listener=events.append,
        includes_x_t=choose.random() < 0.3,
    )


def results_are_right(job: Job) -> bool:
    results = job.future.result()
    if job.request.comparison:
        return job.request.comparison.label == recognised_class(job)
    if job.request.search:
        assert job.label == recognised_class(job)
    return same(results, images(job))


class RandomRun:
    """Random new jobs, cancellations and failing jobs, and the expected error of each job."""

    def __init__(self, seed: int) -> None:
        self.choose, self.runner = random.Random(seed), LateRunner()
        max_batch = self.choose.choice([2, 5, 64])
        self.engine = opened(new_engine(self.runner, capacity=1000, max_batch=max_batch))
        self.expected = dict[Job, type[Exception] | None]()

    def open_job(self, probability: float) -> Job | None:
        jobs = [job for job in self.expected if not job.closed]
        return self.choose.choice(jobs) if jobs and self.choose.random() < probability else None

    def submit_or_cancel(self) -> None:
        if self.choose.random() < 0.3:
            job = random_job(self.choose)
            self.engine.submit(job)
            self.expected[job] = None
        if cancelled := self.open_job(0.1):
            self.engine.cancel(cancelled, ClientGoneError())
            self.expected[cancelled] = ClientGoneError

    def tick(self) -> None:
        """Runs one iteration. The steps of one job may raise."""
        error, faulty = self.choose.choice([RuntimeError, OutOfMemoryError]), self.open_job(0.05)

        def raise_for_faulty(rows: Rows) -> None:
            if any(row.job is faulty for row in rows):
                raise error

        self.runner.on_step = raise_for_faulty
        if any(self.engine.count_images()) or self.engine._abandoned:
            self.engine.loop._tick()
        if faulty and faulty.closed and faulty.future.exception():
            self.expected[faulty] = errors.InternalError
        self.runner.on_step = lambda rows: None


@PROFILE
@given(seed=st.integers(0, 2**32))
def test_every_job_is_answered_correctly_if_values_are_late(seed: int) -> None:
    run = RandomRun(seed)
    for _ in range(60):
        run.submit_or_cancel()
        run.tick()
    while any(run.engine.count_images()) or run.engine._abandoned:
        run.engine.loop._tick()
    for job, expected in run.expected.items():
        error = job.future.exception()
        assert type(error) is (expected or type(None))
        assert error or results_are_right(job)
    backlog = backlog_of(run.engine)
    assert (backlog.waiting, backlog.running, backlog.work, backlog.num_rows, len(backlog)) == (0, 0, 0, 0, 0)
    assert not run.runner.held


def test_row_does_not_take_a_step_while_its_result_is_read() -> None:
    runner = LateRunner()
    engine = opened(new_engine(runner))
    short, long = new_job(2, num_steps=3, seed=1), new_job(1, num_steps=20, seed=2)
    engine.submit(short)
    engine.submit(long)
    for _ in range(3):
        engine.loop._tick()
    assert not short.closed
    engine.loop._tick()
    assert not short.closed
    engine.loop._tick()
    assert same(short.future.result(), images(short))
    assert [Counter(row.job for row in call)[short] for call in runner.calls] == [2, 2, 2, 0, 0]
    assert runner.num_waits == 0  # the engine has steps to run


def test_engine_waits_for_a_result_if_it_has_no_other_work() -> None:
    runner = LateRunner()
    engine = opened(new_engine(runner))
    job = new_job(1, num_steps=3)
    engine.submit(job)
    while any(engine.count_images()):
        engine.loop._tick()
    assert same(job.future.result(), images(job))
    assert (runner.num_steps, runner.num_waits) == (3, 1)


def test_row_with_nan_fails_when_its_result_is_read() -> None:
    runner = LateRunner()
    engine = opened(new_engine(runner))
    bad, good = new_job(2, num_steps=3, seed=1), new_job(1, num_steps=3, seed=2)
    runner.not_finite = lambda row: row.job is bad and row.index == 1
    for job in (bad, good):
        engine.submit(job)
    while any(engine.count_images()) or engine._abandoned:
        engine.loop._tick()
    assert isinstance(bad.future.exception(), errors.InternalError)
    assert same(good.future.result(), images(good))
    assert not runner.held


def test_nan_of_a_cancelled_job_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    runner = LateRunner()
    engine = opened(new_engine(runner))
    runner.not_finite = lambda row: True
    job = new_job(num_steps=1)
    engine.submit(job)
    engine.loop._tick()
    engine.cancel(job, ClientGoneError())
    engine.loop._tick()
    assert runner.num_waits == 1  # its result was read
    assert "Row failed" not in caplog.messages


def test_device_that_is_lost_while_a_result_is_read_fails_the_engine() -> None:
    runner = LateRunner()
    engine = opened(new_engine(runner))
    engine.submit(new_job(1, num_steps=1))
    engine.loop._tick()
    runner.is_lost = True
    with pytest.raises(DeviceLostError):
        engine.loop._tick()


def test_previews_have_the_step_at_which_they_were_read() -> None:
    events: list[Progress | ImageDone] = []
    runner = LateRunner()
    engine = opened(new_engine(runner))
    job = new_job(2, num_steps=8, num_previews=4, listener=events.append)
    engine.submit(job)
    while any(engine.count_images()):
        engine.loop._tick()
    shown = [
        (event.step, [int(image[0, 3]) for image in event.previews]) for event in events if isinstance(event, Progress)
    ]
    assert shown == [(2, [2, 2]), (4, [4, 4]), (6, [6, 6]), (8, [8, 8])]
    assert [event.index for event in events if isinstance(event, ImageDone)] == [0, 1]


def test_frames_are_complete_before_the_job_is_answered() -> None:
    frames: list[Frame] = []
    seen: list[list[tuple[int, int, int]]] = []
    engine = opened(new_engine(LateRunner(), max_batch=1))
    job = new_job(2, num_steps=4, frames=FrameRequest(3, frames.append))

    def see(_: object) -> None:
        seen.append(sorted((frame.index, frame.number, 255 - int(frame.pixels[0, 3])) for frame in frames))

    job.future.add_done_callback(see)
    engine.submit(job)
    while any(engine.count_images()):
        engine.loop._tick()
    assert seen == [[(0, 0, 2), (0, 1, 3), (1, 0, 2), (1, 1, 3)]]
