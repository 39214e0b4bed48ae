"""The engine: admits, selects and answers jobs. StepLoop (step_loop.py) runs the steps in a thread of its own.

The engine has the state that this thread shares with the callers: the admitted jobs, and whether the engine runs. One
lock protects it. Only `Engine` uses the lock, the admission and the backlog. Each of its methods takes the lock itself
and returns values or copies, so that no caller can forget the lock. Callers wait on futures. The thread waits on the
condition variable of the lock while there is no work. Neither of them polls. tests/app/engine/lock_guard.py finds uses
without the lock.

Callers admit their jobs themselves, because a request that is refused must be answered at once. If they sent commands
to the thread, it would answer them only after the step in progress.

Some values are read without the lock:

    single values   `state`, `num_steps`, `beat`, `is_stopping`, `closed` of a job, and `is_wanted` of the feed
    the models      they are set before `ready` completes
    jobs            only the thread changes `unfinished`, and therefore reads it without the lock
    rows            the clock of a row changes when its job is cancelled, in one assignment, so that the runner can read
                    `step` without the lock

Drain: `drain` refuses new jobs and returns a future that completes when all admitted jobs are answered. If this takes
too long, the caller answers the remaining jobs with `give_up`. Background jobs (see background.py) could take hours, so
`drain` answers them at once. Their caller submits them again after a restart.

Heartbeat: the thread stores the time before each step. `alive` is False if the last heartbeat is older than
`watchdog_seconds`, which happens if a step or the idle work of the runner hangs. While the engine starts or waits for
work, it has no heartbeat and is alive.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import StrEnum
from typing import NamedTuple

from app import errors
from app.engine.admission import Admission
from app.engine.backlog import Backlog
from app.engine.batch import Calls
from app.engine.batch_feed import Batch, BatchFeed
from app.engine.interface import ClipEmbedder, ModelInfo, StepRunner
from app.engine.job import Job, Result, StepRows, Trajectory
from app.engine.meters import EngineMetrics
from app.engine.step_times import StepTimes

STARTING_SECONDS = 5  # Retry-After while the service starts: the usual duration of loading and warm-up
RESTART_SECONDS = 10  # Retry-After while the service drains or has failed: the usual duration of a restart


class EngineState(StrEnum):
    """The state of the engine. Jobs are admitted only in the state `ok`."""

    STARTING = "starting"
    OK = "ok"
    DRAINING = "draining"
    FAILED = "failed"

    def refuse_unless_ok(self) -> None:
        """Raises Starting, Draining or EngineFailed if the state is not `ok`."""
        if self is EngineState.STARTING:
            raise errors.Starting(STARTING_SECONDS)
        if self is EngineState.DRAINING:
            raise errors.Draining(RESTART_SECONDS)
        if self is EngineState.FAILED:
            raise errors.EngineFailed(RESTART_SECONDS)


class ImageCounts(NamedTuple):
    """The numbers of unfinished images. Both are 0 if all jobs are answered."""

    waiting: int  # images of interactive jobs before their first step
    running: int  # images of all jobs between their first and last step


class Step(NamedTuple):
    """The step that `select` has chosen."""

    rows: StepRows
    calls: Calls  # see Backlog.calls
    started: list[Trajectory]  # the rows that take their first step
    selected_at: float  # a value of time.monotonic()


class Engine:
    """Admits, selects and answers jobs. Any thread may call the public methods. Only `wait` blocks."""

    def __init__(
        self, *, capacity: int, max_batch: int | None, watchdog_seconds: float, metrics: EngineMetrics
    ) -> None:
        """See Admission for `capacity` and `max_batch`."""
        self.models: dict[str, ModelInfo] = {}  # the served models by name; empty until the engine is ready
        self.clip: ClipEmbedder | None = None  # None until the engine is ready, and without a CLIP model
        self.clip_evaluations = 0  # network evaluations that take as long as the gradient of CLIP for one row
        self.device_memory: Callable[[], int] | None = None  # returns the bytes reserved on a GPU; set when ready
        self.ready: Future[None] = Future()  # completes after loading and warm-up, with their error if they failed
        self.beat: float | None = None  # the last heartbeat, a value of time.monotonic(); None without one
        self.capacity = capacity  # the maximum number of waiting images, without those of background jobs
        self.feed = BatchFeed()
        self._watchdog_seconds, self._metrics = watchdog_seconds, metrics
        # The lock is reentrant, because the futures and listeners of a job are called while it is held.
        self._condition = threading.Condition(threading.RLock())
        self._admission = Admission(capacity, max_batch)
        self._backlog, self._background = self._admission.backlog, self._admission.background
        self._abandoned: list[Trajectory] = []  # rows of jobs that ended early; the thread frees their slots
        self._drained: Future[None] | None = None  # the future that drain() returns
        self._has_given_up = False
        self._is_stopping = False
        self._state = EngineState.STARTING
        self._num_steps = 0

    @property
    def state(self) -> EngineState:
        """Returns the state of the engine. It stays `ok` while a step hangs (see apparent_state)."""
        return self._state

    @property
    def alive(self) -> bool:
        """Returns False if the engine has failed or if its current step has exceeded the watchdog timeout."""
        beat = self.beat
        return self.state is not EngineState.FAILED and (
            beat is None or time.monotonic() - beat < self._watchdog_seconds
        )

    @property
    def apparent_state(self) -> EngineState:
        """Returns the state that clients see. An engine whose step hangs counts as failed."""
        return self.state if self.alive else EngineState.FAILED

    @property
    def num_steps(self) -> int:
        """Returns the number of finished steps."""
        return self._num_steps

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    def open(self, runner: StepRunner, step_times: StepTimes) -> None:
        """Completes `ready`, and admits jobs from now on, unless the engine drains."""
        self.models, self.device_memory = runner.models, runner.device_memory
        self.clip, self.clip_evaluations = runner.clip, step_times.clip_evaluations
        with self._condition:
            self._admission.open(step_times, runner.max_rows)
            if self._state is EngineState.STARTING:
                self._state = EngineState.OK
        self.ready.set_result(None)

    def submit(self, job: Job, *, is_accepted: bool = False) -> None:
        """Admits all images of a job, or raises Overloaded, Starting, Draining or EngineFailed.

        `is_accepted` is True for a request that has waited for CLIP. It is also admitted during a drain, unless
        `give_up` has answered all requests, or the job is a background job.
        """
        may_drain = is_accepted and not job.request.is_background
        if not self.alive:  # A step that hangs would keep the job waiting.
            raise errors.EngineFailed(RESTART_SECONDS)
        with self._condition:
            if not (may_drain and self._state is EngineState.DRAINING and not self._has_given_up):
                self._state.refuse_unless_ok()
            self._admission.admit(job, time.monotonic())
            job.timings.submitted_at_step = self._num_steps
            self._condition.notify()

    def cancel(self, job: Job, error: Exception) -> None:
        """Answers a job with an error. The next step does not contain its rows. Does nothing if the job is answered."""
        if job.closed:  # No lock is needed, and the thread need not wake up.
            return
        with self._condition:
            self._end(job, error)
            self._condition.notify()

    def drain(self) -> Future[None]:
        """Refuses new jobs from now on, and answers the background jobs with Draining.

        Returns a future that completes when all admitted jobs are answered.
        """
        with self._condition:
            if self._state is not EngineState.FAILED:
                self._state = EngineState.DRAINING
            if not self._drained:
                self._drained = Future()
                self._drained.set_running_or_notify_cancel()  # A future that is running cannot be cancelled by callers.
            self._end_all(list(self._background.jobs), errors.Draining(RESTART_SECONDS))
            self._complete_drain_if_idle()
            drained = self._drained
        self.feed.end(errors.Draining(RESTART_SECONDS))
        return drained

    def give_up(self, error: errors.UnfogError) -> None:
        """Answers all jobs with the error, and ends the feed with it. A drain then admits no accepted jobs either."""
        self.feed.end(error)
        with self._condition:
            self._has_given_up = True
            self._end_all(self._jobs(), error)

    def fail(self, error: BaseException) -> None:
        """Changes the state to `failed`, and answers all jobs with EngineFailed. If not ready, fails `ready`."""
        with self._condition:
            self._state = EngineState.FAILED
            self._end_all(self._jobs(), errors.EngineFailed(RESTART_SECONDS))
        self.feed.end(errors.EngineFailed(RESTART_SECONDS))
        if not self.ready.done():
            self.ready.set_exception(error)

    def stop(self) -> None:
        """Lets `wait` return at once, and `select` return None."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()

    def count_images(self) -> ImageCounts:
        """Returns the numbers of unfinished images."""
        with self._condition:
            return self._counts()

    def num_interactive(self) -> int:
        """Returns the number of unfinished images of interactive jobs."""
        with self._condition:
            return self._backlog.waiting + self._backlog.running

    def full_step(self) -> int:
        """Returns the present maximum number of rows of a step."""
        with self._condition:
            return self._admission.max_batch

    def publish_if_idle(self) -> None:
        """Publishes a batch without rows if the feed wants a batch and there are no jobs."""
        with self._condition:
            if self.feed.is_wanted and not self._jobs():
                self._publish(self._num_steps, ())

    def wait(self, seconds: float | None) -> bool:
        """Waits for work, without a limit if `seconds` is None. Returns False if there is none after this time."""
        with self._condition:
            self.publish_if_idle()
            return self._condition.wait_for(self._has_work, seconds)

    def take_abandoned(self) -> list[Trajectory]:
        """Returns the rows of the jobs that ended early after the last call."""
        with self._condition:
            abandoned, self._abandoned = self._abandoned, []
            return abandoned

    def select(self) -> Step | None:
        """Returns the next step, or None if no row can take one. Publishes its rows if the feed wants a batch."""
        with self._condition:
            now = time.monotonic()
            if self._is_stopping or not self._admission.select(now):
                return None
            backlog = self._admission.selected
            step = Step(backlog.batch.step_rows(), backlog.calls(), backlog.start_batch(), now)
            if self.feed.is_wanted:
                self._publish(self._num_steps + 1, step.rows.trajectories)
            return step

    def count_step(self, calls: Calls | None, seconds: float) -> None:
        """Counts a step. Updates the slowdown with the duration of the calls, unless they are None."""
        with self._condition:
            self._num_steps += 1
            if calls:
                self._admission.observe(calls, seconds)

    def lower_max_batch(self) -> None:
        """Lowers the batch size after a memory shortage."""
        with self._condition:
            self._admission.lower_max_batch(time.monotonic())

    def advance(self) -> list[Trajectory]:
        """Adds the step to the progress of the rows. Returns the rows whose result must be read (see Backlog)."""
        with self._condition:
            return self._admission.selected.advance()

    def due(self) -> tuple[dict[Job, int], dict[Trajectory, int]]:
        """Returns the jobs with a preview that is due, and the rows with a frame that is due.

        The values are the mean number of finished steps of the images of each job, and the number of each frame. A
        second call at the same progress returns none.
        """
        with self._condition:
            jobs = self._admission.selected.with_previews
            steps = {job: job.steps_done // job.request.count for job in jobs if job.preview_due()}
            return steps, {row: number for job in jobs for row, number in job.frames_due()}

    def add_errors(self, results: Sequence[tuple[Trajectory, Sequence[float]]]) -> None:
        """Adds the errors of a step to the rows that compare the classes, unless their jobs are answered."""
        with self._condition:
            for row, class_errors in results:
                if not row.job.closed:
                    self._backlog_of(row.job).add_errors(row, class_errors)

    def finish(self, results: Sequence[tuple[Trajectory, Result]]) -> list[Trajectory]:
        """Stores the results of rows, unless their jobs are answered. Returns the rows whose results it has stored."""
        with self._condition:
            finished = [(row, result) for row, result in results if not row.job.closed]
            for row, result in finished:
                self._backlog_of(row.job).finish([(row, result)])
            self._complete_drain_if_idle()
            return [row for row, _ in finished]

    def _has_work(self) -> bool:
        return bool(self._admission.next.num_rows or self._abandoned or self._is_stopping)

    def _publish(self, step: int, selected: Sequence[Trajectory]) -> None:
        """Publishes the running rows. `selected` has the rows of this step."""
        self.feed.publish(Batch.of(step, *self._counts(), self._jobs(), selected))

    def _jobs(self) -> list[Job]:
        """Returns all jobs. The background jobs come last."""
        return [*self._backlog.jobs, *self._background.jobs]

    def _backlog_of(self, job: Job) -> Backlog:
        return self._background if job.request.is_background else self._backlog

    def _counts(self) -> ImageCounts:
        return ImageCounts(self._backlog.waiting, self._backlog.running + self._background.running)

    def _end_all(self, jobs: Sequence[Job], error: errors.UnfogError) -> None:
        for job in jobs:
            self._end(job, error)

    def _end(self, job: Job, error: Exception) -> None:
        """Answers a job with an error, unless it is answered."""
        if not self._backlog_of(job).remove(job):
            return
        for is_started in job.images_started():
            self._metrics.cancelled.labels("running" if is_started else "waiting").inc()
        self._abandoned += job.unfinished
        job.fail(error)
        self._complete_drain_if_idle()

    def _complete_drain_if_idle(self) -> None:
        if self._drained and not self._drained.done() and not self._jobs():
            self._drained.set_result(None)
