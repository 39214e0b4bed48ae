"""Tests of the events that pass from the engine thread to a client."""

import asyncio
import base64
import concurrent.futures
import gc
import io
import json
import threading
import weakref
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import Message

from app.api.http.events import MAX_SMALL_IMAGES, JobEvents, Mailbox
from app.engine.job import ImageDone, Pixels, Progress
from app.main import create_app
from app.settings import Settings
from app.tasks.images import encode_image
from tests.app.api.examples import GENERATING, REQUESTS
from tests.app.application import WORK, run
from tests.app.fakes import FakeRunner, Gate, image, same, wait_until

TIMEOUT = 1.0  # in seconds; the images are generated in a few milliseconds
BLACK: Pixels = np.zeros((1, 1), dtype=np.uint8)


def progress(step: int, num_images: int) -> Progress:
    return Progress(step, 100, [BLACK] * num_images)


def read_all(num_images: int, put: list[Progress | ImageDone]) -> list[Progress | ImageDone]:
    """Returns the events that a client receives if it starts to read after all events were added."""

    async def main() -> list[Progress | ImageDone]:
        events = JobEvents(num_images, Mailbox())
        for event in (*put, None):
            events.put(event)
        await asyncio.sleep(0)
        read, is_end = await events.get()
        assert is_end
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
            assert not any(engine.count_images())
            may_send.set()
            await answering
        text = "".join(message["body"].decode() for message in sent[1:])
        return [line for line in text.split("\n") if line.startswith("event: ")]

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
        events, steps = JobEvents(64, Mailbox()), []
        for step in range(10):
            reading = asyncio.ensure_future(events.get())
            await asyncio.sleep(0)
            events.put(progress(step, 64))
            (event,), is_end = await reading
            assert isinstance(event, Progress)
            assert not is_end
            steps.append(event.step)
        return steps

    assert asyncio.run(main()) == list(range(10))


def test_events_of_another_thread_wait_for_delivery_and_keep_their_order() -> None:
    async def main() -> tuple[bool, list[Progress | ImageDone], bool]:
        mailbox = Mailbox()
        first, second = JobEvents(1, mailbox), JobEvents(1, mailbox)

        def put_all() -> None:
            for events in (first, second):
                events.put(progress(1, 1))
                events.put(ImageDone(0, BLACK))
                events.put(None)

        await asyncio.to_thread(put_all)
        reading = asyncio.ensure_future(first.get())
        await asyncio.sleep(0.05)
        was_early = reading.done()
        await asyncio.to_thread(mailbox.deliver)
        events, is_end = await reading
        assert (await second.get())[1]
        return was_early, events, is_end

    was_early, events, is_end = asyncio.run(main())
    assert not was_early
    assert [type(event) for event in events] == [Progress, ImageDone]
    assert is_end


def test_results_of_another_thread_wait_for_delivery_and_complete_together() -> None:
    async def main() -> list[Any]:
        mailbox, works = Mailbox(), [concurrent.futures.Future[int]() for _ in range(3)]
        results = [mailbox.result_of(work) for work in works]
        results[0].cancel()

        def complete_all() -> None:
            works[0].set_result(8)
            works[1].set_result(7)
            works[2].set_exception(ValueError("failed"))

        await asyncio.to_thread(complete_all)
        await asyncio.sleep(0.05)
        assert not any(result.done() for result in results[1:])
        await asyncio.to_thread(mailbox.deliver)
        async with asyncio.timeout(10):
            return await asyncio.gather(*results, return_exceptions=True)

    cancelled, value, error = asyncio.run(main())
    assert value == 7
    assert (type(error), str(error)) == (ValueError, "failed")
    assert isinstance(cancelled, asyncio.CancelledError)


def test_result_that_the_event_loop_sets_needs_no_delivery() -> None:
    async def main() -> int:
        work: concurrent.futures.Future[int] = concurrent.futures.Future()
        result = Mailbox().result_of(work)
        work.set_result(7)
        return await asyncio.wait_for(result, TIMEOUT)

    assert asyncio.run(main()) == 7


def test_deliveries_wake_the_event_loop_once_until_it_makes_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[int]:
        loop, mailbox = asyncio.get_running_loop(), Mailbox()
        works = [concurrent.futures.Future[int]() for _ in range(3)]
        results = [mailbox.result_of(work) for work in works]
        wake, num_wakes = loop.call_soon_threadsafe, 0

        def count(*arguments: Any) -> Any:
            nonlocal num_wakes
            num_wakes += 1
            return wake(*arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)

        def complete(*places: int) -> None:
            for place in places:
                works[place].set_result(place)
                mailbox.deliver()

        counts = []
        for places in ((0, 1), (2,)):
            thread = threading.Thread(target=complete, args=places)
            thread.start()
            thread.join()  # blocks the event loop, so that it makes no call before the last delivery
            counts.append(num_wakes)
            assert await asyncio.gather(*(results[place] for place in places)) == list(places)
        return counts

    assert asyncio.run(main()) == [1, 2]


def test_mailbox_of_a_closed_event_loop_works_in_the_next_one() -> None:
    mailbox = Mailbox()

    async def leave() -> concurrent.futures.Future[int]:
        work: concurrent.futures.Future[int] = concurrent.futures.Future()
        mailbox.result_of(work)
        return work

    async def wait() -> int:
        work: concurrent.futures.Future[int] = concurrent.futures.Future()
        result = mailbox.result_of(work)
        await asyncio.to_thread(work.set_result, 7)
        mailbox.deliver()
        return await asyncio.wait_for(result, TIMEOUT)

    left = asyncio.run(leave())
    threading.Thread(target=left.set_result, args=(1,)).start()
    left.result(TIMEOUT)
    mailbox.deliver()
    assert asyncio.run(wait()) == 7


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "image/gif"])
def test_job_of_a_client_that_disconnects_leaves_the_engine(accept: str) -> None:
    async def main() -> None:
        gate = Gate()
        app = create_app(Settings(), lambda: FakeRunner(on_step=gate))
        messages = iter([{"type": "http.request", "body": json.dumps(WORK).encode()}])

        async def receive() -> Message:
            if message := next(messages, None):
                return message
            await asyncio.to_thread(gate.entered.wait, TIMEOUT)
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            pass

        headers = [(b"content-type", b"application/json"), (b"accept", accept.encode())]
        scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b""}
        async with app.router.lifespan_context(app):
            engine = app.state.service.engine
            await asyncio.wrap_future(engine.ready)
            await app({**scope, "headers": headers}, receive, send)
            try:
                assert gate.entered.is_set()
                assert not any(engine.count_images())
            finally:
                gate.released.set()

    asyncio.run(main())


def test_stream_that_ends_at_its_deadline_counts_as_a_rejection() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**WORK, "timeout_seconds": 0.05}
        stream = await client.post("/generate", json=body, headers={"Accept": "text/event-stream"})
        gate.released.set()
        assert '"code": "deadline_exceeded"' in stream.text
        assert 'unfog_rejected_total{reason="deadline"} 1.0' in (await client.get("/metrics")).text

    gate = Gate()
    run(check, FakeRunner(on_step=gate))


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "image/gif"])
def test_answered_job_is_freed_before_its_deadline(accept: str) -> None:
    """A timer that is not cancelled would keep the job and its images until the deadline."""
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "timeout_seconds": 30}, headers={"Accept": accept})
        assert answer.status_code == 200
        job = weakref.ref(runner.calls[0][0].job)
        runner.calls.clear()

        def is_freed() -> bool:
            gc.collect()
            return job() is None

        await asyncio.to_thread(wait_until, is_freed, 10)  # the engine thread returns from its last step

    run(check, runner)


EVENTS = {"Accept": "text/event-stream"}
STREAMED = [
    ("/generate", {**WORK}),
    *((path, {**next(iter(REQUESTS[path].values())), "seed": 1, "digit": 3}) for path in GENERATING),
]


def progress_in(response: httpx.Response) -> list[dict[str, Any]]:
    events = [event.split("\ndata: ") for event in response.text.strip().split("\n\n")]
    return [json.loads(data) for name, data in events if name == "event: progress"]


def open_all(pngs: list[str]) -> list[Pixels]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in pngs]


@pytest.mark.parametrize(("path", "body"), STREAMED)
def test_progress_has_x_t_of_each_image_only_if_it_is_included(path: str, body: dict[str, Any]) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        several = {**body, "count": 2}
        plain = await client.post(f"{path}?previews=3", json=several, headers=EVENTS)
        assert all(set(event) == {"step", "of", "previews"} for event in progress_in(plain))
        included = progress_in(await client.post(f"{path}?previews=3&include=x_t", json=several, headers=EVENTS))
        assert [event["step"] for event in included] == [event["step"] for event in progress_in(plain)]
        for event in included:
            previews, x_t = open_all(event["previews"]), open_all(event["x_t"])
            assert same(previews, [image(1, index, event["step"]) for index in range(2)])
            assert same(x_t, [255 - image(1, index, event["step"]) for index in range(2)])

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("count", "scale", "query", "previews_block", "images_block"),
    [
        (MAX_SMALL_IMAGES, 1, "", True, True),
        (MAX_SMALL_IMAGES + 1, 1, "", False, True),
        (MAX_SMALL_IMAGES // 2, 1, "&include=x_t", True, True),
        (MAX_SMALL_IMAGES // 2 + 1, 1, "&include=x_t", False, True),
        (1, 2, "", True, False),
    ],
)
def test_only_small_previews_and_images_are_encoded_in_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, count: int, scale: int, query: str, previews_block: bool, images_block: bool
) -> None:
    is_in_loop: dict[bool, set[bool]] = {True: set(), False: set()}  # for images and previews
    thread = threading.get_ident()

    def record(pixels: Pixels, *of_images: Any) -> bytes:
        is_in_loop[bool(of_images)].add(threading.get_ident() == thread)
        return encode_image(pixels, *of_images)

    async def check(client: httpx.AsyncClient) -> None:
        body = {**WORK, "count": count, "scale": scale}
        answer = await client.post(f"/generate?previews=2{query}", json=body, headers=EVENTS)
        assert answer.text.count("event: image") == count

    monkeypatch.setattr("app.api.native.events.encode_image", record)
    run(check, FakeRunner())
    assert is_in_loop == {False: {previews_block}, True: {images_block}}


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("value", ["", "x_0", "x_t,x_t", "X_T"])
def test_other_values_of_include_are_422(accept: str, value: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post(f"/generate?include={value}", json=WORK, headers={"Accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.json()["errors"][0]["loc"] == ["query", "include"]

    run(check, FakeRunner())


def test_other_formats_ignore_include() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        plain, included = [(await client.post(f"/generate{query}", json=WORK)).json() for query in ("", "?include=x_t")]
        assert plain["images"] == included["images"]

    run(check, FakeRunner())


def test_images_of_x_t_count_as_previews_of_a_slow_reader() -> None:
    async def main() -> list[int]:
        app = create_app(Settings(), FakeRunner)
        may_send, steps = asyncio.Event(), []
        content = json.dumps({**WORK, "num_steps": 100, "count": 16}).encode()
        requests = iter([{"type": "http.request", "body": content}])

        async def receive() -> Message:
            return next(requests, None) or await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            body = message.get("body", b"")
            if body.startswith(b"event: accepted"):
                await may_send.wait()
            for event in body.split(b"\n\n"):
                if event.startswith(b"event: progress"):
                    steps.append(json.loads(event.partition(b"data: ")[2])["step"])

        headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "headers": headers}
        scope["query_string"] = b"previews=100&include=x_t"
        async with app.router.lifespan_context(app):
            engine = app.state.service.engine
            await asyncio.wrap_future(engine.ready)
            answering = asyncio.ensure_future(app(scope, receive, send))
            await asyncio.to_thread(wait_until, lambda: bool(engine.num_steps and not any(engine.count_images())))
            may_send.set()
            await answering
        return steps

    assert asyncio.run(main()) == list(range(93, 101))  # 256 / (16 + 16) events
