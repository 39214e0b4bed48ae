"""Looks ahead: the steps of a backlog are known, so its time is too."""

import heapq
import math
from collections.abc import Sequence

from app.batcher import Batcher, take_turns
from app.pace import Pace
from app.trajectory import Job


def seconds_to_finish(batcher: Batcher, job: Job, max_batch: int, pace: Pace) -> float:
    """When the job's last image would be done if it were admitted now and nobody came after it.

    Rows are dealt to whole jobs as if they could be divided: the jobs that run share them evenly, and
    a job that finds all rows taken starts in the place of the first that ends. Time is counted in
    steps of one row a job, then stretched by how many jobs share the rows.
    """
    jobs, own_steps = batcher.jobs, job.count * job.options.num_steps
    *older, last = [(other.steps_left, False) for other in jobs] + [(own_steps, True)]
    running = older[:max_batch]
    heapq.heapify(running)
    now = 0  # in steps of one row a job
    for steps, is_own in [*older[max_batch:], last]:
        if len(running) == max_batch:
            now = heapq.heappop(running)[0]
        heapq.heappush(running, (now + steps, is_own))
    num_steps: float = now
    for others_done, (end, is_own) in enumerate(sorted(running)):
        num_steps += (end - now) * (len(running) - others_done) / max_batch
        now = end
        if is_own:
            break
    rows = min(max_batch, batcher.waiting + batcher.running + job.count)
    return max(job.options.num_steps, num_steps) * pace.step_seconds(rows * evaluations_a_step([*jobs, job]))


def seconds_to_room(batcher: Batcher, missing: int, max_batch: int, pace: Pace) -> float:
    """When so many of the waiting images will have started that `missing` more may wait, if nobody else comes.

    The batcher's own rule, run ahead: from one image's end to the next, the same rows step together.
    """
    jobs = [[[image.steps_left, image.started] for image in job.unfinished] for job in batcher.jobs]
    num_steps, evaluations = 0, max_batch * evaluations_a_step(batcher.jobs)
    while missing > 0 and jobs:
        rows = take_turns(jobs[:max_batch], max_batch)
        missing -= sum(not started for _, started in rows)
        stride = min(steps_left for steps_left, _ in rows) if missing > 0 else 0
        for row in rows:
            row[:] = row[0] - stride, True
        jobs[:max_batch] = [left for job in jobs[:max_batch] if (left := [row for row in job if row[0]])]
        num_steps += stride
    return num_steps * pace.step_seconds(evaluations)


def evaluations_a_step(jobs: Sequence[Job]) -> float:
    """Of the network, for one row: the jobs' means, weighted by the steps that each has left; 1 of no jobs."""
    steps_left = sum(job.steps_left for job in jobs)
    evaluations = sum(job.steps_left * job.evaluations_a_step for job in jobs)
    return evaluations / steps_left if steps_left else 1.0


def retry_after(seconds: float) -> int:
    """The Retry-After header: whole seconds, at least one."""
    return max(1, math.ceil(seconds))
