"""The loop of the engine thread: it chooses rows, runs their step and answers finished jobs.

One condition protects the state that threads share. Only the engine thread uses the runner. Callers wait on futures,
and the engine thread waits on the condition. Nothing polls.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from functools import cached_property

from app import errors
from app.engine.admission import Admission
from app.engine.interface import ModelInfo, RunnerError, StepRunner
from app.engine.isolation import R, isolate
from app.engine.job import Job, Pixels, Trajectory
from app.engine.step_times import StepTimes
from app.metrics import Metrics

log = logging.getLogger(__name__)

STARTING_SECONDS = 5  # Retry-After while the service starts; loading takes about this long
RESTART_SECONDS = 10  # Retry-After until the service is started again
MAX_FAILED_BATCHES = 3  # in a row without a surviving row; then the known pictures are drawn to test the engine


class EngineState(StrEnum):
    """The state of the engine. Jobs are admitted only while it is `ok`."""

    STARTING = "starting"
    OK = "ok"
    DRAINING = "draining"
    FAILED = "failed"

    def refuse_unless_ok(self) -> None:
        """Raises Starting, Draining or EngineFailed unless the state is `ok`."""
        if self is EngineState.STARTING:
            raise errors.Starting(STARTING_SECONDS)
        if self is EngineState.DRAINING:
            raise errors.Draining(RESTART_SECONDS)
        if self is EngineState.FAILED:
            raise errors.EngineFailed(RESTART_SECONDS)


class Engine:
    """Runs jobs. Any thread may call the public methods. Only `stop` blocks."""

    def __init__(
        self,
        load: Callable[[], StepRunner],
        *,
        capacity: int,
        max_batch: int | None,
        watchdog_seconds: float,
        metrics: Metrics,
    ) -> None:
        self.state = EngineState.STARTING
        self.models: dict[str, ModelInfo] = {}  # the served models by name; empty until the engine is ready
        self.device_memory: Callable[[], int] | None = None  # returns the bytes held on a GPU; set when ready
        self.ready: Future[None] = Future()  # done after loading and warm-up; has the error if they failed
        self._load = load
        self._watchdog_seconds, self._metrics = watchdog_seconds, metrics
        self._admission = Admission(capacity, max_batch)
        self.backlog = self._admission.backlog
        self._condition = threading.Condition()
        self._abandoned: list[Trajectory] = []  # of jobs that were answered early; the engine thread frees the slots
        self._idle: Future[None] | None = None  # the future that drain() returns
        self._stopping = False
        self._num_steps = 0
        self._is_batch_lowered = False  # in this turn of the loop
        self._num_failed_rows = 0
        self._failed_batches = {"step": 0, "pixels": 0}  # in a row without a surviving row
        self._last_beat: float | None = None  # time.monotonic(); None while the engine is idle or starting
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine thread, which loads and warms up the models. Returns at once."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Admits all images of a job; Overloaded, Starting, Draining or EngineFailed if it cannot."""
        with self._condition:
            self.apparent_state.refuse_unless_ok()
            self._admission.admit(job, time.monotonic())
            job.timings.submitted_at_step = self._num_steps
            self._condition.notify()

    def cancel(self, job: Job, error: Exception) -> None:
        """Answers a job with an error. The next step does not contain its rows."""
        with self._condition:
            self._end(job, error)
            self._condition.notify()

    def drain(self) -> Future[None]:
        """Refuses new jobs from now on. Returns a future that is done when every admitted job is answered."""
        with self._condition:
            if self.state is not EngineState.FAILED:
                self.state = EngineState.DRAINING
            if not self._idle:
                self._idle = Future()
                self._idle.set_running_or_notify_cancel()  # mark as running so that a caller cannot cancel it
            self._note_idle()
            return self._idle

    def give_up(self, error: Exception) -> None:
        """Answers every unanswered job with the error."""
        with self._condition:
            for job in list(self.backlog.jobs):
                self._end(job, error)

    def stop(self, timeout: float) -> bool:
        """Ends the thread after its present step; returns False if it is still busy after `timeout` seconds."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Returns True unless the engine thread has failed or its current step exceeds the watchdog timeout."""
        beat = self._last_beat
        return self.state is not EngineState.FAILED and (
            beat is None or time.monotonic() - beat < self._watchdog_seconds
        )

    @property
    def apparent_state(self) -> EngineState:
        """Returns the state that clients see. A stuck engine counts as failed."""
        return self.state if self.alive else EngineState.FAILED

    @cached_property
    def _runner(self) -> StepRunner:
        """Returns the runner. The engine thread loads it when it starts, and no other thread uses it."""
        return self._load()

    def _run(self) -> None:
        try:
            self._open(self._runner.warm_up(lambda: self._stopping))
            while not self._stopping:
                self._tick()
        except BaseException as error:
            self._die(error)

    def _open(self, step_times: StepTimes) -> None:
        with self._condition:
            self._admission.open(step_times)
            self.models, self.device_memory = self._runner.models, self._runner.device_memory
            if self.state is EngineState.STARTING:
                self.state = EngineState.OK
        self.ready.set_result(None)

    def _tick(self) -> None:
        """Runs one turn: waits for work, chooses rows, runs their step and answers finished jobs."""
        rows, abandoned = self._admit()
        self._runner.release(abandoned)
        self._is_batch_lowered = False
        self._retire(self._run_step(rows))
        if max(self._failed_batches.values()) >= MAX_FAILED_BATCHES:
            self._check_runner()

    def _run_step(self, rows: list[Trajectory]) -> list[Trajectory]:
        """Runs one step and returns the rows that survived it."""
        num_failed = self._num_failed_rows
        stepped = self._isolated(rows, self._step)
        for trajectory, finite in stepped:
            if not finite:
                self._fail(trajectory, ArithmeticError("NaN or infinite values"))
        survivors = [trajectory for trajectory, finite in stepped if finite]
        self._count_batch("step", self._num_failed_rows - num_failed, len(survivors))
        return survivors

    def _read_pixels(self, rows: list[Trajectory]) -> list[tuple[Trajectory, Pixels]]:
        num_failed = self._num_failed_rows
        read = self._isolated(rows, self._runner.pixels)
        self._count_batch("pixels", self._num_failed_rows - num_failed, len(read))
        return read

    def _count_batch(self, work: str, num_failed: int, num_survivors: int) -> None:
        if num_survivors:
            self._failed_batches[work] = 0
        elif num_failed:
            self._failed_batches[work] += 1

    def _check_runner(self) -> None:
        """Draws the known pictures after too many failed batches. If this raises, the engine fails.

        Requests that fail on their own therefore cannot stop the engine.
        """
        log.warning("No row survived in %d batches in a row: drawing the known picture", MAX_FAILED_BATCHES)
        self._last_beat = time.monotonic()
        self._runner.check()
        self._failed_batches = dict.fromkeys(self._failed_batches, 0)

    def _admit(self) -> tuple[list[Trajectory], list[Trajectory]]:
        """Waits for work. Returns the rows of the next step, and the abandoned rows that the runner can release."""
        with self._condition:
            self._last_beat = None
            self._condition.wait_for(lambda: self.backlog.jobs or self._abandoned or self._stopping)
            self._last_beat = time.monotonic()
            abandoned, self._abandoned = self._abandoned, []
            rows = [] if self._stopping else self._admission.select(self._last_beat)
            for trajectory in rows:
                if not trajectory.started:
                    self.backlog.start(trajectory)
                    self._note_start(trajectory.job)
            return rows, abandoned

    def _note_start(self, job: Job) -> None:
        timings = job.timings
        timings.started_at = timings.started_at or self._last_beat
        self._metrics.queue_wait.observe(max(0.0, time.monotonic() - timings.submitted_at))
        self._metrics.admission_wait.observe(self._num_steps - timings.submitted_at_step)

    def _isolated(
        self, rows: list[Trajectory], compute: Callable[[list[Trajectory]], list[R]]
    ) -> list[tuple[Trajectory, R]]:
        return isolate(rows, compute, self._fail, self._lower_max_batch)

    def _lower_max_batch(self) -> None:
        """Lowers the batch size at most once in a turn."""
        if not self._is_batch_lowered:
            self._is_batch_lowered = True
            with self._condition:
                self._admission.lower_max_batch(time.monotonic())

    def _step(self, rows: list[Trajectory]) -> list[bool]:
        self._last_beat = start = time.monotonic()
        in_network = self._runner.network_seconds
        finite = self._runner.step(rows)
        seconds = time.monotonic() - start
        self._num_steps += 1
        self._admission.observe(rows, seconds)
        self._metrics.denoise_steps.inc()
        self._metrics.step_duration.observe(seconds)
        self._metrics.network.inc(self._runner.network_seconds - in_network)
        self._metrics.batch_rows.observe(len(rows))
        return finite

    def _retire(self, rows: list[Trajectory]) -> None:
        with self._condition:
            rows = [trajectory for trajectory in rows if not trajectory.job.closed]
            self.backlog.advance(rows)
        self._send_previews(rows)
        done = self._read_pixels([trajectory for trajectory in rows if not trajectory.steps_left])
        with self._condition:
            finished = [(trajectory, pixels) for trajectory, pixels in done if not trajectory.job.closed]
            self.backlog.finish(finished)
            for trajectory, _ in finished:
                self._metrics.images.labels(str(trajectory.job.request.options.digit)).inc()
            self._note_idle()
        self._runner.release([trajectory for trajectory, _ in done])

    def _send_previews(self, rows: list[Trajectory]) -> None:
        for job in dict.fromkeys(trajectory.job for trajectory in rows):
            if job.request.listener and job.preview_due():
                drawn = dict(self._read_pixels(job.unfinished))
                job.tell(job.progress({trajectory.index: pixels for trajectory, pixels in drawn.items()}))

    def _fail(self, trajectory: Trajectory, error: Exception) -> None:
        request_id = trajectory.job.request.request_id
        self._num_failed_rows += 1
        log.error("a row failed at step %d", trajectory.step, exc_info=error, extra={"request_id": request_id})
        with self._condition:
            self._end(trajectory.job, errors.InternalError())

    def _end(self, job: Job, error: Exception) -> None:
        """Answers a job before it is finished. The caller must hold the condition."""
        if not self.backlog.remove(job):
            return
        for trajectory in job.unfinished:
            self._metrics.cancelled.labels("running" if trajectory.started else "waiting").inc()
        self._abandoned += job.unfinished
        job.fail(error)
        self._note_idle()

    def _die(self, error: BaseException) -> None:
        if self.ready.done() or not isinstance(error, RunnerError):  # serve() reports why the start failed
            log.critical("the engine has failed", exc_info=error)
        with self._condition:
            self.state = EngineState.FAILED
            for job in list(self.backlog.jobs):
                self._end(job, errors.EngineFailed(RESTART_SECONDS))
        if not self.ready.done():
            self.ready.set_exception(error)

    def _note_idle(self) -> None:
        if self._idle and not self._idle.done() and not self.backlog.jobs:
            self._idle.set_result(None)
