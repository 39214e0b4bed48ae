"""Simulates replicas of the service behind a router, on a virtual clock.

Each replica runs the scheduler of the service, `Admission`: what is refused, which rows a step has, the reserve and the
deadlines are those of the service. Only durations are modelled, from measured inputs:

- A step takes the time of its number of evaluations, by interpolation in `seconds_by_rows`.
- A request takes `request_seconds` of the core of its replica: HTTP, JSON and PNG. The steps of the other requests
  become longer by this time, half of it when the request arrives and half when its last step has ended.
- A request spends `delay_seconds` outside of the engine, half before its admission and half after its last step.
- A replica can be slower at some times than at others (Pace), because other programs or virtual machines use its core.
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
    request_seconds: float = 0.0  # by which a request makes steps longer
    delay_seconds: float = 0.0  # of a request outside of the engine
    max_batch: int | None = None  # UNFOG_MAX_BATCH; None is `auto`
    queue_capacity: int = 1024  # UNFOG_QUEUE_CAPACITY

    def capacity(self, mean_evaluations: float) -> float:
        """Returns how many requests a second a replica can serve if it always runs steps at the best measured rate.

        `mean_evaluations` is the mean number of evaluations of a request.
        """
        return 1 / (mean_evaluations / StepTimes(self.seconds_by_rows).best_rate + self.request_seconds)


@dataclass(frozen=True, slots=True)
class Pace:
    """How much longer than usual the steps of a replica take, in equal parts of the time since the load began."""

    seconds: float  # length of a part
    factors: Sequence[float]  # actual time divided by the usual time, of each part; the last one is also that of later

    def at(self, time: float) -> float:
        """Returns the factor at this time."""
        return self.factors[min(int(time / self.seconds), len(self.factors) - 1)]


STEADY = Pace(1.0, (1.0,))


class Replica:
    """A replica: the scheduler of the service, and the end of the step in progress."""

    def __init__(self, model: ReplicaModel, pace: Pace = STEADY) -> None:
        self.ends_at: float | None = None  # the end of the step in progress; None without a step
        self._times, self._pace = StepTimes(model.seconds_by_rows), pace
        self._half_request = model.request_seconds / 2
        self._admission = Admission(model.queue_capacity, model.max_batch)
        self._admission.open(self._times.copy())  # with a slowdown of its own, which the scheduler measures
        self._backlog = self._admission.backlog
        self._began_at = 0.0
        self._calls: Calls = {}, {}

    @property
    def num_images(self) -> int:
        """Returns the number of unfinished images: the sum of two gauges that the service publishes."""
        return self._backlog.waiting + self._backlog.running

    def submit(self, job: Job, now: float) -> None:
        """Admits a job, or raises Overloaded. The step in progress becomes longer in both cases."""
        if self.ends_at is not None:
            self.ends_at += self._half_request * self._pace.at(now)
        self._admission.admit(job, now)
        if self.ends_at is None:
            self._begin_step(now, 0)

    def end_step(self) -> list[Job]:
        """Ends the step in progress, and begins the next one if there are rows. Returns the finished jobs."""
        assert self.ends_at is not None, "end_step() needs a step in progress"
        now, self.ends_at = self.ends_at, None
        self._admission.observe(self._calls, now - self._began_at)
        ended = self._backlog.advance()
        self._backlog.finish([(row, PIXELS) for row in ended])
        finished = [job for job in dict.fromkeys(row.job for row in ended) if not job.unfinished]
        if self._backlog.jobs:
            self._begin_step(now, len(finished))
        return finished

    def expire(self, job: Job) -> bool:
        """Removes a job whose deadline has passed. Returns False if it is finished."""
        return self._backlog.remove(job)

    def _begin_step(self, now: float, finished: int) -> None:
        """Begins a step, during which the answers of the finished jobs are sent."""
        self._began_at = now
        self._admission.select(now)
        self._backlog.start_batch()
        self._calls = self._backlog.calls()
        seconds = self._times.measured_seconds(*self._calls) + finished * self._half_request
        self.ends_at = now + seconds * self._pace.at(now)


class _Sent(NamedTuple):
    """A request that a router has sent to a replica."""

    arrival: Arrival
    place: int


class Cluster:
    """Replicas behind a router. `run` can be called once."""

    def __init__(
        self,
        model: ReplicaModel,
        num_replicas: int,
        router: Router,
        report_seconds: float = 0.0,
        paces: Sequence[Pace] = (),
    ) -> None:
        """`report_seconds` is the interval at which each replica reports its number of images to the router.

        The replicas report in turn, at equal intervals. If it is 0, the router always knows the present numbers. The
        router itself counts the requests that it has sent, so their numbers are always up to date.

        `paces` has the pace of each replica. If it is empty, all replicas are steady.
        """
        paces = paces or [STEADY] * num_replicas
        self._replicas = [Replica(model, paces[place]) for place in range(num_replicas)]
        self._half_delay = model.delay_seconds / 2
        self._router, self._report_seconds = router, report_seconds
        self._view, self._changes = View.of(num_replicas), count_from(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count_from()
        self._outcomes = list[Outcome]()
        self._admitted = dict[Job, _Sent]()  # the jobs without a result
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
        place = self._router(self._view)
        self._count_request(place, 1)
        self._num_open += arrival.at < self._until
        self._at(self._now + self._half_delay, partial(self._submit, _Sent(arrival, place)))

    def _submit(self, sent: _Sent) -> None:
        job, replica = Job(sent.arrival.request, self._now), self._replicas[sent.place]
        was_idle = replica.ends_at is None
        try:
            replica.submit(job, self._now)
        except Overloaded:
            self._leave(sent, REFUSED)
            return
        self._admitted[job] = sent
        self._count_images(sent.place)
        self._at(job.deadline, partial(self._expire, job))
        if was_idle:
            self._at(replica.ends_at or 0.0, partial(self._end_step, sent.place))

    def _end_step(self, place: int) -> None:
        replica = self._replicas[place]
        assert replica.ends_at is not None
        if self._now < replica.ends_at:  # requests that arrived during the step have made it longer
            self._at(replica.ends_at, partial(self._end_step, place))
            return
        for job in replica.end_step():
            self._leave(self._admitted.pop(job), OK)
        self._count_images(place)
        if replica.ends_at is not None:
            self._at(replica.ends_at, partial(self._end_step, place))

    def _expire(self, job: Job) -> None:
        sent = self._admitted.get(job)
        if sent is not None and self._replicas[sent.place].expire(job):
            del self._admitted[job]
            self._count_images(sent.place)
            self._leave(sent, LATE)

    def _leave(self, sent: _Sent, status: int) -> None:
        self._at(self._now + self._half_delay, partial(self._answer, sent, status))

    def _answer(self, sent: _Sent, status: int) -> None:
        self._count_request(sent.place, -1)
        at = sent.arrival.at
        self._num_open -= at < self._until
        self._outcomes.append(Outcome(at, self._now, sent.arrival.request.count, status, sent.place))

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
