"""Tests the engine with random sequences of jobs of all tasks, cancellations and failures.

After each event, the counts of the backlogs equal those of the unfinished rows, and no row of an answered job is
stepped. Background jobs have steps only if there is no interactive job. At the end every job is answered once, with its
own result, and the whole capacity is free again.
"""

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.interface import OutOfMemoryError
from app.engine.job import Job, Trajectory
from app.engine.step_times import StepTimes
from tests.app.fakes import (
    FakeRunner,
    Rows,
    backlog_of,
    images,
    new_engine,
    new_job,
    new_recognised_search,
    new_recognition,
    new_search,
    opened,
    recognised_class,
    same,
    tick,
)

CAPACITY = 24
GENERATE, SEARCH, RECOGNISED_SEARCH, RECOGNISE = "generate", "search", "search by recognition", "recognise"


def error_of(row: Trajectory, label: int) -> float:
    """Returns an error that is lowest for the last digit of the seed. For every third seed, no class is dropped."""
    if label == recognised_class(row.job):
        return 1.0
    return 1.001 + 0.001 * label if row.job.request.options.seed % 3 == 0 else 9.0


def evaluations_of(row: Trajectory) -> int:
    """Returns the largest number of evaluations that are left of a row, counted step by step."""
    request = row.job.request
    if row.comparison:
        return sum(len(row.comparison.remaining) for _ in range(row.step, row.options.num_steps))
    return sum(2 if step in request.guided_steps else 1 for step in range(row.step, row.options.num_steps))


def evaluations_left(job: Job) -> int:
    """Returns the largest number of evaluations that are left of a job."""
    request = job.request
    of_image = sum(2 if step in request.guided_steps else 1 for step in range(request.options.num_steps))
    later = request.count * of_image if job.is_searching else 0
    return later + sum(map(evaluations_of, job.unfinished))


class MixedMachine(RuleBasedStateMachine):
    max_batch: int | None = 7
    step_times = StepTimes({1: 1e-6, 1024: 1e-6})

    def __init__(self) -> None:
        super().__init__()
        self.runner = FakeRunner(step_times=self.step_times.copy(), error_of=error_of)
        self.engine = opened(new_engine(self.runner, capacity=CAPACITY, max_batch=self.max_batch))
        self.jobs: list[Job] = []
        self.answers: Counter[Job] = Counter()
        self.guilty: set[Job] = set()  # jobs that a failure may end
        self.ended: dict[Job, Exception] = {}  # jobs that were cancelled, with the error of their answer
        self.drained: Future[None] | None = None
        self.heal()

    @property
    def open(self) -> list[Job]:
        return [job for job in self.jobs if not job.closed]

    def open_of(self, *, is_background: bool) -> list[Job]:
        return [job for job in self.open if job.request.is_background == is_background]

    def heal(self) -> None:
        """Removes all failures."""
        self.runner.on_step = self.runner.on_errors = self.runner.on_pixels = self.check_rows
        self.runner.not_finite = lambda row: False
        self.runner.error_of = error_of

    def check_rows(self, rows: Rows) -> None:
        """Checks the rows of each call of the runner."""
        assert rows
        assert len(set(rows)) == len(rows)
        for row in rows:
            assert not row.job.closed
            assert row in row.job.unfinished
        if any(row.job.request.is_background for row in rows):
            assert not self.open_of(is_background=False)

    def before(self, act: Callable[[Rows], None]) -> Callable[[Rows], None]:
        def hook(rows: Rows) -> None:
            self.check_rows(rows)
            act(rows)

        return hook

    @rule(
        task=st.sampled_from([GENERATE, SEARCH, RECOGNISED_SEARCH, RECOGNISE]),
        count=st.integers(1, 5),
        num_steps=st.integers(1, 5),
        seed=st.integers(0, 99),
        num_pairs=st.integers(1, 12),
        is_guided=st.booleans(),
        timeout=st.sampled_from([math.inf, 1e6, 1e5]),
        is_background=st.booleans(),
    )
    def submit(
        self,
        task: str,
        count: int,
        num_steps: int,
        seed: int,
        num_pairs: int,
        is_guided: bool,
        timeout: float,
        is_background: bool,
    ) -> None:
        common = {"timeout": timeout, "is_background": is_background}
        fields = {"guided_steps": range(num_steps // 2) if is_guided else range(0), **common}
        if task == RECOGNISE:
            job = new_recognition(num_pairs, seed, **common)
        elif task == SEARCH:
            job = new_search(count, num_steps, seed, search_steps=num_pairs // 3 + 1, **fields)
        elif task == RECOGNISED_SEARCH:
            job = new_recognised_search(count, num_steps, seed, num_pairs, **fields)
        else:
            job = new_job(count, num_steps, seed, **fields)
        job.future.add_done_callback(lambda _: self.answers.update([job]))
        if self.drained:
            with pytest.raises(errors.Draining):
                self.engine.submit(job)
            return
        try:
            self.engine.submit(job)
        except errors.Overloaded as refused:
            assert self.open_of(is_background=is_background)
            assert refused.retry_after >= 1
        else:
            self.jobs.append(job)

    @rule(number=st.integers(1, 6))
    def step(self, number: int) -> None:
        for _ in range(number):
            tick(self.engine)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), error=st.sampled_from([ClientGoneError, errors.DeadlineExceeded]))
    def cancel(self, data: st.DataObject, error: Callable[[], Exception]) -> None:
        job = data.draw(st.sampled_from(self.open))
        self.end(job, error())

    def end(self, job: Job, error: Exception) -> None:
        if not job.closed:
            self.ended[job] = error
        self.engine.cancel(job, error)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), call=st.sampled_from(["on_step", "on_errors", "on_pixels"]))
    def cancel_during_a_call_of_the_runner(self, data: st.DataObject, call: str) -> None:
        job = data.draw(st.sampled_from(self.open))
        setattr(self.runner, call, self.before(lambda rows: self.end(job, ClientGoneError())))
        # After the job is cancelled, the rest of the batch may still contain its rows.
        tick(self.engine)
        self.heal()

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        call=st.sampled_from(["on_step", "on_errors", "on_pixels"]),
        error=st.sampled_from([RuntimeError, OutOfMemoryError]),
    )
    def fail_for_the_rows_of_a_job(self, data: st.DataObject, call: str, error: type[Exception]) -> None:
        job = data.draw(st.sampled_from(self.open))
        index = data.draw(st.integers(0, 4))

        def raise_for_guilty(rows: Rows) -> None:
            if any(row.job is job and row.index == index for row in rows):
                self.guilty.add(job)
                raise error

        setattr(self.runner, call, self.before(raise_for_guilty))
        tick(self.engine)
        self.heal()

    @precondition(lambda self: self.open)
    @rule(call=st.sampled_from(["on_step", "on_errors", "on_pixels"]), limit=st.integers(1, 5))
    def run_out_of_memory(self, call: str, limit: int) -> None:
        """No job fails, because a single row fits."""

        def raise_above_limit(rows: Rows) -> None:
            if len(rows) > limit:
                raise OutOfMemoryError

        setattr(self.runner, call, self.before(raise_above_limit))
        tick(self.engine)
        self.heal()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), value=st.sampled_from([math.nan, math.inf]), number=st.integers(0, 9))
    def compute_values_that_are_not_finite(self, data: st.DataObject, value: float, number: int) -> None:
        job = data.draw(st.sampled_from(self.open))
        self.guilty.add(job)
        if data.draw(st.booleans(), "the pixels are not finite"):
            self.runner.not_finite = lambda row: fails(row, row.index)
        else:
            self.runner.error_of = lambda row, label: value if fails(row, label) else error_of(row, label)
        has_failed = False

        def fails(row: Trajectory, place: int) -> bool:
            nonlocal has_failed
            is_guilty = row.job is job and place == number
            has_failed = has_failed or is_guilty
            return is_guilty

        tick(self.engine)
        self.heal()
        if has_failed:
            assert isinstance(job.future.exception(timeout=0), errors.InternalError)
        else:
            self.guilty.discard(job)

    @rule(often=st.integers(0, 9))
    def give_up(self, often: int) -> None:
        if not often:
            error = errors.Draining(1)
            self.ended |= dict.fromkeys(self.open, error)
            self.engine.give_up(error)

    @rule(often=st.integers(0, 9))
    def drain(self, often: int) -> None:
        if not often:
            background = self.open_of(is_background=True)
            self.drained = self.engine.drain()
            for job in background:
                error = job.future.exception(timeout=0)
                assert isinstance(error, errors.Draining)
                self.ended[job] = error

    @invariant()
    def backlogs_equal_the_unfinished_rows(self) -> None:
        for backlog in (backlog_of(self.engine), self.engine._background):
            jobs = self.open_of(is_background=backlog is self.engine._background)
            rows = [row for job in jobs for row in job.unfinished]
            assert set(backlog.jobs) == set(jobs)
            images_waiting = sum(job.request.count for job in jobs if job.is_searching)
            assert backlog.waiting == images_waiting + sum(not row.started for row in rows if not row.is_search)
            assert backlog.running == sum(row.started for row in rows if not row.is_search)
            assert backlog.work == sum(map(evaluations_left, jobs))
            assert all(job.evaluations_left == evaluations_left(job) for job in jobs)

    @invariant()
    def waiting_images_never_exceed_the_capacity(self) -> None:
        assert self.engine.count_images().waiting <= CAPACITY
        assert self.engine._background.waiting <= CAPACITY

    @invariant()
    def every_job_is_answered_once_and_with_its_own_result(self) -> None:
        for job in self.jobs:
            assert self.answers[job] == job.future.done() == job.closed
            if not job.closed:
                continue
            error = job.future.exception()
            if job in self.ended:
                assert error is self.ended[job]
            elif error:
                assert isinstance(error, errors.InternalError)
                assert job in self.guilty
            else:
                self.check_result(job)

    def check_result(self, job: Job) -> None:
        results = job.future.result()
        if job.request.comparison:
            assert [result.label for result in results] == [recognised_class(job)]  # type: ignore[union-attr]
            return
        assert same(results, images(job))  # type: ignore[arg-type]
        if job.request.search:
            assert job.label == recognised_class(job)

    @invariant()
    def no_slot_is_lost(self) -> None:
        started = {row for job in self.open for row in job.unfinished if row.started}
        abandoned = set(self.engine._abandoned)
        assert started <= self.runner.held.keys() | abandoned
        assert self.runner.held.keys() <= started | abandoned

    @invariant()
    def drain_is_complete_when_all_jobs_are_answered(self) -> None:
        assert self.drained is None or self.drained.done() is not bool(self.open)

    def teardown(self) -> None:
        """Runs all remaining jobs to their end. The whole capacity is then free."""
        for _ in range(2000):
            if not self.open:
                break
            tick(self.engine)
            self.backlogs_equal_the_unfinished_rows()
        tick(self.engine)
        assert not self.open
        self.every_job_is_answered_once_and_with_its_own_result()
        for backlog in (backlog_of(self.engine), self.engine._background):
            assert (backlog.waiting, backlog.running, backlog.work) == (0, 0, 0)
        assert not self.runner.held
        if not self.drained:
            self.engine.submit(new_job(CAPACITY))


class AutoMixedMachine(MixedMachine):
    """The step times determine the size of a step. A full step has room for one row that compares ten classes."""

    max_batch = None
    step_times = StepTimes({1: 1e-6, 4: 4e-6, 5: 4.1e-6})


for machine, max_examples in ((MixedMachine, 300), (AutoMixedMachine, 150)):
    machine.TestCase.settings = settings(
        derandomize=True, deadline=None, database=None, max_examples=max_examples, stateful_step_count=40
    )
test_mixed_jobs_are_answered_once = MixedMachine.TestCase
test_mixed_jobs_are_answered_once_with_auto_batch = AutoMixedMachine.TestCase
