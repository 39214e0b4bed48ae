"""The clients against a service whose answers take a known time."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import chain, count, islice, pairwise, takewhile

import pytest
from aiohttp import web

from scripts.benchmark.load import Answer, Ask, Send, arrivals, closed_loop, connected, open_loop


def ask(k: int) -> Ask:
    return Ask("odd" if k % 2 else "even", {"digit": k % 10, "count": 3})


@asynccontextmanager
async def service(seconds: float = 0.0, status: int = 200) -> AsyncIterator[tuple[str, list[int]]]:
    """Answers one request at a time; its address, and how many were open when each came."""
    open_at_once: list[int] = []
    lock, num_open = asyncio.Lock(), 0

    async def generate(request: web.Request) -> web.Response:
        nonlocal num_open
        num_open += 1
        open_at_once.append(num_open)
        async with lock:
            await asyncio.sleep(seconds)
        num_open -= 1
        return web.Response(status=status, headers={"Server-Timing": "queue;dur=250.0, denoise;dur=1"})

    app = web.Application()
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", open_at_once
    finally:
        await runner.cleanup()


async def under(load: str, send: Send) -> list[Answer]:
    if load == "closed":
        return await closed_loop(send, (ask,) * 3, seconds=0.3)
    return await open_loop(send, ask, chain([0.0, 0.0, 0.0, 0.05, 0.2], endless(0.4)), seconds=0.2)


def endless(start: float) -> Iterator[float]:
    """Every tenth of a second."""
    return (start + k / 10 for k in count())


def test_arrivals_are_a_poisson_process_and_the_same_for_the_same_seed() -> None:
    times = list(takewhile(lambda at: at < 200, arrivals(50, seed=1)))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # as of an exponential
    assert times == list(islice(arrivals(50, seed=1), len(times))) != list(islice(arrivals(50, seed=2), len(times)))


def test_a_closed_loop_has_as_many_requests_open_as_clients() -> None:
    async def run() -> tuple[list[Answer], list[int]]:
        async with service(0.01) as (url, open_at_once), connected(url) as send:
            return await under("closed", send), open_at_once

    answers, open_at_once = asyncio.run(run())
    assert 3 <= len(answers) < len(open_at_once)  # those that came after the time are asked, but not counted
    assert max(open_at_once) == 3
    assert set(open_at_once[2 : len(answers)]) == {3}
    assert {answer.kind for answer in answers} == {"odd", "even"}
    assert all((answer.images, answer.status, answer.queue) == (3, 200, 0.25) for answer in answers)
    assert all(answer.planned <= answer.sent < answer.done for answer in answers)


def test_an_open_loop_sends_when_it_is_time_and_counts_from_then() -> None:
    async def run() -> tuple[list[Answer], list[int]]:
        async with service(0.1) as (url, open_at_once), connected(url) as send:
            return await under("open", send), open_at_once

    answers, open_at_once = asyncio.run(run())
    first = answers[0].planned
    assert [answer.planned - first for answer in answers] == pytest.approx([0, 0, 0, 0.05])
    assert open_at_once[:4] == [1, 2, 3, 4]  # nobody waited for an answer
    assert len(answers) == 4 < len(open_at_once)  # the load went on until the last of them was answered
    latencies = [answer.latency for answer in answers]
    assert all(latency > 0.09 * place for place, latency in enumerate(latencies[:3], start=1))
    assert latencies[3] > 0.34  # due at 0.05, and three were before it


def test_a_refusal_is_noted() -> None:
    async def run() -> list[Answer]:
        async with service(status=429) as (url, _), connected(url) as send:
            return await under("open", send)

    assert [answer.status for answer in asyncio.run(run())] == [429] * 4
