"""Tests of the load generators with a service whose answers take a known time."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain, count, islice, pairwise, takewhile

import pytest
from aiohttp import web

from scripts.benchmark.clients import (
    Answer,
    RequestSpec,
    Window,
    arrivals,
    check_answers,
    closed_loop,
    connected,
    open_loop,
    streaming,
    watching,
)
from scripts.common.errors import ScriptError


def request(k: int) -> RequestSpec:
    return RequestSpec("odd" if k % 2 else "even", {"digit": k % 10, "count": 3})


@asynccontextmanager
async def service(
    seconds: float = 0.0, status: int = 200, until: asyncio.Event | None = None
) -> AsyncIterator[tuple[str, list[int]]]:
    """A service that answers one request at a time. Yields its URL, and the number of open requests at each arrival."""
    open_at_once: list[int] = []
    lock, num_open = asyncio.Lock(), 0

    async def generate(_: web.Request) -> web.Response:
        nonlocal num_open
        num_open += 1
        open_at_once.append(num_open)
        async with lock:
            await asyncio.sleep(seconds)
        if until:
            await until.wait()
        num_open -= 1
        return web.Response(text="busy", status=status, headers={"Server-Timing": "queue;dur=250.0, denoise;dur=1"})

    async with serving(web.post("/generate", generate)) as url:
        yield url, open_at_once


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    """Runs a server with these routes and yields its URL."""
    app = web.Application()
    app.router.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def endless(start: float) -> Iterator[float]:
    """Yields the times 0.1 s, 0.2 s, 0.3 s and so on."""
    return (start + k / 10 for k in count())


def test_arrivals_are_a_poisson_process_and_reproducible() -> None:
    times = list(takewhile(lambda at: at < 200, arrivals(50, seed=1)))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(
        statistics.mean(gaps), rel=0.05
    )  # true for an exponential distribution
    assert times == list(islice(arrivals(50, seed=1), len(times))) != list(islice(arrivals(50, seed=2), len(times)))


def test_closed_loop_has_one_open_request_per_client() -> None:
    async def run() -> tuple[Window, list[int]]:
        async with service(0.01) as (url, open_at_once), connected(url) as send:
            return await closed_loop(send, (request,) * 3, settle=0.1, window=0.3), open_at_once

    window, open_at_once = asyncio.run(run())
    assert len(window.answers) == len(open_at_once)
    assert max(open_at_once) == 3
    assert {answer.kind for answer in window.answers} == {"odd", "even"}
    assert all((answer.images, answer.status) == (3, 200) for answer in window.answers)
    assert all((answer.queue, answer.work) == (0.25, 0.001) for answer in window.answers)
    assert all(answer.planned <= answer.sent < answer.done for answer in window.answers)


def test_closed_loop_keeps_the_load_for_the_whole_window() -> None:
    async def run() -> Window:
        async with service(0.05) as (url, _), connected(url) as send:
            return await closed_loop(send, (request,) * 4, settle=0.0, window=0.3)

    window = asyncio.run(run())
    first = sorted(window.answers, key=lambda answer: answer.sent)[:4]
    assert max(answer.done for answer in first) <= window.start
    counted = [answer for answer in window.answers if answer.sent < window.end]
    last = max(counted, key=lambda answer: answer.done)
    assert sum(answer.sent <= last.sent and answer.done >= last.sent for answer in window.answers) >= 2
    # The service answers one request of three images at a time, so the rate follows from the answers.
    own = sorted(answer.done for answer in window.answers)
    seconds = statistics.mean(later - earlier for earlier, later in pairwise(own))
    assert window.images_a_second == pytest.approx(3 / seconds, rel=0.25)


def test_open_loop_sends_at_the_planned_times() -> None:
    answering, released = asyncio.Event(), list[float]()

    async def run() -> Window:
        async with service(until=answering) as (url, _), connected(url) as send:
            times = chain([0.0, 0.0, 0.0, 0.05, 0.2], endless(0.4))
            loop = asyncio.ensure_future(open_loop(send, request, times, settle=0.0, window=0.2))
            await asyncio.sleep(0.5)  # no request is answered in this time
            released.append(time.perf_counter())
            answering.set()
            return await loop

    window = asyncio.run(run())
    assert [answer.planned - window.start for answer in window.due()] == pytest.approx([0, 0, 0, 0.05])
    assert all(answer.sent < released[0] for answer in window.due())  # no request waited for an answer
    assert min(window.latencies()) > 0.4
    assert len(window.answers) > len(
        window.due()
    )  # the load continued until the last request of the window was answered


def test_rejected_requests_have_their_status_and_the_reason() -> None:
    async def run() -> list[Answer]:
        async with service(status=429) as (url, _), connected(url) as send:
            window = await open_loop(send, request, chain([0.0, 0.0], endless(0.1)), settle=0.0, window=0.05)
            return list(window.due())

    answers = asyncio.run(run())
    assert [(answer.status, answer.problem) for answer in answers] == [(429, "busy")] * 2
    with pytest.raises(ScriptError, match=r"^a load: 2 requests failed, the first one with status 429 busy$"):
        check_answers([answer(0, 1), *answers], "a load")


def test_broken_connection_has_status_0_and_the_error() -> None:
    async def run() -> Answer:
        async with service() as (url, _), connected(url) as send:
            assert (await send(request(1), 0.0)).status == 200
        async with connected(url) as send:
            return await send(request(1), 0.0)

    found = asyncio.run(run())
    assert found.status == 0
    assert found.problem.startswith("ConnectionRefusedError")


def answer(planned: float, done: float, *, images: int = 1, kind: str = "one", status: int = 200) -> Answer:
    return Answer(kind, images, planned, planned, done, status, None)


WINDOW = Window(
    10,
    20,
    (
        answer(8, 12, images=4),  # half of its time is in the window
        answer(11, 13, images=2),
        answer(12, 19, kind="two"),
        answer(18, 25),  # two sevenths of its time are in the window
        answer(19, 19.5, images=64, status=429),
    ),
)


def test_images_count_by_overlap_and_latencies_by_planned_time() -> None:
    assert WINDOW.images_a_second == pytest.approx((4 * 2 / 4 + 2 + 1 + 2 / 7) / 10)
    assert WINDOW.latencies() == [2, 7, 7, 0.5]
    assert WINDOW.latencies("two") == [7]


def test_goodput_counts_answers_within_the_objective() -> None:
    assert WINDOW.goodput(2) == pytest.approx(2 / 10)
    assert WINDOW.goodput(7) == pytest.approx((2 + 1 + 1) / 10)


def test_images_count_by_completion_in_an_open_loop() -> None:
    window = replace(WINDOW, by_completion=True)
    assert window.images_a_second == pytest.approx(
        (4 + 2 + 1) / 10
    )  # the images completed at 12, 13 and 19 s count, the image at 25 s does not


@pytest.mark.parametrize(("last", "status"), [("done", 200), ("error", 0)])
def test_stream_counts_as_answered_only_if_it_ends_with_done(last: str, status: int) -> None:
    seen = list[tuple[str, str]]()

    async def generate(request: web.Request) -> web.Response:
        seen.append((request.query_string, request.headers["Accept"]))
        return web.Response(text=f"event: accepted\ndata: {{}}\n\nevent: {last}\ndata: {{}}\n\n")

    async def run() -> Answer:
        async with serving(web.post("/generate", generate)) as url, streaming(url) as send:
            return await send(request(0), time.perf_counter())

    assert asyncio.run(run()).status == status
    assert seen == [("previews=10", "text/event-stream")]


def test_watching_reads_the_batch_events_while_requests_are_sent() -> None:
    num_read = 0

    async def events(request: web.Request) -> web.StreamResponse:
        nonlocal num_read
        stream = web.StreamResponse()
        await stream.prepare(request)
        while True:
            await stream.write(b"event: batch\ndata: {}\n\n")
            num_read += 1
            await asyncio.sleep(0.01)

    async def generate(_: web.Request) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response()

    async def run() -> Answer:
        routes = web.post("/generate", generate), web.get("/events/batch", events)
        async with serving(*routes) as url, watching(url) as send:
            return await send(request(0), time.perf_counter())

    assert asyncio.run(run()).status == 200
    assert num_read >= 2
