"""Row selection: chooses the size and the rows of each step. This module uses no tensors, no threads and no clock.

The rule has three goals. A new request joins the next step. Steps are large enough for a high throughput. A small
request does not wait for the long steps of a large request. The jobs are in order of their targets (see backlog.py).

1. First round: each job gets one row, in order, until half of a full step is used. A new job that fits into the first
   round joins the next step and advances in every step.
2. Fill: the remaining places go to the other rows of the jobs, in order.
3. Short steps: while a job with few images runs together with other jobs, a step is limited to about three times the
   duration of a step with a single image. Otherwise a large job would make every step of the other one slow. How few
   images these are depends on the number of jobs (see `StepLimits.share`).
4. At risk: if a job may miss its target, rules 1 and 3 do not apply. The step first has the rows that the reserve pays
   for (see reserve.py): those of small jobs, which have one image. If there are such rows, the step is short. Otherwise
   it is full. The other places are filled in order (earliest deadline first). The bound in backlog.py holds for such
   steps.

Sizes are counted in network evaluations, because they determine the duration of a step. A guided row takes two. A row
that compares the classes of an image takes one for each remaining class. The gradient of CLIP counts as the number of
evaluations that take as long.

Example without guidance: a full step has 16 evaluations, a short step 8. Job A has 64 images, job B has 1 image.

- The first round takes one row of A and one row of B. B is small, so the step is short: 6 more rows of A are added.
- When B is finished, steps have 16 rows of A.
- If A comes first in the order and is at risk, steps have 16 rows of A, except for those steps that have the row of B
  and 7 rows of A.

Background jobs (see background.py) have steps of their own, whose size depends on how long a new interactive job may
have to wait for the end of such a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from app.engine.job import GUIDED_EVALUATIONS, Job, StepKind, Trajectory
from app.engine.step_times import StepTimes, Throughput

# With automatic sizes, a full step is the largest measured batch whose rate is within BEST_TOLERANCE of the best rate
# and which takes at most FULL_SLOWDOWN times as long as a step with a single image. Large steps give a high throughput,
# especially on a busy machine, because the compute threads wait for each other less often. But the bound of every job
# grows with the duration of a full step, so that fewer requests are admitted. FULL_SLOWDOWN limits this effect.
BEST_TOLERANCE = 0.05
FULL_SLOWDOWN = 20.0
SHARED_SLOWDOWN = 3.0  # the duration of a short step, in multiples of a step with a single image
# A background step that is shared has at least 1 - SHARED_TOLERANCE of the rate of full steps.
SHARED_TOLERANCE = 0.1
# The longest duration of a background step with several evaluations, in seconds at the speed of warm-up. A full step of
# a large network can take much longer on a CPU.
BACKGROUND_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The maximum sizes of a step, and the throughput of full steps at the speed of warm-up."""

    evaluations: int  # the maximum number of evaluations in a step: the size of a full step
    rows: int  # the maximum number of rows in a step
    short: int  # the maximum number of evaluations in a short step
    full: Throughput
    # How many seconds longer the evaluations of a step take than in full steps: the maximum for steps that are not
    # smaller than a short one.
    loss: float
    # The maximum number of evaluations in a background step: a full step, if it takes at most BACKGROUND_SECONDS.
    background: int
    # The same if interactive jobs share the engine with the background jobs, that is, if some ran a moment ago and the
    # next one is likely to arrive during the step. It is the smallest measured batch whose rate is near that of full
    # steps. Such steps delay the interactive jobs less, and the background jobs hardly become slower.
    shared: int

    @classmethod
    def of(
        cls,
        times: StepTimes,
        max_rows: int | None,
        kind: StepKind,
        *,
        auto: bool,
    ) -> "StepLimits":
        """Returns the limits of the steps of a kind. Each step makes one network call for each model.

        With `auto`, the size of a full step follows from the measured times, and `max_rows` is an upper limit if given.
        Without `auto`, a full step has `max_rows` rows, each of which may be guided, and there are no smaller steps. A
        full step has room for a guided row. If the widest row has more than 2 evaluations, it also has room for such a
        row.
        """
        curve, widest_row = times.slowest(kind.models), kind.widest_row
        lone = curve.seconds(1)
        most = curve.best_batch(BEST_TOLERANCE, FULL_SLOWDOWN * lone) if auto else GUIDED_EVALUATIONS * (max_rows or 1)
        most = max(GUIDED_EVALUATIONS, most)
        rows = min(most, max_rows or most)
        calls = times.further_calls_seconds(kind.models, rows)
        most = max(min(most, GUIDED_EVALUATIONS * rows), GUIDED_EVALUATIONS)
        if widest_row > GUIDED_EVALUATIONS:  # The step has room for the widest row and another row.
            most = max(most, widest_row + GUIDED_EVALUATIONS)
        short = min(most, max(1, curve.largest_batch(SHARED_SLOWDOWN * lone - calls))) if auto else most
        # A full step can have fewer than `most` evaluations. If the next row does not fit, places stay empty: one for a
        # guided row, and up to nine for a row that compares ten classes. If no row is guided, `rows` is the limit. The
        # rate must hold for all these sizes. It can be lowest between the smallest and the largest size.
        least = max(1, min(most - widest_row + 1, rows))
        longest = tuple(seconds + calls for seconds in _longest_seconds(times, kind, most))
        rate = min(count / longest[count] for count in range(least, most + 1))
        loss = max(longest[count] - count / rate for count in range(short, most + 1))
        background, shared = _background_sizes(longest, curve.rows, rate) if auto else (most, most)
        return cls(most, rows, short, Throughput(rate, longest[most], lone), max(loss, 0.0), background, shared)

    def fits_first_round(self, size: int, evaluations: int) -> bool:
        """Returns True if the first round has room for a row of this size, after `evaluations` of other rows.

        A row that compares the classes can have more evaluations than half of a full step. It may begin within that
        half.
        """
        half, after = self.evaluations // 2, evaluations + size
        is_wide = size > GUIDED_EVALUATIONS
        return after <= half or (is_wide and evaluations < half and after <= self.evaluations)

    def share(self, num_jobs: int, fewest_images: int, first_round: int, *, all_fit: bool) -> int:
        """Returns the maximum number of evaluations of the next step if no target is at risk.

        `fewest_images` is the number of images of the smallest job. `first_round` is the number of evaluations of the
        first round. `all_fit` says that a full step has room for all rows.

        The step is short if all images of the smallest job fit into its equal share of a short step. Otherwise a short
        step would lower the throughput without helping that job. A short step has room for at least twice the
        evaluations of the first round, so that several small jobs together use at most half of it. It is not enlarged
        for this if a full step has room for all rows: eight jobs with four images each, for example, then have steps
        with all of their rows, because half of these rows in each step would help none of them.

        Example without guidance: a short step has 8 evaluations. Two jobs with 64 images and 4 images get short steps,
        since 2 * 4 <= 8. Two jobs with 64 and 5 images get full steps. A job with 64 images and five jobs with one
        image get steps of 12 evaluations: twice the first round, which has one row for each of the six jobs.
        """
        images_in_equal_shares = num_jobs * fewest_images
        if num_jobs < 2 or (all_fit and images_in_equal_shares > self.short):
            return self.evaluations
        short = max(self.short, 2 * first_round)
        return min(self.evaluations, short) if images_in_equal_shares <= short else self.evaluations


def _longest_seconds(times: StepTimes, kind: StepKind, most: int) -> list[float]:
    """Returns the longest durations of steps of 0 to `most` evaluations, with one network call.

    With CLIP guidance, m of the evaluations can be gradients of CLIP. They take m / r seconds at the best rate r of the
    network. The last call of CLIP for each model can have fewer rows than the other calls, but it takes the same time.
    The duration is therefore at most

        max over n of (duration of n network evaluations + (count - n) / r) + one call of CLIP for each model
    """
    curve = times.slowest(kind.models)
    seconds = [0.0, *map(curve.seconds, range(1, most + 1))]
    if not kind.has_clip:
        return seconds
    rate, last_calls = curve.best_rate, max(1, len(kind.models)) * times.clip_seconds
    above = accumulate((measured - n / rate for n, measured in enumerate(seconds)), max)
    return [count / rate + more + last_calls for count, more in enumerate(above)]


def _background_sizes(seconds: Sequence[float], measured: Sequence[int], rate: float) -> tuple[int, int]:
    """Returns `background` and `shared` of StepLimits.

    `seconds` has the durations of steps of 0 to a full step's evaluations, `measured` the numbers of evaluations that
    were measured. `rate` is that of full steps.

    Example: steps of 1, 8 and 32 evaluations were measured, and take 1 ms, 3.6 ms and 14.4 ms. A full step has 32. The
    rate of a step of 8 is the same, so that a shared step has 8.
    """
    background = max((n for n in range(1, len(seconds)) if seconds[n] <= BACKGROUND_SECONDS), default=1)
    near = (n for n in measured if n < background and n / seconds[n] >= (1 - SHARED_TOLERANCE) * rate)
    return background, min(near, default=background)


def select_rows(
    jobs: Sequence[Job], limits: StepLimits, *, at_risk: bool, paid: Sequence[Trajectory] = ()
) -> list[Trajectory]:
    """Returns the rows of the next step. The module docstring explains the rule.

    `jobs` are in order. `at_risk` says that a job may miss its target. `paid` are the rows that the reserve pays for in
    this case. The rows of a job with the fewest steps left come first, so that its first images finish early. If there
    are rows that can take a step, the step has at least one row.
    """
    rows = list(paid) if at_risk else _first_round(jobs, limits)
    evaluations, limit = sum(row.evaluations for row in rows), limits.evaluations
    if paid or not at_risk:
        fewest = 1 if paid else _fewest_images(jobs, limits)
        all_fit = len(jobs) * fewest > limits.short and _all_fit(jobs, limits)
        limit = limits.share(len(jobs), fewest, evaluations, all_fit=all_fit)
    for row in _remaining_rows(jobs, rows):
        size = row.evaluations
        if rows and (evaluations + size > limit or len(rows) == limits.rows):
            break
        rows.append(row)
        evaluations += size
    return rows


def _all_fit(jobs: Sequence[Job], limits: StepLimits) -> bool:
    """Returns True if a full step has room for all rows that can take a step."""
    num_rows = evaluations = 0
    for row in _remaining_rows(jobs, ()):
        num_rows, evaluations = num_rows + 1, evaluations + row.evaluations
        if num_rows > limits.rows or evaluations > limits.evaluations:
            return False
    return True


def _first_round(jobs: Sequence[Job], limits: StepLimits) -> list[Trajectory]:
    """Returns the first row of each job that has a row that can take a step, until the first round is full."""
    rows: list[Trajectory] = []
    evaluations = 0
    for job in jobs:
        for row in job.unfinished[job.num_pending : job.num_pending + 1]:
            size = row.evaluations
            if rows and (len(rows) == limits.rows or not limits.fits_first_round(size, evaluations)):
                return rows
            rows.append(row)
            evaluations += size
    return rows


def _remaining_rows(jobs: Sequence[Job], first: Sequence[Trajectory]) -> Iterator[Trajectory]:
    """Yields the rows of all jobs in order, without those of `first`. A job has at most one of these: its first row."""
    taken = set(first)
    for job in jobs:
        rows = job.unfinished[job.num_pending :]
        yield from rows[1:] if rows and rows[0] in taken else rows


def _fewest_images(jobs: Sequence[Job], limits: StepLimits) -> int:
    """Returns the number of images of the smallest job.

    Skips the search through all jobs if the result cannot make the step short: with one job, or with more jobs than
    evaluations. It then returns the evaluations of a full step.
    """
    if not 1 < len(jobs) <= limits.evaluations:
        return limits.evaluations
    return min(job.request.count for job in jobs)
