"""Jobs that first search for the digit of their images, by a row that compares the classes."""

import math

import pytest

from app import errors
from app.engine.engine import Engine
from app.engine.job import ImageDone, Progress
from model.inpainting import MIN_STEPS
from tests.app.fakes import FakeRunner, backlog_of, images, new_engine, new_job, new_search, opened, same, tick

SEARCH_STEPS, NUM_STEPS = 2, 3


def run(engine: Engine) -> None:
    while any(engine.count_images()):
        tick(engine)


def test_search_runs_before_the_images_and_the_best_class_is_their_digit() -> None:
    runner = FakeRunner()
    engine, job = opened(new_engine(runner)), new_search(2, seed=6)
    engine.submit(job)
    run(engine)
    assert [[bool(row.comparison) for row in rows] for rows in runner.calls] == [
        *[[True]] * SEARCH_STEPS,
        *[[False] * 2] * NUM_STEPS,
    ]
    assert job.label == 6
    assert same(job.future.result(), images(job))  # type: ignore[arg-type]
    assert not runner.held


def test_search_ends_early_if_one_class_is_left() -> None:
    runner = FakeRunner(error_of=lambda row, label: 0.0 if label == 4 else 1000.0)
    engine, job = opened(new_engine(runner)), new_search(search_steps=20)
    engine.submit(job)
    run(engine)
    assert job.label == 4
    assert len(runner.calls) == MIN_STEPS + NUM_STEPS


def test_work_counts_the_search_and_the_images() -> None:
    engine, job = opened(new_engine(FakeRunner())), new_search(4)
    engine.submit(job)
    assert (backlog_of(engine).waiting, backlog_of(engine).work) == (4, 10 * SEARCH_STEPS + 4 * NUM_STEPS)
    tick(engine)
    assert (*engine.count_images(), backlog_of(engine).work) == (4, 0, 10 + 4 * NUM_STEPS)
    tick(engine)
    assert (*engine.count_images(), backlog_of(engine).work) == (4, 0, 4 * NUM_STEPS)
    tick(engine)
    assert (*engine.count_images(), backlog_of(engine).work) == (0, 4, 4 * (NUM_STEPS - 1))
    run(engine)
    assert (*engine.count_images(), backlog_of(engine).work) == (0, 0, 0)


def test_bound_of_the_finish_time_covers_the_search_and_the_images() -> None:
    engine, job = opened(new_engine(FakeRunner(), max_batch=4)), new_search(3)
    full = engine._admission._full(backlog_of(engine).step_kind(job))
    engine.submit(job)
    work, tail_work = 10 * SEARCH_STEPS + 3 * NUM_STEPS, 10 * SEARCH_STEPS + NUM_STEPS
    assert job.estimate
    expected = (work - tail_work) / full.rate + (SEARCH_STEPS + NUM_STEPS) * full.step_seconds
    assert job.estimate.seconds == pytest.approx(expected)


def test_images_of_a_search_hold_their_places_in_the_queue() -> None:
    engine = opened(new_engine(FakeRunner(), capacity=5))
    engine.submit(new_search(4))
    tick(engine)
    with pytest.raises(errors.Overloaded):
        engine.submit(new_job(2))
    engine.submit(new_job(1))
    run(engine)


def test_events_show_only_images() -> None:
    events: list[Progress | ImageDone] = []
    engine, job = opened(new_engine(FakeRunner())), new_search(2, num_previews=NUM_STEPS, listener=events.append)
    engine.submit(job)
    run(engine)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.step, event.of, len(event.previews)) for event in progress] == [(k, 3, 2) for k in (1, 2, 3)]
    assert len(events) == len(progress) + 2


@pytest.mark.parametrize(("ticks", "stage"), [(0, "waiting"), (1, "waiting"), (SEARCH_STEPS + 1, "running")])
def test_cancelled_job_counts_its_images_and_frees_all_rows(ticks: int, stage: str) -> None:
    runner = FakeRunner()
    engine, job = opened(new_engine(runner)), new_search(3)
    engine.submit(job)
    for _ in range(ticks):
        tick(engine)
    engine.cancel(job, errors.DeadlineExceeded())
    tick(engine)
    assert engine._metrics.cancelled.labels(stage)._value.get() == 3
    assert (*engine.count_images(), backlog_of(engine).work) == (0, 0, 0)
    assert not runner.held


def test_search_with_nan_fails_only_its_job() -> None:
    runner = FakeRunner()
    engine, faulty, healthy = opened(new_engine(runner)), new_search(seed=1), new_search(seed=2)
    runner.error_of = lambda row, label: math.nan if row.job is faulty and label == 5 else float(label != 2)
    for job in (faulty, healthy):
        engine.submit(job)
    run(engine)
    assert isinstance(faulty.future.exception(), errors.InternalError)
    assert healthy.label == 2
    assert same(healthy.future.result(), images(healthy))  # type: ignore[arg-type]


def test_generated_images_are_counted_by_the_digit_that_was_found() -> None:
    engine = opened(new_engine(FakeRunner()))
    engine.submit(new_search(2, seed=8))
    run(engine)
    assert engine._metrics.images.labels("8", "8")._value.get() == 2


def test_slots_of_unfinished_searches_are_limited() -> None:
    capacity, max_batch = 1000, 20
    engine = opened(new_engine(FakeRunner(), max_batch=max_batch, capacity=capacity))
    limit = 2 * (capacity + max_batch)
    admitted = 0
    with pytest.raises(errors.Overloaded):
        while True:
            engine.submit(new_search())
            admitted += 1
    assert admitted == limit // 10  # a search has a slot for each class
    assert backlog_of(engine).extra_slots == 9 * admitted
    run(engine)
    assert backlog_of(engine).extra_slots == 0
    engine.submit(new_search(12))
    assert backlog_of(engine).extra_slots == 0  # the images need more slots than the search


def test_extra_slots_are_freed_if_a_search_is_cancelled() -> None:
    engine, job = opened(new_engine(FakeRunner())), new_search()
    engine.submit(job)
    tick(engine)
    engine.cancel(job, errors.DeadlineExceeded())
    tick(engine)
    assert backlog_of(engine).extra_slots == 0


def test_waiting_times_of_all_images_of_a_search_are_counted() -> None:
    engine = opened(new_engine(FakeRunner()))
    engine.submit(new_search(3))
    run(engine)
    sample = engine._metrics.registry.get_sample_value
    assert sample("unfog_queue_wait_seconds_count") == sample("unfog_admission_wait_steps_count") == 3


def test_idle_engine_with_a_small_queue_admits_a_search() -> None:
    engine = opened(new_engine(FakeRunner(), max_batch=1, capacity=1))
    engine.submit(new_search())
    with pytest.raises(errors.Overloaded):
        engine.submit(new_search())
    run(engine)
    engine.submit(new_search())


def test_retry_after_considers_that_searches_free_their_slots() -> None:
    engine = opened(new_engine(FakeRunner(), max_batch=20, capacity=1000))
    with pytest.raises(errors.Overloaded):
        while True:
            engine.submit(new_search())
    full = engine._admission._full(backlog_of(engine).step_kind(new_search()))
    with pytest.raises(errors.Overloaded) as refused:
        engine.submit(new_search())
    assert refused.value.retry_after <= max(1, math.ceil(0.1 * backlog_of(engine).work / full.rate))
