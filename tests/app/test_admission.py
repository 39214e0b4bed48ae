import logging

import pytest

from app import errors
from app.admission import Admission
from app.pace import Pace
from app.trajectory import Job
from tests.app.fakes import new_job

PACE = Pace({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})  # 8 evaluations take three times as long as one


def opened(capacity: int = 1024, max_batch: int | None = None) -> Admission:
    admission = Admission(capacity, max_batch)
    admission.open(PACE.copy())
    return admission


def admitted(admission: Admission, *jobs: Job) -> list[Job]:
    for job in jobs:
        admission.admit(job)
    return list(jobs)


def test_a_job_is_told_its_place_and_how_long_it_will_take() -> None:
    admission = opened()
    first, second = admitted(admission, new_job(16, num_steps=10), new_job(1, num_steps=10))
    assert (first.position, first.eta_seconds) == (0, 10 * 5.0)
    assert (second.position, second.eta_seconds) == (16, 10 * 3.0)  # in small steps, for its sake


@pytest.mark.parametrize("guided", [False, True])
def test_beside_a_small_request_a_step_has_as_many_evaluations_guided_or_not(guided: bool) -> None:
    admission, steps = opened(), range(10 if guided else 0)
    admitted(admission, new_job(64, num_steps=10, guided_steps=steps), new_job(1, num_steps=10, guided_steps=steps))
    assert sum(row.evaluations for row in admission.select()) == 8


def test_what_cannot_be_done_before_its_deadline_is_refused_but_by_an_idle_engine() -> None:
    admission = opened()
    admitted(admission, new_job(16, num_steps=10, timeout=1))
    with pytest.raises(errors.Overloaded, match="after the request's own deadline") as refused:
        admission.admit(new_job(16, num_steps=10, timeout=60))
    assert refused.value.retry_after == 40  # of the hundred seconds that both take
    assert admission.batcher.num_jobs == 1


def test_what_does_not_fit_is_told_when_it_will() -> None:
    admission = opened(capacity=16)
    admitted(admission, new_job(16, num_steps=10))
    with pytest.raises(errors.Overloaded) as refused:
        admission.admit(new_job(1, num_steps=10))
    assert refused.value.retry_after >= 1


def test_a_lowered_batch_stays_low_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    admission = opened(max_batch=16)
    admitted(admission, new_job(64))
    with caplog.at_level(logging.WARNING):
        admission.lower_max_batch(4)
    admission.lower_max_batch(8)
    assert len(admission.select()) == admission.max_batch == 4
    assert "at most 4 rows a step" in caplog.text
