"""Chooses the size and the rows of each step. This module uses no tensors, no threads and no clock."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.engine.job import Job, Trajectory
from app.engine.step_times import StepTimes, Throughput

# A full step is the largest one within BEST_TOLERANCE of the best rate that takes at most FULL_SLOWDOWN times as long
# as the step of a lone image. Larger steps reach a higher throughput, most of all on a busy machine, because compute
# threads wait for each other less often. But the bound of a job grows with the time of a full step.
BEST_TOLERANCE = 0.05
FULL_SLOWDOWN = 20.0
SHARED_SLOWDOWN = 3.0  # limit for a step that a small and a large request share, in multiples of a lone image's step


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest sizes of a step, in evaluations and in rows, and the throughput of full steps."""

    evaluations: int  # at most, in a full step
    rows: int  # at most, in any step
    short: int  # evaluations of a step that is kept short for a small request
    full: Throughput  # at the speed measured at warm-up

    @classmethod
    def of(cls, times: StepTimes, max_rows: int | None, num_models: int, *, auto: bool) -> "StepLimits":
        """Returns the limits for steps of at most `max_rows` rows, if given, with one call for each model.

        With `auto` the size of a full step follows from the measured rates. Otherwise it has `max_rows` rows, and no
        step is kept short.
        """
        lone = times.measured_seconds(1)
        calls = (num_models - 1) * lone  # each model after the first costs another call
        most = max(2, times.best_batch(BEST_TOLERANCE, FULL_SLOWDOWN * lone)) if auto else 2 * (max_rows or 1)
        rows = min(most, max_rows or most)
        most = min(most, 2 * rows)  # a guided row takes two evaluations
        short = min(most, max(1, times.largest_batch(SHARED_SLOWDOWN * lone - calls))) if auto else most
        least = max(1, min(most - 1, rows))  # evaluations of a full step: a guided row may not fit into the last place
        rate = min(count / (times.measured_seconds(count) + calls) for count in (least, most))
        return cls(most, rows, short, Throughput(rate, times.measured_seconds(most) + calls, lone))

    def share(self, num_jobs: int, fewest_images: int, first_round: int) -> int:
        """Returns the largest number of evaluations of a step. `first_round` is the evaluations of one row of each job.

        Steps stay short while all images of the smallest job fit into its share of a short step. Otherwise a short step
        would cost throughput and not help that job.
        """
        short = max(self.short, 2 * first_round)
        if num_jobs > 1 and num_jobs * fewest_images <= short:
            return min(self.evaluations, short)
        return self.evaluations


def select_rows(jobs: Sequence[Job], limits: StepLimits, *, at_risk: bool) -> list[Trajectory]:
    """Returns the rows of the next step. Of each job it takes the rows that are furthest along.

    `jobs` are in order of their targets. First each job gets one row, up to half of a full step, so that a new job
    takes part in the next step. The other rows go to the jobs in order. If a target is at risk, all rows are chosen in
    this order.
    """
    rows: list[Trajectory] = []
    evaluations, limit = 0, limits.evaluations
    if not at_risk:
        for job in jobs:
            row = job.unfinished[0]
            if rows and (evaluations + row.evaluations > limits.evaluations // 2 or len(rows) == limits.rows):
                break
            rows.append(row)
            evaluations += row.evaluations
        limit = limits.share(len(jobs), _fewest_images(jobs, limits), evaluations)
    for row in _others(jobs, len(rows)):
        if rows and (evaluations + row.evaluations > limit or len(rows) == limits.rows):
            break
        rows.append(row)
        evaluations += row.evaluations
    return rows


def _others(jobs: Sequence[Job], num_first: int) -> Iterator[Trajectory]:
    """Yields all rows in order, without the first row of the first `num_first` jobs."""
    for place, job in enumerate(jobs):
        yield from job.unfinished[1:] if place < num_first else job.unfinished


def _fewest_images(jobs: Sequence[Job], limits: StepLimits) -> int:
    """Returns the smallest number of images of a job. Computes it only if it matters to `StepLimits.share`."""
    if not 1 < len(jobs) <= limits.evaluations:
        return limits.evaluations
    return min(job.request.count for job in jobs)
