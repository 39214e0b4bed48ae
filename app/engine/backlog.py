"""The backlog: the admitted jobs in order of their targets, and an upper bound on the finish time of each job.

Target: the time at which the scheduler aims to finish a job. It is the submission time plus 90% of the timeout. The
remaining 10% are a reserve for steps that are slower than predicted.

Bound: if every step from now on is full and takes its rows in the order of the jobs, a job finishes within

    (W - w) / R + s * T    seconds, where

    W    evaluations that are left of this job and of all jobs before it
    w, s evaluations and steps that are left of the job's tail, which is its image with the most steps left
    R    evaluations per second in full steps
    T    seconds of a full step

Reason: a step either has a row of the tail or it is full of other rows of these jobs. There are s steps of the first
kind, of at most T seconds each. The steps of the second kind together have at most W - w evaluations at the rate R.

Example: R is 2000 per second, T is 8 ms. The first job has 64 new images of 100 steps without guidance. Its bound is
6300 / 2000 + 100 * 0.008 = 3.95 s. For an equal second job, the bound is 12700 / 2000 + 0.8 = 7.15 s.

A job is lost if it would miss its deadline even if it ran alone. The bounds of lost jobs are ignored, since otherwise
one lost job would keep all new requests out and put every step at risk.

Comparison: a row that compares the classes takes one evaluation for each remaining class. W counts all of these classes
for all steps that are left. The bound becomes lower when classes are dropped. R also holds for steps with such rows: a
full step has room for the widest row, and R is the lowest rate of a step into which the next row did not fit.

Search: a job that searches for its digit has two stages. W has the evaluations of both stages. The tail is the search,
followed by one image: w and s are the sums of both. The reason above still holds. The images begin after the search, so
these s steps are all different.

The table of all jobs is a numpy array, because admission computes the bound of every job for each request.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.engine.job import GUIDED_EVALUATIONS, Job, Result, StepKind, Trajectory
from app.engine.step_times import Throughput

Array = npt.NDArray[np.float64]

# A job is lost if it would miss its deadline even if it ran alone and needed only this share of the predicted time.
LOST_MARGIN = 0.9
# The columns of the table: times in seconds of time.monotonic(), work in evaluations, waiting and running in images.
# IMAGE_WORK is the work of one image from its first step to its last step.
_TARGET, _DEADLINE, _WORK, _TAIL_WORK, _TAIL_STEPS, _WAITING, _RUNNING, _IMAGE_WORK = range(8)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The place of a job in the backlog."""

    number: int  # increases with each added job; orders jobs with equal targets by arrival
    slot: int  # the job's row in the table


class Backlog:
    """The admitted jobs that are not answered yet, in order of their targets. Equal targets are in order of arrival."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the maximum number of waiting images."""
        self.capacity = capacity
        self.waiting = 0  # images that have not started their first step
        self.running = 0  # unfinished images that have started
        self.extra_slots = 0  # slots that unfinished searches need in addition to one for each image
        self.jobs: list[Job] = []  # sorted by target
        self._entries: dict[Job, _Entry] = {}
        self._num_added = 0
        self._table = np.zeros((64, 8))  # (slots, columns)
        self._free = list(range(64))  # the slots without a job
        self._order = np.zeros(0, dtype=np.intp)  # the slots of `jobs`, in the same order
        self._of_model: Counter[str] = Counter()  # the number of jobs of each model
        self._of_width: Counter[int] = Counter()  # the number of jobs by the evaluations of their widest row
        self._num_with_clip = 0  # the number of jobs with CLIP guidance

    def __contains__(self, job: Job) -> bool:
        """Returns True if the job was added and not removed."""
        return job in self._entries

    def __iter__(self) -> Iterator[Job]:
        """Iterates over the jobs in order of their targets."""
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    def step_kind(self, *new_jobs: Job) -> StepKind:
        """Returns the kind of the steps of the jobs and `new_jobs` together."""
        models = self._of_model.keys() | {job.request.options.model for job in new_jobs}
        widest = max([GUIDED_EVALUATIONS, *self._of_width, *(job.request.widest_row for job in new_jobs)])
        has_clip = self._num_with_clip > 0 or any(job.request.clip for job in new_jobs)
        return StepKind(max(1, len(models)), widest, has_clip)

    def add(self, job: Job) -> None:
        """Inserts a job at its place in the order. The caller must have checked that the queue has room for it."""
        assert self.waiting + job.request.count <= self.capacity, "add() needs a job that fits into the queue"
        if not self._free:
            size = len(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._free = list(range(size, 2 * size))
        entry = self._entries[job] = _Entry(self._num_added, self._free.pop())
        self._num_added += 1
        job.number = self._num_added
        place = self._place(job)
        self.jobs.insert(place, job)
        self._order = np.insert(self._order, place, entry.slot)
        self.waiting += job.request.count
        self.extra_slots += job.extra_slots
        self._of_model[job.request.options.model] += 1
        self._of_width[job.request.widest_row] += 1
        self._num_with_clip += job.request.clip is not None
        self._table[entry.slot] = _table_row(job)

    def remove(self, job: Job) -> bool:
        """Removes a job and its images. Returns False if the job is not in the backlog."""
        if job not in self._entries:
            return False
        place = self._place(job)
        del self.jobs[place]
        self._order = np.delete(self._order, place)
        self._free.append(self._entries.pop(job).slot)
        self._of_model -= Counter([job.request.options.model])  # Counter's -= deletes keys whose count becomes 0
        self._of_width -= Counter([job.request.widest_row])
        self._num_with_clip -= job.request.clip is not None
        self.waiting -= job.num_waiting
        self.running -= job.num_running
        self.extra_slots -= job.extra_slots
        return True

    def start(self, trajectory: Trajectory) -> None:
        """Marks a waiting image as running, or a search as started. The images of a search wait until it ends."""
        trajectory.started = True
        if trajectory.is_search:
            return
        trajectory.job.num_waiting -= 1
        self.waiting -= 1
        self.running += 1

    def advance(self, rows: Sequence[Trajectory]) -> None:
        """Adds one step to each of these images."""
        for row in rows:
            row.job.evaluations_left -= row.evaluations
            row.job.steps_done += not row.is_search
            row.step += 1
        self._update(rows)

    def add_errors(self, row: Trajectory, errors: Sequence[float]) -> None:
        """Adds the errors of a step to a row that compares the classes. Dropped classes reduce the remaining work."""
        assert row.comparison, "add_errors() needs a row that compares the classes"
        before = row.evaluations_left
        row.comparison.add(errors)
        row.job.evaluations_left -= before - row.evaluations_left
        self._update([row])

    def finish(self, results: Sequence[tuple[Trajectory, Result]]) -> None:
        """Stores the results of finished rows and answers the jobs whose last image is among them."""
        for trajectory, result in results:
            job = trajectory.job
            if trajectory.is_search:
                self.extra_slots -= job.extra_slots
            else:
                if len(job.unfinished) == 1:
                    self.remove(job)
                else:
                    self.running -= 1
            job.finish(trajectory, result)
        self._update([trajectory for trajectory, _ in results])

    def slack(self, full: Throughput, now: float) -> float:
        """Returns the time in seconds for which row selection may still deviate from the order of the jobs.

        This is the minimum over all jobs of target - (now + bound + time of one full step). The full step is the step
        in progress, or the next step, which may deviate. If the result is negative, a target is at risk. Lost jobs
        are ignored. The result is infinity without jobs.
        """
        rows = self._table[self._order]
        left = np.cumsum(rows[:, _WORK])
        slack = rows[:, _TARGET] - now - full.step_seconds - _finish(rows, left, full)
        return float(slack.min(initial=np.inf, where=~_is_lost(rows, full, now)))

    def admits(self, job: Job, full: Throughput, now: float, wait: float = 0.0) -> bool:
        """Returns True if `job` and all jobs that it delays would meet their targets.

        It delays the jobs with later targets. If it changes the kind of the steps, it delays all jobs, because every
        step may then take longer. Lost jobs are ignored. An empty backlog admits every job (see admission.py).

        With `wait`, the job is submitted `wait` seconds from now. Until then, the backlog drains in order at the rate
        of full steps, and no other job arrives.
        """
        rows = self._table[self._order]
        drained = wait * full.rate
        total = np.cumsum(rows[:, _WORK])
        left = np.maximum(total - drained, 0.0)
        if not left.any():
            return True
        own = np.array([_table_row(job)])
        target = own[0, _TARGET] + wait
        place = int(np.searchsorted(rows[:, _TARGET], target, side="right"))
        start = now + wait + full.step_seconds  # the step in progress ends before the job can start
        own_left = own[:, _WORK] + (left[place - 1] if place else 0.0)
        if start + _finish(own, own_left, full)[0] > target:
            return False
        delayed = (left > 0) & ~_is_lost(rows, full, now)
        # the share of each tail that is left after the wait
        tail_left = np.minimum(left / np.maximum(rows[:, _TAIL_WORK], 1.0), 1.0)
        rows[:, [_TAIL_WORK, _TAIL_STEPS]] *= tail_left[:, None]
        if self.step_kind() == self.step_kind(job):
            delayed[:place] = False  # steps do not become longer, so jobs with earlier targets are not delayed
        left[place:] += own[0, _WORK]
        late = start + _finish(rows, left, full) > rows[:, _TARGET]
        return not bool((late & delayed).any())

    def finish_seconds(self, job: Job, full: Throughput) -> float:
        """Returns the bound in seconds for a job that is not in the backlog yet."""
        rows = self._table[self._order]
        place = int(np.searchsorted(rows[:, _TARGET], job.target, side="right"))
        own = np.array([_table_row(job)])
        return float(_finish(own, own[:, _WORK] + rows[:place, _WORK].sum(), full)[0])

    def images_after(self, seconds: float, rate: float) -> int:
        """Returns the predicted number of unfinished images after the backlog has drained in order for `seconds`.

        `rate` is in evaluations per second. Within a job, the running images finish first and the waiting images after
        them. Both finish at regular intervals.

        Example: at 100 evaluations per second, a job of 10 images with 10 steps each has 5 images left after 0.5 s.
        """
        jobs = self._table[self._order]
        before = np.cumsum(jobs[:, _WORK]) - jobs[:, _WORK]
        left = jobs[:, _WORK] - np.clip(seconds * rate - before, 0.0, jobs[:, _WORK])
        of_waiting = jobs[:, _WAITING] * jobs[:, _IMAGE_WORK]
        of_running = np.maximum(jobs[:, _WORK] - of_waiting, 1.0)
        running = jobs[:, _RUNNING] * np.maximum(left - of_waiting, 0.0) / of_running
        waiting = np.minimum(left, of_waiting) / jobs[:, _IMAGE_WORK]
        return int(np.ceil(running + waiting - 1e-9).sum())

    @property
    def work(self) -> float:
        """Returns the number of evaluations that are left of all jobs together."""
        return float(self._table[self._order, _WORK].sum())

    def _update(self, rows: Sequence[Trajectory]) -> None:
        for job in dict.fromkeys(row.job for row in rows):
            if entry := self._entries.get(job):
                self._table[entry.slot] = _table_row(job)

    def _place(self, job: Job) -> int:
        return bisect_left(self.jobs, self._key(job), key=self._key)

    def _key(self, job: Job) -> tuple[float, int]:
        return job.target, self._entries[job].number


def _table_row(job: Job) -> tuple[float, ...]:
    return (
        job.target,
        job.deadline,
        job.evaluations_left,
        *job.tail,
        job.num_waiting,
        job.num_running,
        job.request.evaluations_from(0),
    )


def _finish(rows: Array, left: Array, full: Throughput) -> Array:
    """Returns the bound (N,) of each job in seconds. `left` (N,) is the work of each job and all jobs before it."""
    others = np.maximum(left - rows[:, _TAIL_WORK], 0.0)
    return others / full.rate + rows[:, _TAIL_STEPS] * full.step_seconds


def _is_lost(rows: Array, full: Throughput, now: float) -> npt.NDArray[np.bool_]:
    """Returns True (N,) for each job that would miss its deadline even if it ran alone."""
    alone = np.maximum(rows[:, _WORK] / full.rate, rows[:, _TAIL_STEPS] * full.lone_seconds)
    return now + LOST_MARGIN * alone > rows[:, _DEADLINE]
