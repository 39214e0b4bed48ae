"""The rule that chooses the rows of each step, and the size of a step. No tensors, no threads, no clock."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.engine.job import Job, Trajectory
from app.engine.step_times import StepTimes, Throughput

# A full step is the largest one within BEST_TOLERANCE of the best rate that takes at most FULL_SLOWDOWN times as long
# as a lone image's step. Larger steps reach a higher throughput, most of all on a busy machine, because the compute
# threads wait for each other less often. But the bound of a job grows with the time of a full step.
BEST_TOLERANCE = 0.05
FULL_SLOWDOWN = 20.0
SHARED_SLOWDOWN = 3.0  # of a step that a small request shares with a large one, compared with a lone image's step


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold, in evaluations and rows, and how fast steps of that size are."""

    evaluations: int  # of a full step, at most
    rows: int  # of any step, at most
    short: int  # evaluations of a step that is kept short for a small request
    full: Throughput  # at the speed measured while warming up

    @classmethod
    def of(cls, times: StepTimes, max_rows: int | None, num_models: int, *, auto: bool) -> "StepLimits":
        """Returns the limits for steps of at most `max_rows` rows, if given, with a call for each of the models.

        With `auto` the size of a full step follows from the measured rates. Otherwise it has `max_rows` rows, and no
        step is kept short.
        """
        lone = times.measured_seconds(1)
        calls = (num_models - 1) * lone  # each model after the first costs another call
        most = max(2, times.best_batch(BEST_TOLERANCE, FULL_SLOWDOWN * lone)) if auto else 2 * (max_rows or 1)
        rows = min(most, max_rows or most)
        most = min(most, 2 * rows)  # a guided row takes two
        short = min(most, max(1, times.largest_batch(SHARED_SLOWDOWN * lone - calls))) if auto else most
        least = max(1, min(most - 1, rows))  # of a full step: a guided row may not fit
        rate = min(count / (times.measured_seconds(count) + calls) for count in (least, most))
        return cls(most, rows, short, Throughput(rate, times.measured_seconds(most) + calls, lone))

    def share(self, num_jobs: int, fewest_images: int, first_round: int) -> int:
        """Returns the evaluations that a step may have, given the jobs and the evaluations of one row of each.

        Steps stay short while all images of the smallest job fit into its share of a short step. Otherwise a short step
        would cost throughput and not help that job.
        """
        short = max(self.short, 2 * first_round)
        if num_jobs > 1 and num_jobs * fewest_images <= short:
            return min(self.evaluations, short)
        return self.evaluations


def select_rows(jobs: Sequence[Job], limits: StepLimits, *, at_risk: bool) -> list[Trajectory]:
    """Returns the rows of the next step; of each job those that are furthest along.

    `jobs` are in order of their targets. First each job gets one row, up to half of a full step, so that a newcomer
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
    """All rows in order, without the first row of the first `num_first` jobs."""
    for place, job in enumerate(jobs):
        yield from job.unfinished[1:] if place < num_first else job.unfinished


def _fewest_images(jobs: Sequence[Job], limits: StepLimits) -> int:
    """The smallest number of images of a job, counted only where it matters to `StepLimits.share`."""
    if not 1 < len(jobs) <= limits.evaluations:
        return limits.evaluations
    return min(job.request.count for job in jobs)
