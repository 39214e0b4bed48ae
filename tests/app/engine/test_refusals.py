"""Tests of refused jobs: jobs that would miss their deadlines, and jobs that do not fit into the queue."""

import pytest

from app import errors
from app.engine.step_times import StepTimes
from tests.app.fakes import FakeRunner, new_engine, new_job, opened, tick


def test_job_that_would_finish_after_its_deadline_is_refused() -> None:
    engine = opened(new_engine(FakeRunner(step_times=StepTimes({1: 1.0, 64: 1.0}))))  # Each step takes 1 s.
    engine.submit(new_job(num_steps=10))
    with pytest.raises(errors.Overloaded) as refused:
        engine.submit(new_job(num_steps=10, timeout=6.5))
    assert refused.value.retry_after >= 1
    assert engine.count_images().waiting == 1
    job = new_job(num_steps=10, timeout=25)  # The bound is 22 s, and the target is 22.5 s.
    engine.submit(job)
    assert job.estimate.seconds == 10


def test_step_times_are_learned_per_evaluation_and_not_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[int] = []
    monkeypatch.setattr(StepTimes, "observe", lambda step_times, calls, *others: observed.extend(calls.values()))
    engine = opened(new_engine(FakeRunner()))
    engine.submit(new_job(3, num_steps=4))
    engine.submit(new_job(2, num_steps=4, guided_steps=range(1, 3)))
    for _ in range(4):
        tick(engine)
    assert observed == [5, 7, 7, 5]


def test_idle_engine_admits_every_job() -> None:
    """Only running steps correct the predicted step times."""
    engine = opened(new_engine(FakeRunner(step_times=StepTimes({1: 1.0, 64: 1.0}))))
    job = new_job(num_steps=10, timeout=6.5)
    engine.submit(job)
    assert engine.count_images().waiting == 1


def test_retry_after_of_a_full_queue_is_the_time_until_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "observe", lambda *arguments: None)  # the fake steps take almost no time
    engine = opened(new_engine(FakeRunner(step_times=StepTimes({1: 1.0, 64: 1.0})), capacity=4, max_batch=2))
    engine.submit(new_job(4, num_steps=10))
    tick(engine)  # Two images run, and two images wait.
    with pytest.raises(errors.Overloaded) as refused:
        engine.submit(new_job(4, num_steps=10))
    assert 5 <= refused.value.retry_after <= 18  # The two waiting images start after 9 s.
