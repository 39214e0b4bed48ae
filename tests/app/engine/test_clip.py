"""Tests of CLIP guidance in the scheduler: sizes of rows, kinds of steps and limits."""

import numpy as np
import pytest

from app.engine.admission import Admission
from app.engine.backlog import Backlog
from app.engine.batcher import StepLimits
from app.engine.job import ClipTarget, Job, StepKind
from app.engine.step_times import StepTimes
from model.spec import CALL_ROWS
from tests.app.fakes import new_job

CLIP_EVALUATIONS = 3


def guided_job(**fields: object) -> Job:
    clip = ClipTarget(1.0, np.zeros(4, np.float32), frozenset({1, 2}), CLIP_EVALUATIONS)
    return new_job(2, num_steps=4, guided_steps=range(2, 4), clip=clip, **fields)


def test_size_of_a_row_includes_clip_in_the_steps_in_which_it_acts() -> None:
    job = guided_job()
    row, sizes, of_network, left = job.unfinished[0], [], [], []
    for step in range(4):
        row.step = step
        sizes.append(row.evaluations)
        of_network.append(row.network_evaluations)
        left.append(row.evaluations_left)
        assert (row.clip is job.request.clip) == (step in {1, 2})
    assert of_network == [1, 1, 2, 2]
    assert sizes == [1, 1 + 3, 2 + 3, 2]
    assert left == [12, 11, 7, 2]
    assert job.evaluations_left == 24
    assert job.request.network_evaluations == 6
    assert job.request.widest_row == 5


def test_kind_of_the_steps_follows_the_jobs_of_the_backlog() -> None:
    backlog, plain, guided = Backlog(100), new_job(), guided_job(model="fast")
    assert backlog.step_kind() == StepKind((), 2, has_clip=False)
    backlog.add(plain)
    assert backlog.step_kind(guided) == StepKind(("default", "fast"), 5, has_clip=True)
    backlog.add(guided)
    assert backlog.step_kind() == StepKind(("default", "fast"), 5, has_clip=True)
    backlog.remove(plain)
    assert backlog.step_kind() == StepKind(("fast",), 5, has_clip=True)
    backlog.remove(guided)
    assert backlog.step_kind() == StepKind((), 2, has_clip=False)


def test_kind_for_the_bound_has_no_reserved_jobs() -> None:
    backlog, guided = Backlog(100), guided_job(model="fast")
    backlog.add(new_job())
    backlog.add(guided, is_reserved=True)
    assert backlog.bound_kind() == StepKind(("default",), 2, has_clip=False)
    assert backlog.step_kind() == StepKind(("default", "fast"), 5, has_clip=True)
    backlog.remove(guided)
    assert backlog.step_kind() == backlog.bound_kind()


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize(
    "curve", [{1: 1.0, 4: 2.0, 8: 3.0, 16: 4.0}, {1: 2.0, 64: 2.2, 128: 3.0}, {1: 2.0, 16: 32.0}], ids=str
)
@pytest.mark.parametrize("clip_seconds", [0.5, 12.0])
def test_no_step_within_the_limits_takes_longer_than_a_full_step(
    num_models: int, curve: dict[int, float], clip_seconds: float
) -> None:
    """Tries all numbers of network evaluations and of rows with CLIP guidance, for one model and for each of two."""
    times = StepTimes(curve, clip_seconds)
    of_clip = times.clip_evaluations
    limits = StepLimits.of(
        times, None, StepKind(("default", "fast")[:num_models], 2 + of_clip, has_clip=True), auto=True
    )
    for rows in range(limits.evaluations // (1 + of_clip) + 1):
        for network in range(max(rows, 1), limits.evaluations - rows * of_clip + 1):
            calls = -(-rows // CALL_ROWS) + (rows > 1) * (num_models - 1)  # rows of two models need separate calls
            seconds = times.of("default").seconds(network) + calls * clip_seconds + (num_models - 1) * curve[1]
            assert seconds <= limits.full.step_seconds * (1 + 1e-9), (rows, network)


def test_steps_without_clip_guidance_have_the_limits_of_a_service_without_clip() -> None:
    curve, plain = {1: 1.0, 4: 2.0, 8: 3.0, 16: 4.0}, StepKind(("default",), 2, has_clip=False)
    with_clip, without = (StepLimits.of(StepTimes(curve, s), None, plain, auto=True) for s in (12.0, 0.0))
    assert with_clip == without


@pytest.mark.parametrize("other_has_clip", [None, False, True])
def test_estimate_of_one_image_counts_the_calls_of_clip_in_its_steps(other_has_clip: bool | None) -> None:
    """Without other images, CLIP is called in two of four steps. An image of another request can need it in all."""
    admission = Admission(100, None)
    admission.open(StepTimes({1: 1.0, 64: 1.0}, clip_seconds=5.0))
    if other_has_clip is not None:
        admission.admit(guided_job() if other_has_clip else new_job(num_steps=4), 0.0)
    clip = ClipTarget(1.0, np.zeros(4, np.float32), frozenset({1, 2}), CLIP_EVALUATIONS)
    job = new_job(num_steps=4, clip=clip)
    admission.admit(job, 0.0)
    assert job.estimate
    assert job.estimate.seconds == pytest.approx(4 * 1.0 + (4 if other_has_clip else 2) * 5.0)
