"""The backlog: the admitted jobs in order of their targets, and an upper bound on the finish time of each job.

Target: the time at which the scheduler aims to finish a job. It is the submission time plus 90% of the timeout. The
remaining 10% are for steps that are slower than predicted.

Bound: if every step from now on is full and takes its rows in the order of the jobs, except for what the reserve pays
for (see reserve.py), a job finishes within

    ((W - w) / R + s * T + B) / (1 - RESERVE_SHARE)    seconds, where

    W    evaluations that are left of this job and of all jobs before it, without the reserved jobs
    w, s evaluations and steps that are left of the job's tail, which is its image with the most steps left
    R    evaluations per second in full steps
    T    seconds of a full step
    B    the capacity of the reserve

Reason: a step either has a row of the tail or it is full of other rows of these jobs. There are s steps of the first
kind, of at most T seconds each. The steps of the second kind together have at most W - w evaluations at the rate R.
This takes D = (W - w) / R + s * T seconds. In a time t, the reserve takes at most B + RESERVE_SHARE * t, so that the
job ends when t = D + B + RESERVE_SHARE * t.

Example: R is 2000 per second, T is 8 ms, B is 0.15 s. The first job has 64 new images of 100 steps without guidance.
Without the reserve it would take 6300 / 2000 + 100 * 0.008 = 3.95 s, so its bound is (3.95 + 0.15) / 0.9 = 4.56 s. For
an equal second job, the bound is (12700 / 2000 + 0.8 + 0.15) / 0.9 = 8.11 s.

A job is lost if it would miss its deadline even if it ran alone. The bounds of lost jobs are ignored, since otherwise
one lost job would keep all new requests out and put every step at risk.

Comparison: a row that compares the classes takes one evaluation for each remaining class. W counts all of these classes
for all steps that are left. The bound becomes lower when classes are dropped. R also holds for steps with such rows: a
full step has room for the widest row, and R is the lowest rate of a step into which the next row did not fit.

Search: a job that searches for its class has two stages. W has the evaluations of both stages. The tail is the search,
followed by one image: w and s are the sums of both. The reason above still holds. The images begin after the search, so
these s steps are all different.

The table of all jobs is a numpy array, because the bounds of all jobs are computed together. A step subtracts the
progress of its rows from the whole table at once.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count as count_from
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from app.engine.batch import Batch, Calls
from app.engine.job import GUIDED_EVALUATIONS, RESERVE_SHARE, Job, Result, StepKind, Trajectory
from app.engine.step_times import Throughput

K = TypeVar("K")
Array = npt.NDArray[np.float64]
S = TypeVar("S", float, Array)

# A job is lost if it would miss its deadline even if it ran alone and needed only this share of the predicted time.
LOST_MARGIN = 0.9
# The rows of the table: times in seconds of time.monotonic(), work in evaluations, waiting and running in images.
# IMAGE_WORK is the work of one image from its first step to its last step.
_WORK, _TAIL_WORK, _TAIL_STEPS, _TARGET, _DEADLINE, _WAITING, _RUNNING, _IMAGE_WORK = range(8)
_DECREASING = slice(_WORK, _TAIL_STEPS + 1)  # the rows that each step decreases
FIRST_PLACES = 64  # initial number of jobs for which the table has room


class Backlog:
    """The admitted jobs that are not answered yet, in the order in which they are served.

    Reserved jobs come first, in order of arrival, and the others follow in order of their targets. Others with equal
    targets are in order of arrival.
    """

    def __init__(self, capacity: int, numbers: Iterator[int] | None = None) -> None:
        """`capacity` is the maximum number of waiting images.

        `numbers` yields the number of each new job. Backlogs can share it, so that their jobs have different numbers.
        """
        self.capacity = capacity
        self.waiting = 0  # images that have not started their first step
        self.running = 0  # unfinished images that have started
        self.extra_slots = 0  # slots that unfinished searches need in addition to one for each image
        self.work = 0  # evaluations that are left of all jobs together
        self.num_rows = 0  # rows that can take a step
        self.jobs: list[Job] = []  # in order
        self.num_reserved = 0  # the number of reserved jobs, which are the first ones of `jobs`
        self.batch = Batch()
        self.is_changed = False  # True if other rows may have to be selected for the next step
        self._new_rows: dict[Trajectory, None] = {}  # rows that were added after the last selection, in order
        self._keys: list[tuple[float, int]] = []  # the key of each job of `jobs` (see _key_of)
        self._numbers = count_from(1) if numbers is None else numbers
        self._last_number = 0  # the number of the newest job
        self._table = np.zeros((8, FIRST_PLACES))  # (rows, places)
        self._decreases: Array | None = None  # what a step subtracts from the table, (3, places); None if not known
        self._free = list(range(FIRST_PLACES))  # the places without a job
        self._order = np.zeros(FIRST_PLACES, dtype=np.intp)  # the places of `jobs`, in the same order
        self._counts = Counter[int]()  # the number of jobs by their number of images
        self.with_previews: dict[Job, None] = {}  # the jobs that send previews or frames
        # The numbers of jobs that are not reserved: of each model, by the evaluations of their widest row, and of those
        # with CLIP guidance.
        self._models = Counter[str]()
        self._widths = Counter[int]()
        self._num_with_clip = 0
        self._kind: StepKind | None = None  # the kind of the jobs that are not reserved; None if it is not known

    def __contains__(self, job: Job) -> bool:
        """Returns True if the job was added and not removed."""
        return job.place >= 0

    def __iter__(self) -> Iterator[Job]:
        """Iterates over the jobs in order."""
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def reserved(self) -> list[Job]:
        """Returns the reserved jobs."""
        return self.jobs[: self.num_reserved]

    @property
    def others(self) -> list[Job]:
        """Returns the jobs that are not reserved, in order of their targets."""
        return self.jobs[self.num_reserved :]

    @property
    def has_small_and_large(self) -> bool:
        """Returns True if there are a job with one image and a job with several images."""
        return len(self._counts) > 1 and 1 in self._counts

    def step_kind(self, *new_jobs: Job) -> StepKind:
        """Returns the kind of the steps of all jobs and `new_jobs` together."""
        return self.bound_kind(*self.reserved, *new_jobs)

    def bound_kind(self, *new_jobs: Job) -> StepKind:
        """Returns the kind of the steps of the jobs that are not reserved and `new_jobs` together."""
        kind = self._kind
        if kind is None:
            widest = max(GUIDED_EVALUATIONS, *self._widths, 0)
            kind = self._kind = StepKind(tuple(sorted(self._models)), widest, self._num_with_clip > 0)
        if not new_jobs:
            return kind
        new_models = {job.request.options.model for job in new_jobs} - self._models.keys()
        if new_models:
            kind = kind._replace(models=tuple(sorted(self._models.keys() | new_models)))
        for job in new_jobs:
            if job.widest_row > kind.widest_row:
                kind = kind._replace(widest_row=job.widest_row)
            if job.request.clip and not kind.has_clip:
                kind = kind._replace(has_clip=True)
        return kind

    @property
    def fewest_images(self) -> int:
        """Returns the number of images of the smallest job. There must be a job."""
        return min(self._counts)

    def add(self, job: Job, *, is_reserved: bool = False) -> None:
        """Inserts a job at its place in the order. The caller must have checked that the queue has room for it."""
        assert self.waiting + job.request.count <= self.capacity, "add() needs a job that fits into the queue"
        job.number = self._last_number = next(self._numbers)
        job.place, job.is_reserved = self._take_place(), is_reserved
        self.num_reserved += is_reserved
        key, count = _key_of(job), len(self.jobs)
        position = bisect_left(self._keys, key)
        self.jobs.insert(position, job)
        self._keys.insert(position, key)
        self._order[position + 1 : count + 1] = self._order[position:count]
        self._order[position] = job.place
        self._table[:, job.place] = _column_of(job)
        self.waiting += job.request.count
        self.extra_slots += job.extra_slots
        self.work += job.evaluations_left
        self._count_kind(job, 1)
        if (job.request.listener and job.request.num_previews) or job.request.frames:
            self.with_previews[job] = None
        self._add_rows(job.unfinished)

    def remove(self, job: Job) -> bool:
        """Removes a job and its images. Returns False if the job is not in the backlog."""
        if job.place < 0:
            return False
        position, count = bisect_left(self._keys, _key_of(job)), len(self.jobs)
        self.num_reserved -= job.is_reserved
        del self.jobs[position], self._keys[position]
        self._order[position : count - 1] = self._order[position + 1 : count]
        self._free.append(job.place)
        job.place = -1
        self.batch.remove(job.unfinished)
        self._decreases = None  # a new job can take the place of this one before the step of the batch ends
        for row in job.unfinished:
            self._new_rows.pop(row, None)
        self.num_rows -= len(job.unfinished) - job.num_pending
        self.is_changed = True
        self.waiting -= job.num_waiting
        self.running -= job.num_running
        self.extra_slots -= job.extra_slots
        self.work -= job.evaluations_left
        self._count_kind(job, -1)
        self.with_previews.pop(job, None)
        return True

    def join(self, most: int, most_rows: int) -> bool:
        """Adds all rows that can take a step to the batch. Returns False if this is not possible.

        It is possible if these are only the rows of the batch and rows that were added after the last selection, and if
        the batch then has at most `most` evaluations and `most_rows` rows.
        """
        new, num_in_batch = self._new_rows, len(self.batch.rows)
        if self.num_rows > most_rows or self.num_rows != num_in_batch + len(new):
            return False
        if self.batch.size + sum(row.evaluations for row in new) > most:
            return False
        self.batch.add(list(new))
        self._selected()
        return True

    def replace_batch(self, rows: Sequence[Trajectory]) -> None:
        """Makes these rows the batch."""
        self.batch.replace(rows)
        self._selected()

    def calls(self) -> Calls:
        """Returns the sizes of the calls of the next step, as `Batch.calls`."""
        return self.batch.calls(self.step_kind())

    def start_batch(self) -> list[Trajectory]:
        """Marks the rows of the batch as started. Returns those that had not started before.

        The images of a search wait until it ends. Call this before the first step of a batch.
        """
        started = [row for row in self.batch.take_joined() if not row.started]
        if started:
            self.start(started)
        return started

    def start(self, rows: Sequence[Trajectory]) -> None:
        """Marks rows that wait as started."""
        for row in rows:
            row.started = True
        for job, count in Counter(row.job for row in rows if not row.job.is_searching).items():
            job.num_waiting -= count
            self.waiting -= count
            self.running += count
            self._table[_WAITING, job.place] = job.num_waiting
            self._table[_RUNNING, job.place] = job.num_running

    def advance(self) -> list[Trajectory]:
        """Adds one step to each row of the batch.

        Returns the rows whose result must be read: they have ended, or they compare the classes. They have left the
        batch. `add_errors` adds those back that have steps left.
        """
        if self._decreases is None:
            self._decreases = self.batch.decreases(self._table.shape[1])
        self._table[_DECREASING] -= self._decreases
        self.work -= self.batch.size
        version = self.batch.version
        leaving = self.batch.advance()
        for row in leaving:
            row.job.num_pending += 1
        self.num_rows -= len(leaving)
        if self.batch.version != version:
            self.is_changed, self._decreases = True, None
        return leaving

    def add_errors(self, row: Trajectory, errors: Sequence[float]) -> None:
        """Adds the errors of a step to a row that compares the classes. Dropped classes reduce the remaining work.

        If the row has steps left, it can take the next one.
        """
        assert row.comparison, "add_errors() needs a row that compares the classes"
        before = row.evaluations_left
        row.comparison.add(errors)
        self.work -= before - row.evaluations_left
        self._update(row.job)
        if row.steps_left:
            row.job.num_pending -= 1
            self._add_rows([row])

    def finish(self, results: Sequence[tuple[Trajectory, Result]]) -> None:
        """Stores the results of finished rows and answers the jobs whose last image is among them."""
        for trajectory, result in results:
            job = trajectory.job
            if trajectory.is_search:
                self.extra_slots -= job.extra_slots
            elif len(job.unfinished) == 1:
                self.remove(job)
            else:
                self.running -= 1
                self._table[_RUNNING, job.place] -= 1
            job.num_pending -= 1
            job.finish(trajectory, result)
            if trajectory.is_search:
                self._update(job)
                self._add_rows(job.unfinished)

    def slack(self, full: Throughput, now: float) -> float:
        """Returns the time in seconds for which row selection may still deviate from the order of the jobs.

        This is the minimum over all jobs of target - (now + bound + time of one full step). The full step is the step
        in progress, or the next step, which may deviate. If the result is negative, a target is at risk. Lost and
        reserved jobs are ignored. The result is infinity without other jobs.
        """
        jobs = self._in_order(self.num_reserved)
        slack = jobs[_TARGET] - now - full.step_seconds - _finish(jobs, np.cumsum(jobs[_WORK]), full)
        return float(slack.min(initial=np.inf, where=~_is_lost(jobs, full, now)))

    def admits(self, job: Job, full: Throughput, present: Throughput, now: float, wait: float = 0.0) -> bool:
        """Returns True if `job` and all jobs that it delays would meet their targets.

        It delays the jobs with later targets. If it changes the kind of the steps, it delays all jobs, because every
        step may then take longer. Lost and reserved jobs are ignored. An empty backlog admits every job (see
        admission.py). `full` is the throughput of full steps with the job, and `present` without it: a job is not lost
        because the new one would make its steps longer.

        With `wait`, the job is submitted `wait` seconds from now. Until then, the backlog drains in order at the rate
        of full steps, and no other job arrives.
        """
        if self.work <= wait * full.rate:
            return True
        jobs = self._in_order(self.num_reserved)
        left = np.maximum(np.cumsum(jobs[_WORK]) - wait * full.rate, 0.0)
        own = _column_of(job)[:, None]
        target = own[_TARGET, 0] + wait
        position = int(np.searchsorted(jobs[_TARGET], target, side="right"))
        start = now + wait + full.step_seconds  # the step in progress ends before the job can start
        own_left = own[_WORK] + (left[position - 1] if position else 0.0)
        if start + _finish(own, own_left, full)[0] > target:
            return False
        delayed = (left > 0) & ~_is_lost(jobs, present, now)
        # the share of each tail that is left after the wait
        tail_left = np.minimum(left / np.maximum(jobs[_TAIL_WORK], 1.0), 1.0)
        jobs[_TAIL_WORK : _TAIL_STEPS + 1] *= tail_left
        if self.bound_kind() == self.bound_kind(job):
            delayed[:position] = False  # steps do not become longer, so jobs with earlier targets are not delayed
        left[position:] += own[_WORK, 0]
        late = start + _finish(jobs, left, full) > jobs[_TARGET]
        return not bool((late & delayed).any())

    def finish_seconds(self, job: Job, full: Throughput) -> float:
        """Returns the bound in seconds for a job that is not in the backlog yet, without the time of the reserve."""
        return self._alone_after(job, self._work_before(job), full)

    def latest_finish_seconds(self, job: Job, full: Throughput) -> float:
        """Returns the bound in seconds for a new job if all other jobs come before it. It takes a constant time."""
        return _with_reserve(self._alone_after(job, self.work, full), full)

    def images_after(self, seconds: float, rate: float) -> int:
        """Returns the predicted number of unfinished images after the backlog has drained in order for `seconds`.

        `rate` is in evaluations per second. Within a job, the running images finish first and the waiting images after
        them. Both finish at regular intervals.

        Example: at 100 evaluations per second, a job of 10 images with 10 steps each has 5 images left after 0.5 s.
        """
        jobs = self._in_order()
        before = np.cumsum(jobs[_WORK]) - jobs[_WORK]
        left = jobs[_WORK] - np.clip(seconds * rate - before, 0.0, jobs[_WORK])
        of_waiting = jobs[_WAITING] * jobs[_IMAGE_WORK]
        of_running = np.maximum(jobs[_WORK] - of_waiting, 1.0)
        running = jobs[_RUNNING] * np.maximum(left - of_waiting, 0.0) / of_running
        waiting = np.minimum(left, of_waiting) / jobs[_IMAGE_WORK]
        return int(np.ceil(running + waiting - 1e-9).sum())

    def _work_before(self, job: Job) -> float:
        """Returns the work of the jobs that would come before a new job."""
        position = bisect_left(self._keys, (job.target, self._last_number + 1))
        if position == len(self.jobs):
            return self.work
        return float(self._table[_WORK, self._order[:position]].sum())

    def _alone_after(self, job: Job, before: float, full: Throughput) -> float:
        """Returns the bound without the time of the reserve. `before` is the work of the jobs that come first."""
        tail_work, tail_steps = job.tail
        return (before + job.evaluations_left - tail_work) / full.rate + tail_steps * full.step_seconds

    def _in_order(self, first: int = 0) -> Array:
        """Returns a copy of the table with a column for each job from the position `first`, in order (rows, J)."""
        return self._table[:, self._order[first : len(self.jobs)]]

    def _add_rows(self, rows: Sequence[Trajectory]) -> None:
        """Adds rows that can take the next step."""
        self._new_rows |= dict.fromkeys(rows)
        self.num_rows += len(rows)
        self.is_changed = True

    def _selected(self) -> None:
        self._new_rows, self._decreases, self.is_changed = {}, None, False

    def _take_place(self) -> int:
        """Returns a free place of the table. Doubles the size of the table if there is none."""
        if not self._free:
            size = self._table.shape[1]
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
            self._order = np.concatenate([self._order, np.zeros_like(self._order)])
            self._free, self._decreases = list(range(size, 2 * size)), None
        return self._free.pop()

    def _update(self, job: Job) -> None:
        if job.place >= 0:
            self._table[:, job.place] = _column_of(job)

    def _count_kind(self, job: Job, change: int) -> None:
        """Adds a job to the counters that determine the kind of the steps, or removes it from them."""
        _add(self._counts, job.request.count, change)
        if job.is_reserved:
            return
        _add(self._models, job.request.options.model, change)
        _add(self._widths, job.widest_row, change)
        self._num_with_clip += change * (job.request.clip is not None)
        self._kind = None


def _key_of(job: Job) -> tuple[float, int]:
    return -math.inf if job.is_reserved else job.target, job.number


def _add(counter: Counter[K], key: K, change: int) -> None:
    counter[key] += change
    if not counter[key]:
        del counter[key]


def _column_of(job: Job) -> Array:
    """Returns the column (rows,) of a job in the table."""
    column = (job.evaluations_left, *job.tail, job.target, job.deadline, job.num_waiting, job.num_running)
    return np.array([*column, job.image_work], dtype=np.float64)


def _finish(jobs: Array, left: Array, full: Throughput) -> Array:
    """Returns the bound (J,) of each job in seconds. `left` (J,) is the work of each job and all jobs before it."""
    others = np.maximum(left - jobs[_TAIL_WORK], 0.0)
    return _with_reserve(others / full.rate + jobs[_TAIL_STEPS] * full.step_seconds, full)


def _with_reserve(seconds: S, full: Throughput) -> S:
    """Returns the time that the work takes if the reserve takes as much as it can."""
    return (seconds + full.reserve_seconds) / (1 - RESERVE_SHARE)


def _is_lost(jobs: Array, full: Throughput, now: float) -> npt.NDArray[np.bool_]:
    """Returns True (J,) for each job that would miss its deadline even if it ran alone."""
    alone = np.maximum(jobs[_WORK] / full.rate, jobs[_TAIL_STEPS] * full.lone_seconds)
    return now + LOST_MARGIN * alone > jobs[_DEADLINE]
