"""Engines for the measurements, and a runner that measures the time between steps."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from app.engine.engine import Engine
from app.engine.interface import OutOfMemoryError
from app.engine.job import Job, Pixels, StepRows, Trajectory
from app.engine.step_loop import StepLoop
from app.runner.runner import Runner
from scripts.gpu.measurements.machine import Kind, Machine, TimedEvent

READY_SECONDS, JOB_SECONDS, STOP_SECONDS = 120.0, 60.0, 10.0  # time limits
CAPACITY = 100_000


class NoMetrics:
    """Ignores all metrics."""

    def __getattr__(self, name: str) -> "NoMetrics":
        return self

    def labels(self, *values: str) -> "NoMetrics":
        return self

    def inc(self, amount: float = 1) -> None:
        """Does nothing."""

    def observe(self, value: float, count: int = 1) -> None:
        """Does nothing."""


class StepEvents(NamedTuple):
    """The events of a step, in order, and whether rows begin in it."""

    entry: TimedEvent  # before the step
    call: TimedEvent  # before its network call
    end: TimedEvent
    has_new_rows: bool


class MeasuredRunner:
    """A runner that counts steps, their rows, and shortages of memory. It records events if `is_recording` is True."""

    def __init__(self, machine: Machine, runner: Runner) -> None:
        self._machine, self._runner = machine, runner
        self._trajectories: list[Trajectory] = []
        self.row_steps = self.num_steps = self.num_shortages = 0
        self.is_recording = False
        self.events: list[StepEvents] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Runs a step. See Runner.step."""
        is_recording = self.is_recording
        entry = self._machine.event() if is_recording else None
        call: TimedEvent | None = None
        is_changed = rows.trajectories is not self._trajectories
        has_new_rows = is_changed and any(not row.slots for row in rows.trajectories)

        def before() -> None:
            nonlocal call
            call = self._machine.event() if is_recording else None
            before_call()

        try:
            not_finite = self._runner.step(rows, before)
        except OutOfMemoryError:
            self.num_shortages += 1
            raise
        if entry and call:
            self.events.append(StepEvents(entry, call, self._machine.event(), has_new_rows))
        self._trajectories = rows.trajectories
        self.row_steps += len(rows.trajectories)
        self.num_steps += 1
        return not_finite


def idle_share(events: list[StepEvents]) -> float:
    """Returns the share of the time in which the device has no step to do. All events must have passed.

    The time before the network call of a step counts as work only if rows begin in this step, because the device then
    draws their noise. The time of readings counts as idle.
    """
    idle = 0.0
    for before, step in pairwise(events):
        idle += before.end.elapsed_time(step.entry)
        if not step.has_new_rows:
            idle += step.entry.elapsed_time(step.call)
    return idle / events[0].end.elapsed_time(events[-1].end)


@contextmanager
def running_engine(
    machine: Machine, kind: Kind, max_batch: int | None = None
) -> Iterator[tuple[Engine, MeasuredRunner]]:
    """Yields an engine that is ready, and its runner. Stops the engine after the block.

    `max_batch` is the maximum number of rows of a step. If it is None, the engine chooses it from the step times.
    """
    made: list[MeasuredRunner] = []

    def load() -> Any:
        machine.select()
        made.append(MeasuredRunner(machine, machine.runner(kind)))
        return made[0]

    metrics = NoMetrics()
    engine = Engine(capacity=CAPACITY, max_batch=max_batch, watchdog_seconds=JOB_SECONDS, metrics=metrics)
    loop = StepLoop(engine, load, metrics)
    loop.start()
    try:
        engine.ready.result(READY_SECONDS)
        yield engine, made[0]
    finally:
        loop.stop(STOP_SECONDS)


def images_of(engine: Engine, job: Job) -> list[Pixels]:
    """Submits a job and waits for its images. Raises the error of the job, or TimeoutError after JOB_SECONDS."""
    done = threading.Event()
    job.future.add_done_callback(lambda _: done.set())
    engine.submit(job)
    if not done.wait(JOB_SECONDS):
        raise TimeoutError(f"the images were not finished within {JOB_SECONDS:g} s")
    return [image for image in job.future.result() if isinstance(image, np.ndarray)]
