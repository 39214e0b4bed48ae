"""Whatever arrives, leaves or fails at whatever step: no image is lost, doubled or swapped, and capacity returns."""

from collections import Counter as Tally
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import Counter

from app import errors
from app.api.requests import ClientGoneError
from app.engine.engine import EngineState
from app.engine.interface import OutOfMemoryError
from app.engine.job import ImageDone, Job, Progress
from app.engine.step_times import StepTimes
from tests.app.fakes import FakeRunner, Rows, image, images, new_engine, new_job, opened, same, tick

CAPACITY = 12
MAX_BATCH = 5

Image = tuple["Truth", int]  # whose, which


@dataclass(eq=False)
class Truth:
    """What is known of a job without asking the engine."""

    job: Job
    steps: list[int]
    answers: int = 0
    error: type[Exception] | None = None
    events: list[Progress | ImageDone] = field(default_factory=list)

    @property
    def unfinished(self) -> list[int]:
        return [index for index, steps in enumerate(self.steps) if steps < self.job.request.options.num_steps]

    @property
    def alive(self) -> bool:
        return self.error is None and bool(self.unfinished)


def totals(counter: Counter) -> Tally[str]:
    """Each label's count."""
    (family,) = counter.collect()
    values = {s.labels.popitem()[1]: s.value for s in family.samples if s.name.endswith("_total")}
    return Tally({label: int(value) for label, value in values.items()})


class EngineMachine(RuleBasedStateMachine):
    max_batch_asked: int | None = MAX_BATCH
    step_times = StepTimes({1: 1e-6, 1024: 1e-6})

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.runner = FakeRunner(step_times=self.step_times.copy())
        self.engine = opened(new_engine(self.runner, capacity=CAPACITY, max_batch=self.max_batch_asked))
        self.max_rows = MAX_BATCH  # lowered by shortages of memory
        self.truths: list[Truth] = []
        self.idle: Future[None] | None = None
        self.images_done: Tally[str] = Tally()
        self.cancelled: Tally[str] = Tally()

    @property
    def living(self) -> list[Truth]:
        return [truth for truth in self.truths if truth.alive]

    @property
    def waiting(self) -> int:
        return sum(truth.steps[index] == 0 for truth in self.living for index in truth.unfinished)

    @property
    def running(self) -> int:
        return sum(truth.steps[index] > 0 for truth in self.living for index in truth.unfinished)

    def expected_rows(self) -> list[Image]:
        """One image of each job, oldest first, then the other images of the jobs, oldest first."""
        images = [[(truth, index) for index in truth.unfinished] for truth in self.living]
        first = [each[0] for each in images][: self.first_round()]
        others = [image for each in images for image in each if image not in first]
        return [*first, *others][: self.limit(images)]

    def first_round(self) -> int:
        return self.max_rows

    def limit(self, images: list[list[Image]]) -> int:
        return self.max_rows

    def end(self, truth: Truth, error: type[Exception]) -> None:
        for index in truth.unfinished:
            self.cancelled["running" if truth.steps[index] else "waiting"] += 1
        truth.error = error

    def turn(self, rows: list[Image]) -> None:
        """One turn of the engine, and what it must have done to the rows."""
        for truth, index in rows:
            truth.steps[index] += 1
        before = len(self.runner.calls)
        tick(self.engine)
        stepped = Tally(row for call in self.runner.calls[before:] for row in call)
        for truth, index in rows:
            done = truth.steps[index] == truth.job.request.options.num_steps
            if truth.error is None:
                self.images_done[str(truth.job.request.options.digit)] += done
                assert sum(n for row, n in stepped.items() if row.job is truth.job and row.index == index) == 1
        allowed = {(truth.job, index) for truth, index in rows}
        assert {(row.job, row.index) for row in stepped} <= allowed
        self.runner.on_step = self.runner.on_pixels = lambda rows: None
        self.runner.not_finite = lambda row: False
        begun = {(t.job, i) for t in self.living for i in t.unfinished if t.steps[i]}
        ended = {row for row in self.runner.held if row.job.closed}
        assert {(row.job, row.index) for row in self.runner.held if row not in ended} == begun
        assert ended <= set(self.engine._abandoned)

    def fail(self, guilty: set[Image], error: type[Exception] = errors.InternalError) -> None:
        """The jobs of the guilty images end before the turn: what it does to their other images is nobody's loss."""
        for truth in dict.fromkeys(truth for truth, _ in guilty):
            started = {index for owner, index in self.expected_rows() if owner is truth}
            for index in truth.unfinished:
                self.cancelled["running" if truth.steps[index] or index in started else "waiting"] += 1
        for truth, _ in guilty:
            truth.error = error

    @rule(
        count=st.integers(1, 6),
        num_steps=st.integers(1, 5),
        seed=st.integers(0, 2**16 - 1),
        digit=st.integers(0, 9),
        num_previews=st.integers(0, 4),
    )
    def arrive(self, count: int, num_steps: int, seed: int, digit: int, num_previews: int) -> None:
        events: list[Progress | ImageDone] = []
        job = new_job(count, num_steps, seed, digit, num_previews=num_previews, listener=events.append)
        truth = Truth(job, [0] * count, events=events)

        def answered(future: object) -> None:
            truth.answers += 1

        truth.job.future.add_done_callback(answered)
        if self.idle:
            with pytest.raises(errors.Draining):
                self.engine.submit(truth.job)
        elif self.waiting + count > CAPACITY:
            with pytest.raises(errors.Overloaded) as refused:
                self.engine.submit(truth.job)
            assert refused.value.retry_after >= 1
        else:
            position = self.waiting
            self.engine.submit(truth.job)
            self.truths.append(truth)
            assert truth.job.estimate.position == position

    @precondition(lambda self: self.truths)
    @rule(data=st.data(), error=st.sampled_from([ClientGoneError, errors.DeadlineExceeded]))
    def cancel_or_expire(self, data: st.DataObject, error: Callable[[], Exception]) -> None:
        truth = data.draw(st.sampled_from(self.truths))
        cause = error()
        alive = truth.alive
        if alive:
            self.end(truth, type(cause))
        self.engine.cancel(truth.job, cause)
        assert (truth.job.future.exception() is cause) is alive

    @rule()
    def step(self) -> None:
        self.turn(self.expected_rows())

    @precondition(lambda self: self.living)
    @rule(data=st.data(), error=st.sampled_from([RuntimeError, OutOfMemoryError, AssertionError]))
    def step_that_raises_for_some_rows(self, data: st.DataObject, error: type[Exception]) -> None:
        rows = self.expected_rows()
        guilty = data.draw(st.sets(st.sampled_from(rows), min_size=1, max_size=3))
        names = {(truth.job, index) for truth, index in guilty}

        def raise_for_guilty(batch: Rows) -> None:
            if any((row.job, row.index) in names for row in batch):
                raise error

        self.runner.on_step = raise_for_guilty
        self.fail(guilty)
        self.turn(rows)
        if error is OutOfMemoryError:
            self.lower()

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def step_with_nan_rows(self, data: st.DataObject) -> None:
        rows = self.expected_rows()
        guilty = data.draw(st.sets(st.sampled_from(rows), min_size=1, max_size=3))
        names = {(truth.job, index) for truth, index in guilty}
        self.runner.not_finite = lambda row: (row.job, row.index) in names
        self.fail(guilty)
        self.turn(rows)

    @precondition(lambda self: len(self.expected_rows()) > 1)
    @rule(data=st.data())
    def step_out_of_memory(self, data: st.DataObject) -> None:
        rows = self.expected_rows()
        limit = data.draw(st.integers(1, len(rows) - 1))

        def raise_above_limit(batch: Rows) -> None:
            if len(batch) > limit:
                raise OutOfMemoryError

        self.runner.on_step = raise_above_limit
        self.turn(rows)  # no image is lost
        self.lower()

    def lower(self) -> None:
        """Once a step, however often its batch was halved."""
        self.max_rows = max(1, self.max_rows // 2)
        assert self.engine._admission.max_batch == self.max_rows

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def image_that_cannot_be_read(self, data: st.DataObject) -> None:
        """It fails its job, and no other, when it is asked for: at its last step, or earlier for a preview."""
        rows = self.expected_rows()
        suspect, index = data.draw(st.sampled_from(rows))
        blamed = False

        def raise_for_guilty(batch: Rows) -> None:
            nonlocal blamed
            if any(row.job is suspect.job and row.index == index for row in batch):
                blamed = blamed or len(batch) == 1
                raise RuntimeError

        self.runner.on_pixels = raise_for_guilty
        for truth, i in rows:
            truth.steps[i] += 1
        tick(self.engine)
        self.runner.on_pixels = lambda rows: None
        assert blamed or index in suspect.unfinished
        finished = [(truth, i) for truth, i in rows if i not in truth.unfinished]
        told = [(t, i) for t, i in finished if any(isinstance(e, ImageDone) and e.index == i for e in t.events)]
        assert all(truth is suspect and blamed for truth, _ in set(finished) - set(told))
        self.images_done.update(str(truth.job.request.options.digit) for truth, _ in told)
        self.cancelled["running"] += len(finished) - len(told)
        if blamed:
            self.end(suspect, errors.InternalError)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def somebody_leaves_during_a_step(self, data: st.DataObject) -> None:
        rows = self.expected_rows()
        leaver = data.draw(st.sampled_from(self.living))
        self.runner.on_step = lambda batch: self.engine.cancel(leaver.job, ClientGoneError())
        self.fail({(leaver, 0)}, ClientGoneError)
        self.turn(rows)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def somebody_leaves_while_images_are_read(self, data: st.DataObject) -> None:
        """After the step has been counted, before what it finished is handed out."""
        rows, before = self.expected_rows(), {truth: truth.unfinished for truth in self.living}
        last = [t for t, index in rows if t.steps[index] + 1 == t.job.request.options.num_steps]
        leaver = data.draw(st.sampled_from(last or self.living))
        left = False

        def leave(batch: Rows) -> None:
            nonlocal left
            left = True
            self.engine.cancel(leaver.job, ClientGoneError())

        self.runner.on_pixels = leave
        for truth, index in rows:
            truth.steps[index] += 1
        tick(self.engine)
        self.runner.on_pixels = lambda rows: None
        if left:
            leaver.error = ClientGoneError
            self.cancelled.update("running" if leaver.steps[index] else "waiting" for index in before[leaver])
        finished = [truth for truth, index in rows if index not in truth.unfinished and truth.error is None]
        self.images_done.update(str(truth.job.request.options.digit) for truth in finished)

    @rule(often=st.integers(0, 7))
    def give_up(self, often: int) -> None:
        if often:
            return
        for truth in self.living:
            self.end(truth, errors.Draining)
        self.engine.give_up(errors.Draining(1))

    @rule(often=st.integers(0, 5))
    def drain(self, often: int) -> None:
        if not often:
            self.idle = self.engine.drain()
            assert self.engine.state is EngineState.DRAINING

    @precondition(lambda self: self.idle and not self.living)
    @rule()
    def start_again(self) -> None:
        self.teardown()
        self.start()

    @invariant()
    def counts_are_true(self) -> None:
        assert (self.engine.backlog.waiting, self.engine.backlog.running) == (self.waiting, self.running)
        assert self.engine.backlog.waiting <= CAPACITY
        steps_left = sum(
            truth.job.request.options.num_steps - truth.steps[index]
            for truth in self.living
            for index in truth.unfinished
        )
        assert self.engine.backlog.work == steps_left
        assert self.engine.backlog.jobs == [truth.job for truth in self.living]

    @invariant()
    def every_job_is_answered_once_and_rightly(self) -> None:
        for truth in self.truths:
            assert truth.answers == (not truth.alive)
            if truth.error:
                assert type(truth.job.future.exception()) is truth.error
            elif not truth.alive:
                assert same(truth.job.future.result(), images(truth.job))

    @invariant()
    def every_finished_image_is_told_once(self) -> None:
        for truth in self.truths:
            told = [event for event in truth.events if isinstance(event, ImageDone)]
            assert len({event.index for event in told}) == len(told)
            options = truth.job.request.options
            for event in told:
                assert same([event.pixels], [image(options.seed, event.index, options.num_steps)])
            if truth.error is None:
                assert {event.index for event in told} == set(range(truth.job.request.count)) - set(truth.unfinished)
                shown = [event for event in truth.events if isinstance(event, Progress)]
                assert all(len(event.previews) == truth.job.request.count for event in shown)
                assert len(shown) <= truth.job.request.num_previews

    @invariant()
    def the_drain_is_over_when_nobody_is_left(self) -> None:
        assert self.idle is None or self.idle.done() is (not self.living)

    @invariant()
    def metrics_agree(self) -> None:
        assert totals(self.engine._metrics.images) == self.images_done
        assert totals(self.engine._metrics.cancelled) == self.cancelled

    def teardown(self) -> None:
        """All that is left runs to its end, and all capacity is there again."""
        for _ in range(200):
            if not self.living:
                break
            self.turn(self.expected_rows())
        tick(self.engine)
        self.counts_are_true()
        self.every_job_is_answered_once_and_rightly()
        assert not self.living
        assert not self.runner.held
        if not self.idle:
            self.engine.submit(new_job(CAPACITY))


class AutoEngineMachine(EngineMachine):
    """Full steps have five rows; with a small job among several, three, or twice those of the first round."""

    max_batch_asked = None
    step_times = StepTimes({1: 1e-6, 4: 4e-6, 5: 4.1e-6})

    def first_round(self) -> int:
        return max(1, self.full() // 2)

    def limit(self, images: list[list[Image]]) -> int:
        short = max(3, 2 * min(len(images), self.first_round()))
        fewest = min((truth.job.request.count for truth in self.living), default=0)
        shared = len(images) > 1 and len(images) * fewest <= short
        return min(short if shared else self.full(), self.max_rows)

    def full(self) -> int:
        """Evaluations of a full step: five, or two for each row after a shortage of memory."""
        return min(5, 2 * self.max_rows)


for machine, max_examples in ((EngineMachine, 200), (AutoEngineMachine, 100)):
    machine.TestCase.settings = settings(
        derandomize=True, deadline=None, database=None, max_examples=max_examples, stateful_step_count=40
    )
test_no_image_is_lost_doubled_or_swapped = EngineMachine.TestCase
test_nor_where_the_service_chooses_its_batches = AutoEngineMachine.TestCase
