"""Tests of the previews that a job sends before its images are finished."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from app.engine.engine import Engine
from app.engine.job import ImageDone, Job, Progress
from tests.app.fakes import FakeRunner, image, images, new_engine, new_job, new_search, opened, same, tick


@pytest.mark.parametrize(("count", "max_batch", "num_previews"), [(1, 8, 5), (3, 8, 4), (3, 2, 10), (4, 1, 3)])
def test_previews_precede_the_last_image(count: int, max_batch: int, num_previews: int) -> None:
    events: list[Progress | ImageDone] = []
    job = new_job(count, num_steps=20, seed=5, num_previews=num_previews, listener=events.append)
    engine = opened(new_engine(FakeRunner(), max_batch=max_batch))
    engine.submit(job)
    while not job.closed:
        tick(engine)
    progress = [event for event in events if isinstance(event, Progress)]
    assert len(progress) == num_previews
    assert [event.step for event in progress] == sorted(event.step for event in progress)
    assert (progress[-1].step, progress[-1].of) == (20, 20)
    assert same(progress[-1].previews, images(job))
    assert all(len(event.previews) == count for event in progress)
    assert events.index(progress[-1]) < min(
        i for i, e in enumerate(events) if isinstance(e, ImageDone) and e.index == count - 1
    )
    assert sorted(event.index for event in events if isinstance(event, ImageDone)) == list(range(count))


def test_preview_has_the_current_step_of_each_image() -> None:
    events: list[Progress | ImageDone] = []
    job = new_job(2, num_steps=4, seed=5, num_previews=2, listener=events.append)
    engine = opened(new_engine(FakeRunner(), max_batch=1))
    engine.submit(job)
    for _ in range(4):
        tick(engine)
    first = events[0]
    assert isinstance(first, Progress)
    assert (first.step, first.of) == (2, 4)
    assert same(first.previews, [image(5, 0, 4), image(5, 1, 0)])


def progress_of(job: Job, events: list[Progress | ImageDone], runner: FakeRunner, **options: Any) -> list[Progress]:
    """Runs the job and returns its Progress events."""
    engine = opened(new_engine(runner, **options))
    engine.submit(job)
    while not job.closed:
        tick(engine)
    return [event for event in events if isinstance(event, Progress)]


def test_x_t_has_the_current_step_of_each_image_and_the_result_of_finished_images() -> None:
    """The fake runner inverts its image for x_t."""
    events: list[Progress | ImageDone] = []
    job = new_job(2, num_steps=2, seed=5, num_previews=4, listener=events.append, includes_x_t=True)
    progress = progress_of(job, events, FakeRunner(), max_batch=1)
    expected = [
        [255 - image(5, 0, 1), 255 - image(5, 1, 0)],
        [255 - image(5, 0, 2), 255 - image(5, 1, 0)],
        [image(5, 0, 2), 255 - image(5, 1, 1)],
        [image(5, 0, 2), 255 - image(5, 1, 2)],
    ]
    assert [event.step for event in progress] == [0, 1, 1, 2]
    for event, x_t in zip(progress, expected, strict=True):
        assert event.x_t is not None
        assert same(event.x_t, x_t)
    assert same(progress[-1].previews, images(job))


def test_x_t_of_a_request_without_it_is_not_read() -> None:
    def fail(rows: object) -> Any:
        raise AssertionError

    events: list[Progress | ImageDone] = []
    runner = FakeRunner()
    runner.pixels_with_x_t = fail  # type: ignore[method-assign]
    job = new_job(2, num_steps=2, num_previews=2, listener=events.append)
    assert [event.x_t for event in progress_of(job, events, runner)] == [None, None]


def test_search_for_the_digit_sends_no_progress_with_x_t() -> None:
    events: list[Progress | ImageDone] = []
    job = new_search(num_steps=2, seed=3, num_previews=100, listener=events.append, includes_x_t=True)
    progress = progress_of(job, events, FakeRunner())
    assert [(event.step, len(event.x_t or [])) for event in progress] == [(1, 1), (2, 1)]


def test_failed_row_of_a_read_of_x_t_fails_only_its_job() -> None:
    def fail(rows: list[Any]) -> None:
        if any(row.job.request.options.seed == 1 for row in rows):
            raise ValueError

    events: list[Progress | ImageDone] = []
    bad = new_job(seed=1, num_previews=3, listener=events.append, includes_x_t=True)
    good = new_job(seed=2, num_previews=3, listener=events.append, includes_x_t=True)
    engine = opened(new_engine(FakeRunner(on_pixels=fail)))
    engine.submit(bad)
    engine.submit(good)
    while not (bad.closed and good.closed):
        tick(engine)
    assert bad.future.exception() is not None
    assert same(good.future.result(), images(good))


def finish(engine: Engine, job: Job) -> None:
    while not job.closed:
        tick(engine)


def cancel(engine: Engine, job: Job) -> None:
    tick(engine)
    engine.cancel(job, ValueError())


@pytest.mark.parametrize("end", [finish, cancel])
def test_engine_keeps_no_ended_job_with_previews(end: Callable[[Engine, Job], None]) -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    job = new_job(2, num_steps=4, num_previews=4, listener=lambda event: None)
    engine.submit(job)
    end(engine, job)
    ended = weakref.ref(job)
    del job
    tick(engine)
    runner.calls.clear()
    gc.collect()
    assert ended() is None
