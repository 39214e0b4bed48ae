"""Runs the work of requests with pictures in worker threads, in a fair order and within a limit of time.

A request is divided into steps: one parses the body, and one for each picture decodes and converts it. After each step,
the worker selects the next one. There are three lanes, for small, medium and large requests. The next step belongs to
the lane that has had the least work, and in a lane, requests are served in order of arrival. So each lane gets a third
of the worker time if it needs it, and a small request waits for one step of a large one, not for all of its pictures.

A request is refused with 429, before its pictures are decoded, if a third of the worker time until its deadline is not
enough for it and for the requests before it in its lane. Later requests do not delay it further, so an admitted request
is in time if the predictions are right. Without unfinished requests, every one is admitted, because only finished steps
correct a wrong prediction.

The work of a step is predicted as a number of pixels. Finished steps give the mean seconds per pixel.
"""

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, TypeVar

from app.api.http.thread_priority import lower_priority
from app.errors import FieldError, Overloaded, UnfogError

NUM_WORKERS = 2  # pictures that are decoded at the same time; each of them needs up to 100 MB, or 150 MB in colour
FIRST_SECONDS = 2e-8  # per pixel of work, before the first step
FIRST_WORK = 1_000_000  # weight of FIRST_SECONDS: it counts like a finished step of this work
KEPT = 0.9  # weight of the earlier steps in the seconds per pixel
MAX_JUMP = 10.0  # a step counts at most as this multiple of its predicted time, because the process can be suspended
# The largest work of small and of medium requests: an ordinary picture, and the largest picture.
LARGEST_WORK = (2_000_000, 20_000_000)
NUM_LANES = len(LARGEST_WORK) + 1
LONGEST_WAIT = 3600  # maximum Retry-After, in seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """A part of a request that a worker runs without interruption. `work` is a predicted number of pixels."""

    work: int
    run: Callable[[], T]


@dataclass(eq=False, slots=True)
class _Request:
    lane: "_Lane"
    steps: deque[Step[Any]]  # that have not begun
    is_running: bool = False
    results: list[Any] = field(default_factory=list)
    future: Future[list[Any]] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _Lane:
    requests: dict[_Request, None] = field(default_factory=dict)  # unfinished, in the order of arrival
    work_left: int = 0  # of their steps that have not finished
    # Of the steps that have begun. It is raised after the lane was empty, so that the lane does not catch up.
    work_begun: int = 0

    def waiting(self) -> _Request | None:
        """Returns the oldest request that has steps and of which no step runs."""
        return next((request for request in self.requests if request.steps and not request.is_running), None)


class PictureQueue:
    """Queue and worker threads. Any thread may call the public methods, and none of them waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds and must be monotonic."""
        self._clock = clock
        self._workers = ThreadPoolExecutor(NUM_WORKERS, "pictures", lower_priority)
        self._lock = threading.Lock()
        # The executor has a call of _run_step for each request that waits.
        self._lanes = [_Lane() for _ in range(NUM_LANES)]
        # The `work_begun` of the lane that was selected last, before its step. An empty lane continues from here.
        self._work_begun = 0
        self._seconds, self._work = FIRST_SECONDS * FIRST_WORK, float(FIRST_WORK)  # weighted sums of finished steps
        self._is_closed = False

    def submit(self, steps: Iterable[Step[T]], timeout: float) -> Future[list[T]]:
        """Returns a future of the results of the steps, at least one, which run one after the other.

        The steps that have not begun are dropped if the future is cancelled or a step raises an exception. Raises
        Overloaded if the results are not expected within `timeout` seconds.
        """
        steps = deque(steps)
        assert steps, "a request has at least one step"
        work = sum(step.work for step in steps)
        with self._lock:
            lane = self._lanes[bisect_left(LARGEST_WORK, work)]
            self._refuse_if_late(lane, work, timeout)
            if not lane.requests:
                lane.work_begun = max(lane.work_begun, self._work_begun)
            request = _Request(lane, steps)
            lane.requests[request] = None
            lane.work_left += work
            self._call_worker()
        request.future.add_done_callback(lambda _: self._remove(request))
        if self._is_closed:
            request.future.cancel()
        return request.future

    def close(self) -> None:
        """Cancels all requests. The steps that run now are finished."""
        with self._lock:
            self._is_closed = True
            requests = [request for lane in self._lanes for request in lane.requests]
        self._workers.shutdown(wait=False, cancel_futures=True)
        for request in requests:
            request.future.cancel()

    def _refuse_if_late(self, lane: _Lane, work: int, timeout: float) -> None:
        """Raises Overloaded if a request of this work would be late. The lock must be held."""
        pace = self._seconds / self._work / NUM_WORKERS
        late = pace * (lane.work_left + work) - timeout / NUM_LANES
        if late > 0 and any(other.requests for other in self._lanes):
            wait = math.ceil(min(late, pace * sum(other.work_left for other in self._lanes)))
            raise Overloaded(max(1, min(wait, LONGEST_WAIT)), "Too many pictures are being decoded. Retry later")

    def _call_worker(self) -> None:
        """Makes a worker run a step. Does nothing after `close`. The lock must be held."""
        if not self._is_closed:
            self._workers.submit(self._run_step)

    def _run_step(self) -> None:
        """Runs the next step. Does nothing if the request of this call is cancelled and no other waits."""
        with self._lock:
            if not (request := self._select()):
                return
            request.is_running = True
            step = request.steps.popleft()
            self._work_begun = request.lane.work_begun
            request.lane.work_begun += step.work
        start, error = self._clock(), None
        try:
            request.results.append(step.run())
        except Exception as raised:
            error = raised
            if isinstance(raised, UnfogError | FieldError):
                # Its frames hold the file and the decoded picture. They would stay until a garbage collection.
                raised.__traceback__ = raised.__cause__ = raised.__context__ = None
        seconds, work = self._clock() - start, step.work
        del step  # It holds the file, which is not needed any more.
        with self._lock:
            self._measure(work, seconds)
            request.lane.work_left -= work
            request.is_running = False
            if error:
                self._drop_steps(request)
            is_done = not request.steps
            if not is_done:
                self._call_worker()
        with suppress(InvalidStateError):  # the request was cancelled
            if error:
                request.future.set_exception(error)
            elif is_done:
                request.future.set_result(request.results)

    def _select(self) -> _Request | None:
        """Returns the next request of the lane that has had the least work. The lock must be held."""
        waiting = [(lane.work_begun, request) for lane in self._lanes if (request := lane.waiting())]
        return min(waiting, key=itemgetter(0))[1] if waiting else None

    def _measure(self, work: int, seconds: float) -> None:
        """Adds a finished step to the weighted sums. The lock must be held."""
        most = MAX_JUMP * self._seconds / self._work * work
        self._seconds = KEPT * self._seconds + min(seconds, most)
        self._work = KEPT * self._work + work

    def _remove(self, request: _Request) -> None:
        """Removes a request that is done."""
        with self._lock:
            del request.lane.requests[request]
            self._drop_steps(request)

    def _drop_steps(self, request: _Request) -> None:
        """Drops the steps that have not begun. The lock must be held."""
        request.lane.work_left -= sum(step.work for step in request.steps)
        request.steps.clear()
