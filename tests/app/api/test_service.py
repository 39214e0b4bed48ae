import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest

from app.api.service import InFlight
from app.main import create_app
from app.settings import Settings
from app.tasks.images import encode_images, encode_sheet
from tests.app.api.examples import GENERATING, REQUESTS
from tests.app.application import WORK, run
from tests.app.fakes import WAIT_SECONDS, FakeRunner, Rows

LARGE = {**WORK, "count": 5, "scale": 16}  # images of 5,120 pixels together, which are encoded in a thread


def test_in_flight_is_zero_after_the_last_request_has_ended() -> None:
    async def main() -> None:
        in_flight = InFlight()
        await in_flight.none()
        with in_flight.one():
            with pytest.raises(ValueError), in_flight.one():
                raise ValueError
            waiting = asyncio.ensure_future(in_flight.none())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        await in_flight.none()

    asyncio.run(main())


def test_request_is_in_flight_until_its_images_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, may_continue = threading.Event(), threading.Event()

    def encode(*arguments: object) -> bytes:
        encoding.set()
        assert may_continue.wait(WAIT_SECONDS)
        return encode_sheet(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("app.api.native.answers.encode_sheet", encode)

    async def main() -> None:
        app = create_app(Settings(), FakeRunner)
        service = app.state.service
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            await asyncio.wrap_future(service.engine.ready)
            answering = asyncio.ensure_future(client.post("/generate", json=LARGE, headers={"Accept": "image/png"}))
            await asyncio.to_thread(encoding.wait, WAIT_SECONDS)
            assert not any(service.engine.count_images())
            idle = asyncio.ensure_future(service.in_flight.none())
            await asyncio.sleep(0)
            assert not idle.done()
            may_continue.set()
            assert (await answering).status_code == 200
            await asyncio.wait_for(idle, WAIT_SECONDS)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "is_in_thread"),
    [(WORK, False), ({**WORK, "count": 64}, False), ({**LARGE, "count": 4}, False), (LARGE, True)],
    ids=["one image", "small images", "4,096 pixels", "5,120 pixels"],
)
def test_only_small_images_are_encoded_in_the_event_loop(
    body: dict[str, Any], is_in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding_threads = []

    def encode(*arguments: Any) -> list[bytes]:
        encoding_threads.append(threading.current_thread())
        return encode_images(*arguments)

    monkeypatch.setattr("app.api.native.answers.encode_images", encode)

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/generate", json=body)).status_code == 200
        assert [thread is not threading.current_thread() for thread in encoding_threads] == [is_in_thread]

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [("count", 4, 200), ("count", 5, 422), ("timeout_seconds", 20, 200), ("timeout_seconds", 20.5, 422)],
)
def test_request_up_to_the_limits_of_the_settings_is_permitted(field: str, value: float, status: int) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, field: value})
        assert answer.status_code == status
        if status != 200:
            assert answer.json()["errors"][0]["loc"][-1] == field

    run(check, FakeRunner(), max_count=4, request_timeout=20)


TASKS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"digit": 3, "num_steps": 7, "guidance_scale": 2}),
    ("/generate", {"digit": 3, "num_steps": 7, "guidance_scale": 1}),
    *(
        (path, {**body, "guidance_scale": 1 if body.get("mode") == "mean" else 2})
        for path, requests in REQUESTS.items()
        for body in requests.values()
        if path in GENERATING
    ),
    ("/edit", {**REQUESTS["/edit"]["one"], "strength": 0}),
]


@pytest.mark.parametrize(("path", "body"), TASKS)
def test_evaluations_in_the_answer_are_those_of_the_steps_without_the_search(path: str, body: dict[str, Any]) -> None:
    counted = 0

    def count(rows: Rows) -> None:
        nonlocal counted
        counted += sum(row.evaluations for row in rows if not row.is_search)

    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post(path, json={**body, "seed": 1})
        assert answer.json()["evaluations"] == counted
        stream = await client.post(path, json={**body, "seed": 1}, headers={"Accept": "text/event-stream"})
        done = stream.text.strip().rpartition("event: done\ndata: ")[2]
        assert 2 * json.loads(done)["evaluations"] == counted

    run(check, FakeRunner(on_step=count))


def test_job_that_ends_after_its_deadline_is_504_even_if_the_event_loop_was_busy() -> None:
    """The event loop can see the result before its timer for the deadline."""
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        loop = asyncio.get_running_loop()

        def step_longer_than_the_timeout(rows: Rows) -> None:
            loop.call_soon_threadsafe(time.sleep, 0.3)
            time.sleep(0.1)

        runner.on_step = step_longer_than_the_timeout
        response = await client.post("/generate", json={**WORK, "num_steps": 1, "timeout_seconds": 0.05})
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")

    run(check, runner)
