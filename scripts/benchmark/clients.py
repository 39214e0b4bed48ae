"""Load generators: send requests to a service and record when each was planned, sent and answered.

In a closed loop each client sends its next request as soon as the previous one is answered. In an open loop requests
are sent at times that do not depend on the service. Latency then counts from the planned time, so that a slow service
cannot delay the requests that measure it (Tene 2015, "coordinated omission"). Both loops keep up the load until every
request that counts is answered.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from scripts.benchmark.http_client import HttpClient
from scripts.common.errors import ScriptError

TIMEOUT = 600  # seconds; a slower request counts as failed
LONGEST_PROBLEM = 200  # bytes
EVENTS, NUM_PREVIEWS = "text/event-stream", 10


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one request. Times are in seconds of `time.perf_counter`."""

    kind: str  # the kind of request, for loads that mix several
    images: int
    planned: float
    sent: float
    done: float
    status: int  # 0 if the answer is incomplete
    queue: float | None  # seconds until the first step; None if the service does not report it
    problem: str = ""  # the error or the beginning of the body, if the status is not 200
    work: float | None = None  # seconds from the first to the last step; None if the service does not report it

    @property
    def latency(self) -> float:
        """The seconds from the planned time to the answer."""
        return self.done - self.planned


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A request to send: its kind and its JSON body."""

    kind: str
    body: dict[str, Any]


RequestMaker = Callable[[int], RequestSpec]  # returns the k-th request of a run
Send = Callable[[RequestSpec, float], Awaitable[Answer]]


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yields the times of an endless Poisson process with `rate` events per second."""
    generator, at = random.Random(seed), 0.0
    while True:
        at += generator.expovariate(rate)
        yield at


@dataclass(frozen=True, slots=True)
class Window:
    """The measured time window of a load, and the answers of the whole run."""

    start: float
    end: float
    answers: tuple[Answer, ...]  # all answers, also those before and after the window
    by_completion: bool = False  # True: count a request where it completes. False: count its overlap with the window

    @property
    def images_a_second(self) -> float:
        """Throughput in the window.

        If `by_completion` is set, a request counts if it completed in the window. An open loop needs this, since its
        requests may wait in the queue for long. Otherwise a request counts with the fraction of its time in the window.
        """
        counts = (a.images * self._share(a) for a in self.answers if a.status == 200)
        return sum(counts) / (self.end - self.start)

    def due(self, kind: str | None = None) -> list[Answer]:
        """Returns the requests of a kind, or of all kinds, whose planned time is in the window."""
        return [a for a in self.answers if self.start <= a.planned < self.end and kind in (None, a.kind)]

    def latencies(self, kind: str | None = None) -> list[float]:
        """Returns the latencies, in seconds, of the requests that `due` returns."""
        return [a.latency for a in self.due(kind)]

    def goodput(self, objective: float) -> float:
        """Returns the images per second, counting only requests of `due` answered within `objective` seconds."""
        good = (a.images for a in self.due() if a.status == 200 and a.latency <= objective)
        return sum(good) / (self.end - self.start)

    def _share(self, answer: Answer) -> float:
        if self.by_completion:
            return float(self.start <= answer.done < self.end)
        within = min(answer.done, self.end) - max(answer.sent, self.start)
        return max(within, 0.0) / (answer.done - answer.sent)


def check_answers(answers: Sequence[Answer], name: str) -> None:
    """Raises ScriptError if a request was not answered with status 200. `name` says what was measured."""
    if failed := [answer for answer in answers if answer.status != 200]:
        first = f"{failed[0].status} {failed[0].problem}".strip()
        raise ScriptError(f"{name}: {len(failed)} requests failed, the first one with status {first}")


@asynccontextmanager
async def connected(url: str, accept: str = "image/png") -> AsyncIterator[Send]:
    """Yields a function that sends a request to POST /generate of the service at `url`."""
    async with HttpClient(url) as client:
        yield partial(_send, client, "/generate", accept)


@asynccontextmanager
async def streaming(url: str) -> AsyncIterator[Send]:
    """Does the same as `connected`, but requests an event stream with NUM_PREVIEWS previews."""
    async with HttpClient(url) as client:
        yield partial(_send, client, f"/generate?previews={NUM_PREVIEWS}", EVENTS)


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Send]:
    """Does the same as `connected`, and reads GET /events/batch at the same time, like the view Batch of the page."""
    async with HttpClient(url) as client:
        reader = asyncio.create_task(client.request("GET", "/events/batch", accept=EVENTS, take=lambda part: None))
        try:
            yield partial(_send, client, "/generate", "image/png")
            if reader.done():
                status = reader.result().status
                raise ScriptError(f"The stream of batch events, with status {status}, has ended")
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


async def _send(client: HttpClient, path: str, accept: str, request: RequestSpec, planned: float) -> Answer:
    sent, status, timing, problem = time.perf_counter(), 0, "", ""
    try:
        async with asyncio.timeout(TIMEOUT):
            response = await client.request("POST", path, request.body, accept)
        # A stream that has begun has status 200, also if it ends with an error.
        is_complete = accept != EVENTS or b"event: done" in response.content
        status = response.status if is_complete else 0
        timing = response.headers.get("server-timing", "")
        if status != 200:
            problem = response.content[:LONGEST_PROBLEM].decode(errors="replace")
    except OSError as error:  # also of a request that takes longer than TIMEOUT
        problem = repr(error)
    done, count = time.perf_counter(), request.body.get("count", 1)
    queue, work = _seconds_of(timing, "queue"), _seconds_of(timing, "denoise")
    return Answer(request.kind, count, planned, sent, done, status, queue, problem, work)


def _seconds_of(timing: str, phase: str) -> float | None:
    """Returns the duration of a phase in the header Server-Timing. Returns None if the header does not have it."""
    milliseconds = timing.partition(f"{phase};dur=")[2].partition(",")[0]
    return float(milliseconds) / 1000 if milliseconds else None


async def closed_loop(send: Send, clients: Sequence[RequestMaker], settle: float, window: float) -> Window:
    """Runs clients that send one request after the other.

    The window opens when every client has got an answer and at least `settle` seconds have passed. Every request of
    the window is therefore sent under full load. `window` is its length in seconds.
    """
    begin, numbers, loop = time.perf_counter(), itertools.count(1), _Loop()

    async def client(place: int, make_request: RequestMaker) -> None:
        while not loop.is_over(now := time.perf_counter()):
            await loop.take(send(make_request(next(numbers)), now))
            loop.unanswered.discard(place)
            if not loop.unanswered and not loop.end and (now := time.perf_counter()) >= begin + settle:
                loop.start, loop.end = now, now + window

    loop.unanswered = set(range(len(clients)))
    async with asyncio.TaskGroup() as group:
        for place, make_request in enumerate(clients):
            group.create_task(client(place, make_request))
    return Window(loop.start, loop.end, tuple(loop.answers))


async def open_loop(
    send: Send, make_request: RequestMaker, times: Iterable[float], settle: float, window: float
) -> Window:
    """Sends a request at each of these times, in seconds from now. The window opens after `settle` seconds."""
    begin, loop = time.perf_counter(), _Loop()
    loop.start, loop.end = begin + settle, begin + settle + window
    async with asyncio.TaskGroup() as group:
        for k, at in enumerate(times):
            await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
            if loop.is_over(begin + at):
                break
            group.create_task(loop.take(send(make_request(k), begin + at), due=begin + at))
    return Window(loop.start, loop.end, tuple(loop.answers), by_completion=True)


class _Loop:
    """State of a running load: the window, the answers and the requests in flight."""

    def __init__(self) -> None:
        self.start = self.end = 0.0
        self.answers: list[Answer] = []
        self.unanswered: set[int] = set()  # numbers of the clients that have no answer yet
        self._open: list[float] = []  # planned times of the requests in flight

    def is_over(self, now: float) -> bool:
        """True if the window has ended and no request in flight was planned in it."""
        return bool(self.end) and now >= self.end and all(due >= self.end for due in self._open)

    async def take(self, answer: Awaitable[Answer], due: float | None = None) -> None:
        """Waits for an answer and stores it. `due` is the planned time; None means now."""
        due = time.perf_counter() if due is None else due
        self._open.append(due)
        self.answers.append(await answer)
        self._open.remove(due)
