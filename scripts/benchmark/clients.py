"""Sends requests to a service on loopback, and notes when each was due, sent and answered.

Closed loop: each client asks again as soon as it is answered. Open loop: requests are sent at times that were drawn
beforehand, whatever the service does, and a latency counts from the time that was planned, so that a service cannot
slow down the clock that measures it (Tene 2015, "coordinated omission"). Both go on until all that is counted has been
answered: the last answers come under the same load as the first.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.common.progress import require

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientSession

TIMEOUT = 600  # seconds: what takes longer is a failure of the run


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's fate; times in seconds on one clock."""

    kind: str  # which of the mix it was
    images: int
    planned: float
    sent: float
    done: float
    status: int
    queue: float | None  # seconds until its first step, where the service says so

    @property
    def latency(self) -> float:
        """From when it was due."""
        return self.done - self.planned


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to make: a name for its kind, and its body."""

    kind: str
    body: dict[str, Any]


Asks = Callable[[int], Ask]  # the k-th request of a run
Send = Callable[[Ask, float], Awaitable[Answer]]


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """The times of a Poisson process, `rate` a second on the average, without end."""
    draw, at = random.Random(seed), 0.0
    while True:
        at += draw.expovariate(rate)
        yield at


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen between two times of the same clock."""

    start: float
    end: float
    answers: tuple[Answer, ...]  # those before it and after it too
    by_completion: bool = False  # how images are counted: requests that wait in an open loop may never be drawn in time

    @property
    def images_a_second(self) -> float:
        """A request counts where it is completed, or with the share of its time that lies within."""
        counts = (a.images * self._share(a) for a in self.answers if a.status == 200)
        return sum(counts) / (self.end - self.start)

    def due(self, kind: str | None = None) -> list[Answer]:
        """Requests that were due within it, of one kind or of all."""
        return [a for a in self.answers if self.start <= a.planned < self.end and kind in (None, a.kind)]

    def latencies(self, kind: str | None = None) -> list[float]:
        """Their seconds."""
        return [a.latency for a in self.due(kind)]

    def goodput(self, objective: float) -> float:
        """Images a second of requests that were due within it and answered within `objective` seconds."""
        good = (a.images for a in self.due() if a.status == 200 and a.latency <= objective)
        return sum(good) / (self.end - self.start)

    @property
    def failures(self) -> int:
        """Requests that were not answered with 200."""
        return sum(answer.status != 200 for answer in self.answers)

    def _share(self, answer: Answer) -> float:
        if self.by_completion:
            return float(self.start <= answer.done < self.end)
        within = min(answer.done, self.end) - max(answer.sent, self.start)
        return max(within, 0.0) / (answer.done - answer.sent)


@asynccontextmanager
async def connected(url: str) -> "AsyncIterator[Send]":
    """A way to send requests to POST /generate there."""
    aiohttp = require("aiohttp", extra="bench")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT)) as session:
        yield lambda ask, planned: _send(session, f"{url}/generate", ask, planned)


async def _send(session: "ClientSession", url: str, ask: Ask, planned: float) -> Answer:
    broken = require("aiohttp", extra="bench").ClientError, OSError
    sent, status, queue = time.perf_counter(), 0, ""
    with suppress(*broken):  # a failure, with status 0
        async with session.post(url, json=ask.body, headers={"Accept": "image/png"}) as answer:
            await answer.read()
            status = answer.status
            queue = answer.headers.get("Server-Timing", "").partition("queue;dur=")[2].partition(",")[0]
    done, count = time.perf_counter(), ask.body.get("count", 1)
    return Answer(ask.kind, count, planned, sent, done, status, float(queue) / 1000 if queue else None)


async def closed_loop(send: Send, clients: Sequence[Asks], settle: float, window: float) -> Window:
    """Each client asks one after the other.

    The window opens when each has been answered once, and not before `settle` seconds: what is answered in it was
    asked for under the load that it is answered under.
    """
    begin, numbers, loop = time.perf_counter(), itertools.count(1), _Loop()

    async def client(place: int, asks: Asks) -> None:
        while not loop.is_over(now := time.perf_counter()):
            await loop.take(send(asks(next(numbers)), now))
            loop.unanswered.discard(place)
            if not loop.unanswered and not loop.end and (now := time.perf_counter()) >= begin + settle:
                loop.start, loop.end = now, now + window

    loop.unanswered = set(range(len(clients)))
    async with asyncio.TaskGroup() as group:
        for place, asks in enumerate(clients):
            group.create_task(client(place, asks))
    return Window(loop.start, loop.end, tuple(loop.answers))


async def open_loop(send: Send, asks: Asks, times: Iterable[float], settle: float, window: float) -> Window:
    """One request at each of these times, counted from now; the window opens after `settle` seconds."""
    begin, loop = time.perf_counter(), _Loop()
    loop.start, loop.end = begin + settle, begin + settle + window
    async with asyncio.TaskGroup() as group:
        for k, at in enumerate(times):
            await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
            if loop.is_over(begin + at):
                break
            group.create_task(loop.take(send(asks(k), begin + at), due=begin + at))
    return Window(loop.start, loop.end, tuple(loop.answers), by_completion=True)


class _Loop:
    """The answers so far; the load goes on until all that was due in the window is answered."""

    def __init__(self) -> None:
        self.start = self.end = 0.0
        self.answers: list[Answer] = []
        self.unanswered: set[int] = set()  # clients that have had no answer yet
        self._open: list[float] = []  # when those that are not answered were due

    def is_over(self, now: float) -> bool:
        """Whether what comes now changes nothing any more."""
        return bool(self.end) and now >= self.end and all(due >= self.end for due in self._open)

    async def take(self, answer: Awaitable[Answer], due: float | None = None) -> None:
        """Waits for it, and keeps it."""
        due = time.perf_counter() if due is None else due
        self._open.append(due)
        self.answers.append(await answer)
        self._open.remove(due)
