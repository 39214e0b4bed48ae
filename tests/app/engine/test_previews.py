"""Tests of the previews that a job sends before its images are finished."""

import pytest

from app.engine.job import ImageDone, Progress
from tests.app.fakes import FakeRunner, image, images, new_engine, new_job, opened, same, tick


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
