"""Tests of the engine with its thread: jobs are answered with their images, and metrics count the steps."""

import threading

import pytest

from app.api.http.requests import ClientGoneError
from app.engine.job import ImageKey, Job
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
    Gate,
    Rows,
    image,
    images,
    new_engine,
    new_job,
    opened,
    running,
    same,
    tick,
    wait_until,
)


def test_jobs_are_answered_with_their_images() -> None:
    jobs = [new_job(count, num_steps, seed) for count, num_steps, seed in [(3, 5, 1), (70, 2, 2), (1, 9, 3)]]
    runner = FakeRunner()
    with running(new_engine(runner, max_batch=8)) as engine:
        engine.ready.result(WAIT_SECONDS)
        for job in jobs:
            engine.submit(job)
        for job in jobs:
            assert same(job.future.result(WAIT_SECONDS), images(job))
        wait_until(lambda: not runner.held)
    assert max(map(len, runner.calls)) == 8


def test_single_image_joins_the_next_step_and_every_step_until_it_is_finished() -> None:
    large, single = new_job(64, num_steps=20, seed=1), new_job(1, num_steps=10, seed=2)
    runner = FakeRunner()
    engine = new_engine(runner, max_batch=64)

    def arrive(rows: Rows) -> None:
        if len(runner.calls) == 5:  # The sixth step is in progress.
            engine.submit(single)

    runner.on_step = arrive
    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        engine.submit(large)
        assert same(single.future.result(WAIT_SECONDS), images(single))
        assert same(large.future.result(WAIT_SECONDS), images(large))
    steps_with_single = [number for number, rows in enumerate(runner.calls) if any(row.job is single for row in rows)]
    assert steps_with_single == list(range(6, 16))
    assert [len(rows) for rows in runner.calls[:16]] == [64] * 16
    sample = engine._metrics.registry.get_sample_value
    assert sample("unfog_admission_wait_steps_sum") == 1  # the step in progress when `single` was submitted
    assert sample("unfog_admission_wait_steps_count") == 65


def test_rows_cancelled_during_a_step_are_released() -> None:
    gate = Gate()
    runner = FakeRunner(on_step=gate)
    with running(new_engine(runner)) as engine:
        engine.ready.result(WAIT_SECONDS)
        leaving, staying = new_job(3, num_steps=50, seed=1), new_job(1, num_steps=4, seed=2)
        engine.submit(leaving)
        assert gate.entered.wait(WAIT_SECONDS)
        engine.submit(staying)
        engine.cancel(leaving, ClientGoneError())
        gate.released.set()
        assert same(staying.future.result(WAIT_SECONDS), images(staying))
        wait_until(lambda: not runner.held)
    assert sum(any(row.job is leaving for row in rows) for rows in runner.calls) == 1


def test_rows_of_a_cancelled_job_are_released_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, released = FakeRunner(), Rows()
    engine = opened(new_engine(runner))
    leaving, staying = new_job(2, num_steps=9, seed=1), new_job(num_steps=9, seed=2)
    for job in (leaving, staying):
        engine.submit(job)
    tick(engine)
    engine.cancel(leaving, ClientGoneError())
    monkeypatch.setattr(runner, "release", released.extend)
    for _ in range(3):
        tick(engine)
    assert [row.index for row in released] == [0, 1]


def test_cancel_of_an_answered_job_does_not_wait_for_the_engine() -> None:
    engine = opened(new_engine(FakeRunner()))
    job = new_job(num_steps=1)
    engine.submit(job)
    while not job.closed:
        tick(engine)
    cancelling = threading.Thread(target=engine.cancel, args=(job, ClientGoneError()), daemon=True)
    with engine._condition:
        cancelling.start()
        cancelling.join(WAIT_SECONDS)
        assert not cancelling.is_alive()
    assert same(job.future.result(), images(job))


def test_metrics_count_every_step() -> None:
    engine = opened(new_engine(FakeRunner(), max_batch=2))
    job: Job = new_job(3, num_steps=2)
    engine.submit(job)
    while not job.closed:
        tick(engine)
    sample = engine._metrics.registry.get_sample_value
    assert sample("unfog_denoise_steps_total") == 4
    assert sample("unfog_batch_rows_sum") == 6
    assert sample("unfog_denoise_step_duration_seconds_count") == 4
    assert sample("unfog_network_seconds_total") == 4 * 0.25
    assert sample("unfog_queue_wait_seconds_count") == 3
    assert sample("unfog_images_total", {"digit": "0", "label": "0"}) == 3


def test_images_with_their_own_digits_are_answered_in_order_and_counted_by_digit() -> None:
    keys = (ImageKey(3, 7, 0), ImageKey(8, 300, 0), ImageKey(3, 9, 2))
    job, engine = new_job(3, seed=7, digit=3, images=keys), opened(new_engine(FakeRunner(), max_batch=2))
    engine.submit(job)
    while not job.closed:
        tick(engine)
    assert same(job.future.result(), [image(key.seed, key.index, 3) for key in keys])
    sample = engine._metrics.registry.get_sample_value
    assert sample("unfog_images_total", {"digit": "3", "label": "3"}) == 2
    assert sample("unfog_images_total", {"digit": "8", "label": "8"}) == 1
