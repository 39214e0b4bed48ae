"""Decides which rows run: what waits, what runs, how much fits, who is next. No tensors, no threads, no clock."""

from itertools import islice, zip_longest
from typing import TypeVar

from app.trajectory import Job, Trajectory

T = TypeVar("T")


class QueueFullError(Exception):
    """The job's images do not fit among those that wait; `missing` of them would have to start first."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} images too many")
        self.missing = missing


class Batcher:
    """The admitted jobs, oldest first. An image waits until its first step and runs from then on."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # images that may wait
        self.waiting = 0
        self.running = 0
        self.steps_left = 0  # of all images together
        self._jobs: dict[Job, None] = {}  # a set that keeps its order

    @property
    def jobs(self) -> list[Job]:
        """The jobs that are not answered yet, oldest first."""
        return list(self._jobs)

    @property
    def num_jobs(self) -> int:
        """How many there are."""
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Admits a job whole; QueueFullError if its images do not all fit."""
        missing = self.waiting + job.count - self.capacity
        if missing > 0:
            raise QueueFullError(missing)
        self._jobs[job] = None
        self.waiting += job.count
        self.steps_left += job.count * job.options.num_steps

    def select(self, max_rows: int) -> list[Trajectory]:
        """The rows of the next step: one of each job, oldest job first, then a second of each, until it is full.

        So a newcomer takes part in the next step and in every step after it while there are
        no more jobs than rows; with more, the oldest run to their end.
        """
        return take_turns([job.unfinished for job in islice(self._jobs, max_rows)], max_rows)

    def start(self, trajectory: Trajectory) -> None:
        """An image that waited has its first step."""
        trajectory.started = True
        self.waiting -= 1
        self.running += 1

    def advance(self, trajectory: Trajectory) -> None:
        """An image has done one more step."""
        trajectory.step += 1
        trajectory.job.steps_done += 1
        self.steps_left -= 1

    def retire(self, trajectory: Trajectory) -> None:
        """An image has reached x_0; call before its job takes it."""
        self.running -= 1
        if len(trajectory.job.unfinished) == 1:
            del self._jobs[trajectory.job]

    def remove(self, job: Job) -> bool:
        """Takes a job out, wherever its images are; False if it is not in."""
        if job not in self._jobs:
            return False
        del self._jobs[job]
        for trajectory in job.unfinished:
            if trajectory.started:
                self.running -= 1
            else:
                self.waiting -= 1
            self.steps_left -= trajectory.steps_left
        return True


def take_turns(queues: list[list[T]], limit: int) -> list[T]:
    """The first of each queue, then the second of each, until there are `limit`."""
    rounds = zip_longest(*queues)
    return list(islice((item for items in rounds for item in items if item is not None), limit))
