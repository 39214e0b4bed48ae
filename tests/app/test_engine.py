import threading
from collections.abc import Callable

import pytest

from app import errors
from app.device import DeviceLostError, OutOfMemoryError, RunnerError
from app.http import ClientGoneError
from app.pace import Pace
from app.state import EngineState
from app.trajectory import ImageDone, Job, Progress
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
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


class Gate:
    """A step that hangs until it is let go."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self, rows: Rows) -> None:
        self.entered.set()
        assert self.released.wait(WAIT_SECONDS)


def raising(error: BaseException) -> Callable[[object], None]:
    def fail(_: object) -> None:
        raise error

    return fail


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


def test_a_single_image_takes_part_in_the_next_step_and_in_every_step_until_it_is_done() -> None:
    crowd, single = new_job(64, num_steps=20, seed=1), new_job(1, num_steps=10, seed=2)
    runner = FakeRunner()
    engine = new_engine(runner, max_batch=64)

    def arrive(rows: Rows) -> None:
        if len(runner.calls) == 5:  # while the sixth step runs
            engine.submit(single)

    runner.on_step = arrive
    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        engine.submit(crowd)
        assert same(single.future.result(WAIT_SECONDS), images(single))
        assert same(crowd.future.result(WAIT_SECONDS), images(crowd))
    took_part = [number for number, rows in enumerate(runner.calls) if any(row.job is single for row in rows)]
    assert took_part == list(range(6, 16))
    assert [len(rows) for rows in runner.calls[:16]] == [64] * 16
    waits = engine._metrics.registry.get_sample_value
    assert waits("unfog_admission_wait_steps_sum") == 1  # the step that ran when it came
    assert waits("unfog_admission_wait_steps_count") == 65


@pytest.mark.parametrize("error", [DeviceLostError("gone"), KeyboardInterrupt(), MemoryError(), SystemExit(1)])
def test_the_death_of_the_engine_answers_everyone(error: BaseException) -> None:
    gate = Gate()
    runner = FakeRunner(on_step=gate)
    fatal = not isinstance(error, MemoryError)  # an ordinary exception is the row's own
    with running(new_engine(runner, max_batch=1)) as engine:
        engine.ready.result(WAIT_SECONDS)
        jobs = [new_job(2, num_steps=50, seed=seed) for seed in range(3)]
        for job in jobs:
            engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        runner.on_step = raising(error)
        gate.released.set()
        kinds = [type(job.future.exception(WAIT_SECONDS)) for job in jobs]
        if not fatal:
            assert kinds == [errors.InternalError] * 3
            return
        assert kinds == [errors.EngineFailed] * 3
        wait_until(lambda: engine.state is EngineState.FAILED)
        assert not engine.alive
        assert (engine.waiting, engine.running) == (0, 0)
        with pytest.raises(errors.EngineFailed):
            engine.submit(new_job())
        assert engine.drain().done()
        assert engine.state is EngineState.FAILED


def test_a_device_lost_while_images_are_read_answers_everyone() -> None:
    with running(new_engine(FakeRunner(on_pixels=raising(DeviceLostError("gone"))))) as engine:
        engine.ready.result(WAIT_SECONDS)
        job = new_job()
        engine.submit(job)
        assert isinstance(job.future.exception(WAIT_SECONDS), errors.EngineFailed)


@pytest.mark.parametrize("error", [RunnerError("no such file"), ZeroDivisionError()])
def test_what_stops_the_loading_is_what_ready_fails_with(error: Exception) -> None:
    with running(new_engine(FakeRunner(on_warm_up=raising(error)))) as engine:
        assert engine.ready.exception(WAIT_SECONDS) is error
        assert engine.state is EngineState.FAILED
        assert not engine.alive
        assert not engine.models
        with pytest.raises(errors.EngineFailed):
            engine.submit(new_job())


def test_nothing_is_taken_before_it_is_warm() -> None:
    engine = new_engine(FakeRunner())
    with pytest.raises(errors.Starting) as starting:
        engine.submit(new_job())
    assert starting.value.retry_after >= 1
    opened(engine).submit(new_job())


def test_stopping_ends_the_warming_up() -> None:
    warming = threading.Event()

    def warm_up(should_stop: Callable[[], bool]) -> None:
        warming.set()
        wait_until(should_stop)

    engine = new_engine(FakeRunner(on_warm_up=warm_up))
    engine.start()
    assert warming.wait(WAIT_SECONDS)
    assert engine.drain().done()
    assert engine.stop(WAIT_SECONDS)
    assert engine.state is EngineState.DRAINING
    with pytest.raises(errors.Draining):
        engine.submit(new_job())


def test_a_stuck_step_is_noticed_and_its_waiters_can_still_be_answered() -> None:
    gate = Gate()
    with running(new_engine(FakeRunner(on_step=gate), watchdog_seconds=0.01)) as engine:
        engine.ready.result(WAIT_SECONDS)
        job, error = new_job(), errors.DeadlineExceeded()
        engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        wait_until(lambda: not engine.alive)
        assert engine.state is EngineState.OK
        engine.cancel(job, error)
        assert job.future.exception(0) is error
        assert not engine.stop(0.01)
        gate.released.set()


def test_an_idle_engine_is_alive_however_long_it_idles() -> None:
    with running(new_engine(FakeRunner(), watchdog_seconds=1e-9)) as engine:
        wait_until(lambda: engine.alive)


def test_a_drain_is_over_when_the_last_job_is_answered() -> None:
    gate = Gate()
    with running(new_engine(FakeRunner(on_step=gate))) as engine:
        engine.ready.result(WAIT_SECONDS)
        job = new_job(2)
        engine.submit(job)
        assert gate.entered.wait(WAIT_SECONDS)
        idle = engine.drain()
        assert not idle.done()
        with pytest.raises(errors.Draining) as draining:
            engine.submit(new_job())
        assert draining.value.retry_after >= 1
        gate.released.set()
        idle.result(WAIT_SECONDS)
        assert same(job.future.result(0), images(job))
        assert engine.drain() is idle


def test_whoever_gives_a_drain_up_does_not_disturb_it() -> None:
    engine = opened(new_engine(FakeRunner()))
    engine.submit(new_job(num_steps=1))
    idle = engine.drain()
    assert not idle.cancel()
    tick(engine)
    assert idle.done()


def test_a_drain_is_over_when_the_last_job_leaves() -> None:
    engine, job = opened(new_engine(FakeRunner())), new_job()
    engine.submit(job)
    idle = engine.drain()
    engine.cancel(job, ClientGoneError())
    assert idle.done()


def test_giving_up_answers_all_who_wait() -> None:
    engine, error = opened(new_engine(FakeRunner(), max_batch=1)), errors.Draining(1)
    jobs = [new_job(seed=seed) for seed in range(3)]
    for job in jobs:
        engine.submit(job)
    tick(engine)
    engine.give_up(error)
    assert [job.future.exception(0) for job in jobs] == [error] * 3
    assert (engine.waiting, engine.running) == (0, 0)


def test_a_request_that_would_end_past_its_deadline_is_refused() -> None:
    engine = opened(new_engine(FakeRunner(pace=Pace({1: 1.0, 64: 1.0}))))  # a second a step
    engine.submit(new_job(num_steps=10))
    with pytest.raises(errors.Overloaded) as refused:
        engine.submit(new_job(num_steps=10, timeout=6.5))
    assert refused.value.retry_after == 4
    assert engine.waiting == 1
    job = new_job(num_steps=10, timeout=10)
    engine.submit(job)
    assert job.eta_seconds == 10


def test_the_pace_is_learned_from_evaluations_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[int] = []
    monkeypatch.setattr(Pace, "observe", lambda pace, rows, seconds: observed.append(rows))
    engine = opened(new_engine(FakeRunner()))
    engine.submit(new_job(3, num_steps=4))
    engine.submit(new_job(2, num_steps=4, guided_steps=range(1, 3)))
    for _ in range(4):
        tick(engine)
    assert observed == [5, 7, 7, 5]


def test_an_idle_engine_refuses_nobody_for_a_forecast() -> None:
    """It would refuse for ever: what corrects a wrong pace is steps."""
    engine = opened(new_engine(FakeRunner(pace=Pace({1: 1.0, 64: 1.0}))))
    job = new_job(num_steps=10, timeout=6.5)
    engine.submit(job)
    assert engine.waiting == 1


def test_a_full_queue_refuses_with_the_time_until_there_is_room() -> None:
    engine = opened(new_engine(FakeRunner(pace=Pace({1: 1.0, 64: 1.0})), capacity=4, max_batch=2))
    engine.submit(new_job(4, num_steps=10))
    tick(engine)  # two run, two wait
    with pytest.raises(errors.Overloaded) as refused:
        engine.submit(new_job(4, num_steps=10))
    assert refused.value.retry_after == 9  # then the two that wait start together


@pytest.mark.parametrize(("count", "max_batch", "num_previews"), [(1, 8, 5), (3, 8, 4), (3, 2, 10), (4, 1, 3)])
def test_previews_come_before_the_image_and_end_at_the_last_step(count: int, max_batch: int, num_previews: int) -> None:
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


def test_previews_show_each_image_as_it_is_then() -> None:
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


def test_out_of_memory_lowers_the_batch_and_nobody_loses_an_image() -> None:
    def too_many(rows: Rows) -> None:
        if len(rows) > 3:
            raise OutOfMemoryError

    runner = FakeRunner(on_step=too_many)
    engine = opened(new_engine(runner, max_batch=16))
    jobs = [new_job(5, num_steps=3, seed=seed) for seed in range(4)]
    for job in jobs:
        engine.submit(job)
    while not all(job.closed for job in jobs):
        tick(engine)
    assert all(same(job.future.result(0), images(job)) for job in jobs)
    assert engine.max_batch == 2  # 16, 8, 4, 2
    assert max(map(len, runner.calls)) <= 3


def test_out_of_memory_never_raises_the_batch() -> None:
    def too_many(rows: Rows) -> None:
        if len(rows) > 8:
            raise OutOfMemoryError

    engine = opened(new_engine(FakeRunner(on_pixels=too_many), max_batch=2))
    job = new_job(32, num_steps=1, num_previews=8, listener=lambda event: None)
    engine.submit(job)
    while not job.closed:
        tick(engine)
        assert engine.max_batch <= 2
    assert same(job.future.result(0), images(job))


def test_auto_makes_large_steps_for_many_and_small_ones_where_somebody_is_small() -> None:
    pace = Pace({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})
    runner = FakeRunner(pace=pace)
    engine = opened(new_engine(runner, max_batch=None))
    assert engine.max_batch == 16
    engine.submit(new_job(64, num_steps=9))
    tick(engine)
    engine.submit(new_job(1, num_steps=2))
    for _ in range(3):
        tick(engine)
    assert [len(rows) for rows in runner.calls] == [16, 8, 8, 16]


@pytest.mark.parametrize("started", [False, True])
def test_auto_outlives_the_last_request_that_leaves(started: bool) -> None:
    engine = opened(new_engine(FakeRunner(pace=Pace({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})), max_batch=None))
    leaver = new_job(4, num_steps=9)
    engine.submit(leaver)
    if started:
        tick(engine)
    engine.cancel(leaver, errors.DeadlineExceeded())
    tick(engine)
    job = new_job(2, num_steps=3)
    engine.submit(job)
    for _ in range(3):
        tick(engine)
    assert same(job.future.result(0), images(job))


def test_a_number_of_rows_that_was_asked_for_is_kept() -> None:
    runner = FakeRunner(pace=Pace({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0}))
    engine = opened(new_engine(runner, max_batch=3))
    engine.submit(new_job(64))
    tick(engine)
    engine.submit(new_job(1))
    tick(engine)
    assert [len(rows) for rows in runner.calls] == [3, 3]


def test_rows_that_left_during_a_step_are_forgotten() -> None:
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


def test_every_step_is_measured() -> None:
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
    assert sample("unfog_images_total", {"digit": "0"}) == 3
