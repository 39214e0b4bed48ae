"""Simulates replicas of the service behind a router, on a virtual clock.

Each replica runs the scheduler of the service, `Admission`: what is refused, which rows a step has, the reserve and the
deadlines are those of the service. Only durations are modelled, from two measured inputs:

- A step takes the time of its number of evaluations, by interpolation in `seconds_by_rows`.
- A request takes `request_seconds` of the core of its replica: HTTP, JSON and PNG. The step in progress, or the next
  one, becomes longer by this time, half of it when the request arrives and half when its answer leaves.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as count_from
from typing import NamedTuple

import numpy as np

from app.engine.admission import Admission
from app.engine.batch import Calls
from app.engine.job import Job, JobRequest
from app.engine.step_times import StepTimes
from app.errors import Overloaded
from scripts.benchmark.report import percentile
from scripts.benchmark.routers import Router, View

PIXELS = np.zeros((1, 1), np.uint8)  # the result of each image; the simulation does not look at it
OK, REFUSED, LATE = 200, 429, 504
PERCENTILES = (50, 95, 99)  # of latencies, in the results


class Arrival(NamedTuple):
    """A request and its planned time, in seconds since the load began."""

    at: float
    request: JobRequest


class Outcome(NamedTuple):
    """What became of a request. Times are in seconds since the load began."""

    at: float
    done: float
    images: int
    status: int
    replica: int

    @property
    def latency(self) -> float:
        """The seconds from the planned time to the answer."""
        return self.done - self.at


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    """The measured speed of a replica, and its settings."""

    seconds_by_rows: Mapping[int, float]  # of a step, by its number of evaluations
    request_seconds: float = 0.0  # time that a request takes from the steps of its replica
    max_batch: int | None = None  # UNFOG_MAX_BATCH; None is `auto`
    queue_capacity: int = 1024  # UNFOG_QUEUE_CAPACITY

    def capacity(self, mean_evaluations: float) -> float:
        """Returns how many requests a second a replica can serve if it always runs steps at the best measured rate.

        `mean_evaluations` is the mean number of evaluations of a request.
        """
        return 1 / (mean_evaluations / StepTimes(self.seconds_by_rows).best_rate + self.request_seconds)


class Replica:
    """A replica: the scheduler of the service, and the end of the step in progress."""

    def __init__(self, model: ReplicaModel) -> None:
        self.ends_at: float | None = None  # the end of the step in progress; None without a step
        self._times = StepTimes(model.seconds_by_rows)
        self._half_request = model.request_seconds / 2
        self._admission = Admission(model.queue_capacity, model.max_batch)
        self._admission.open(self._times.copy())  # with a slowdown of its own, which the scheduler measures
        self._backlog = self._admission.backlog
        self._free_at = self._began_at = 0.0
        self._calls: Calls = {}, {}

    @property
    def num_images(self) -> int:
        """Returns the number of unfinished images: the sum of two gauges that the service publishes."""
        return self._backlog.waiting + self._backlog.running

    def submit(self, job: Job, now: float) -> None:
        """Admits a job, or raises Overloaded. The time for the request passes in both cases."""
        if self.ends_at is not None:
            self.ends_at += self._half_request
        else:
            self._free_at = max(self._free_at, now) + self._half_request
        self._admission.admit(job, now)
        if self.ends_at is None:
            self._begin_step(now)

    def end_step(self) -> dict[Job, float]:
        """Ends the step in progress and begins the next one if there are rows. Returns the finished jobs.

        The values are the times at which their answers leave.
        """
        assert self.ends_at is not None, "end_step() needs a step in progress"
        now = self._free_at = self.ends_at
        self._admission.observe(self._calls, now - self._began_at)
        ended = self._backlog.advance()
        self._backlog.finish([(row, PIXELS) for row in ended])
        finished = {}
        for job in dict.fromkeys(row.job for row in ended):
            if not job.unfinished:
                self._free_at += self._half_request
                finished[job] = self._free_at
        self.ends_at = None
        if self._backlog.jobs:
            self._begin_step(now)
        return finished

    def expire(self, job: Job) -> bool:
        """Removes a job whose deadline has passed. Returns False if it is finished."""
        return self._backlog.remove(job)

    def _begin_step(self, now: float) -> None:
        """Begins a step at once, or when the requests that arrived or ended before are handled."""
        self._began_at = now
        start = max(now, self._free_at)
        self._admission.select(start)
        self._backlog.start_batch()
        self._calls = self._backlog.calls()
        self.ends_at = start + self._times.measured_seconds(*self._calls)


class Cluster:
    """Replicas behind a router. `run` can be called once."""

    def __init__(self, model: ReplicaModel, num_replicas: int, router: Router, report_seconds: float = 0.0) -> None:
        """`report_seconds` is the interval at which each replica reports its number of images to the router.

        The replicas report in turn, at equal intervals. If it is 0, the router always knows the present numbers. The
        router itself counts the requests that it has sent, so their numbers are always up to date.
        """
        self._replicas = [Replica(model) for _ in range(num_replicas)]
        self._router, self._report_seconds = router, report_seconds
        self._view, self._changes = View.of(num_replicas), count_from(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count_from()
        self._outcomes = list[Outcome]()
        self._owners = dict[Job, int]()  # the replica of each unanswered job
        self._until, self._num_open, self._now = 0.0, 0, 0.0

    def run(self, arrivals: Iterable[Arrival], until: float) -> list[Outcome]:
        """Returns the outcomes of the requests planned before `until`, in the order of their ends.

        Later requests take part too, until all of these have ended.
        """
        self._until, coming = until, iter(arrivals)
        if self._report_seconds:
            for place in range(len(self._replicas)):
                self._at(self._report_seconds * place / len(self._replicas), partial(self._report, place))
        arrival = next(coming)
        while arrival.at < until or self._num_open:
            if self._events and self._events[0][0] <= arrival.at:
                self._now, _, act = heapq.heappop(self._events)
                act()
            else:
                self._now = arrival.at
                self._arrive(arrival)
                arrival = next(coming)
        return [outcome for outcome in self._outcomes if outcome.at < until]

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), act))

    def _arrive(self, arrival: Arrival) -> None:
        job = Job(arrival.request, arrival.at)
        place = self._router(self._view)
        replica = self._replicas[place]
        self._count_request(place, 1)
        self._num_open += arrival.at < self._until
        was_idle = replica.ends_at is None
        try:
            replica.submit(job, self._now)
        except Overloaded:
            self._answer(job, place, REFUSED)
            return
        self._owners[job] = place
        self._count_images(place)
        self._at(job.deadline, partial(self._expire, job))
        if was_idle:
            self._at(replica.ends_at or 0.0, partial(self._end_step, place))

    def _end_step(self, place: int) -> None:
        replica = self._replicas[place]
        assert replica.ends_at is not None
        if self._now < replica.ends_at:  # requests that arrived during the step have made it longer
            self._at(replica.ends_at, partial(self._end_step, place))
            return
        for job, done in replica.end_step().items():
            self._at(done, partial(self._answer, job, self._owners.pop(job), OK))
        self._count_images(place)
        if replica.ends_at is not None:
            self._at(replica.ends_at, partial(self._end_step, place))

    def _expire(self, job: Job) -> None:
        place = self._owners.pop(job, None)
        if place is not None and self._replicas[place].expire(job):
            self._count_images(place)
            self._answer(job, place, LATE)

    def _answer(self, job: Job, place: int, status: int) -> None:
        self._count_request(place, -1)
        at = job.timings.submitted_at
        self._num_open -= at < self._until
        self._outcomes.append(Outcome(at, self._now, job.request.count, status, place))

    def _count_request(self, place: int, change: int) -> None:
        self._view.count_request(place, change, next(self._changes))

    def _count_images(self, place: int) -> None:
        if not self._report_seconds:
            self._view.images[place] = self._replicas[place].num_images

    def _report(self, place: int) -> None:
        self._view.images[place] = self._replicas[place].num_images
        self._at(self._now + self._report_seconds, partial(self._report, place))


def percentiles_of(latencies: Sequence[float]) -> dict[str, float]:
    """Returns the percentiles of latencies by name, such as `p95`."""
    return {f"p{share}": percentile(latencies, share / 100) for share in PERCENTILES}
