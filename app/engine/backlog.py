"""The admitted jobs in order of their targets, and a bound on when each of them finishes.

The bound holds if steps are full and rows are chosen in this order. For a job it is the time that full steps need for
all evaluations up to and including this job's, without those of its longest image, plus the time of that image's
steps. The figures of the jobs are kept in numpy arrays, since admission looks at every job.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.engine.job import Job, Pixels, Trajectory
from app.engine.step_times import Throughput

Array = npt.NDArray[np.float64]

LOST_MARGIN = 0.9  # a job is lost if it would miss its deadline even if it ran alone and took 0.9 of the measured time
# The columns of the table. Work is in evaluations. The tail is the image with the most steps left.
_TARGET, _DEADLINE, _WORK, _TAIL_WORK, _TAIL_STEPS, _WAITING, _RUNNING, _IMAGE_WORK = range(8)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The number and the slot that the backlog gives to a job."""

    number: int  # counts the jobs; decides between equal targets
    slot: int  # the job's row in the table


class Backlog:
    """The admitted jobs that are not answered yet, by target; jobs with equal targets in order of arrival."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of images that may wait."""
        self.capacity = capacity
        self.waiting = 0  # images without a step; an image runs from its first step on
        self.running = 0
        self.jobs: list[Job] = []
        self._entries: dict[Job, _Entry] = {}
        self._num_added = 0
        self._table = np.zeros((64, 8))  # a row for each job, at its slot
        self._free = list(range(64))
        self._order = np.zeros(0, dtype=np.intp)  # the slots of `jobs`
        self._of_model: Counter[str] = Counter()

    def __contains__(self, job: Job) -> bool:
        """Returns True if the job was added and not removed."""
        return job in self._entries

    def __iter__(self) -> Iterator[Job]:
        """Iterates over the jobs by target."""
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    def num_models(self, *newcomers: Job) -> int:
        """Returns the number of models that the jobs and `newcomers` use. Each model costs one call in every step."""
        return len(self._of_model.keys() | {job.request.options.model for job in newcomers})

    def add(self, job: Job) -> None:
        """Inserts a job at its place in the order. The caller must have checked that its images fit."""
        assert self.waiting + job.request.count <= self.capacity, "the queue has room"
        if not self._free:
            size = len(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._free = list(range(size, 2 * size))
        entry = self._entries[job] = _Entry(self._num_added, self._free.pop())
        self._num_added += 1
        place = self._place(job)
        self.jobs.insert(place, job)
        self._order = np.insert(self._order, place, entry.slot)
        self.waiting += job.request.count
        self._of_model[job.request.options.model] += 1
        self._table[entry.slot] = _figures(job)

    def remove(self, job: Job) -> bool:
        """Removes a job and its images; returns False if it is not in the backlog."""
        if job not in self._entries:
            return False
        place = self._place(job)
        del self.jobs[place]
        self._order = np.delete(self._order, place)
        self._free.append(self._entries.pop(job).slot)
        self._of_model -= Counter([job.request.options.model])  # removes the key at 0
        self.waiting -= job.num_waiting
        self.running -= len(job.unfinished) - job.num_waiting
        return True

    def start(self, trajectory: Trajectory) -> None:
        """Marks an image that waited as running."""
        trajectory.started = True
        trajectory.job.num_waiting -= 1
        self.waiting -= 1
        self.running += 1

    def advance(self, rows: Sequence[Trajectory]) -> None:
        """Counts one more step of each of these images."""
        for row in rows:
            row.job.evaluations_left -= row.evaluations
            row.job.steps_done += 1
            row.step += 1
        self._update(rows)

    def finish(self, images: Sequence[tuple[Trajectory, Pixels]]) -> None:
        """Stores finished images and answers the jobs whose last image is among them."""
        for trajectory, pixels in images:
            job = trajectory.job
            if len(job.unfinished) == 1:
                self.remove(job)
            else:
                self.running -= 1
            job.finish(trajectory, pixels)
        self._update([trajectory for trajectory, _ in images])

    def slack(self, full: Throughput, now: float) -> float:
        """Returns the smallest time in seconds between the bound of a job and its target; infinity without jobs.

        Adds the time of one full step, which is in progress or is about to be chosen. Ignores lost jobs.
        """
        rows = self._table[self._order]
        left = np.cumsum(rows[:, _WORK])
        slack = rows[:, _TARGET] - now - full.step_seconds - _finish(rows, left, full)
        return float(slack.min(initial=np.inf, where=~_is_lost(rows, full, now)))

    def admits(self, job: Job, full: Throughput, now: float, wait: float = 0.0) -> bool:
        """Returns True if `job`, submitted after `wait` seconds, and all jobs that it delays would meet their targets.

        It assumes that the backlog drains in order until then and that no other job arrives. An empty backlog admits
        every job. Lost jobs are ignored.
        """
        rows = self._table[self._order]
        drained = wait * full.rate
        total = np.cumsum(rows[:, _WORK])
        left = np.maximum(total - drained, 0.0)
        if not left.any():
            return True
        own = np.array([_figures(job)])
        target = own[0, _TARGET] + wait
        place = int(np.searchsorted(rows[:, _TARGET], target, side="right"))
        start = now + wait + full.step_seconds  # a step is in progress
        own_left = own[:, _WORK] + (left[place - 1] if place else 0.0)
        if start + _finish(own, own_left, full)[0] > target:
            return False
        delayed = (left > 0) & ~_is_lost(rows, full, now)
        tail_left = np.minimum(left / np.maximum(rows[:, _TAIL_WORK], 1.0), 1.0)  # share of each tail after the wait
        rows[:, [_TAIL_WORK, _TAIL_STEPS]] *= tail_left[:, None]
        if self.num_models() == self.num_models(job):  # another model would slow down every step
            delayed[:place] = False
        left[place:] += own[0, _WORK]
        late = start + _finish(rows, left, full) > rows[:, _TARGET]
        return not bool((late & delayed).any())

    def finish_seconds(self, job: Job, full: Throughput) -> float:
        """Returns the bound for a job that is not added yet."""
        rows = self._table[self._order]
        place = int(np.searchsorted(rows[:, _TARGET], job.target, side="right"))
        own = np.array([_figures(job)])
        return float(_finish(own, own[:, _WORK] + rows[:place, _WORK].sum(), full)[0])

    def images_after(self, seconds: float, rate: float) -> int:
        """Returns the number of images that are left after the backlog drained in order for `seconds`.

        The running images of each job finish before its waiting ones, evenly over the time that they need together.
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
        """Returns the number of evaluations that all jobs together have left."""
        return float(self._table[self._order, _WORK].sum())

    def _update(self, rows: Sequence[Trajectory]) -> None:
        for job in dict.fromkeys(row.job for row in rows):
            if entry := self._entries.get(job):
                self._table[entry.slot] = _figures(job)

    def _place(self, job: Job) -> int:
        return bisect_left(self.jobs, self._key(job), key=self._key)

    def _key(self, job: Job) -> tuple[float, int]:
        return job.target, self._entries[job].number


def _figures(job: Job) -> tuple[float, ...]:
    last = job.unfinished[-1]  # no image of the job has more steps left
    return (
        job.target,
        job.deadline,
        job.evaluations_left,
        last.evaluations_left,
        last.steps_left,
        job.num_waiting,
        len(job.unfinished) - job.num_waiting,
        job.request.evaluations_from(0),
    )


def _finish(rows: Array, left: Array, full: Throughput) -> Array:
    """Returns the bound (N,), in seconds from now. `left` (N,) is the work up to and including each job."""
    others = np.maximum(left - rows[:, _TAIL_WORK], 0.0)
    return others / full.rate + rows[:, _TAIL_STEPS] * full.step_seconds


def _is_lost(rows: Array, full: Throughput, now: float) -> npt.NDArray[np.bool_]:
    """Returns True (N,) for jobs that would miss their deadlines even if each ran alone."""
    alone = np.maximum(rows[:, _WORK] / full.rate, rows[:, _TAIL_STEPS] * full.lone_seconds)
    return now + LOST_MARGIN * alone > rows[:, _DEADLINE]
