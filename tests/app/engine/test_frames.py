"""Tests of the frames that show how each image of a job emerges. The fake runner inverts its image for x_t."""

import gc
import random
import weakref
from typing import Any

import pytest

from app import errors
from app.engine.job import Frame, FrameRequest, ImageDone, Job, Progress
from tests.app.fakes import (
    FakeRunner,
    Rows,
    backlog_of,
    image,
    images,
    new_engine,
    new_job,
    new_search,
    opened,
    same,
    tick,
)

Frames = dict[tuple[int, int], list[int]]  # (index, number) -> pixels of the only line


def by_place(frames: list[Frame]) -> Frames:
    places = [(frame.index, frame.number) for frame in frames]
    assert len(set(places)) == len(places)
    return dict(zip(places, [frame.pixels[0].tolist() for frame in frames], strict=True))


def expected(count: int, steps: list[int], seed: int = 5) -> Frames:
    """Returns the frames of images that have one frame after each of these steps."""
    return {
        (index, number): (255 - image(seed, index, step))[0].tolist()
        for index in range(count)
        for number, step in enumerate(steps)
    }


def frames_of(
    max_batch: int, others: list[Job] | None = None, runner: FakeRunner | None = None, **fields: Any
) -> tuple[list[Frame], Job]:
    """Runs a job together with others. Returns its frames and the job."""
    frames: list[Frame] = []
    request = FrameRequest(fields.pop("num_frames"), frames.append)
    job = new_job(**{"seed": 5, "frames": request, **fields})
    engine = opened(new_engine(runner or FakeRunner(), max_batch=max_batch))
    for each in (others or [])[::2]:
        engine.submit(each)
    engine.submit(job)
    for each in (others or [])[1::2]:
        engine.submit(each)
    while not job.closed:
        tick(engine)
    return frames, job


@pytest.mark.parametrize("max_batch", [1, 2, 3, 64])
def test_frames_follow_the_steps_of_their_own_image_at_any_batch_size(max_batch: int) -> None:
    frames, job = frames_of(max_batch, count=5, num_steps=20, num_frames=5)
    assert by_place(frames) == expected(5, [4, 8, 12, 16])
    assert same(job.future.result(), images(job))  # type: ignore[arg-type]


def test_frames_do_not_depend_on_the_load() -> None:
    choose = random.Random(1)
    others = [new_job(choose.randint(1, 4), choose.randint(1, 9), seed) for seed in range(20)]
    alone, _ = frames_of(64, count=4, num_steps=9, num_frames=4)
    loaded, _ = frames_of(3, others, count=4, num_steps=9, num_frames=4)
    assert by_place(loaded) == by_place(alone) == expected(4, [3, 5, 7])


def test_frames_equal_x_t_of_the_progress_events_if_all_images_run_together() -> None:
    events: list[Progress | ImageDone] = []
    fields: dict[str, Any] = {"count": 3, "num_steps": 10, "num_previews": 4, "includes_x_t": True}
    frames, _ = frames_of(64, num_frames=4, listener=events.append, **fields)
    progress = [event.x_t for event in events if isinstance(event, Progress)]
    for number, x_t in enumerate(progress[:-1]):
        assert x_t
        assert same([frame.pixels for frame in frames if frame.number == number], x_t)
    assert len(frames) == 3 * (len(progress) - 1)


def test_job_with_one_frame_reads_no_x_t() -> None:
    def fail(rows: object) -> Any:
        raise AssertionError

    runner = FakeRunner()
    runner.pixels_with_x_t = fail  # type: ignore[method-assign]
    frames, job = frames_of(64, runner=runner, count=2, num_steps=5, num_frames=1)
    assert frames == []
    assert same(job.future.result(), images(job))  # type: ignore[arg-type]


def test_search_for_the_digit_has_no_frames() -> None:
    frames: list[Frame] = []
    # The pixels of the search differ from those of the images.
    job = new_search(2, num_steps=3, seed=3, search_seed=4, search_steps=4, frames=FrameRequest(3, frames.append))
    engine = opened(new_engine(FakeRunner()))
    engine.submit(job)
    while not job.closed:
        tick(engine)
    assert by_place(frames) == expected(2, [1, 2], seed=3)


def test_failed_read_of_a_frame_fails_only_its_job() -> None:
    def fail(rows: Rows) -> None:
        if any(row.job.request.options.seed == 1 for row in rows):
            raise ValueError

    frames: list[Frame] = []
    bad, good = (new_job(2, seed=seed, frames=FrameRequest(3, frames.append)) for seed in (1, 2))
    engine = opened(new_engine(FakeRunner(on_pixels=fail)))
    engine.submit(bad)
    engine.submit(good)
    while not (bad.closed and good.closed):
        tick(engine)
    assert isinstance(bad.future.exception(), errors.InternalError)
    assert same(good.future.result(), images(good))  # type: ignore[arg-type]
    assert by_place(frames) == expected(2, [1, 2], seed=2)


def test_cancelled_job_gets_no_further_frames_and_is_freed() -> None:
    frames: list[Frame] = []
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    job = new_job(2, num_steps=4, frames=FrameRequest(4, frames.append))
    engine.submit(job)
    tick(engine)
    engine.cancel(job, ValueError())
    ended = weakref.ref(job)
    del job
    tick(engine)
    runner.calls.clear()
    gc.collect()
    assert len(frames) == 2
    assert ended() is None
    assert backlog_of(engine).with_previews == {}


def test_job_that_ends_during_the_read_of_its_frames_gets_none_of_them() -> None:
    """Other threads may read the frames of a job as soon as its future is done."""
    ending, other = list[Frame](), list[Frame]()
    job = new_job(2, num_steps=4, seed=1, frames=FrameRequest(4, ending.append))
    engine = opened(new_engine(FakeRunner(on_pixels=lambda rows: engine.cancel(job, ValueError()))))
    engine.submit(job)
    engine.submit(new_job(num_steps=4, seed=2, frames=FrameRequest(4, other.append)))
    tick(engine)
    assert ending == []
    assert by_place(other) == expected(1, [1], seed=2)


def test_frames_of_several_jobs_are_read_together() -> None:
    reads = []
    runner = FakeRunner()
    read = runner.pixels_with_x_t

    def count(rows: Rows) -> Any:
        reads.append(len(rows))
        return read(rows)

    runner.pixels_with_x_t = count  # type: ignore[method-assign]
    frames: dict[int, list[Frame]] = {6: [], 7: []}
    others = [new_job(seed=seed, frames=FrameRequest(3, own.append)) for seed, own in frames.items()]
    of_job, _ = frames_of(64, others, runner, count=2, num_steps=3, num_frames=3)
    assert reads == [4, 4]
    assert by_place(of_job) == expected(2, [1, 2])
    for seed, own in frames.items():
        assert by_place(own) == expected(1, [1, 2], seed)
