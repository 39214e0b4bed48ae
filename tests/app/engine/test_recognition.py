"""Jobs that recognise an image. A row takes several evaluations per step, and their number falls."""

import math

import pytest

from app import errors
from app.engine.batcher import StepLimits, select_rows
from app.engine.job import Job, StepKind
from app.engine.step_times import StepTimes
from tests.app.fakes import (
    FakeRunner,
    Rows,
    backlog_of,
    fixed_limits,
    images,
    new_engine,
    new_job,
    new_recognition,
    opened,
    recognised_class,
    same,
    tick,
)

MOST = 20 * 10  # evaluations of a recognition with 20 pairs and 10 classes


def run(job: Job, runner: FakeRunner, **options: int) -> list[int]:
    """Runs a job alone. Returns the number of evaluations of each step."""
    engine = opened(new_engine(runner, **options))
    engine.submit(job)
    evaluations: list[int] = []
    runner.on_step = lambda rows: evaluations.append(sum(row.evaluations for row in rows))
    while any(engine.count_images()):
        tick(engine)
    return evaluations


def test_classes_are_dropped_and_the_best_one_is_the_answer() -> None:
    job, runner = new_recognition(20, seed=4), FakeRunner()
    evaluations = run(job, runner)
    (result,) = job.future.result()
    assert result.label == recognised_class(job) == 4
    # A distance of 3 instead of 1 lowers the log-odds by 2 for each pair. After four pairs, the margin 6 is exceeded.
    assert evaluations == [10] * 4 + [1] * 6
    assert result.evaluations == sum(evaluations) < MOST
    assert not runner.held


def test_no_class_is_dropped_while_all_are_similar() -> None:
    job, runner = new_recognition(20), FakeRunner(error_of=lambda row, label: 1.0 + 0.001 * label)
    assert run(job, runner) == [10] * 20


def test_admission_counts_one_image_and_the_largest_number_of_evaluations() -> None:
    engine = opened(new_engine(FakeRunner(), capacity=2))
    engine.submit(new_recognition(20))
    assert (backlog_of(engine).waiting, backlog_of(engine).work) == (1, MOST)
    engine.submit(new_recognition(20))
    with pytest.raises(errors.Overloaded):
        engine.submit(new_recognition(20))


def test_work_shrinks_when_classes_are_dropped() -> None:
    engine, job = opened(new_engine(FakeRunner())), new_recognition(20)
    engine.submit(job)
    for steps in range(1, 4):
        tick(engine)
        assert backlog_of(engine).work == MOST - 10 * steps
    tick(engine)
    assert backlog_of(engine).work == 16  # one class is left for the other 16 pairs


def test_recognition_and_generation_share_steps() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    drawn, recognised = new_job(2, num_steps=12), new_recognition(20, seed=7)
    engine.submit(drawn)
    engine.submit(recognised)
    while any(engine.count_images()):
        tick(engine)
    assert {len(rows) for rows in runner.calls[:4]} == {3}
    assert same(drawn.future.result(), images(drawn))  # type: ignore[arg-type]
    (result,) = recognised.future.result()
    assert result.label == 7


def test_recognition_runs_if_a_step_has_one_row_at_most() -> None:
    job = new_recognition(20, seed=3)
    assert run(job, FakeRunner(), max_batch=1)[0] == 10
    assert job.future.result()[0].label == 3


@pytest.mark.parametrize("full", [4, 8, 16, 32])
@pytest.mark.parametrize("count", [1, 64])
def test_recognition_joins_the_next_step_of_a_running_job(full: int, count: int) -> None:
    times = StepTimes({1: 1.0, full: 1.1, 2 * full: 1e3})
    limits = StepLimits.of(times, None, StepKind(("default",), 10, has_clip=False), auto=True)
    running, recognised = new_job(count, num_steps=100), new_recognition(20)
    rows = select_rows([running, recognised], limits, at_risk=False)
    assert recognised.unfinished[0] in rows
    assert running.unfinished[0] in rows
    assert sum(row.evaluations for row in rows) <= limits.evaluations


@pytest.mark.parametrize("widest_row", [2, 10])
def test_full_step_has_room_for_the_widest_row(widest_row: int) -> None:
    times = StepTimes({1: 1.0, 2: 1.1, 4: 4.0})
    limits = StepLimits.of(times, None, StepKind(("default",), widest_row, has_clip=False), auto=True)
    assert limits.evaluations == (12 if widest_row == 10 else 2)
    assert limits.full.step_seconds == times.of("default").seconds(limits.evaluations)
    assert fixed_limits(4).evaluations == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_errors_that_are_not_finite_fail_only_their_job(value: float) -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    healthy, faulty = new_recognition(20, seed=1), new_recognition(20, seed=2)
    runner.error_of = lambda row, label: value if row.job is faulty and label == 9 else 1.0 + (label != 1)
    for job in (healthy, faulty):
        engine.submit(job)
    while any(engine.count_images()):
        tick(engine)
    assert isinstance(faulty.future.exception(), errors.InternalError)
    assert healthy.future.result()[0].label == 1
    assert not runner.held


def test_read_of_errors_that_fails_for_one_row_fails_only_its_job() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    jobs = [new_recognition(20, seed=seed) for seed in range(4)]

    def raise_for_guilty(rows: Rows) -> None:
        if any(row.job is jobs[2] for row in rows):
            raise RuntimeError

    runner.on_errors = raise_for_guilty
    for job in jobs:
        engine.submit(job)
    while any(engine.count_images()):
        tick(engine)
    assert [job.future.exception() is None for job in jobs] == [True, True, False, True]


def test_cancelled_recognition_frees_its_row_at_the_next_step() -> None:
    runner = FakeRunner()
    engine, job = opened(new_engine(runner)), new_recognition(20)
    engine.submit(job)
    tick(engine)
    engine.cancel(job, errors.DeadlineExceeded())
    tick(engine)
    assert not runner.held
    assert (backlog_of(engine).running, backlog_of(engine).work) == (0, 0)
