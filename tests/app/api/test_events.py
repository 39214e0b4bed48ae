"""Tests of the events that pass from the engine thread to a client."""

import asyncio
import json

import numpy as np
import pytest
from starlette.types import Message

from app.api.events import JobEvents
from app.engine.job import ImageDone, Pixels, Progress
from app.main import create_app
from app.settings import Settings
from tests.app.application import WORK
from tests.app.fakes import FakeRunner

TIMEOUT = 1.0  # in seconds; the images are generated in a few milliseconds
BLACK: Pixels = np.zeros((1, 1), dtype=np.uint8)


def progress(step: int, num_images: int) -> Progress:
    return Progress(step, 100, [BLACK] * num_images)


def read_all(num_images: int, put: list[Progress | ImageDone]) -> list[Progress | ImageDone]:
    """Returns the events that a client receives if it starts to read after all events were added."""

    async def main() -> list[Progress | ImageDone]:
        events = JobEvents(num_images)
        for event in (*put, None):
            events.put(event)
        await asyncio.sleep(0)
        read: list[Progress | ImageDone] = []
        while (event := await events.get()) is not None:
            read.append(event)
        return read

    return asyncio.run(main())


def test_deadline_does_not_apply_to_the_transfer_of_finished_images() -> None:

    async def main() -> list[str]:
        app = create_app(Settings(), FakeRunner)
        engine = app.state.service.engine
        body = json.dumps({**WORK, "count": 3, "timeout_seconds": TIMEOUT}).encode()
        may_send, sent = asyncio.Event(), []
        requests = iter([{"type": "http.request", "body": body}])

        async def receive() -> Message:
            return next(requests, None) or await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await may_send.wait()

        headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b""}
        async with app.router.lifespan_context(app):
            await asyncio.wrap_future(engine.ready)
            answering = asyncio.ensure_future(app({**scope, "headers": headers}, receive, send))
            await asyncio.sleep(1.5 * TIMEOUT)
            assert len(sent) == 2
            assert not engine.backlog.waiting + engine.backlog.running
            may_send.set()
            await answering
        return [message["body"].decode().split("\n")[0] for message in sent[1:-1]]

    names = asyncio.run(main())
    assert names == ["event: accepted", *["event: progress"] * 3, *["event: image"] * 3, "event: done"]


@pytest.mark.parametrize(("num_images", "kept"), [(1, 100), (2, 100), (64, 4), (1000, 1)])
def test_slow_reader_receives_only_the_newest_previews(num_images: int, kept: int) -> None:
    put = [progress(step, num_images) for step in range(100)]
    steps = [event.step for event in read_all(num_images, [*put]) if isinstance(event, Progress)]
    assert steps == list(range(100 - kept, 100))


def test_slow_reader_receives_every_image_in_order() -> None:
    put: list[Progress | ImageDone] = []
    for index in range(64):
        put += [progress(index, 64), ImageDone(index, BLACK)]
    read = read_all(64, put)
    assert [event.index for event in read if isinstance(event, ImageDone)] == list(range(64))
    assert [event.step for event in read if isinstance(event, Progress)] == [60, 61, 62, 63]
    assert isinstance(read[-1], ImageDone)


def test_waiting_reader_receives_each_event_immediately() -> None:
    async def main() -> list[int]:
        events, steps = JobEvents(64), []
        for step in range(10):
            reading = asyncio.ensure_future(events.get())
            await asyncio.sleep(0)
            events.put(progress(step, 64))
            event = await reading
            assert isinstance(event, Progress)
            steps.append(event.step)
        return steps

    assert asyncio.run(main()) == list(range(10))
