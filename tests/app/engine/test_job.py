import math

import pytest

from app.engine.job import FrameRequest, ImageDone, ImageKey, Job, Progress
from tests.app.fakes import image, images, new_job, same


def test_job_is_answered_with_its_images_in_order() -> None:
    job = new_job(3, num_steps=4, seed=7)
    for index in (2, 0, 1):
        assert not job.closed
        trajectory = next(t for t in job.unfinished if t.index == index)
        job.finish(trajectory, image(7, index, 4))
    assert job.closed
    assert job.unfinished == []
    assert same(job.future.result(), images(job))


def test_second_error_does_not_replace_the_first() -> None:
    job, first = new_job(), ValueError("first")
    job.fail(first)
    job.fail(ValueError("second"))
    assert job.future.exception() is first


def test_finished_job_cannot_fail() -> None:
    job = new_job()
    job.finish(job.unfinished[0], image(0, 0, 3))
    job.fail(ValueError())
    assert job.future.exception() is None


def test_caller_cannot_cancel_the_future() -> None:
    assert new_job().future.cancel() is False


def test_target_of_a_job_without_a_timeout_is_infinite() -> None:
    assert new_job().target == math.inf


def test_listener_receives_each_finished_image() -> None:
    events: list[Progress | ImageDone] = []
    job = new_job(2, listener=events.append)
    second = job.unfinished[1]
    job.finish(second, image(0, 1, 3))
    assert [event.index for event in events if isinstance(event, ImageDone)] == [1]
    assert not job.closed


def test_steps_left_is_the_number_of_unfinished_steps() -> None:
    trajectory = new_job(num_steps=5).unfinished[0]
    trajectory.step += 2
    assert trajectory.steps_left == 3


def set_steps_done(job: Job, steps_done: int) -> None:
    """Gives the images of a job this number of steps together, the first images first."""
    for row in job.unfinished:
        row.step = min(steps_done, job.request.options.num_steps)
        steps_done -= row.step


@pytest.mark.parametrize(
    ("num_frames", "num_steps", "expected"),
    [(5, 20, [4, 8, 12, 16]), (1, 3, []), (3, 3, [1, 2]), (3, 10, [4, 7]), (2, 3, [2]), (1, 1, [])],
)
def test_frames_of_an_image_are_due_after_fixed_steps_of_its_own(
    num_frames: int, num_steps: int, expected: list[int]
) -> None:
    job = new_job(2, num_steps, frames=FrameRequest(num_frames, lambda frame: None))
    first, second = job.unfinished
    due = []
    for step in range(1, num_steps + 1):
        second.step = step  # The first image waits.
        due += [(row, number, step) for row, number in job.frames_due()]
        assert job.frames_due() == []
    assert due == [(second, number, step) for number, step in enumerate(expected)]
    assert first.step == 0


def test_job_without_frames_has_no_due_frames() -> None:
    job = new_job(2, num_steps=3)
    job.unfinished[0].step = 2
    assert job.frames_due() == []


@pytest.mark.parametrize(
    ("num_previews", "count", "num_steps", "expected"),
    [
        (5, 1, 20, [4, 8, 12, 16, 20]),
        (1, 1, 3, [3]),
        (0, 1, 3, []),
        (3, 1, 3, [1, 2, 3]),
        (10, 1, 4, [1, 2, 3, 4]),
        (3, 1, 10, [4, 7, 10]),
        (2, 3, 4, [6, 12]),
    ],
)
def test_previews_are_due_at_regular_intervals(
    num_previews: int, count: int, num_steps: int, expected: list[int]
) -> None:
    job = new_job(count, num_steps, num_previews=num_previews)
    actual = []
    for steps_done in range(1, count * num_steps + 1):
        set_steps_done(job, steps_done)
        if job.preview_due():
            actual.append(job.steps_done)
        assert not job.preview_due()  # The first call has counted the preview as sent.
    assert actual == expected


def test_several_due_previews_are_sent_as_one() -> None:
    job = new_job(4, num_steps=2, num_previews=8)
    set_steps_done(job, 4)
    assert job.preview_due()
    assert not job.preview_due()


def test_progress_has_finished_and_unfinished_images_in_order() -> None:
    job = new_job(3, num_steps=10, seed=1)
    job.finish(job.unfinished[1], image(1, 1, 10))
    progress = job.progress(5, {0: image(1, 0, 4), 2: image(1, 2, 3)})
    assert (progress.step, progress.of) == (5, 10)
    assert same(progress.previews, [image(1, 0, 4), image(1, 1, 10), image(1, 2, 3)])


def test_images_of_a_job_have_its_digit_and_seed_and_their_position_as_index() -> None:
    rows = new_job(2, seed=7, digit=3).unfinished
    assert [(row.label, row.noise_key) for row in rows] == [(3, (7, 0)), (3, (7, 1))]


def test_images_with_keys_have_their_own_digit_seed_and_index() -> None:
    keys = (ImageKey(3, 7, 5), ImageKey(8, 9, 0))
    job = new_job(2, seed=7, digit=3, images=keys)
    assert [(row.label, row.noise_key) for row in job.unfinished] == [(3, (7, 5)), (8, (9, 0))]
    assert [row.index for row in job.unfinished] == [0, 1]
    first, second = job.unfinished
    job.finish(second, image(9, 0, 3))
    job.finish(first, image(7, 5, 3))
    assert same(job.future.result(), [image(7, 5, 3), image(9, 0, 3)])
