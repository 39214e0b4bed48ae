"""Looks ahead: the steps of a backlog are known, so its time is too."""

import heapq
import math
from itertools import islice

from app.batcher import Batcher
from app.pace import Pace
from app.trajectory import Job


def seconds_to_finish(batcher: Batcher, job: Job, max_batch: int, pace: Pace) -> float:
    """When the job's last image would be done if it were admitted now and nobody came after it."""
    own_steps = job.count * job.options.num_steps
    all_steps = batcher.steps_left + own_steps
    rows = min(max_batch, batcher.waiting + batcher.running + job.count)
    num_jobs = batcher.num_jobs + 1
    # With no more jobs than rows each has its fair share of every step; with more, the older ones go first.
    fair_steps = own_steps * num_jobs / max_batch if num_jobs <= max_batch else math.inf
    num_steps = max(job.options.num_steps, min(fair_steps, all_steps / rows))
    return num_steps * pace.step_seconds(rows)


def seconds_to_room(batcher: Batcher, missing: int, max_batch: int, pace: Pace) -> float:
    """When so many of the waiting images will have started that `missing` more may wait, if nobody else comes."""
    images = [trajectory for job in batcher.jobs for trajectory in job.unfinished]
    rows = sorted(trajectory.steps_left for trajectory in images if trajectory.started)[:max_batch]
    rows += [0] * (max_batch - len(rows))
    start = 0
    for trajectory in islice((trajectory for trajectory in images if not trajectory.started), missing):
        start = heapq.heappop(rows)  # the step at which a row comes free
        heapq.heappush(rows, start + trajectory.steps_left)
    return start * pace.step_seconds(max_batch)


def retry_after(seconds: float) -> int:
    """The Retry-After header: whole seconds, at least one."""
    return max(1, math.ceil(seconds))
