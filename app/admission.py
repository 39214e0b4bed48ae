"""What is let in, and how many rows a step has for those who are. No threads, no clock: the engine holds its lock."""

import logging

from app import errors
from app.batcher import Batcher, QueueFullError
from app.forecast import evaluations_a_step, retry_after, seconds_to_finish, seconds_to_room
from app.limits import Limits
from app.pace import Pace
from app.trajectory import Job, Trajectory

log = logging.getLogger(__name__)


class Admission:
    """The admitted jobs, what a step may hold, and how long it takes."""

    def __init__(self, capacity: int, max_batch: int | None) -> None:
        """`capacity` images may wait; `max_batch` rows a step, or None for what the pace will tell."""
        self.batcher = Batcher(capacity)
        self.pace = Pace({1: 1.0})
        self._limits, self._is_auto = Limits.fixed(max_batch or 1), max_batch is None

    @property
    def max_batch(self) -> int:
        """Rows that a step may have."""
        return self._limits.most

    def open(self, pace: Pace) -> None:
        """Steps have been timed."""
        self.pace = pace
        if self._is_auto:
            self._limits = Limits.auto(pace)

    def lower_max_batch(self, rows: int) -> None:
        """A step with more was too large for the device."""
        self._limits = self._limits.lowered_to(rows)
        log.warning("out of device memory: at most %d rows a step from now on", self.max_batch)

    def admit(self, job: Job) -> None:
        """Takes a job whole, with its place and its forecast; Overloaded where it cannot be done in time."""
        max_rows = self._max_rows(job)
        job.position = self.batcher.waiting
        job.eta_seconds = seconds_to_finish(self.batcher, job, max_rows, self.pace)
        late = job.eta_seconds - job.timeout
        if late > 0 and self.batcher.num_jobs:  # an idle engine always tries: only steps correct the pace
            detail = f"the backlog would end {late:.0f} s after the request's own deadline"
            raise errors.Overloaded(retry_after(late), detail)
        try:
            self.batcher.add(job)
        except QueueFullError as full:
            wait = seconds_to_room(self.batcher, full.missing, max_rows, self.pace)
            raise errors.Overloaded(retry_after(wait)) from full

    def select(self) -> list[Trajectory]:
        """The rows of the next step."""
        return self.batcher.select(self._max_rows())

    def _max_rows(self, *more: Job) -> int:
        jobs = [*self.batcher.jobs, *more]
        return self._limits.rows([len(job.unfinished) for job in jobs], evaluations_a_step(jobs[: self._limits.most]))
