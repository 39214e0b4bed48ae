"""Tests of CLIP guidance through POST /generate and POST /reproduce, with a fake runner and a fake CLIP model."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app import errors
from app.api.service import Service
from app.engine.job import Trajectory
from app.main import create_app
from app.settings import Settings
from model.clip import ClipNotInstalledError
from model.prompts import digit_prompt
from tests.app.application import client_of, run
from tests.app.clip_fakes import CLIP_INFO, FakeClip, embedding
from tests.app.fakes import INFO, WAIT_SECONDS, FakeRunner

Check = Callable[[httpx.AsyncClient], Awaitable[None]]
TINY = replace(INFO, image_shape=(1, 1, 4))
BODY = {"digit": 7, "num_steps": 4, "seed": 1}
PNG = {"accept": "image/png"}


def check_with(check: Check, model: FakeClip | None, runner: FakeRunner | None = None, **settings: Any) -> None:
    runner = runner or FakeRunner(models={"default": TINY})
    runner.clip = model
    run(check, runner, **settings)


def check_service(check: Callable[[httpx.AsyncClient, Service], Awaitable[None]], model: FakeClip) -> None:
    async def main() -> None:
        async with client_of(FakeRunner(models={"default": TINY}, clip=model)) as client:
            await check(client, client._transport.app.state.service)  # type: ignore[attr-defined]

    asyncio.run(main())


def chunks(png: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(png)) as image:
        return {name: value for name, value in image.text.items() if name.startswith("CLIP-")}


@pytest.mark.parametrize(("given", "used"), [({}, digit_prompt(7)), ({"clip_prompt": "a thick é"}, "a thick é")])
def test_answer_and_text_chunks_name_the_scale_the_prompt_and_the_model(given: dict[str, str], used: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**BODY, "clip_guidance_scale": 1.5, **given}
        answer = (await client.post("/generate", json=body)).json()
        assert (answer["clip_guidance_scale"], answer["clip_prompt"]) == (1.5, used)
        assert answer["clip"] == {"name": CLIP_INFO.name, "sha256": CLIP_INFO.sha256}
        assert answer["evaluations"] == 4  # of the network
        expected = {
            "CLIP-Guidance-Scale": "1.5",
            "CLIP-Prompt": '"' + used.replace("é", "\\u00e9") + '"',
            "CLIP-SHA256": CLIP_INFO.sha256,
        }
        assert chunks(base64.b64decode(answer["images"][0]["png"])) == expected
        for accept in ("image/png", "application/zip", "text/event-stream", "image/webp", "image/gif"):
            assert (await client.post("/generate", json=body, headers={"accept": accept})).status_code == 200
        assert chunks((await client.post("/generate", json=body, headers=PNG)).content) == expected

    check_with(check, FakeClip())


def test_job_has_the_embedding_of_the_prompt_and_the_steps_of_the_model() -> None:
    seen: list[Trajectory] = []
    runner = FakeRunner(models={"default": TINY})
    runner.on_step = lambda rows: seen.extend(rows)

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json={**BODY, "clip_guidance_scale": 2, "clip_prompt": "one"})
        (clip,) = {row.job.request.clip for row in seen}
        assert clip
        np.testing.assert_allclose(clip.text, embedding("one"), rtol=1e-6)
        assert (clip.scale, clip.steps) == (2, range(2, 4))

    check_with(check, FakeClip(), runner)


@pytest.mark.parametrize("scale", [{}, {"clip_guidance_scale": 0}, {"clip_guidance_scale": 0.0}])
@pytest.mark.parametrize("clip", [None, FakeClip()], ids=["without CLIP", "with CLIP"])
def test_request_without_a_scale_has_no_clip_guidance(scale: dict[str, Any], clip: FakeClip | None) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/generate", json={**BODY, **scale})
        answer = response.json()
        assert response.status_code == 200, answer
        assert (answer["clip_guidance_scale"], answer["clip_prompt"], answer["clip"]) == (0, None, None)
        assert chunks(base64.b64decode(answer["images"][0]["png"])) == {}

    check_with(check, clip)


@pytest.mark.parametrize(
    "given",
    [
        {"clip_guidance_scale": -0.1},
        {"clip_guidance_scale": 10.1},
        {"clip_guidance_scale": "1"},
        {"clip_guidance_scale": None},
        {"clip_guidance_scale": True},
        {"clip_guidance_scale": 1, "clip_prompt": ""},
        {"clip_guidance_scale": 1, "clip_prompt": " \t"},
        {"clip_guidance_scale": 1, "clip_prompt": "\x1c"},
        {"clip_guidance_scale": 1, "clip_prompt": "a" * 201},
        {"clip_guidance_scale": 1, "clip_prompt": 7},
        {"clip_guidance_scale": 1, "clip_prompt": None},
        {"clip_guidance_scale": 1, "clip_prompt": ["seven"]},
        {"clip_prompt": "a thick seven"},
        {"clip_guidance_scale": 0, "clip_prompt": "a thick seven"},
    ],
    ids=str,
)
def test_invalid_field_is_named(given: dict[str, Any]) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/generate", json={**BODY, **given})
        problem = response.json()
        assert (response.status_code, problem["code"]) == (422, "invalid_request"), problem
        assert problem["errors"][0]["loc"] == ["body", list(given)[-1]]

    check_with(check, FakeClip())


def test_lone_surrogate_in_a_prompt_is_refused() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = b'{"digit": 7, "num_steps": 4, "clip_guidance_scale": 1, "clip_prompt": "\\ud800"}'
        response = await client.post("/generate", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422), response.text
        assert "Traceback" not in response.text

    check_with(check, FakeClip())


@pytest.mark.parametrize(
    ("settings", "detail"),
    [({}, str(ClipNotInstalledError())), ({"clip": "off"}, "CLIP is turned off (UNFOG_CLIP=off)")],
)
def test_service_without_a_clip_model_answers_501_and_says_what_to_do(settings: dict[str, str], detail: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for accept in ("application/json", "text/event-stream"):
            body = {**BODY, "clip_guidance_scale": 1}
            response = await client.post("/generate", json=body, headers={"accept": accept})
            assert (response.status_code, response.json()["code"]) == (501, "not_available")
            assert response.json()["detail"].startswith(detail)

    check_with(check, None, **settings)


def test_prompt_that_is_not_embedded_in_time_is_answered_with_504() -> None:
    def block(batch: Any) -> None:
        if list(batch) == ["slow"]:
            released.wait(60)

    released = threading.Event()

    async def check(client: httpx.AsyncClient) -> None:
        body = {**BODY, "clip_guidance_scale": 1, "clip_prompt": "slow", "timeout_seconds": 0.05}
        try:
            async with asyncio.timeout(10):
                response = await client.post("/generate", json=body)
        finally:
            released.set()
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")

    check_with(check, FakeClip(on_call=block))


class Held(FakeClip):
    """Blocks the embedding of the prompt "slow" until `released` is set."""

    def __init__(self) -> None:
        super().__init__(on_call=self._hold)
        self.entered, self.released = threading.Event(), threading.Event()

    def _hold(self, batch: Any) -> None:
        if list(batch) == ["slow"]:
            self.entered.set()
            assert self.released.wait(WAIT_SECONDS)


SLOW = {**BODY, "clip_guidance_scale": 1, "clip_prompt": "slow"}


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_request_whose_prompt_waits_when_the_drain_begins_is_finished(accept: str) -> None:
    clip = Held()

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        waiting = asyncio.ensure_future(client.post("/generate", json=SLOW, headers={"accept": accept}))
        await asyncio.to_thread(clip.entered.wait, WAIT_SECONDS)
        drained = asyncio.gather(asyncio.wrap_future(service.engine.drain()), service.in_flight.none())
        refused = await client.post("/generate", json=SLOW)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        await asyncio.sleep(0)
        assert not drained.done()
        drained.add_done_callback(lambda _: service.give_up(errors.Draining(1)))  # as the server does
        clip.released.set()
        answer = await waiting
        assert answer.status_code == 200, answer.text
        assert "draining" not in answer.text
        await asyncio.wait_for(drained, WAIT_SECONDS)

    check_service(check, clip)


def test_request_whose_prompt_waits_when_the_drain_ends_is_answered_with_503() -> None:
    clip = Held()

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        waiting = asyncio.ensure_future(client.post("/generate", json=SLOW))
        await asyncio.to_thread(clip.entered.wait, WAIT_SECONDS)
        service.engine.drain()
        service.give_up(errors.Draining(1))
        clip.released.set()
        answer = await asyncio.wait_for(waiting, WAIT_SECONDS)
        assert (answer.status_code, answer.json()["code"]) == (503, "draining")

    check_service(check, clip)


def test_prompt_that_is_embedded_at_the_end_of_the_drain_is_answered_with_503() -> None:
    """The event loop can see the embedding after the drain has ended."""
    clip = Held()

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        waiting = asyncio.ensure_future(client.post("/generate", json=SLOW))
        await asyncio.to_thread(clip.entered.wait, WAIT_SECONDS)
        service.engine.drain()
        (embedding_of_slow,) = service.clip._prompts
        clip.released.set()
        embedding_of_slow.result(WAIT_SECONDS)  # blocks the event loop
        service.give_up(errors.Draining(1))
        answer = await asyncio.wait_for(waiting, WAIT_SECONDS)
        assert (answer.status_code, answer.json()["code"]) == (503, "draining")

    check_service(check, clip)


def done_event(text: str) -> dict[str, Any]:
    done: dict[str, Any] = json.loads(text.strip().rpartition("event: done\ndata: ")[2])
    return done


def test_prompt_that_does_not_describe_the_digit_gets_a_warning_in_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake embeds a prompt as the angle of its length, and an image as the angle of its mean grey level."""
    lengths = [len(digit_prompt(digit)) for digit in range(10)]
    monkeypatch.setattr("app.main.read_real_digits", lambda: [[np.full((2, 2), n, np.uint8)] * 2 for n in lengths])
    unsuitable = "unlearned".ljust(lengths[7] + 3, "x")  # cos(3) = -0.99

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        image = np.zeros((2, 2), np.uint8)
        await asyncio.wrap_future(service.clip.score([image], ["a"], 30))  # The real digits are embedded first.
        body = {**BODY, "clip_guidance_scale": 1, "clip_prompt": unsuitable}
        warning = (await client.post("/generate", json=body)).json()["warning"]
        assert warning == (
            f"The CLIP model has not learned these words: {unsuitable}. The prompt does not describe the digit 7: its "
            "similarity to real images of it is at most -0.99. The mean for real digits and their own prompts is 1.00"
        )
        stream = await client.post("/generate", json=body, headers={"accept": "text/event-stream"})
        assert done_event(stream.text)["warning"] == warning
        png = (await client.post("/generate", json=body, headers=PNG)).content
        assert (await client.post("/reproduce", files={"image": png})).json()["warning"] == warning
        for suitable in ({"clip_guidance_scale": 1}, {}):
            assert (await client.post("/generate", json=BODY | suitable)).json()["warning"] is None
            stream = await client.post("/generate", json=BODY | suitable, headers={"accept": "text/event-stream"})
            assert "warning" not in done_event(stream.text)

    check_service(check, FakeClip(unknown={unsuitable}))


def test_time_for_the_prompt_counts_towards_the_deadline() -> None:
    runner = FakeRunner(models={"default": TINY})

    async def check(client: httpx.AsyncClient) -> None:
        body = {**BODY, "clip_guidance_scale": 1, "clip_prompt": "slow", "timeout_seconds": 20}
        assert (await client.post("/generate", json=body)).status_code == 200
        assert 10 < runner.calls[0][0].job.request.timeout <= 19.9

    check_with(check, FakeClip(on_call=lambda batch: time.sleep(0.1) if list(batch) == ["slow"] else None), runner)


def test_request_is_in_flight_while_its_prompt_is_embedded() -> None:
    began, released = threading.Event(), threading.Event()

    def block(batch: Any) -> None:
        if list(batch) == ["slow"]:
            began.set()
            released.wait(10)

    async def main() -> None:
        runner = FakeRunner(models={"default": TINY}, clip=FakeClip(on_call=block))
        app = create_app(Settings(), lambda: runner)
        service = app.state.service
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            await asyncio.wrap_future(service.engine.ready)
            body = {**BODY, "clip_guidance_scale": 1, "clip_prompt": "slow"}
            answering = asyncio.ensure_future(client.post("/generate", json=body))
            await asyncio.to_thread(began.wait, 10)
            idle = asyncio.ensure_future(service.in_flight.none())
            await asyncio.sleep(0)
            assert not idle.done()
            released.set()
            assert (await answering).status_code == 200
            await asyncio.wait_for(idle, 10)

    asyncio.run(main())


def test_picture_with_clip_guidance_is_reproduced() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**BODY, "clip_guidance_scale": 1.5, "clip_prompt": "a thick seven", "count": 4}
        png = (await client.post("/generate", json=body, headers=PNG)).content
        again = await client.post("/reproduce", files={"image": png}, headers=PNG)
        assert (again.status_code, again.headers["x-identical"]) == (200, "true")
        assert again.content == png
        answer = (await client.post("/reproduce", files={"image": png})).json()
        assert (answer["clip_prompt"], answer["clip"]["sha256"]) == ("a thick seven", CLIP_INFO.sha256)

    check_with(check, FakeClip())
