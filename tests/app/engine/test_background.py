"""Tests of background jobs: they take what interactive jobs leave, and change nothing for these."""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.admission import Admission
from app.engine.background import SHARED_SECONDS
from app.engine.batcher import BACKGROUND_SECONDS, SHARED_TOLERANCE, StepLimits
from app.engine.engine import Engine
from app.engine.interface import OutOfMemoryError
from app.engine.job import TARGET_SHARE, Job, StepKind
from app.engine.step_times import StepTimes
from tests.app.engine.test_late_readings import LateRunner
from tests.app.engine.virtual_service import MEASURED, MEASURED_WITH_AMX, VirtualService, random_mix
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
    Gate,
    Rows,
    image,
    images,
    new_engine,
    new_job,
    new_recognition,
    new_search,
    opened,
    running,
    same,
    tick,
)

KIND = StepKind(("default",), 2, has_clip=False)
NOW = 50.0


def background_job(count: int = 1, num_steps: int = 3, seed: int = 0, **fields: object) -> Job:
    return new_job(count, num_steps, seed, is_background=True, **fields)  # type: ignore[arg-type]


def new_admission(capacity: int = 1024, measured: dict[int, float] = MEASURED, **options: object) -> Admission:
    admission = Admission(capacity, None)
    admission.open(StepTimes(measured, **options))  # type: ignore[arg-type]
    return admission


def jobs_of_steps(runner: FakeRunner) -> list[set[Job]]:
    return [{row.job for row in call} for call in runner.calls]


def run_to_the_end(engine: Engine, *jobs: Job) -> None:
    while not all(job.closed for job in jobs):
        tick(engine)  # type: ignore[arg-type]


def test_interactive_job_joins_the_next_step_and_background_rows_continue_after_it() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    background, interactive = background_job(5, num_steps=4, seed=1), new_job(2, num_steps=3, seed=2)
    engine.submit(background)
    tick(engine)
    engine.submit(interactive)
    run_to_the_end(engine, background)
    assert jobs_of_steps(runner) == [{background}, *[{interactive}] * 3, *[{background}] * 3]
    assert same(background.future.result(), images(background))  # type: ignore[arg-type]
    assert same(interactive.future.result(), images(interactive))  # type: ignore[arg-type]


def test_interactive_job_that_arrives_during_a_background_step_joins_the_next_one() -> None:
    gate = Gate()
    runner = FakeRunner(on_step=gate)
    with running(new_engine(runner)) as engine:
        engine.ready.result(WAIT_SECONDS)
        background, interactive = background_job(5, num_steps=50), new_job(1, num_steps=3)
        engine.submit(background)
        assert gate.entered.wait(WAIT_SECONDS)
        engine.submit(interactive)
        gate.released.set()
        interactive.future.result(WAIT_SECONDS)
        background.future.result(WAIT_SECONDS)
    assert jobs_of_steps(runner)[:5] == [{background}, *[{interactive}] * 3, {background}]


def test_waiting_thread_wakes_up_for_a_background_job() -> None:
    with running(new_engine(FakeRunner())) as engine:
        engine.ready.result(WAIT_SECONDS)
        for seed in range(3):
            job = background_job(2, seed=seed)
            engine.submit(job)
            assert same(job.future.result(WAIT_SECONDS), images(job))  # type: ignore[arg-type]


def test_background_job_waits_for_the_results_of_interactive_rows() -> None:
    """On a GPU, a row that compares the classes takes its next step only when the errors of the last one are known."""
    runner = LateRunner()
    engine = opened(new_engine(runner))
    background, interactive = background_job(3), new_recognition(seed=4)
    engine.submit(background)
    engine.submit(interactive)
    run_to_the_end(engine, background, interactive)
    order = jobs_of_steps(runner)
    assert order == sorted(order, key=lambda jobs: background in jobs)


def test_background_jobs_are_served_in_order_of_arrival() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner, max_batch=4))
    jobs = [background_job(3, seed=seed) for seed in range(4)]
    for job in jobs:
        engine.submit(job)
    run_to_the_end(engine, *jobs)
    assert [[(jobs.index(row.job), row.index) for row in call] for call in runner.calls[:1]] == [
        [(0, 0), (0, 1), (0, 2), (1, 0)]
    ]
    assert [job.number for job in jobs] == [1, 2, 3, 4]
    assert sorted(jobs, key=lambda job: job.timings.finished_at or 0.0) == jobs


def test_jobs_of_both_classes_have_different_numbers() -> None:
    engine = opened(new_engine(FakeRunner()))
    jobs = [background_job(), new_job(), new_job(), background_job(), new_job()]
    for job in jobs:
        engine.submit(job)
    assert [job.number for job in jobs] == [1, 2, 3, 4, 5]


def test_background_job_has_no_deadline_and_is_refused_only_if_its_queue_is_full() -> None:
    engine = opened(new_engine(FakeRunner(step_times=StepTimes({1: 100.0})), capacity=8))
    first = background_job(6, timeout=1.0)
    engine.submit(first)
    assert first.deadline == math.inf
    with pytest.raises(errors.Overloaded) as refused:
        engine.submit(background_job(3))
    assert refused.value.retry_after == 300  # one of the images must finish: 3 steps of 100 s
    engine.submit(background_job(2))
    assert engine._background.waiting == 8


def test_background_images_do_not_use_up_the_capacity_of_interactive_jobs() -> None:
    engine = opened(new_engine(FakeRunner(), capacity=8, max_batch=4))
    engine.submit(background_job(8))
    tick(engine)
    engine.submit(new_job(8, timeout=1e6))
    with pytest.raises(errors.Overloaded):
        engine.submit(new_job(1, timeout=1e6))
    assert engine.count_images() == (8, 4)  # only interactive images count as waiting
    assert engine.num_interactive() == 8


def test_metrics_of_the_wait_have_no_background_jobs() -> None:
    engine = opened(new_engine(FakeRunner()))
    background, interactive = background_job(4), new_job(2)
    for job in (background, interactive):
        engine.submit(job)
    run_to_the_end(engine, background)
    sample = engine._metrics.registry.get_sample_value
    assert sample("unfog_queue_wait_seconds_count") == sample("unfog_admission_wait_steps_count") == 2
    assert sample("unfog_images_total", {"digit": "0", "class_name": "0"}) in (None, 6)
    assert background.timings.started_at


def test_drain_answers_background_jobs_at_once_and_waits_for_interactive_jobs() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner, max_batch=2))
    waiting, started, interactive = background_job(), background_job(4), new_job()
    engine.submit(started)
    tick(engine)
    for job in (waiting, interactive):
        engine.submit(job)
    drained = engine.drain()
    assert [type(job.future.exception(0)) for job in (waiting, started)] == [errors.Draining] * 2
    assert not drained.done()
    for is_accepted in (False, True):
        with pytest.raises(errors.Draining):
            engine.submit(background_job(), is_accepted=is_accepted)
    run_to_the_end(engine, interactive)
    assert same(interactive.future.result(), images(interactive))  # type: ignore[arg-type]
    assert drained.done()
    tick(engine)
    assert not runner.held


def test_drain_is_complete_if_there_are_only_background_jobs() -> None:
    engine = opened(new_engine(FakeRunner()))
    engine.submit(background_job())
    assert engine.drain().done()


@pytest.mark.parametrize("end", [lambda engine: engine.give_up(errors.EngineFailed(1)), lambda e: e.fail(OSError())])
def test_background_jobs_are_answered_when_the_engine_ends(end: Callable[[Engine], None]) -> None:
    engine = opened(new_engine(FakeRunner()))
    job = background_job()
    engine.submit(job)
    end(engine)
    assert isinstance(job.future.exception(0), errors.EngineFailed)


def test_cancelled_background_job_leaves_the_next_step() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    cancelled, other = background_job(2, seed=1), background_job(2, seed=2)
    for job in (cancelled, other):
        engine.submit(job)
    tick(engine)
    engine.cancel(cancelled, ClientGoneError())
    run_to_the_end(engine, other)
    assert jobs_of_steps(runner) == [{cancelled, other}, {other}, {other}]
    tick(engine)
    assert not runner.held


def test_only_the_failing_background_job_fails() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner))
    failing, other = background_job(3, seed=1), background_job(3, seed=2)

    def fail(rows: Rows) -> None:
        if any(row.job is failing and row.index == 1 for row in rows):
            raise RuntimeError

    runner.on_step = fail
    for job in (failing, other):
        engine.submit(job)
    run_to_the_end(engine, failing, other)
    assert isinstance(failing.future.exception(0), errors.InternalError)
    assert same(other.future.result(), images(other))  # type: ignore[arg-type]


def test_memory_shortage_in_a_background_step_lowers_the_size_of_all_steps() -> None:
    runner = FakeRunner()
    engine = opened(new_engine(runner, max_batch=8))

    def fail(rows: Rows) -> None:
        if len(rows) > 4:
            raise OutOfMemoryError

    runner.on_step = fail
    job = background_job(8)
    engine.submit(job)
    assert engine.full_step() == 8
    run_to_the_end(engine, job)
    assert engine.full_step() == 4
    assert same(job.future.result(), images(job))  # type: ignore[arg-type]


def test_engine_tests_itself_after_three_background_steps_without_a_surviving_row() -> None:
    runner = FakeRunner(not_finite=lambda row: True)
    engine = opened(new_engine(runner))
    for seed in range(3):
        engine.submit(background_job(seed=seed))
        tick(engine)
    assert runner.num_checks == 1


def test_viewers_see_background_rows() -> None:
    engine = opened(new_engine(FakeRunner()))
    messages: list[object] = []
    engine.feed.receiver, engine.feed.is_wanted = messages.append, True
    engine.submit(background_job(3))
    engine.publish_if_idle()
    assert messages == []
    tick(engine)
    (batch,) = messages
    assert (batch.waiting, batch.running, len(batch.rows)) == (0, 3, 3)  # type: ignore[attr-defined]


def test_search_of_a_background_job_finds_its_class_beside_interactive_jobs() -> None:
    engine = opened(new_engine(FakeRunner()))
    job, others = new_search(2, seed=7, is_background=True), [new_recognition(seed=seed) for seed in range(4)]
    engine.submit(job)
    for other in others:
        tick(engine)
        engine.submit(other)
    run_to_the_end(engine, job)
    assert job.label == 7
    assert same(job.future.result(), images(job))  # type: ignore[arg-type]
    assert all(other.closed for other in others)


# Steps: full ones, and smaller ones for some time after an interactive job.


@pytest.mark.parametrize("measured", [MEASURED, MEASURED_WITH_AMX, {1: 2e-3, 64: 2.2e-3, 256: 5e-3, 512: 9e-3}])
def test_shared_step_is_the_smallest_measured_batch_near_the_rate_of_full_steps(measured: dict[int, float]) -> None:
    limits = StepLimits.of(StepTimes(measured), None, KIND, auto=True)
    near = [rows for rows, seconds in measured.items() if rows / seconds >= (1 - SHARED_TOLERANCE) * limits.full.rate]
    assert limits.background == limits.evaluations
    assert limits.shared == min(near) < limits.evaluations


def test_background_steps_of_a_slow_network_have_few_rows() -> None:
    measured = {rows: 100 * seconds for rows, seconds in MEASURED.items()}  # one evaluation takes 0.1 s
    limits = StepLimits.of(StepTimes(measured), None, KIND, auto=True)
    seconds = StepTimes(measured).step_seconds
    assert seconds(limits.background) <= BACKGROUND_SECONDS < seconds(limits.background + 1)
    assert limits.background < limits.evaluations
    slower = StepLimits.of(StepTimes({1: 1.0, 8: 4.0}), None, KIND, auto=True)
    assert (slower.background, slower.shared) == (1, 1)


def test_fixed_batch_size_has_no_shared_steps() -> None:
    limits = StepLimits.of(StepTimes(MEASURED), 16, KIND, auto=False)
    assert limits.background == limits.shared == limits.evaluations


def test_background_steps_are_small_until_no_interactive_job_has_run_for_some_time() -> None:
    admission = new_admission()
    limits = StepLimits.of(admission.step_times, None, KIND, auto=True)
    admission.admit(background_job(200, num_steps=100), NOW)
    assert len(admission.select(NOW)) == limits.evaluations
    admission.admit(new_job(1, submitted_at=NOW + 1), NOW + 1)
    assert len(admission.select(NOW + 1)) == 1
    admission.backlog.remove(admission.backlog.jobs[0])
    assert len(admission.select(NOW + 1)) == limits.shared
    assert len(admission.select(NOW + 1 + 0.9 * SHARED_SECONDS)) == limits.shared
    assert len(admission.select(NOW + 1 + SHARED_SECONDS)) == limits.evaluations


def test_refused_interactive_job_makes_background_steps_small() -> None:
    admission = new_admission(capacity=4)
    admission.admit(background_job(4, num_steps=100), NOW)
    with pytest.raises(errors.Overloaded):
        admission.admit(new_job(5, submitted_at=NOW), NOW)
    assert admission.background_steps.interactive_at == NOW


def test_background_row_that_is_wider_than_a_shared_step_takes_a_step_alone() -> None:
    admission = new_admission()
    for _ in range(3):
        admission.admit(new_recognition(is_background=True), NOW)
    admission.background_steps.interactive_at = NOW
    (row,) = admission.select(NOW)
    assert row.evaluations > admission._limits_for(admission.background.step_kind()).shared


def test_slowdown_is_computed_from_the_calls_of_the_background_step() -> None:
    admission = new_admission(of_models={"large": {rows: 10 * seconds for rows, seconds in MEASURED.items()}})
    admission.admit(background_job(2, model="large"), NOW)
    rows = admission.select(NOW)
    admission.admit(new_job(1), NOW)
    predicted = 10 * MEASURED[len(rows)]
    for _ in range(50):
        admission.observe(admission.selected.calls(), 3 * predicted)
    assert admission.step_times.slowdown == pytest.approx(3.0, rel=0.01)


# Promises.


def shortest_timeout(factor: float) -> float:
    """Returns the shortest timeout of an admitted job that arrives at the beginning of a background step.

    The step takes `factor` times as long as a step of the default network with one evaluation.
    """

    def is_admitted(timeout: float) -> bool:
        admission = new_admission(of_models={"large": {rows: factor * seconds for rows, seconds in MEASURED.items()}})
        admission.admit(background_job(1, model="large"), NOW)
        assert len(admission.select(NOW)) == 1
        admission.admit(new_job(2, submitted_at=NOW), NOW)
        try:
            admission.admit(new_job(2, num_steps=10, submitted_at=NOW, timeout=timeout), NOW)
        except errors.Overloaded:
            return False
        return True

    shortest, longest = 0.0, 100.0
    while longest - shortest > 1e-6:
        middle = (shortest + longest) / 2
        shortest, longest = (shortest, middle) if is_admitted(middle) else (middle, longest)
    return longest


def test_admission_counts_with_the_end_of_a_background_step_that_takes_longer_than_a_full_step() -> None:
    full = new_admission()._full(KIND).step_seconds
    lone = MEASURED[1]
    assert shortest_timeout(0.9 * full / lone) == pytest.approx(shortest_timeout(1.0), abs=1e-5)
    longer = (100 * lone - full) / TARGET_SHARE  # targets are a share of the timeouts
    assert shortest_timeout(100.0) == pytest.approx(shortest_timeout(1.0) + longer, abs=1e-5)


class SharedService(VirtualService):
    """Also runs background jobs. Requests arrive during the steps, too."""

    def __init__(self, new_background_job: Callable[[], Job], **options: Any) -> None:
        super().__init__(**options)
        self.new_background_job = new_background_job
        self.num_background_steps = 0

    def submit(self, job: Job) -> None:
        backlog, admission = self.admission.backlog, self.admission
        if not backlog.jobs:  # An idle engine admits the job. The bound counts from the end of the step in progress.
            full = admission._full(backlog.step_kind(job))
            start = admission.background_steps.start_of_bounds(full.step_seconds, self.now)
            if start + backlog.latest_finish_seconds(job, full) > job.target:
                self.predicted_late.add(job)
        admission.admit(job, self.now)

    def step(self) -> list[Job]:
        has_interactive = bool(self.admission.backlog.jobs)
        while self.admission.background.waiting < 64:
            self.admission.admit(self.new_background_job(), self.now)
        done = super().step()
        assert (self.admission.selected is self.admission.backlog) == has_interactive
        self.num_background_steps += not has_interactive
        return [job for job in done if not job.request.is_background]

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.arrivals and self.arrivals[0][0] < end:
            time, client = heapq.heappop(self.arrivals)
            self.now = max(self.now, time)
            self._arrive(client)
        self.now = end

    def idle(self) -> None:
        self.step()


@pytest.mark.parametrize("larger", [0.5, 1.0, 10.0, 30.0])
def test_no_admitted_job_is_late_in_random_mixes_beside_background_jobs(larger: float) -> None:
    """With a factor other than 1, the background jobs also use a network that takes this multiple of the time."""
    outcomes: Counter[str] = Counter()
    for seed in range(7000, 7008):
        choose = random.Random(seed)

        def new_background_job(choose: random.Random = choose) -> Job:
            if choose.random() < 0.2:
                return new_recognition(is_background=True)
            return background_job(choose.randint(1, 8), num_steps=100, model=choose.choice(["default", "large"]))

        measured = choose.choice([MEASURED, MEASURED_WITH_AMX])
        service = SharedService(
            new_background_job,
            measured=measured,
            noise=lambda choose=choose: choose.uniform(1.0, 1.1),
            of_models={"large": {rows: larger * seconds for rows, seconds in measured.items()}},
        )
        result = service.run(random_mix(seed, second="large"), until=5.0)
        assert result.late == [], seed
        outcomes.update(outcome for (_, outcome), number in result.outcomes.items() for _ in range(number))
        outcomes["background steps"] += service.num_background_steps
    assert outcomes["200"] > 100
    assert outcomes["429"] > 10
    assert outcomes["background steps"] > 100


Row = tuple[int, int, int]  # number of the job, index of the image, and number of finished steps


class Twin:
    """An admission with the interactive jobs of the machine. Its steps take exactly the predicted time."""

    def __init__(self) -> None:
        self.admission = new_admission(capacity=100, clip_seconds=0.0)
        self.jobs: list[Job] = []

    def admit(self, job: Job, now: float) -> object:
        """Returns the estimate, or the Retry-After of a refused job."""
        try:
            self.admission.admit(job, now)
        except errors.Overloaded as refused:
            return refused.retry_after
        self.jobs.append(job)
        return job.estimate

    def select(self, now: float) -> list[Row]:
        """Returns the rows of the next step, with the positions of their jobs."""
        return [(self.jobs.index(row.job), row.index, row.step) for row in self.admission.select(now)]

    def finish_step(self) -> None:
        backlog, calls = self.admission.selected, self.admission.selected.calls()
        self.admission.observe(calls, self.admission.step_times.measured_seconds(*calls))
        ended = backlog.advance()
        for row in ended:
            if row.comparison:
                backlog.add_errors(row, [1.0 if label == 0 else 9.0 for label in row.comparison.remaining])
        backlog.finish([(row, image(0, row.index, row.step)) for row in ended if not row.steps_left])


class TwinMachine(RuleBasedStateMachine):
    """Gives the same interactive jobs to an admission with background jobs and to one without them.

    Both make the same decisions at the same times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.shared, self.alone = Twin(), Twin()
        self.background: list[Job] = []

    @rule(
        count=st.sampled_from([1, 1, 2, 8, 40]),
        num_steps=st.sampled_from([1, 5, 20]),
        guided=st.booleans(),
        recognises=st.booleans(),
        timeout=st.sampled_from([0.02, 0.1, 0.5, 2.0, None]),
    )
    def submit(self, count: int, num_steps: int, guided: bool, recognises: bool, timeout: float | None) -> None:
        def new() -> Job:
            if recognises and count == 1:
                job = new_recognition(timeout=timeout)
                return Job(job.request, self.now)
            steps = range(num_steps if guided else 0)
            return new_job(count, num_steps, guided_steps=steps, timeout=timeout, submitted_at=self.now)

        assert self.shared.admit(new(), self.now) == self.alone.admit(new(), self.now)

    @rule(count=st.integers(1, 40), num_steps=st.sampled_from([1, 5, 20]), guided=st.booleans())
    def submit_background(self, count: int, num_steps: int, guided: bool) -> None:
        job = background_job(count, num_steps, guided_steps=range(num_steps if guided else 0))
        with suppress(errors.Overloaded):
            self.shared.admission.admit(job, self.now)
            self.background.append(job)

    @precondition(lambda self: self.shared.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.shared.jobs) - 1))
        for twin in (self.shared, self.alone):
            twin.admission.backlog.remove(twin.jobs[number])

    @rule(seconds=st.sampled_from([0.01, 0.1, 3.0]))
    def pause(self, seconds: float) -> None:
        self.now += seconds

    @rule(number=st.integers(1, 30))
    def step(self, number: int) -> None:
        for _ in range(number):
            self.begin_step()
            self.end_step()

    @rule(count=st.sampled_from([1, 3, 20]), share=st.floats(0.0, 1.0))
    def submit_during_a_step(self, count: int, share: float) -> None:
        seconds = self.begin_step()
        start, self.now = self.now, self.now + share * seconds
        self.submit(count, 5, False, False, 2.0)
        self.now = start
        self.end_step()
        has_interactive = bool(self.shared.admission.backlog.num_rows)
        self.begin_step()
        assert not has_interactive or self.shared.admission.selected is self.shared.admission.backlog
        self.end_step()

    def begin_step(self) -> float:
        """Returns the duration of the step."""
        admission, expected = self.shared.admission, self.alone.select(self.now)
        if expected:
            assert self.shared.select(self.now) == expected
        else:
            assert not admission.backlog.jobs
            admission.select(self.now)
        self.is_alone_stepping = bool(expected)
        self.is_stepping = bool(admission.selected.num_rows)
        if not self.is_stepping:
            return 0.0
        for twin in (self.shared, self.alone)[: 1 + bool(expected)]:
            twin.admission.selected.start_batch()
        calls = admission.selected.calls()
        self.seconds = admission.step_times.measured_seconds(*calls)
        return self.seconds

    def end_step(self) -> None:
        if self.is_stepping:
            self.now += self.seconds
            self.shared.finish_step()
        if self.is_alone_stepping:
            self.alone.finish_step()

    @invariant()
    def interactive_backlogs_are_equal(self) -> None:
        shared, alone = self.shared.admission, self.alone.admission
        values = [
            (each.backlog.waiting, each.backlog.running, each.backlog.work, each.reserve.seconds)
            for each in (shared, alone)
        ]
        assert values[0] == values[1]
        assert shared.step_times.slowdown == alone.step_times.slowdown

    def teardown(self) -> None:
        """Runs all jobs to their end."""
        for _ in range(5000):
            if not (self.shared.admission.backlog.jobs or self.shared.admission.background.jobs):
                break
            self.step(1)
        assert all(job.closed for job in self.background)
        assert not self.alone.admission.backlog.jobs


TwinMachine.TestCase.settings = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, stateful_step_count=40
)
test_interactive_jobs_are_admitted_and_selected_as_without_background_jobs = TwinMachine.TestCase
