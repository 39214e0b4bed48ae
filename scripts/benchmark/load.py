"""Sends requests to a service on loopback, and notes when each was due, sent and answered.

Closed loop: each client asks again as soon as it is answered. Open loop: requests are sent at times that were drawn
beforehand, whatever the service does, and a latency counts from the time that was planned, so that a service cannot
slow down the clock that measures it (Tene 2015, "coordinated omission"). Both go on with what is not counted until all
that is counted has been answered: the last answers come under the same load as the first.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.progress import require

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


@asynccontextmanager
async def connected(url: str) -> "AsyncIterator[Send]":
    """A way to send requests to POST /generate there."""
    aiohttp = require("aiohttp", extra="bench")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT)) as session:
        yield lambda ask, planned: _send(session, f"{url}/generate", ask, planned)


async def _send(session: "ClientSession", url: str, ask: Ask, planned: float) -> Answer:
    sent = time.perf_counter()
    async with session.post(url, json=ask.body, headers={"Accept": "image/png"}) as answer:
        await answer.read()
        queue = answer.headers.get("Server-Timing", "").partition("queue;dur=")[2].partition(",")[0]
        count, status = ask.body.get("count", 1), answer.status
    done = time.perf_counter()
    return Answer(ask.kind, count, planned, sent, done, status, float(queue) / 1000 if queue else None)


async def closed_loop(send: Send, clients: Sequence[Asks], seconds: float) -> list[Answer]:
    """Each client asks one after the other; those due within so many seconds are counted."""
    until, counted, numbers = time.perf_counter() + seconds, _Counted(), itertools.count(1)

    async def client(asks: Asks) -> None:
        while (now := time.perf_counter()) < until or counted.left:
            await counted.wait_for(send(asks(next(numbers)), now), is_counted=now < until)

    async with asyncio.TaskGroup() as group:
        for asks in clients:
            group.create_task(client(asks))
    return counted.answers


async def open_loop(send: Send, asks: Asks, times: Iterable[float], seconds: float) -> list[Answer]:
    """One request at each of these times, counted from now; those due within so many seconds are counted."""
    start, counted = time.perf_counter(), _Counted()
    async with asyncio.TaskGroup() as group:
        for k, at in enumerate(times):
            await asyncio.sleep(max(start + at - time.perf_counter(), 0))
            if at >= seconds and not counted.left:
                break
            group.create_task(counted.wait_for(send(asks(k), start + at), is_counted=at < seconds))
    return counted.answers


class _Counted:
    """The answers that count, and how many are still to come."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.left = 0

    async def wait_for(self, answer: Awaitable[Answer], *, is_counted: bool) -> None:
        self.left += is_counted
        got = await answer
        if is_counted:
            self.answers.append(got)
            self.left -= 1
