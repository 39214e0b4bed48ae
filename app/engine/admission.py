"""Admits jobs only if every admitted job still finishes in time, and chooses the rows of each step accordingly.

This module uses no threads and no clock: the engine holds its lock and passes the time.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from app import errors
from app.engine.backlog import Backlog
from app.engine.batcher import StepLimits, select_rows
from app.engine.job import Estimate, Job, Trajectory
from app.engine.step_times import StepTimes, Throughput

log = logging.getLogger(__name__)

RECOVERY_SECONDS = 60.0  # without a memory shortage, after which the limit of rows doubles
LONGEST_WAIT = 3600  # seconds; the largest Retry-After


class Admission:
    """The admitted jobs, the limits of a step, and the speed of the machine."""

    def __init__(self, capacity: int, max_batch: int | None) -> None:
        """`capacity` is the number of images that may wait.

        `max_batch` is the largest number of rows of a step. If None, the step times decide.
        """
        self.backlog = Backlog(capacity)
        self.step_times = StepTimes({1: 1.0})
        self._max_batch = max_batch
        self._max_rows: int | None = None  # after a memory shortage
        self._shortage_at = -math.inf
        self._limits: dict[int, StepLimits] = {}  # by the number of models
        self._safe_until = -math.inf  # no target is at risk before this time unless the slowdown has grown
        self._safe_slowdown = 0.0

    @property
    def max_batch(self) -> int:
        """Returns the largest number of rows of a step."""
        return self._limits_for(1).rows

    def open(self, step_times: StepTimes) -> None:
        """Sets the measured step times."""
        self.step_times = step_times
        self._limits.clear()

    def observe(self, rows: Sequence[Trajectory], seconds: float) -> None:
        """Updates the slowdown after a step of these rows that took `seconds`. Call it before the rows advance."""
        calls: dict[str, int] = {}
        for row in rows:
            model = row.job.request.options.model
            calls[model] = calls.get(model, 0) + row.evaluations
        self.step_times.observe(list(calls.values()), seconds)

    def admit(self, job: Job, now: float) -> None:
        """Admits all images of a job and sets its estimate; Overloaded if the job must be refused.

        An idle engine admits every job, since only running steps correct the step times.
        """
        backlog = self.backlog
        if not self._has_room(backlog.waiting, backlog.waiting + backlog.running, job):
            raise errors.Overloaded(self._retry_after(job, now), "the queue has no room for this request")
        full = self._full(job)
        if not backlog.admits(job, full, now):
            detail = "the request, or an earlier one, would miss its deadline"
            raise errors.Overloaded(self._retry_after(job, now), detail)
        job.estimate = Estimate(backlog.waiting, self._seconds_of(job, full))
        backlog.add(job)
        self._safe_until = -math.inf

    def select(self, now: float) -> list[Trajectory]:
        """Returns the rows of the next step."""
        if not self.backlog.jobs:
            return []
        self._recover(now)
        limits = self._limits_for(self.backlog.num_models())
        return select_rows(self.backlog.jobs, limits, at_risk=self._is_at_risk(now))

    def lower_max_batch(self, now: float) -> None:
        """Halves the largest number of rows of a step after a memory shortage."""
        self._shortage_at = now
        self._limit_rows(max(1, self.max_batch // 2))
        log.warning("Out of device memory: limiting the batch", extra={"max_batch": self.max_batch})

    def _has_room(self, waiting: int, images: int, job: Job) -> bool:
        """Returns True if the job fits into the queue when `waiting` of `images` unfinished images have had no step.

        It also limits the images that have begun, because their state takes memory. Otherwise requests with ever
        earlier deadlines would begin and then wait for each other.
        """
        capacity, count = self.backlog.capacity, job.request.count
        return waiting + count <= capacity and images + count <= 2 * (capacity + self.max_batch)

    def _recover(self, now: float) -> None:
        if self._max_rows is not None and now - self._shortage_at >= RECOVERY_SECONDS:
            self._shortage_at = now
            lowered = self.max_batch
            self._limit_rows(2 * self._max_rows)
            if self.max_batch == lowered:
                self._max_rows = None
            else:
                log.info("No memory shortage for a minute: raising the batch", extra={"max_batch": self.max_batch})

    def _limit_rows(self, rows: int | None) -> None:
        self._max_rows = rows
        self._limits.clear()
        self._safe_until = -math.inf

    def _limits_for(self, num_models: int) -> StepLimits:
        if num_models not in self._limits:
            given = [rows for rows in (self._max_batch, self._max_rows) if rows is not None]
            auto = self._max_batch is None
            self._limits[num_models] = StepLimits.of(self.step_times, min(given, default=None), num_models, auto=auto)
        return self._limits[num_models]

    def _full(self, *newcomers: Job) -> Throughput:
        """Returns the throughput of full steps at the machine's present speed."""
        full = self._limits_for(max(1, self.backlog.num_models(*newcomers))).full
        slowdown = self.step_times.slowdown
        return Throughput(full.rate / slowdown, full.step_seconds * slowdown, full.lone_seconds * slowdown)

    def _is_at_risk(self, now: float) -> bool:
        """Returns True if a job may miss its target. Computes it again only if time or slowdown may have changed it."""
        if now < self._safe_until and self.step_times.slowdown <= 1.01 * self._safe_slowdown:
            return False
        slack = self.backlog.slack(self._full(), now)
        self._safe_until, self._safe_slowdown = now + slack, self.step_times.slowdown
        return slack < 0

    def _retry_after(self, job: Job, now: float) -> int:
        """Returns the whole number of seconds after which the job would be admitted if no other job arrived."""
        backlog, full = self.backlog, self._full(job)
        longest = min(LONGEST_WAIT, 1 + math.ceil(backlog.work / full.rate))
        limits = self._limits_for(max(1, backlog.num_models(job)))
        rows = min(limits.rows, int(limits.evaluations / _mean_evaluations(job)))

        def fits(seconds: int) -> bool:
            images = backlog.images_after(seconds, full.rate)
            waiting = min(max(images - rows, 0), backlog.waiting)
            return self._has_room(waiting, images, job) and backlog.admits(job, full, now, seconds)

        return _first(fits, longest)

    def _seconds_of(self, job: Job, full: Throughput) -> float:
        """Returns the expected time to finish.

        For an image that has a row in every step, this is the time of its own steps. Otherwise it is the bound.
        """
        backlog, num_models = self.backlog, max(1, self.backlog.num_models(job))
        limits = self._limits_for(num_models)
        mean = _mean_evaluations(job)
        first_round = (len(backlog) + 1) * mean
        if job.request.count > 1 or first_round > max(mean, limits.evaluations // 2):
            return backlog.finish_seconds(job, full)
        fewest = 1 if backlog.jobs else limits.evaluations
        share = limits.share(len(backlog) + 1, fewest, math.ceil(first_round))
        evaluations = min(share, (backlog.waiting + backlog.running + 1) * mean)
        seconds = self.step_times.step_seconds(evaluations) + (num_models - 1) * full.lone_seconds
        return job.request.options.num_steps * seconds


def _mean_evaluations(job: Job) -> float:
    """Returns the evaluations of one row in one step: the mean over all steps of an image."""
    return job.request.evaluations_from(0) / job.request.options.num_steps


def _first(fits: Callable[[int], bool], longest: int) -> int:
    """Returns a short wait that fits, in seconds; `longest` if none is found.

    A later submission has a later target, which may come after the target of another job. A longer wait may thus not
    fit although a shorter one does. Therefore the search starts with short waits.
    """
    low, high = 0, 1
    while high < longest and not fits(high):
        low, high = high, 2 * high
    return bisect_left(range(min(high, longest)), True, lo=low + 1, key=fits)
