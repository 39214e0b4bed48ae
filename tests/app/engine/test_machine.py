"""Tests the engine against a simple model, with random sequences of new jobs, cancellations and failures.

After each event no image is lost, duplicated or swapped. At the end the whole capacity is free again.
"""

from collections import Counter as Counts
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count as count_from
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import Counter

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.engine import EngineState
from app.engine.interface import OutOfMemoryError
from app.engine.job import ImageDone, Job, Progress
from app.engine.step_times import StepTimes
from tests.app.fakes import FakeRunner, Rows, backlog_of, image, images, new_engine, new_job, opened, same, tick

CAPACITY = 12
MAX_BATCH = 5

Image = tuple["ExpectedJob", int]  # (job, index)


@dataclass(eq=False)
class ExpectedJob:
    """The state of a job as the model expects it."""

    job: Job
    steps: list[int]
    answers: int = 0
    error: type[Exception] | None = None
    events: list[Progress | ImageDone] = field(default_factory=list)

    @property
    def unfinished(self) -> list[int]:
        return [index for index, steps in enumerate(self.steps) if steps < self.job.request.options.num_steps]

    @property
    def is_open(self) -> bool:
        return self.error is None and bool(self.unfinished)


def totals(counter: Counter) -> Counts[str]:
    """Returns the count of each label."""
    (family,) = counter.collect()
    values = {s.labels.popitem()[1]: s.value for s in family.samples if s.name.endswith("_total")}
    return Counts({label: int(value) for label, value in values.items()})


class EngineMachine(RuleBasedStateMachine):
    max_batch: int | None = MAX_BATCH
    step_times = StepTimes({1: 1e-6, 1024: 1e-6})

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        # The time of the engine, which is a microsecond later at each look. With the real time, a machine that pauses
        # for half a minute puts targets at risk, and the steps then have other rows than the model expects.
        self.now = map((1e-6).__mul__, count_from()).__next__
        self.clock = patch("time.monotonic", self.now)
        self.clock.start()
        self.runner = FakeRunner(step_times=self.step_times.copy())
        self.engine = opened(new_engine(self.runner, capacity=CAPACITY, max_batch=self.max_batch))
        self.max_rows = MAX_BATCH  # current row limit, which memory shortages lower
        self.expected_jobs: list[ExpectedJob] = []
        self.drained: Future[None] | None = None
        self.images_done: Counts[str] = Counts()
        self.cancelled: Counts[str] = Counts()

    @property
    def unanswered(self) -> list[ExpectedJob]:
        return [expected for expected in self.expected_jobs if expected.is_open]

    @property
    def waiting(self) -> int:
        return sum(expected.steps[index] == 0 for expected in self.unanswered for index in expected.unfinished)

    @property
    def running(self) -> int:
        return sum(expected.steps[index] > 0 for expected in self.unanswered for index in expected.unfinished)

    def expected_rows(self) -> list[Image]:
        """Returns one image of each job, oldest job first, and then the other images, oldest job first."""
        images = [[(expected, index) for index in expected.unfinished] for expected in self.unanswered]
        first = [each[0] for each in images][: self.first_round()]
        others = [image for each in images for image in each if image not in first]
        return [*first, *others][: self.limit(images)]

    def first_round(self) -> int:
        return self.max_rows

    def limit(self, images: list[list[Image]]) -> int:
        return self.max_rows

    def end(self, expected: ExpectedJob, error: type[Exception]) -> None:
        for index in expected.unfinished:
            self.cancelled["running" if expected.steps[index] else "waiting"] += 1
        expected.error = error

    def run_iteration(self, rows: list[Image]) -> None:
        """Runs one iteration of the engine and checks its effect on the rows."""
        for expected, index in rows:
            expected.steps[index] += 1
        before = len(self.runner.calls)
        tick(self.engine)
        stepped = Counts(row for call in self.runner.calls[before:] for row in call)
        for expected, index in rows:
            done = expected.steps[index] == expected.job.request.options.num_steps
            if expected.error is None:
                self.images_done[str(expected.job.request.options.label)] += done
                assert sum(n for row, n in stepped.items() if row.job is expected.job and row.index == index) == 1
        allowed = {(expected.job, index) for expected, index in rows}
        assert {(row.job, row.index) for row in stepped} <= allowed
        self.runner.on_step = self.runner.on_pixels = lambda rows: None
        self.runner.not_finite = lambda row: False
        begun = {(t.job, i) for t in self.unanswered for i in t.unfinished if t.steps[i]}
        ended = {row for row in self.runner.held if row.job.closed}
        assert {(row.job, row.index) for row in self.runner.held if row not in ended} == begun
        assert ended <= set(self.engine._abandoned)

    def fail(self, failing: set[Image], error: type[Exception] = errors.InternalError) -> None:
        """Ends the jobs of the failing images in the model, before the iteration runs.

        Their other images may or may not make another step in this iteration.
        """
        for expected in dict.fromkeys(expected for expected, _ in failing):
            started = {index for owner, index in self.expected_rows() if owner is expected}
            for index in expected.unfinished:
                self.cancelled["running" if expected.steps[index] or index in started else "waiting"] += 1
        for expected, _ in failing:
            expected.error = error

    @rule(
        count=st.integers(1, 6),
        num_steps=st.integers(1, 5),
        seed=st.integers(0, 2**16 - 1),
        digit=st.integers(0, 9),
        num_previews=st.integers(0, 4),
    )
    def submit(self, count: int, num_steps: int, seed: int, digit: int, num_previews: int) -> None:
        events: list[Progress | ImageDone] = []
        job = new_job(
            count, num_steps, seed, digit, num_previews=num_previews, listener=events.append, submitted_at=self.now()
        )
        expected = ExpectedJob(job, [0] * count, events=events)

        def answered(future: object) -> None:
            expected.answers += 1

        expected.job.future.add_done_callback(answered)
        if self.drained:
            with pytest.raises(errors.Draining):
                self.engine.submit(expected.job)
        elif self.waiting + count > CAPACITY:
            with pytest.raises(errors.Overloaded) as refused:
                self.engine.submit(expected.job)
            assert refused.value.retry_after >= 1
        else:
            position = self.waiting
            self.engine.submit(expected.job)
            self.expected_jobs.append(expected)
            assert expected.job.estimate.position == position

    @precondition(lambda self: self.expected_jobs)
    @rule(data=st.data(), error=st.sampled_from([ClientGoneError, errors.DeadlineExceeded]))
    def cancel_or_expire(self, data: st.DataObject, error: Callable[[], Exception]) -> None:
        expected = data.draw(st.sampled_from(self.expected_jobs))
        cause = error()
        is_open = expected.is_open
        if is_open:
            self.end(expected, type(cause))
        self.engine.cancel(expected.job, cause)
        assert (expected.job.future.exception() is cause) is is_open

    @rule()
    def step(self) -> None:
        self.run_iteration(self.expected_rows())

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data(), error=st.sampled_from([RuntimeError, OutOfMemoryError, AssertionError]))
    def step_that_raises_for_some_rows(self, data: st.DataObject, error: type[Exception]) -> None:
        rows = self.expected_rows()
        failing = data.draw(st.sets(st.sampled_from(rows), min_size=1, max_size=3))
        names = {(expected.job, index) for expected, index in failing}

        def raise_for_guilty(batch: Rows) -> None:
            if any((row.job, row.index) in names for row in batch):
                raise error

        self.runner.on_step = raise_for_guilty
        self.fail(failing)
        self.run_iteration(rows)
        if error is OutOfMemoryError:
            self.lower()

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def step_with_nan_rows(self, data: st.DataObject) -> None:
        rows = self.expected_rows()
        failing = data.draw(st.sets(st.sampled_from(rows), min_size=1, max_size=3))
        names = {(expected.job, index) for expected, index in failing}
        self.runner.not_finite = lambda row: (row.job, row.index) in names
        self.fail(failing)
        self.run_iteration(rows)

    @precondition(lambda self: len(self.expected_rows()) > 1)
    @rule(data=st.data())
    def step_out_of_memory(self, data: st.DataObject) -> None:
        rows = self.expected_rows()
        limit = data.draw(st.integers(1, len(rows) - 1))

        def raise_above_limit(batch: Rows) -> None:
            if len(batch) > limit:
                raise OutOfMemoryError

        self.runner.on_step = raise_above_limit
        self.run_iteration(rows)  # No image is lost.
        self.lower()

    def lower(self) -> None:
        """Expects that the batch size was lowered once, even if the batch was halved several times."""
        self.max_rows = max(1, self.max_rows // 2)
        assert self.engine._admission.max_batch == self.max_rows

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def fail_to_read_an_image(self, data: st.DataObject) -> None:
        """Makes the read of one image fail. Only its job fails, at its last step or earlier if a preview is read."""
        rows = self.expected_rows()
        suspect, index = data.draw(st.sampled_from(rows))
        blamed = False

        def raise_for_guilty(batch: Rows) -> None:
            nonlocal blamed
            if any(row.job is suspect.job and row.index == index for row in batch):
                blamed = blamed or len(batch) == 1
                raise RuntimeError

        self.runner.on_pixels = raise_for_guilty
        for expected, i in rows:
            expected.steps[i] += 1
        tick(self.engine)
        self.runner.on_pixels = lambda rows: None
        assert blamed or index in suspect.unfinished
        finished = [(expected, i) for expected, i in rows if i not in expected.unfinished]
        announced = [(t, i) for t, i in finished if any(isinstance(e, ImageDone) and e.index == i for e in t.events)]
        assert all(expected is suspect and blamed for expected, _ in set(finished) - set(announced))
        self.images_done.update(str(expected.job.request.options.label) for expected, _ in announced)
        self.cancelled["running"] += len(finished) - len(announced)
        if blamed:
            self.end(suspect, errors.InternalError)

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def cancel_during_a_step(self, data: st.DataObject) -> None:
        rows = self.expected_rows()
        cancelled = data.draw(st.sampled_from(self.unanswered))
        self.runner.on_step = lambda batch: self.engine.cancel(cancelled.job, ClientGoneError())
        self.fail({(cancelled, 0)}, ClientGoneError)
        self.run_iteration(rows)

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def cancel_while_images_are_read(self, data: st.DataObject) -> None:
        """Cancels a job after the step was counted and before the finished images are delivered."""
        rows, before = self.expected_rows(), {expected: expected.unfinished for expected in self.unanswered}
        last = [t for t, index in rows if t.steps[index] + 1 == t.job.request.options.num_steps]
        cancelled = data.draw(st.sampled_from(last or self.unanswered))
        is_cancelled = False

        def cancel(batch: Rows) -> None:
            nonlocal is_cancelled
            is_cancelled = True
            self.engine.cancel(cancelled.job, ClientGoneError())

        self.runner.on_pixels = cancel
        for expected, index in rows:
            expected.steps[index] += 1
        tick(self.engine)
        self.runner.on_pixels = lambda rows: None
        if is_cancelled:
            cancelled.error = ClientGoneError
            self.cancelled.update("running" if cancelled.steps[index] else "waiting" for index in before[cancelled])
        finished = [expected for expected, index in rows if index not in expected.unfinished and expected.error is None]
        self.images_done.update(str(expected.job.request.options.label) for expected in finished)

    @rule(often=st.integers(0, 7))
    def give_up(self, often: int) -> None:
        if often:
            return
        for expected in self.unanswered:
            self.end(expected, errors.Draining)
        self.engine.give_up(errors.Draining(1))

    @rule(often=st.integers(0, 5))
    def drain(self, often: int) -> None:
        if not often:
            self.drained = self.engine.drain()
            assert self.engine.state is EngineState.DRAINING

    @precondition(lambda self: self.drained and not self.unanswered)
    @rule()
    def start_again(self) -> None:
        self.teardown()
        self.start()

    @invariant()
    def counts_are_correct(self) -> None:
        assert self.engine.count_images() == (self.waiting, self.running)
        assert self.engine.count_images().waiting <= CAPACITY
        steps_left = sum(
            expected.job.request.options.num_steps - expected.steps[index]
            for expected in self.unanswered
            for index in expected.unfinished
        )
        assert backlog_of(self.engine).work == steps_left
        assert backlog_of(self.engine).jobs == [expected.job for expected in self.unanswered]

    @invariant()
    def every_job_is_answered_once_and_correctly(self) -> None:
        for expected in self.expected_jobs:
            assert expected.answers == (not expected.is_open)
            if expected.error:
                assert type(expected.job.future.exception()) is expected.error
            elif not expected.is_open:
                assert same(expected.job.future.result(), images(expected.job))

    @invariant()
    def every_finished_image_is_announced_once(self) -> None:
        for expected in self.expected_jobs:
            announced = [event for event in expected.events if isinstance(event, ImageDone)]
            assert len({event.index for event in announced}) == len(announced)
            options = expected.job.request.options
            for event in announced:
                assert same([event.pixels], [image(options.seed, event.index, options.num_steps)])
            if expected.error is None:
                assert {event.index for event in announced} == set(range(expected.job.request.count)) - set(
                    expected.unfinished
                )
                shown = [event for event in expected.events if isinstance(event, Progress)]
                assert all(len(event.previews) == expected.job.request.count for event in shown)
                assert len(shown) <= expected.job.request.num_previews

    @invariant()
    def drain_is_complete_when_all_jobs_are_answered(self) -> None:
        assert self.drained is None or self.drained.done() is (not self.unanswered)

    @invariant()
    def metrics_are_correct(self) -> None:
        assert totals(self.engine._metrics.images) == self.images_done
        assert totals(self.engine._metrics.cancelled) == self.cancelled

    def teardown(self) -> None:
        try:
            self.run_to_the_end()
        finally:
            self.clock.stop()

    def run_to_the_end(self) -> None:
        """Runs all remaining jobs to their end. The whole capacity is then free."""
        for _ in range(200):
            if not self.unanswered:
                break
            self.run_iteration(self.expected_rows())
        tick(self.engine)
        self.counts_are_correct()
        self.every_job_is_answered_once_and_correctly()
        assert not self.unanswered
        assert not self.runner.held
        if not self.drained:
            self.engine.submit(new_job(CAPACITY, submitted_at=self.now()))


class AutoEngineMachine(EngineMachine):
    """The step times determine the size of a step. A full step has five evaluations, a short step has three."""

    max_batch = None
    step_times = StepTimes({1: 1e-6, 4: 4e-6, 5: 4.1e-6})

    def first_round(self) -> int:
        return max(1, self.full() // 2)

    def limit(self, images: list[list[Image]]) -> int:
        fewest = min((expected.job.request.count for expected in self.unanswered), default=0)
        full, short = min(self.full(), self.max_rows), max(3, 2 * min(len(images), self.first_round()))
        all_fit = sum(map(len, images)) <= full and len(images) * fewest > 3
        is_short = len(images) > 1 and not all_fit and len(images) * fewest <= short
        return min(short, full) if is_short else full

    def full(self) -> int:
        """Returns the evaluations of a full step: five, or two for each row after a memory shortage."""
        return min(5, 2 * self.max_rows)


for machine, max_examples in ((EngineMachine, 200), (AutoEngineMachine, 100)):
    machine.TestCase.settings = settings(
        derandomize=True, deadline=None, database=None, max_examples=max_examples, stateful_step_count=40
    )
test_no_image_is_lost_duplicated_or_swapped = EngineMachine.TestCase
test_no_image_is_lost_duplicated_or_swapped_with_auto_batch = AutoEngineMachine.TestCase
