"""Sends requests to a service on loopback, and notes when each was due, sent and answered.

Closed loop: each client asks again as soon as it is answered. Open loop: requests are sent at times that were drawn
beforehand, whatever the service does, and a latency counts from the time that was planned, so that a service cannot
slow down the clock that measures it (Tene 2015, "coordinated omission").
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
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


Send = Callable[[Ask, float], Awaitable[Answer]]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process within so many seconds, `rate` a second on the average."""
    draw, times, at = random.Random(seed), list[float](), 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    return times


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


async def closed_loop(send: Send, asks: Callable[[int], Ask], clients: int, seconds: float) -> list[Answer]:
    """`clients` that ask one after the other for so many seconds; `asks(k)` is the k-th request of all."""
    until, answers, count = time.perf_counter() + seconds, list[Answer](), 0

    async def client() -> None:
        nonlocal count
        while (now := time.perf_counter()) < until:
            count += 1
            answers.append(await send(asks(count), now))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return answers


async def open_loop(send: Send, asks: Callable[[int], Ask], times: Sequence[float]) -> list[Answer]:
    """One request at each of these times, counted from now."""
    start, tasks = time.perf_counter(), list[asyncio.Task[Answer]]()
    async with asyncio.TaskGroup() as group:
        for k, at in enumerate(times):
            await asyncio.sleep(max(start + at - time.perf_counter(), 0))
            tasks.append(group.create_task(_as_coroutine(send(asks(k), start + at))))
    return [task.result() for task in tasks]


async def _as_coroutine(answer: Awaitable[Answer]) -> Answer:
    return await answer
