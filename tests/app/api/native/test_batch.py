"""Tests of GET /events/batch within this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from app.api.native import batch
from app.api.native.batch import MAX_VIEWERS, BatchEvent, BatchViewers, encode_batch
from app.engine.batch_feed import Batch
from app.engine.interface import DeviceLostError
from app.engine.job import Job
from app.main import create_app
from app.settings import Settings
from tests.app.application import WORK
from tests.app.fakes import (
    FakeRunner,
    Gate,
    Rows,
    new_engine,
    new_job,
    new_recognised_search,
    new_recognition,
    new_search,
    opened,
    tick,
    wait_until,
)

KEY = "a-key-for-this-test"
IDLE = {"waiting": 0, "running": 0, "rows": []}
EVENT_SECONDS = 20  # time limit for an event


@pytest.fixture(autouse=True)
def no_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are not repeated. Otherwise an event that was not sent would only come late."""
    monkeypatch.setattr(batch, "REPEAT_SECONDS", 1000.0)


class Client:
    """A client that reads the stream. It accepts data only while `may_read` is set."""

    def __init__(self, app: FastAPI, method: str = "GET", **headers: str) -> None:
        self._engine = app.state.service.engine
        self.status, self.headers = 0, dict[str, str]()
        self.may_read, self._gone = asyncio.Event(), asyncio.Event()
        self.may_read.set()
        self._received: asyncio.Queue[bytes] = asyncio.Queue()
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        path: dict[str, Any] = {"path": "/events/batch", "raw_path": b"/events/batch", "query_string": b""}
        scope = {"type": "http", "method": method, "headers": raw, **path}
        self.answer = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def event(self) -> tuple[str, dict[str, Any]]:
        """Waits for the next event."""
        async with asyncio.timeout(EVENT_SECONDS):
            name, data = (await self._received.get()).decode().strip().split("\ndata: ")
        return name.removeprefix("event: "), json.loads(data)

    async def batch(self) -> dict[str, Any]:
        name, data = await self.event()
        assert name == "batch"
        BatchEvent.model_validate(data, strict=True)
        return data

    async def idle(self) -> None:
        """Waits for the event of the idle engine after its last step."""
        while await self.batch() != {"step": self._engine.num_steps, **IDLE}:
            pass

    @property
    def num_unread(self) -> int:
        return self._received.qsize()

    async def leave(self) -> None:
        self._gone.set()
        self.may_read.set()
        await self.answer

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            await self.may_read.wait()
            self._received.put_nowait(message["body"])


async def no_pause() -> None:
    await asyncio.sleep(0)


@asynccontextmanager
async def application(
    runner: FakeRunner, pause: Callable[[], Awaitable[None]] = no_pause, **settings: Any
) -> AsyncIterator[FastAPI]:
    app = create_app(Settings(**settings), lambda: runner)
    app.state.viewers = BatchViewers(app.state.service.engine, pause)
    async with app.router.lifespan_context(app):
        await asyncio.wrap_future(app.state.service.engine.ready)
        yield app


def finish(app: FastAPI, *jobs: Job) -> Awaitable[Any]:
    """Submits the jobs. Returns an awaitable of their answers."""
    for job in jobs:
        app.state.service.engine.submit(job)
    return asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))


# Content


def row(**fields: Any) -> dict[str, Any]:
    plain = {"job": 1, "index": 0, "step": 0, "of": 3, "model": "default", "sampler": "ddpm", "guided": False}
    return plain | {"evaluations": 1} | fields


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (new_job(), [row()]),
        (new_job(2, num_steps=5, guided_steps=range(1)), [row(of=5, guided=True, evaluations=2), row(of=5, index=1)]),
        (new_recognition(30), [row(of=30, sampler="recognise", evaluations=10)]),
        (new_search(4, search_steps=6), [row(of=6, evaluations=10)]),
        (new_recognised_search(4, num_pairs=7), [row(of=7, sampler="recognise", evaluations=10)]),
    ],
    ids=["image", "guided", "recognition", "search", "recognised search"],
)
def test_row_has_its_options_and_the_evaluations_of_the_step(job: Job, expected: list[dict[str, Any]]) -> None:
    batches: list[Batch] = []
    engine = opened(new_engine(FakeRunner(), max_batch=1 if job.request.guided_steps else 64))
    engine.feed.receiver = lambda message: batches.append(message) if isinstance(message, Batch) else None
    engine.submit(job)
    engine.feed.is_wanted = True
    tick(engine)
    tick(engine)  # The batch is encoded after a later step has changed its rows.
    name, data = encode_batch(batches[0]).decode().strip().split("\ndata: ")
    assert name == "event: batch"
    assert json.loads(data)["rows"] == expected[:1]
    if expected[1:]:
        engine.feed.is_wanted = True
        while batches[-1].selected[0].index == 0:
            engine.feed.is_wanted = True
            tick(engine)
        second = json.loads(encode_batch(batches[-1]).decode().split("\ndata: ")[1])["rows"][-1]
        assert second == expected[1] | {"guided": True, "evaluations": 2}


def test_row_without_a_step_has_no_evaluations() -> None:
    batches: list[Batch] = []
    engine = opened(new_engine(FakeRunner(), max_batch=1))
    engine.feed.receiver = lambda message: batches.append(message) if isinstance(message, Batch) else None
    for timeout in (50, 20):  # The second job comes before the first one, whose image has started.
        engine.submit(new_job(timeout=timeout))
        engine.feed.is_wanted = True
        tick(engine)
    rows = json.loads(encode_batch(batches[-1]).decode().split("\ndata: ")[1])["rows"]
    assert rows == [row(job=2), row(step=1, evaluations=0)]


def test_first_event_of_an_idle_engine_has_no_rows() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            first, second = Client(app), Client(app)
            assert await first.batch() == {"step": 0, **IDLE}
            assert await second.batch() == {"step": 0, **IDLE}
            assert first.headers["content-type"].startswith("text/event-stream")
            assert (first.status, first.headers["cache-control"]) == (200, "no-store")
            await finish(app, new_job(num_steps=3))
            later = Client(app)
            assert (await later.batch())["step"] == 3

    asyncio.run(main())


def test_running_images_are_sent_while_their_step_runs() -> None:
    async def main() -> None:
        gate = Gate()
        async with application(FakeRunner(on_step=gate), max_batch=2) as app:
            client = Client(app)
            await client.idle()
            done = finish(app, new_job(3, num_steps=4, seed=1))
            batch = await client.batch()
            assert batch == {
                "step": 1,
                "waiting": 1,
                "running": 2,
                "rows": [row(index=index, of=4) for index in range(2)],
            }
            gate.released.set()
            await done
            await client.idle()

    asyncio.run(main())


def test_last_event_is_idle_however_the_end_of_the_work_meets_the_pause() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            client = Client(app)
            await client.idle()
            for number in range(200):
                await finish(app, new_job(1 + number % 3, num_steps=1 + number % 4))
                await client.idle()

    asyncio.run(main())


# Rate and cost


def test_one_event_is_sent_per_pause_and_it_is_the_newest() -> None:
    async def main() -> None:
        turn = asyncio.Semaphore(0)

        async def pause() -> None:
            await turn.acquire()

        async with application(FakeRunner(), pause) as app:
            client = Client(app)
            await client.idle()
            for number in range(1, 4):
                await finish(app, new_job(num_steps=50))
                assert client.num_unread == 0
                turn.release()
                assert (await client.batch())["step"] == 50 * number

    asyncio.run(main())


def test_new_viewer_does_not_raise_the_rate_of_the_others() -> None:
    async def main() -> None:
        turn = asyncio.Semaphore(0)

        async def pause() -> None:
            await turn.acquire()

        async with application(FakeRunner(), pause) as app:
            first = Client(app)
            await first.idle()
            later = [Client(app) for _ in range(5)]
            for _ in range(20):
                await asyncio.sleep(0)
            assert [client.num_unread for client in (first, *later)] == [0] * 6
            turn.release()
            for client in (first, *later):
                await client.idle()
            assert first.num_unread == 0

    asyncio.run(main())


def test_engine_publishes_nothing_without_viewers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            for _ in range(5):  # The workers of batches begin their tasks.
                await asyncio.sleep(0)
            tasks = asyncio.all_tasks()
            client = Client(app)
            await client.idle()
            await client.leave()

            def fail(*arguments: object) -> None:
                raise AssertionError

            monkeypatch.setattr(app.state.service.engine.feed, "publish", fail)
            await finish(app, new_job(5, num_steps=20))
            assert not app.state.service.engine.feed.is_wanted
            assert asyncio.all_tasks() == tasks

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_last_event_is_repeated_so_that_lost_connections_are_noticed(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """With 0 seconds, the time is over when the batch arrives. The batch must not be lost."""
    monkeypatch.setattr(batch, "REPEAT_SECONDS", seconds)

    async def main() -> None:
        async with application(FakeRunner()) as app:
            client = Client(app)
            for _ in range(3):
                assert await client.batch() == {"step": 0, **IDLE}

    asyncio.run(main())


# Viewers


def test_viewer_that_does_not_read_gets_only_the_newest_event_and_delays_no_other() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            hostile, client = Client(app), Client(app)
            await hostile.idle()
            await client.idle()
            hostile.may_read.clear()
            for _ in range(50):
                await finish(app, new_job(num_steps=2))
                await client.idle()
            hostile.may_read.set()
            assert (await hostile.batch())["step"] <= 2  # It was being sent.
            assert await hostile.batch() == {"step": 100, **IDLE}
            assert hostile.num_unread == 0

    asyncio.run(main())


def test_viewer_that_disconnects_is_removed_at_once() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            reading, blocked = Client(app), Client(app)
            blocked.may_read.clear()
            await reading.idle()
            assert len(app.state.viewers) == 2
            for client in (reading, blocked):
                await client.leave()
            assert len(app.state.viewers) == 0

    asyncio.run(main())


def test_viewer_gets_events_after_another_one_has_left() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            client, other = Client(app), Client(app)
            await client.idle()
            await other.idle()
            await other.leave()
            await finish(app, new_job(num_steps=3))
            await client.idle()

    asyncio.run(main())


def test_batch_that_arrives_during_the_pause_is_ignored() -> None:
    async def main() -> None:
        errors = list[dict[str, Any]]()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        async with application(FakeRunner(), asyncio.Event().wait) as app:
            client = Client(app)
            await client.idle()
            app.state.service.engine.feed.publish(Batch(7, 0, 0, [], ()))
            await asyncio.sleep(0.01)
            assert (client.num_unread, errors) == (0, [])

    asyncio.run(main())


def test_number_of_viewers_is_limited() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            clients = [Client(app) for _ in range(MAX_VIEWERS)]
            for client in clients:
                await client.idle()
            refused = Client(app)
            async with asyncio.timeout(EVENT_SECONDS):
                await refused.answer
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) >= 1
            text = app.state.service.metrics.render().decode()
            assert 'unfog_rejected_total{reason="overloaded"} 0.0' in text
            assert 'unfog_requests_total{code="429",route="/events/batch"} 1.0' in text
            await clients[0].leave()
            await Client(app).idle()

    asyncio.run(main())


def test_requests_that_no_stream_can_answer_are_refused() -> None:
    async def main() -> None:
        async with application(FakeRunner(), api_keys=KEY) as app:
            for headers, status in (
                ({}, 401),
                ({"x_api_key": "wrong"}, 403),
                ({"x_api_key": KEY, "accept": "application/json"}, 406),
            ):
                client = Client(app, **headers)
                await client.answer
                assert client.status == status
            for accept in ("*/*", "text/event-stream"):
                await Client(app, x_api_key=KEY, accept=accept).idle()

    asyncio.run(main())


def test_head_has_the_headers_of_get_and_adds_no_viewer() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            client = Client(app, "HEAD")
            await client.answer
            assert (client.status, client.num_unread, len(app.state.viewers)) == (200, 0, 0)
            assert client.headers["content-type"].startswith("text/event-stream")

    asyncio.run(main())


def test_disconnect_is_counted_with_its_route() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            client = Client(app)
            await client.idle()
            await client.leave()
            text = app.state.service.metrics.render().decode()
            assert 'unfog_requests_total{code="200",route="/events/batch"} 1.0' in text
            assert "unfog_requests_in_progress 0.0" in text

    asyncio.run(main())


# Start and end


def test_stream_is_refused_while_the_service_starts() -> None:
    async def main() -> None:
        app = create_app(Settings(), FakeRunner)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.get("/events/batch")
        assert (response.status_code, response.json()["code"]) == (503, "starting")
        assert int(response.headers["retry-after"]) >= 1

    asyncio.run(main())


def test_drain_ends_every_stream_and_waits_for_no_viewer() -> None:
    async def main() -> None:
        gate = Gate()
        async with application(FakeRunner(on_step=gate)) as app:
            service = app.state.service
            client, blocked = Client(app), Client(app)
            await client.idle()
            blocked.may_read.clear()
            done = finish(app, new_job())
            assert (await client.batch())["running"] == 1
            drained = service.engine.drain()
            name, data = await client.event()
            assert (name, data["code"], data["status"]) == ("error", "draining", 503)
            await client.answer
            refused = Client(app)
            await refused.answer
            assert refused.status == 503
            gate.released.set()
            await asyncio.gather(done, asyncio.wrap_future(drained), service.in_flight.none())
            assert not blocked.answer.done()
            blocked.may_read.set()
            await blocked.answer

    asyncio.run(main())


def test_failed_engine_ends_the_stream() -> None:
    def fail(rows: Rows) -> None:
        raise DeviceLostError

    async def main() -> None:
        async with application(FakeRunner(on_step=fail)) as app:
            client = Client(app)
            await client.idle()
            with suppress(Exception):
                await finish(app, new_job())
            event = await client.event()
            while event[0] == "batch":
                event = await client.event()
            assert (event[0], event[1]["code"]) == ("error", "engine_failed")
            await client.answer

    asyncio.run(main())


def test_bug_in_the_encoder_ends_the_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Batch) -> bytes:
        raise ValueError("secret")

    monkeypatch.setattr(batch, "encode_batch", fail)

    async def main() -> None:
        async with application(FakeRunner()) as app:
            client = Client(app)
            name, data = await client.event()
            assert (name, data["code"]) == ("error", "internal_error")
            assert "secret" not in json.dumps(data)
            await client.answer

    asyncio.run(main())


def test_request_of_an_image_is_not_disturbed_by_viewers() -> None:
    async def main() -> None:
        async with application(FakeRunner()) as app:
            client = Client(app)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as other:
                answers = [await other.post("/generate", json=WORK) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200] * 3
            await client.idle()
            await asyncio.to_thread(wait_until, lambda: not any(app.state.service.engine.count_images()))

    asyncio.run(main())
