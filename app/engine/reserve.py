"""The reserve: a share of the time of all steps that is kept for small jobs.

A small job has one image, or recognises one image. If the machine becomes slower than it was when a large job was
admitted, the target of the large job can be at risk until its end. Without a reserve, all steps would then have only
rows of the large job: admitted small jobs would wait, and new ones would be refused, although each of them delays the
large job by about 1%. The reserve limits the sum of these delays to a share that is known in advance, so that the bound
of the large job still holds.

Unit: seconds at the speed of warm-up. Income and costs are computed from the measured curve of step times and the sizes
of the steps that really ran, so a wrong prediction of the speed does not change them.

Income: each step adds RESERVE_SHARE of its time, up to a capacity.

Costs: while a target is at risk, a step with rows of small jobs costs

    seconds(n) - (n - m) / R    where

    n    evaluations of the step
    m    those of the small jobs
    R    evaluations per second in full steps

This is the time of the step without the time in which full steps would have computed the other n - m evaluations. It
contains the loss of a step that is smaller than a full one. While no target is at risk, small jobs cost nothing.

A small job that the bound refuses (see backlog.py) is admitted as a reserved job if the reserve will have paid for it
before its target. Reserved jobs are served before all others, in order of admission. They are no part of the bound,
because the bound contains the whole reserve. Small jobs that the bound has admitted use what the reserved jobs do not
need, so that they are fast, too.

Example: full steps compute 2000 evaluations per second. An image of 100 steps with 146 evaluations costs 73 ms in full
steps, and about 100 ms if its steps are short. If the reserve is 150 ms when a target becomes at risk, it pays for one
image at once. Its income is 0.1 s for each second of steps at the speed of warm-up. If the machine is six times slower,
the income pays for one image in 6 s.
"""

from collections.abc import Sequence
from dataclasses import replace

from app.engine.batcher import StepLimits
from app.engine.job import RESERVE_SHARE, Job, Trajectory

# The capacity pays for this number of evaluations in full steps: about two images of 100 steps with guidance. On a
# fast machine, it is the income of CAPACITY_SECONDS, which pays for more evaluations.
CAPACITY_EVALUATIONS, CAPACITY_SECONDS = 300, 1.0


class Reserve:
    """The account of the reserve. `limits` are those of steps with the reserved jobs."""

    def __init__(self, rate: float) -> None:
        """`rate` is the number of evaluations per second in full steps of the default model."""
        # The largest amount. It does not depend on the jobs, so that each bound contains the whole reserve.
        self.capacity = max(CAPACITY_EVALUATIONS / rate, RESERVE_SHARE * CAPACITY_SECONDS)
        self.seconds = self.capacity  # the present amount

    def fill(self) -> None:
        """Fills the reserve. Call it when the engine is idle, because this then delays no admitted job."""
        self.seconds = self.capacity

    def add_step(self, seconds: float) -> None:
        """Adds the income of a step of this duration."""
        self.seconds = min(self.seconds + RESERVE_SHARE * seconds, self.capacity)

    def pay(self, seconds: float, others: int, rate: float) -> None:
        """Subtracts the cost of a step of this duration that also has `others` evaluations of other jobs.

        `rate` is that of full steps without the reserved jobs.
        """
        self.seconds -= seconds - others / rate

    def wait_for(self, limits: StepLimits, jobs: Sequence[Job]) -> float:
        """Returns for how long steps must run until the income has paid for reserved jobs.

        The result is in seconds at the speed of warm-up. It is 0 if the present amount is enough.
        """
        return max(0.0, cost_of(limits, jobs) - self.seconds) / RESERVE_SHARE

    def paid_rows(self, limits: StepLimits, reserved: Sequence[Job], others: Sequence[Job]) -> list[Trajectory]:
        """Returns the rows of small jobs for which the reserve pays in the next step, at most half of a full step.

        `others` are the other jobs, in order. Their small jobs only get what the reserved jobs do not need.
        """
        rows: list[Trajectory] = []
        evaluations, amount = 0, self.seconds - limits.loss  # a step has its loss once
        unpaid = cost_of(limits, reserved)
        for job in (*reserved, *(job for job in others if job.is_small)):
            for row in job.unfinished[job.num_pending :]:
                cost = row.evaluations / limits.full.rate
                if cost > (amount if job.is_reserved else amount - unpaid):
                    # Each paid step has its loss, so the reserve saves until it pays for all reserved rows that fit.
                    return [] if job.is_reserved and self.seconds < self.capacity else rows
                is_full = len(rows) == limits.rows or not limits.fits_first_round(row.evaluations, evaluations)
                if rows and is_full:
                    return rows
                rows.append(row)
                evaluations, amount = evaluations + row.evaluations, amount - cost
                unpaid -= cost if job.is_reserved else 0.0
        return rows


def with_loss_of_others(limits: StepLimits, rate: float) -> StepLimits:
    """Returns these limits with the largest possible cost of a step, without that of its reserved rows, as the loss.

    `rate` is that of full steps without the reserved jobs. It is higher if the reserved jobs have CLIP guidance or need
    another network call. The other rows, at most a full step of them, then take longer than at this rate.
    """
    return replace(limits, loss=limits.loss + limits.evaluations * max(0.0, 1 / limits.full.rate - 1 / rate))


def num_steps_of(limits: StepLimits, jobs: Sequence[Job]) -> float:
    """Returns the largest number of steps that reserved jobs take if the reserve has paid for them.

    Each step has a row of the job with the most steps left, or as many rows of the others as fit into half of a step.
    """
    evaluations, longest = sum(job.evaluations_left for job in jobs), max((job.tail[1] for job in jobs), default=0)
    own = max((job.evaluations_left for job in jobs if job.tail[1] == longest), default=0)
    return (evaluations - own) / max(1, min(limits.evaluations // 2, limits.rows)) + longest


def cost_of(limits: StepLimits, jobs: Sequence[Job]) -> float:
    """Returns the largest possible cost of the remaining steps of reserved jobs."""
    evaluations = sum(job.evaluations_left for job in jobs)
    return evaluations / limits.full.rate + num_steps_of(limits, jobs) * limits.loss
