"""Background jobs: the rows of offline batches. They run in the time that all other jobs, called interactive, leave.

A background job has no deadline. It takes steps only while there are no interactive jobs. A new interactive job
therefore joins the next step, and the order, the bounds and the estimates of interactive jobs are the same as without
background jobs. The images of background jobs that have started keep their state, and continue later. Background jobs
have a backlog of their own, in order of arrival, and their steps are filled in this order.

An interactive job that arrives during a background step waits for its end. The size of these steps limits this time
(see `StepLimits` in batcher.py): they are smaller for SHARED_SECONDS after the last interactive job. The bound of an
interactive job contains the time of one full step of the interactive jobs, for the step in progress (see backlog.py).
This is enough for a background step of the same kind. A background step of a slower kind, for example of a larger
network, can take longer. Admission then computes the bounds as if the interactive job arrived later, so that they
contain the end of the background step (see `start_of_bounds`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from app.engine.batch import Calls
from app.engine.batcher import StepLimits, select_rows
from app.engine.job import Job, Trajectory
from app.engine.step_times import StepTimes

# For this time after the last step or submission of an interactive job, another one is likely to arrive soon.
SHARED_SECONDS = 2.0


class BackgroundSteps:
    """Determines the size and the rows of background steps, and predicts the end of the step in progress."""

    def __init__(self) -> None:
        self.interactive_at = -math.inf  # the time of the last step or submission of an interactive job
        self._ends_at = -math.inf  # the predicted end of the last background step

    def size(self, limits: StepLimits, now: float) -> int:
        """Returns the maximum number of evaluations of the next step."""
        return limits.shared if now - self.interactive_at < SHARED_SECONDS else limits.background

    def select(self, jobs: Sequence[Job], limits: StepLimits, now: float) -> list[Trajectory]:
        """Returns the rows of the next step. `limits` are those of the kind of the jobs."""
        return select_rows(jobs, replace(limits, evaluations=self.size(limits, now)), at_risk=True)

    def begin(self, calls: Calls, times: StepTimes, now: float) -> None:
        """Predicts the end of a step that begins now."""
        self._ends_at = now + times.slowdown * times.measured_seconds(*calls)

    def start_of_bounds(self, full_seconds: float, now: float) -> float:
        """Returns the time from which to compute bounds that contain the end of the background step in progress.

        `full_seconds` is the part of the bounds for the step in progress. The result is `now` unless the step takes
        longer than that.
        """
        return max(now, self._ends_at - full_seconds)
