"""The step loop: a thread that repeatedly selects rows, runs their step and answers finished jobs.

The thread alone uses the runner, the readings and the counts of failures. It shares all other state with the callers
through `Engine` (engine.py), which has the lock. `Mailbox` in app/api/http/events.py passes events to the event loop.

Failures: if a step raises, it is run again in halves until the failing rows are isolated (see isolation.py). Only their
jobs fail. After MAX_FAILED_BATCHES batches in which every row failed, the loop generates the probe image of each model.
The engine itself fails if this raises, if the device is lost, or if the thread raises. It then answers all jobs with
EngineFailed.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial

from app import errors
from app.engine.batch import Calls
from app.engine.engine import Engine, Step
from app.engine.interface import Reading, RunnerError, StepRunner
from app.engine.isolation import R, isolate
from app.engine.job import Frame, Job, Pixels, Result, StepRows, Trajectory
from app.engine.meters import EngineMetrics

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5  # after this time without work, the runner does its idle work (see StepRunner.idle)
MAX_FAILED_BATCHES = 3  # consecutive batches in which every row failed, after which the engine tests itself


class StepLoop:
    """Runs the steps of an engine in a thread. Any thread may call `start` and `stop`, and only `stop` blocks."""

    def __init__(
        self,
        engine: Engine,
        load: Callable[[], StepRunner],
        metrics: EngineMetrics,
        deliver: Callable[[], None] = lambda: None,
    ) -> None:
        """`load` creates the runner.

        `deliver` is called immediately before the network call of each step, and in each iteration without a step.
        Listeners can store their events and deliver them there. If they woke another thread earlier, that thread would
        take the interpreter's lock, and the loop would wait for it. A compiled network call does not need the lock.
        """
        self._engine, self._load, self._metrics, self._deliver = engine, load, metrics, deliver
        self._step_end = 0.0  # the time at which the last step returned, a value of time.monotonic()
        # The calls of the steps that the device has not finished (see Step), or None for a part of a batch.
        self._unfinished: deque[Calls | None] = deque()
        # Readings whose values are not handled yet: a function that says if they are known, and one that handles them.
        self._readings: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self._is_batch_lowered = False  # True if the batch size was already lowered in this iteration
        self._num_failed_rows = 0
        self._failed_batches = {"step": 0, "pixels": 0, "errors": 0}  # consecutive batches in which every row failed
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which loads and warms up the models. Returns immediately."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Ends the thread after its current step. Returns False if it still runs after `timeout` seconds."""
        self._engine.stop()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @cached_property
    def _runner(self) -> StepRunner:
        """Returns the runner. The first access loads it, which must happen in the thread."""
        return self._load()

    def _run(self) -> None:
        try:
            self._engine.open(self._runner, self._runner.warm_up(lambda: self._engine.is_stopping))
            while not self._engine.is_stopping:
                self._tick()
        except BaseException as error:
            self._fail_engine(error)
        finally:
            self._deliver()

    def _tick(self) -> None:
        """Runs one iteration: selects rows, runs their step and answers finished jobs. Waits if there is no work."""
        self._engine.beat = time.monotonic()
        abandoned = self._engine.take_abandoned()
        self._runner.release(abandoned)
        self._is_batch_lowered = False
        if step := self._engine.select():
            self._run_step(step)
            self._retire()
        else:
            self._deliver()
            self._unfinished.clear()
            if not (abandoned or self._readings):
                self._wait_for_work()
        self._finish_readings(must_wait=not step)
        if max(self._failed_batches.values()) >= MAX_FAILED_BATCHES:
            self._check_runner()

    def _run_step(self, step: Step) -> None:
        """Runs a step. Jobs with a row that fails are answered."""
        if step.started:
            for job, count in Counter(row.job for row in step.started).items():
                self._record_start(job, count, step.selected_at)
        num_failed, num_survivors = self._num_failed_rows, 0
        for batch, not_finite in self._run_isolated(step.rows.trajectories, partial(self._step, step)):
            num_survivors += len(batch) - len(not_finite)
            for trajectory in not_finite:
                self._fail(trajectory, ArithmeticError("NaN or infinite values"))
        self._count_batch("step", self._num_failed_rows - num_failed, num_survivors)

    def _read(
        self,
        work: str,
        rows: list[Trajectory],
        read: Callable[[list[Trajectory]], Reading[Sequence[R | None]]],
        then: Callable[[list[tuple[Trajectory, R]]], None],
    ) -> None:
        """Reads values of the rows. Calls `then` when they are known, with the rows that have not failed."""
        if not rows:
            return
        num_failed = self._num_failed_rows
        batches = self._run_isolated(rows, read)
        num_failed = self._num_failed_rows - num_failed

        def finish() -> None:
            nonlocal num_failed
            results = []
            for batch, reading in batches:
                for trajectory, values in zip(batch, reading.wait(), strict=True):
                    if values is not None:
                        results.append((trajectory, values))
                    elif not trajectory.job.closed:
                        num_failed += 1
                        self._fail(trajectory, ArithmeticError("NaN or infinite values"))
            self._count_batch(work, num_failed, len(results))
            then(results)

        self._readings.append((lambda: all(reading.is_ready() for _, reading in batches), finish))

    def _finish_readings(self, *, must_wait: bool) -> None:
        """Handles the values of readings in order. Waits for the first one if the engine has nothing else to do."""
        while self._readings and (must_wait or self._readings[0][0]()):
            _, finish = self._readings.popleft()
            finish()
            must_wait = False

    def _count_batch(self, work: str, num_failed: int, num_survivors: int) -> None:
        if num_survivors:
            self._failed_batches[work] = 0
        elif num_failed:
            self._failed_batches[work] += 1

    def _check_runner(self) -> None:
        """Generates the probe images after too many failed batches. If this raises, the engine fails.

        The test shows whether the device or the requests caused the failures. If it succeeds, the requests caused them,
        and the engine continues.
        """
        log.warning("No row survived, testing the engine with the probe image", extra={"batches": MAX_FAILED_BATCHES})
        self._deliver()
        self._engine.beat = time.monotonic()
        self._runner.check()
        self._failed_batches = dict.fromkeys(self._failed_batches, 0)

    def _wait_for_work(self) -> None:
        """Waits until there is work. Meanwhile the runner does its idle work, one part at a time."""
        self._engine.beat, seconds = None, IDLE_SECONDS
        while not self._engine.wait(seconds if self._runner.has_idle_work else None):
            self._engine.beat = time.monotonic()
            self._runner.idle()
            self._engine.beat, seconds = None, 0.0

    def _record_start(self, job: Job, num_rows: int, now: float) -> None:
        """Records that rows of a job take their first step."""
        timings = job.timings
        if timings.started_at and job.request.search:
            return  # Only the search waited in the queue. The images of this job waited for the search.
        timings.started_at = timings.started_at or now
        if job.request.is_background:
            return  # These jobs may wait for hours, which says nothing about the wait of the others.
        num_images = job.request.count if job.request.search else num_rows
        self._metrics.queue_wait.observe(max(0.0, time.monotonic() - timings.submitted_at), num_images)
        self._metrics.admission_wait.observe(self._engine.num_steps - timings.submitted_at_step, num_images)

    def _run_isolated(
        self, rows: list[Trajectory], compute: Callable[[list[Trajectory]], R]
    ) -> list[tuple[list[Trajectory], R]]:
        return isolate(rows, compute, self._fail, self._lower_max_batch)

    def _lower_max_batch(self) -> None:
        """Lowers the batch size, at most once per iteration.

        A batch that is split into halves can run out of memory several times. This is still one shortage.
        """
        if not self._is_batch_lowered:
            self._is_batch_lowered = True
            self._engine.lower_max_batch()

    def _step(self, step: Step, rows: list[Trajectory]) -> list[Trajectory]:
        """Runs a step, or after a failure a part of its rows. Returns the rows with NaN or infinite values."""
        is_whole = rows is step.rows.trajectories
        step_rows, calls = (step.rows, step.calls) if is_whole else (StepRows.of(rows), None)
        self._engine.beat = start = time.monotonic()
        in_network = self._runner.network_seconds
        not_finite = self._runner.step(step_rows, self._deliver)
        self._unfinished.append(calls)  # After a failure, the durations of parts are not used.
        seconds, finished = self._duration(start)
        self._engine.count_step(finished, seconds)
        self._metrics.denoise_steps.inc()
        self._metrics.step_duration.observe(seconds)
        self._metrics.network.inc(self._runner.network_seconds - in_network)
        self._metrics.batch_rows.observe(len(rows))
        return not_finite

    def _duration(self, start: float) -> tuple[float, Calls | None]:
        """Returns a duration, and the calls of the step that took this time on the device.

        Returns None instead of the calls if the duration is not that of a whole step on the device.

        A runner that enqueues steps does not wait for the device in the first `steps_ahead` steps. Each later call
        returns when the device has finished one more step: the one that was enqueued `steps_ahead` steps before. The
        time between two such returns is the duration of this step on the device.
        """
        end, before, ahead = time.monotonic(), self._step_end, self._runner.steps_ahead
        self._step_end = end
        if len(self._unfinished) <= ahead:
            return end - start, None
        return end - (before if ahead else start), self._unfinished.popleft()

    def _retire(self) -> None:
        """Adds the step to the progress of the rows, and reads the results of those that have ended."""
        ended = self._engine.advance()
        self._read("errors", [row for row in ended if row.comparison], self._runner.errors, self._compare)
        self._send_previews()
        self._read("pixels", [row for row in ended if not row.comparison], self._runner.pixels, self._finish)

    def _finish(self, results: Sequence[tuple[Trajectory, Result]]) -> None:
        """Stores the results of finished rows and frees their slots."""
        if not results:
            return
        finished = self._engine.finish(results)
        images = Counter((row.options.model, row.label) for row in finished if not row.comparison)
        for (model, label), count in images.items():
            info = self._engine.models[model]
            names = info.digit_of(label), info.name_of(label)
            self._metrics.images.labels(*("none" if name is None else str(name) for name in names)).inc(count)
        self._runner.release([trajectory for trajectory, _ in results])

    def _compare(self, results: Sequence[tuple[Trajectory, Sequence[float]]]) -> None:
        """Adds the errors of a step to rows that compare the classes. Finishes those that have no steps left."""
        for trajectory, class_errors in results:
            if not all(map(math.isfinite, class_errors)):
                self._fail(trajectory, ArithmeticError("NaN or infinite errors"))
        self._engine.add_errors(results)
        self._finish([(row, row.comparison) for row, _ in results if row.comparison and not row.steps_left])

    def _send_previews(self) -> None:
        """Sends the previews and frames that are due. A read for all jobs is faster than one for each job."""
        steps, frames = self._engine.due()
        if not (steps or frames):
            return
        plain = [job for job in steps if not job.request.includes_x_t]
        with_x_t = [job for job in steps if job.request.includes_x_t]

        def send(jobs: list[Job], x_0: dict[Trajectory, Pixels], x_t: dict[Trajectory, Pixels]) -> None:
            for job in jobs:
                if job.closed:
                    continue
                previews, noisy = ({row.index: of[row] for row in job.unfinished if row in of} for of in (x_0, x_t))
                job.tell(job.progress(steps[job], previews, noisy if job.request.includes_x_t else None))

        def send_plain(results: list[tuple[Trajectory, Pixels]]) -> None:
            send(plain, dict(results), {})

        def send_pairs(results: list[tuple[Trajectory, tuple[Pixels, Pixels]]]) -> None:
            send(with_x_t, {row: x_0 for row, (x_0, _) in results}, {row: x_t for row, (_, x_t) in results})

        def send_frames(results: list[tuple[Trajectory, tuple[Pixels, Pixels]]]) -> None:
            for row, (_, x_t) in results:
                if (request := row.job.request.frames) and not row.job.closed:
                    request.listener(Frame(row.index, frames[row], x_t))

        self._read("pixels", [row for job in plain for row in job.unfinished], self._runner.pixels, send_plain)
        self._read(
            "pixels", [row for job in with_x_t for row in job.unfinished], self._runner.pixels_with_x_t, send_pairs
        )
        self._read("pixels", list(frames), self._runner.pixels_with_x_t, send_frames)

    def _fail(self, trajectory: Trajectory, error: Exception) -> None:
        facts = {"request_id": trajectory.job.request.request_id, "index": trajectory.index, "step": trajectory.step}
        self._num_failed_rows += 1
        log.error("Row failed", exc_info=error, extra=facts)
        self._engine.cancel(trajectory.job, errors.InternalError())

    def _fail_engine(self, error: BaseException) -> None:
        # A RunnerError before the engine is ready is not logged here, because serve() reports it.
        if self._engine.ready.done() or not isinstance(error, RunnerError):
            log.critical("Engine failed", exc_info=error)
        self._engine.fail(error)
