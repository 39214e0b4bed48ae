"""Admission control: admits a job only if every admitted job still finishes before its deadline.

This module uses no threads and no clock. Engine holds its lock and passes the time (see engine.py).

Admission refuses a job with 429 in three cases:

- The queue has no room. At most `capacity` images wait for their first step. All unfinished images together are
  limited too, because an image that has started keeps its state in device memory.
- A target would be missed. backlog.py computes an upper bound on the finish time of each job. If the bound of the new
  job, or of a job that it delays, is later than the target of that job, the new job is refused. A small job is
  nevertheless admitted, as a reserved job, if the reserve will pay for it before its target (see reserve.py).
- A reserved job would miss its target, because the new job makes the steps longer.

A background job is refused only if the queue of the background jobs has no room (see background.py). All other rules
are about interactive jobs.

The bound only holds for full steps that take the rows in order, but normally row selection deviates from this to serve
new and small jobs early (see batcher.py). Therefore `select` checks the slack of the backlog before each step, so that
the admitted jobs still meet their targets. While the slack is positive, row selection may deviate. If it is negative, a
target is at risk, and the next step takes the rows that the reserve pays for, and then the others in order.

Jobs, rows and evaluations are explained in job.py, the target and the bound in backlog.py.

Example: full steps compute 2000 evaluations per second and take 8 ms. Job A has 64 images of 100 steps and a timeout of
10 s. Its target is 9 s, its bound 4.56 s. Job B is equal, but has a timeout of 6 s. Its target is 5.4 s, so B comes
before A in the order. The bound of B is 4.56 s, and the bound of A becomes 8.11 s. Both are before their targets, so B
is admitted. Job C is equal to B. It would come after B with a bound of 8.11 s, which is after its target: C is refused.
Then the machine becomes 1.5 times slower, so that the targets of A and B are at risk. Job D has one image and a timeout
of 5 s. It would come first and delay A and B. The bounds therefore refuse it, but the reserve pays for it.

An idle engine admits every job, even one that would miss its target. Only running steps correct the predicted step
times. If a wrong prediction could keep all jobs out, it would never be corrected.

Memory: after the device ran out of memory, the maximum number of rows is halved. It doubles again after each minute
without a shortage.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as count_from

from app import errors
from app.engine.background import BackgroundSteps
from app.engine.backlog import Backlog
from app.engine.batch import Calls
from app.engine.batcher import StepLimits, select_rows
from app.engine.job import (
    GUIDED_EVALUATIONS,
    LONGEST_TIMEOUT,
    RESERVE_SHARE,
    SHORTEST_TIMEOUT,
    Estimate,
    Job,
    StepKind,
    Trajectory,
)
from app.engine.reserve import Reserve, num_steps_of, with_loss_of_others
from app.engine.step_times import StepTimes, Throughput

log = logging.getLogger(__name__)
# The default timeout of a request is this multiple of the time that it takes in full steps at the speed of warm-up,
# within the limits in job.py. On two cores that eight other processes used too, steps took 20 times as long. The factor
# leaves room for this and for other requests.
TIMEOUT_FACTOR = 60.0
# Of steps of the default model, whatever its name: StepTimes has the times of the default model for unknown names.
DEFAULT_KIND = StepKind(("",), GUIDED_EVALUATIONS, has_clip=False)

# The slack is computed for steps that are slower than now by SPEED_MARGIN. It is valid until they are slower than that,
# or until their slowdown is less than FASTER times that: a lost job (see backlog.py) may then no longer be lost.
SPEED_MARGIN, FASTER = 1.01, 0.95
RECOVERY_SECONDS = 60.0  # after this time without a memory shortage, the lowered number of rows doubles
LONGEST_WAIT = 3600  # maximum Retry-After, in seconds


@dataclass(frozen=True, slots=True)
class _Slack:
    """The result of a computation of the backlog's slack."""

    until: float  # no target is at risk before this time
    slowdown: float  # the largest slowdown for which this is true
    # The kinds of the steps for which this is true: without reserved jobs, as in the bounds, and of all jobs.
    kinds: tuple[StepKind, StepKind]


class Admission:
    """Decides which jobs are admitted and which rows the next step has."""

    def __init__(self, capacity: int, max_batch: int | None) -> None:
        """`capacity` is the maximum number of waiting images, of interactive and of background jobs each.

        `max_batch` is the maximum number of rows of a step. If it is None, the number follows from the step times.
        """
        numbers = count_from(1)
        # The backlogs of the interactive and of the background jobs, and the one whose rows the last selection has.
        self.backlog, self.background = Backlog(capacity, numbers), Backlog(capacity, numbers)
        self.selected = self.backlog
        self.background_steps = BackgroundSteps()
        self._background_limits: tuple[StepLimits, int] | None = None  # limits and size of the last background step
        self.step_times = StepTimes({1: 1.0})
        self._max_batch = max_batch
        self._max_rows: int | None = None  # the limit after a memory shortage; None without a shortage
        self._shortage_at = -math.inf  # the time of the last shortage, or of the last recovery step
        self._limits: dict[StepKind, StepLimits] = {}
        self.reserve = Reserve(self._limits_for(DEFAULT_KIND).full.rate)
        self._slack: _Slack | None = None  # None if it is not known
        # The last selection: its limits, whether a target was at risk, and the rows that the reserve paid for.
        self._selected_with: tuple[StepLimits | None, bool, list[Trajectory]] = None, False, []

    @property
    def max_batch(self) -> int:
        """Returns the maximum number of rows of a step."""
        return self._limits_for(DEFAULT_KIND).rows

    def open(self, step_times: StepTimes, max_rows: int | None = None) -> None:
        """Sets the step times that were measured at warm-up, and the largest number of rows of the runner."""
        self.step_times = step_times
        if max_rows is not None:
            self._max_batch = min(self._max_batch or max_rows, max_rows)
        self._limits.clear()
        self.reserve = Reserve(self._limits_for(DEFAULT_KIND).full.rate)

    @property
    def next(self) -> Backlog:
        """Returns the backlog whose rows take the next step: the background jobs wait for all interactive jobs.

        This includes interactive jobs whose rows cannot take a step until their last results are known.
        """
        return self.backlog if self.backlog.jobs else self.background

    def observe(self, calls: Calls, seconds: float) -> None:
        """Updates the slowdown after a step that took `seconds`. `calls` is the result of `Backlog.calls` before it."""
        self.step_times.observe(*calls, seconds)

    def admit(self, job: Job, now: float) -> None:
        """Admits all images of a job and sets its estimate, or raises Overloaded with a Retry-After.

        The module docstring explains the rule.
        """
        backlog = self.backlog
        if job.request.is_background:
            self._admit_background(job)
            return
        self.background_steps.interactive_at = now
        now = self.background_steps.start_of_bounds(self._full(backlog.bound_kind(job)).step_seconds, now)
        if job.request.timeout is None:
            job.set_timeout(self._default_timeout(job))
        if not self._has_room(backlog.waiting, backlog.waiting + backlog.running + backlog.extra_slots, job):
            images = f"images: {job.request.count}"
            detail = f"The queue has no room for this request ({images}). Retry later or request fewer images"
            raise errors.Overloaded(self._retry_after(job, now), detail)
        if not backlog.jobs:
            self.reserve.fill()
        kind = backlog.bound_kind(job)
        slack = self._slack_with(job, kind, now)
        is_late = (slack is None or slack.until < now) and not self._is_within_bounds(job, now)
        is_refused = is_late and not (job.is_small and self._paid_after(job, now) <= 0)
        if is_refused or self._delays_reserved_jobs(job, now):
            detail = "This request or an admitted one would miss its deadline. Retry later or request fewer images"
            raise errors.Overloaded(self._retry_after(job, now), detail)
        kind = backlog.step_kind(job)
        job.estimate = Estimate(backlog.waiting, self._seconds_of(job, kind, self._full(kind)))
        backlog.add(job, is_reserved=is_late)
        if not is_late:  # The bounds contain no reserved jobs.
            self._slack = slack

    def select(self, now: float) -> list[Trajectory]:
        """Makes the rows of the next step the batch of their backlog, `selected`, and returns them."""
        backlog = self.selected = self.next
        if not backlog.num_rows:
            return []
        self._recover(now)
        limits = self._limits_for(backlog.step_kind())
        if backlog is self.background:
            return self._select_background(limits, now)
        self.background_steps.interactive_at, at_risk = now, self._is_at_risk(now)
        has_use = backlog.num_reserved or backlog.has_small_and_large
        paid = self._paid_rows() if at_risk and has_use else []
        if backlog.is_changed or self._selected_with != (limits, at_risk, paid):
            share = limits.share(len(backlog), backlog.fewest_images, first_round=0, all_fit=True)
            has_unpaid = at_risk and backlog.num_reserved > 0  # such rows may have to wait
            if has_unpaid or not backlog.join(share, limits.rows):
                backlog.replace_batch(self._select(limits, at_risk, paid))
            self._selected_with = limits, at_risk, paid
        self._keep_account(paid)
        return backlog.batch.rows

    def lower_max_batch(self, now: float) -> None:
        """Halves the maximum number of rows of a step after a memory shortage."""
        self._shortage_at = now
        self._limit_rows(max(1, self.max_batch // 2))
        log.warning("Out of device memory, batch size lowered", extra={"max_batch": self.max_batch})

    def _admit_background(self, job: Job) -> None:
        """Adds a job after all other background jobs, or raises Overloaded if their queue has no room.

        The estimate and Retry-After assume that no interactive job arrives.
        """
        background, full = self.background, self._full(self.background.step_kind(job))
        num_missing = background.waiting + job.request.count - background.capacity  # images without room
        if num_missing > 0:
            of_image = background.work / max(1, background.waiting + background.running)
            raise errors.Overloaded(max(1, math.ceil(num_missing * of_image / full.rate)))
        job.set_timeout(math.inf)  # jobs with equal targets are in order of arrival
        job.estimate = Estimate(background.waiting, background.finish_seconds(job, full))
        background.add(job)

    def _select_background(self, limits: StepLimits, now: float) -> list[Trajectory]:
        """Makes the rows of the next background step the batch of the background jobs, and returns them."""
        background, steps = self.background, self.background_steps
        size = steps.size(limits, now)
        if background.is_changed or self._background_limits != (limits, size):
            if not background.join(size, limits.rows):
                background.replace_batch(steps.select(background.jobs, limits, now))
            self._background_limits = limits, size
        steps.begin(background.calls(), self.step_times, now)
        return background.batch.rows

    def _default_timeout(self, job: Job) -> float:
        """Returns the timeout in seconds of a job whose request has none. It does not depend on the current speed."""
        full = self._limits_for(StepKind((job.request.options.model,), GUIDED_EVALUATIONS, has_clip=False)).full
        tail_work, tail_steps = job.tail
        seconds = (job.evaluations_left - tail_work) / full.rate + tail_steps * full.step_seconds
        return min(max(SHORTEST_TIMEOUT, TIMEOUT_FACTOR * seconds), LONGEST_TIMEOUT)

    def _select(self, limits: StepLimits, at_risk: bool, paid: list[Trajectory]) -> list[Trajectory]:
        """Returns the rows of the next step. If a target is at risk, the rows in `paid` come first."""
        reserved, others = self.backlog.reserved, self.backlog.others
        if not at_risk:
            return select_rows(self.backlog.jobs, limits, at_risk=False)
        rows = select_rows([*others, *reserved], limits, at_risk=True, paid=paid)
        bound_limits = self._limits_for(self.backlog.bound_kind())
        if paid or limits is bound_limits:
            return rows
        # The bound holds for steps without reserved jobs.
        return select_rows(others, bound_limits, at_risk=True) or rows

    def _is_within_bounds(self, job: Job, now: float, wait: float = 0.0) -> bool:
        """Returns True if `job` and all jobs that it delays would meet their targets if it arrived after `wait`."""
        full, present = self._full(self.backlog.bound_kind(job)), self._full(self.backlog.bound_kind())
        return self.backlog.admits(job, full, present, now, wait)

    def _paid_rows(self) -> list[Trajectory]:
        return self.reserve.paid_rows(self._reserve_limits(), self.backlog.reserved, self.backlog.others)

    def _reserve_limits(self, *new_jobs: Job) -> StepLimits:
        """Returns the limits of steps with the reserved jobs and `new_jobs`, with their largest cost as the loss."""
        limits = self._limits_for(self.backlog.step_kind(*new_jobs))
        return with_loss_of_others(limits, self._limits_for(self.backlog.bound_kind()).full.rate)

    def _keep_account(self, paid: list[Trajectory]) -> None:
        """Adds the income of the next step to the reserve, and subtracts its cost."""
        seconds = self.step_times.measured_seconds(*self.backlog.calls())
        self.reserve.add_step(seconds)
        if paid:
            rate = self._limits_for(self.backlog.bound_kind()).full.rate
            self.reserve.pay(seconds, self.backlog.batch.size - sum(row.evaluations for row in paid), rate)

    def _paid_after(self, job: Job, now: float) -> float:
        """Returns in how many seconds the reserve could pay for a small job before its target.

        The result is 0 or less if it can do so now, and infinity if waiting does not help. Waiting helps only until
        the reserve is full.
        """
        limits, jobs = self._reserve_limits(job), [*self.backlog.reserved, job]
        late = self._lateness_of_last(jobs, limits, now)
        until_full = (self.reserve.capacity - self.reserve.seconds) / RESERVE_SHARE
        wait = min(self.reserve.wait_for(limits, jobs), until_full)
        return late if late <= self.step_times.slowdown * wait else math.inf

    def _lateness_of_last(self, reserved: Sequence[Job], limits: StepLimits, now: float) -> float:
        """Returns how many seconds after its target the last of these reserved jobs ends, if the reserve pays for all.

        Each step takes at most as long as a full step. The result is negative if the job ends before its target.
        """
        seconds = self.reserve.wait_for(limits, reserved) + num_steps_of(limits, reserved) * limits.full.step_seconds
        return now + self.step_times.slowdown * seconds - reserved[-1].target

    def _delays_reserved_jobs(self, job: Job, now: float) -> bool:
        """Returns True if the job makes steps so much longer that a reserved job would miss its target."""
        backlog = self.backlog
        if not backlog.num_reserved or backlog.step_kind(job) == backlog.step_kind():
            return False
        reserved, limits = backlog.reserved, self._reserve_limits(job)
        return any(self._lateness_of_last(reserved[: i + 1], limits, now) > 0 for i in range(len(reserved)))

    def _has_room(self, waiting: int, slots: int, job: Job) -> bool:
        """Returns True if the queue has room for the job.

        `waiting` is the number of images that have not started. `slots` is the number of slots that all unfinished
        images need. A search for the class can need more slots than the images of its job. The limit of the slots,
        2 * (capacity + max_batch), bounds the memory. Without it, each request with an earlier deadline than all others
        would start, take memory and then be overtaken by the next such request.
        """
        capacity, count = self.backlog.capacity, job.request.count
        own = count + job.extra_slots
        most = max(2 * (capacity + self.max_batch), own)  # an idle engine admits every job
        return waiting + count <= capacity and slots + own <= most

    def _recover(self, now: float) -> None:
        if self._max_rows is not None and now - self._shortage_at >= RECOVERY_SECONDS:
            self._shortage_at = now
            lowered = self.max_batch
            self._limit_rows(2 * self._max_rows)
            if self.max_batch == lowered:
                self._max_rows = None
            else:
                log.info("Batch size raised after a memory shortage", extra={"max_batch": self.max_batch})

    def _limit_rows(self, rows: int | None) -> None:
        self._max_rows = rows
        self._limits.clear()
        self._slack = None

    def _limits_for(self, kind: StepKind) -> StepLimits:
        """Returns the limits of a step of this kind."""
        if kind not in self._limits:
            given = [rows for rows in (self._max_batch, self._max_rows) if rows is not None]
            most = min(given, default=None)
            self._limits[kind] = StepLimits.of(self.step_times, most, kind, auto=self._max_batch is None)
        return self._limits[kind]

    def _full(self, kind: StepKind, margin: float = 1.0) -> Throughput:
        """Returns the throughput of full steps of this kind if each takes `margin` times as long as now."""
        full, slowdown = self._limits_for(kind).full, margin * self.step_times.slowdown
        return Throughput(
            full.rate / slowdown,
            full.step_seconds * slowdown,
            full.lone_seconds * slowdown,
            self.reserve.capacity * slowdown,
        )

    def _is_at_risk(self, now: float) -> bool:
        """Returns True if a job may miss its target.

        The slack shrinks at most as fast as time passes, unless steps become slower. If the slack is 5 s, it is not
        computed again for 5 s, or until the slowdown has changed.
        """
        if self._known_slack(now).until <= now:
            self._slack = None  # compute it again, because the slack is only a lower bound
        return self._known_slack(now).until <= now

    def _known_slack(self, now: float) -> _Slack:
        """Returns a slack of the backlog that is at most the true one. Computes it if none is known."""
        slack, slowdown = self._slack, self.step_times.slowdown
        kinds = self.backlog.bound_kind(), self.backlog.step_kind()
        if slack is None or slack.kinds != kinds or not FASTER * slack.slowdown <= slowdown <= slack.slowdown:
            until = (
                now + self.backlog.slack(self._full(kinds[0], SPEED_MARGIN), now) - self._excess(kinds, SPEED_MARGIN)
            )
            slack = self._slack = _Slack(until, SPEED_MARGIN * slowdown, kinds)
        return slack

    def _excess(self, kinds: tuple[StepKind, StepKind], margin: float) -> float:
        """Returns how much longer a full step with reserved jobs takes than the full step in the slack."""
        without, with_reserved = (self._full(kind, margin).step_seconds for kind in kinds)
        return max(0.0, with_reserved - without)

    def _slack_with(self, job: Job, kind: StepKind, now: float) -> _Slack | None:
        """Returns a slack of the backlog with a new job that is at most the true one, or None if it is not known.

        `kind` is the kind of the steps after the job was added. The new job delays each other job by at most its own
        work, unless it changes the kind of the steps.
        """
        if self.backlog.jobs and kind != self.backlog.bound_kind():
            return None
        slack = self._known_slack(now)
        full = self._full(kind, slack.slowdown / self.step_times.slowdown)
        kinds = kind, slack.kinds[1] if self.backlog.jobs else kind
        excess = self._excess(kinds, slack.slowdown / self.step_times.slowdown)
        own = job.target - full.step_seconds - self.backlog.latest_finish_seconds(job, full) - excess
        until = min(own, slack.until - job.evaluations_left / full.rate / (1 - RESERVE_SHARE))
        return _Slack(until, slack.slowdown, kinds)

    def _retry_after(self, job: Job, now: float) -> int:
        """Returns the number of seconds, rounded up, after which the job would be admitted if no other job arrived.

        It simulates the backlog draining in order at the rate of full steps. A small job does not wait longer than the
        reserve needs to pay for it, unless there are other small jobs that use the income of the reserve.
        """
        backlog, kind = self.backlog, self.backlog.bound_kind(job)
        full, limits = self._full(kind), self._limits_for(kind)
        longest = min(LONGEST_WAIT, 1 + math.ceil(backlog.work / full.rate))
        rows = min(limits.rows, int(limits.evaluations / _mean_evaluations(job)))
        has_income = job.is_small and not any(other.is_small for other in backlog.others)
        paid_after = self._paid_after(job, now) if has_income else math.inf

        def fits(seconds: int) -> bool:
            images = backlog.images_after(seconds, full.rate)
            waiting = min(max(images - rows, 0), backlog.waiting)
            extra_slots = math.ceil(backlog.extra_slots * images / max(backlog.waiting + backlog.running, 1))
            if not self._has_room(waiting, images + extra_slots, job):
                return False
            return seconds >= paid_after or self._is_within_bounds(job, now, seconds)

        return _shortest_wait(fits, longest)

    def _seconds_of(self, job: Job, kind: StepKind, full: Throughput) -> float:
        """Returns the expected number of seconds until the job is finished.

        A single image that fits into the first round has a row in every step. The result is its number of steps times
        the predicted duration of the next step. For all other jobs the result is the bound of the backlog.
        """
        backlog, request, limits = self.backlog, job.request, self._limits_for(kind)
        mean = _mean_evaluations(job)
        first_round = (len(backlog) + 1) * mean
        if request.count > 1 or job.is_searching or first_round > max(mean, limits.evaluations // 2):
            return backlog.finish_seconds(job, full)
        fewest = 1 if backlog.jobs else limits.evaluations
        num_steps, clip_steps = request.options.num_steps, len(request.clip.steps) if request.clip else 0
        if backlog.step_kind().has_clip:
            clip_steps = num_steps  # a step of this image can contain a call of CLIP for the others
        num_rows = backlog.waiting + backlog.running + 1
        evaluations = num_rows * request.network_evaluations / num_steps
        all_fit = num_rows <= limits.rows and evaluations <= limits.evaluations
        share = limits.share(len(backlog) + 1, fewest, math.ceil(first_round), all_fit=all_fit)
        evaluations = min(share, evaluations)
        times = self.step_times
        seconds = times.slowest(kind.models).seconds(evaluations)
        seconds += times.further_calls_seconds(kind.models, limits.rows)
        return times.slowdown * (num_steps * seconds + clip_steps * times.clip_seconds)


def _mean_evaluations(job: Job) -> float:
    """Returns the mean number of evaluations per step of one image, at most that of all classes for a recognition."""
    return job.image_work / job.request.options.num_steps


def _shortest_wait(fits: Callable[[int], bool], longest: int) -> int:
    """Returns a short wait for which `fits` is True, in whole seconds, or `longest` if the search finds none.

    Doubles the wait until it fits, then bisects between the last two waits. It does not bisect the whole range,
    because a longer wait can fail although a shorter one fits: after a longer wait the job has a later target, and it
    may then come after another job in the order.
    """
    low, high = 0, 1
    while high < longest and not fits(high):
        low, high = high, 2 * high
    return bisect_left(range(min(high, longest)), True, lo=low + 1, key=fits)
