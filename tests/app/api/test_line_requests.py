"""Tests of lines of batches with a fake runner: their answers equal those of the same requests over HTTP."""

import asyncio
import base64
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from app import errors
from app.api.http.picture_queue import NUM_WORKERS
from app.api.line_requests import LONGEST_WAIT, LineRequests
from app.api.service import Service
from app.batches.records import Line, LineAnswer
from app.engine.engine import RESTART_SECONDS, STARTING_SECONDS
from app.engine.job import JobRequest
from app.main import LINE_ROUTERS, create_app
from app.settings import Settings
from app.tasks.from_image import read_drawing
from tests.app.api.examples import REQUESTS
from tests.app.application import WORK, client_of
from tests.app.clip_fakes import FakeClip
from tests.app.fakes import WAIT_SECONDS, FakeRunner, Gate, Rows, wait_until
from tests.app.picture_samples import encode, grey

GENERATIONS = "/v1/images/generations"
ENDPOINTS = LineRequests.endpoints_of(LINE_ROUTERS)
PICTURE = base64.b64encode(encode(grey(), "PNG")).decode()
CHANGING = ("timing", "created", "request_id")  # fields that differ between equal requests


@dataclass
class Waits:
    """Replaces asyncio.sleep: stores the seconds, calls `meanwhile` and then continues at once."""

    seconds: list[float] = field(default_factory=list)
    meanwhile: Callable[[], Awaitable[object]] | None = None

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.meanwhile:
            await self.meanwhile()


@dataclass(frozen=True)
class Setup:
    lines: LineRequests
    service: Service
    client: httpx.AsyncClient
    waits: Waits

    def answering(self, line: Line) -> "asyncio.Task[LineAnswer]":
        return asyncio.create_task(self.lines.answer(line))


Check = Callable[[Setup], Awaitable[None]]


@asynccontextmanager
async def setup_with(runner: FakeRunner, **settings: Any) -> AsyncIterator[Setup]:
    async with client_of(runner, **settings) as client:
        service, waits = client._transport.app.state.service, Waits()  # type: ignore[attr-defined]
        yield Setup(LineRequests(service, LINE_ROUTERS, waits), service, client, waits)


def run(check: Check, runner: FakeRunner | None = None, **settings: Any) -> None:
    async def main() -> None:
        async with setup_with(runner or FakeRunner(), **settings) as setup:
            await check(setup)

    asyncio.run(main())


class HeldClip(FakeClip):
    """Blocks the embedding of the prompt "held" until `released` is set."""

    def __init__(self) -> None:
        super().__init__(on_call=self._hold)
        self.entered, self.released = threading.Event(), threading.Event()

    def _hold(self, batch: Any) -> None:
        if isinstance(batch[0], str) and list(batch) == ["held"]:
            self.entered.set()
            assert self.released.wait(WAIT_SECONDS)


def line(body: dict[str, Any], endpoint: str = "/generate", number: int = 1) -> Line:
    return Line("batch_1", number, "custom", endpoint, json.dumps(body).encode())


def lasting(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are the same in the answers of equal requests."""
    return {name: value for name, value in document.items() if name not in CHANGING}


async def entered(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition that another thread makes true."""
    await asyncio.to_thread(wait_until, condition)


async def turns() -> None:
    """Gives the other tasks time to reach the point where they wait for another thread or for each other."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_lines_can_name_the_routes_for_images_and_pictures() -> None:
    assert {
        "/generate",
        "/recognize",
        "/denoise",
        "/inpaint",
        "/edit",
        "/reproduce",
        GENERATIONS,
        "/v1/images/edits",
    } == ENDPOINTS


@pytest.mark.parametrize("endpoint", sorted(ENDPOINTS - {"/generate"}))
def test_line_equals_the_answer_to_a_request_with_its_key(endpoint: str) -> None:
    async def check(setup: Setup) -> None:
        for number, body in enumerate(REQUESTS[endpoint].values(), 1):
            asked = line(body, endpoint, number)
            headers = {"Idempotency-Key": f"batch_1_{number}"}
            response = await setup.client.post(endpoint, json=body, headers=headers)
            answer = await setup.lines.answer(asked)
            assert answer.status == response.status_code, answer.body
            assert lasting(json.loads(answer.body)) == lasting(response.json())

    run(check, FakeRunner(clip=FakeClip()))


def test_line_without_a_seed_has_the_images_of_its_key_and_another_line_others() -> None:
    body = {"digit": 3, "num_steps": 3, "count": 2}

    async def check(setup: Setup) -> None:
        first, again, second = [
            json.loads((await setup.lines.answer(line(body, number=number))).body) for number in (1, 1, 2)
        ]
        assert first["seed"] == again["seed"] != second["seed"]
        assert first["images"] == again["images"] != second["images"]
        expected = await setup.client.post("/generate", json=body, headers={"Idempotency-Key": "batch_1_1"})
        assert lasting(first) == lasting(expected.json())

    run(check)


def test_line_with_a_seed_keeps_it() -> None:
    async def check(setup: Setup) -> None:
        answers = [await setup.lines.answer(line({**WORK, "seed": 42}, number=number)) for number in (1, 2)]
        first, second = [lasting(json.loads(answer.body)) for answer in answers]
        assert first == second
        assert first["seed"] == 42

    run(check)


def test_images_and_evaluations_of_a_line_are_counted() -> None:
    evaluations = 0

    def count(rows: Rows) -> None:
        nonlocal evaluations
        evaluations += sum(row.evaluations for row in rows)

    async def check(setup: Setup) -> None:
        generated = await setup.lines.answer(line({**WORK, "count": 3, "guidance_scale": 2}))
        assert (generated.images, generated.evaluations) == (3, evaluations)
        recognised = await setup.lines.answer(line({"image": PICTURE, "num_pairs": 2}, "/recognize"))
        assert (recognised.status, recognised.images) == (200, 0)
        assert recognised.evaluations == 2 * 10
        for body in ({"digit": 11}, {**WORK, "count": 65}):
            refused = await setup.lines.answer(line(body))
            assert (refused.status, refused.images, refused.evaluations) == (422, 0, 0)

    run(check, FakeRunner(on_step=count))


def test_error_of_a_line_has_the_format_of_its_endpoint() -> None:
    async def check(setup: Setup) -> None:
        native = await setup.lines.answer(line({"digit": 11}))
        problem = json.loads(native.body)
        assert (native.status, problem["code"], problem["request_id"]) == (422, "invalid_request", native.request_id)
        openai = await setup.lines.answer(line({"prompt": "7", "n": 0}, GENERATIONS))
        assert (openai.status, json.loads(openai.body)["error"]["param"]) == (400, "n")
        unknown = await setup.lines.answer(line(WORK, "/generated"))
        assert (unknown.status, json.loads(unknown.body)["code"]) == (404, "not_found")

    run(check)


@pytest.mark.parametrize("endpoint", ["/generate", GENERATIONS])
def test_bug_in_a_route_is_answered_with_500_and_ends_no_other_line(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(setup: Setup) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise ZeroDivisionError

        body = {"prompt": "7", "size": "28x28"} if endpoint == GENERATIONS else WORK
        with monkeypatch.context() as patch:
            patch.setattr(setup.service.engine, "submit", fail)
            answer = await setup.lines.answer(line(body, endpoint))
        document = json.loads(answer.body)
        assert (answer.status, document.get("error", document)["code"]) == (500, "internal_error")
        assert (await setup.lines.answer(line(body, endpoint))).status == 200

    run(check)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [(GENERATIONS, {"prompt": "7"}), ("/v1/images/edits", {"prompt": "7", "image": PICTURE})],
)
def test_stream_is_refused_before_a_step(endpoint: str, body: dict[str, Any]) -> None:
    runner = FakeRunner()

    async def check(setup: Setup) -> None:
        answer = await setup.lines.answer(line({**body, "stream": True}, endpoint))
        assert (answer.status, json.loads(answer.body)["error"]["param"]) == (400, "stream")
        assert runner.calls == []
        assert (await setup.lines.answer(line({**body, "stream": False}, endpoint))).status == 200

    run(check, runner)


# Deadlines


def test_line_has_no_deadline_and_yields_to_requests() -> None:
    found: set[JobRequest] = set()
    runner = FakeRunner(on_step=lambda rows: found.update(row.job.request for row in rows), clip=FakeClip())

    async def check(setup: Setup) -> None:
        for fields in ({}, {"timeout_seconds": 1e-9}, {"clip_guidance_scale": 1, "timeout_seconds": 1e-9}):
            answer = await setup.lines.answer(line({**WORK, **fields}))
            assert answer.status == 200, answer.body
            (request,) = found
            assert (request.timeout, request.is_background) == (math.inf, True)
            found.clear()
        await setup.client.post("/generate", json=WORK)
        (request,) = found
        assert not request.is_background
        assert request.timeout == 20

    run(check, runner, request_timeout=20)


def test_timeout_does_not_limit_the_time_for_the_pictures_of_a_line() -> None:
    async def check(setup: Setup) -> None:
        late = {"image": PICTURE, "timeout_seconds": 1e-9}
        assert (await setup.client.post("/recognize", json=late)).status_code in (429, 504)
        answer = await setup.lines.answer(line(late, "/recognize"))
        assert answer.status == 200, answer.body

    run(check, FakeRunner(clip=FakeClip()))


def test_timeout_that_is_too_long_is_refused_as_in_a_request() -> None:
    async def check(setup: Setup) -> None:
        answer = await setup.lines.answer(line({**WORK, "timeout_seconds": 21}))
        assert (answer.status, json.loads(answer.body)["errors"][0]["loc"]) == (422, ["body", "timeout_seconds"])

    run(check, request_timeout=20)


# Retries


@pytest.mark.parametrize("error", [errors.Overloaded, errors.Starting, errors.Draining, errors.EngineFailed])
def test_line_is_tried_again_after_retry_after(
    error: type[errors.Unavailable], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(setup: Setup) -> None:
        submit, refusals = setup.service.engine.submit, [7, 3600]

        def refuse_twice(*arguments: Any, **options: Any) -> None:
            if refusals:
                raise error(refusals.pop(0))
            submit(*arguments, **options)

        monkeypatch.setattr(setup.service.engine, "submit", refuse_twice)
        answer = await setup.lines.answer(line({**WORK, "count": 2}))
        assert setup.waits.seconds == [7, LONGEST_WAIT]
        assert (answer.status, answer.images) == (200, 2)
        metrics = (await setup.client.get("/metrics")).text
        assert 'unfog_rejected_total{reason="overloaded"} 0.0' in metrics

    run(check)


def test_line_that_can_never_be_admitted_is_refused_at_once() -> None:
    async def check(setup: Setup) -> None:
        answer = await setup.lines.answer(line({**WORK, "count": 9}))
        assert (answer.status, json.loads(answer.body)["errors"][0]["loc"]) == (422, ["body", "count"])
        assert (await setup.lines.answer(line({**WORK, "count": 8}))).status == 200
        assert setup.waits.seconds == []

    run(check, queue_capacity=8)


def test_line_of_a_service_that_starts_is_answered_when_it_is_ready() -> None:
    loaded = threading.Event()

    def load() -> FakeRunner:
        assert loaded.wait(WAIT_SECONDS)
        return FakeRunner()

    async def main() -> None:
        app = create_app(Settings(), load)
        service = app.state.service

        async def finish_loading() -> None:
            loaded.set()
            await asyncio.wrap_future(service.engine.ready)

        waits = Waits(meanwhile=finish_loading)
        lines = LineRequests(service, LINE_ROUTERS, waits)
        async with app.router.lifespan_context(app):
            assert (await lines.answer(line(WORK))).status == 200
        assert waits.seconds == [STARTING_SECONDS]

    asyncio.run(main())


# Cancellation and drain


def test_cancelled_line_leaves_the_engine() -> None:
    gate = Gate()

    async def check(setup: Setup) -> None:
        answering = setup.answering(line({**WORK, "count": 2}))
        await entered(gate.entered)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        assert setup.service.engine.count_images() == (0, 0)
        gate.released.set()
        assert (await setup.lines.answer(line(WORK))).status == 200

    run(check, FakeRunner(on_step=gate))


def test_line_whose_inner_tasks_are_cancelled_has_no_answer() -> None:
    """At the end of an event loop, as after Ctrl-C, all tasks are cancelled, not only those of the lines."""
    clip = HeldClip()

    async def check(setup: Setup) -> None:
        answering = setup.answering(line({**WORK, "clip_guidance_scale": 1, "clip_prompt": "held"}))
        await entered(clip.entered)
        waiting = [task for task in asyncio.all_tasks() if "_wait_for_disconnect" in repr(task.get_coro())]
        assert waiting
        for task in waiting:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        clip.released.set()

    run(check, FakeRunner(clip=clip))


def test_cancelled_line_leaves_the_queue_of_clip() -> None:
    clip, endpoint = HeldClip(), "/generate"
    body = {**WORK, "clip_guidance_scale": 1, "clip_prompt": "held"}

    async def check(setup: Setup) -> None:
        first, second = setup.answering(line(body, endpoint)), setup.answering(line(body, endpoint, 2))
        await entered(clip.entered)
        await turns()
        for task in (second, first):
            task.cancel()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        assert setup.service.clip._prompts == {}
        assert not any(work.num_images for work in setup.service.clip._images.values())  # 0: the real digits
        clip.released.set()
        assert (await setup.lines.answer(line(body, endpoint))).status == 200

    run(check, FakeRunner(clip=clip))


def test_drain_ends_lines_and_does_not_wait_for_them() -> None:
    gate = Gate()

    async def check(setup: Setup) -> None:
        setup.waits.meanwhile = asyncio.Event().wait
        answering = setup.answering(line(WORK))
        await entered(gate.entered)
        drained = asyncio.gather(asyncio.wrap_future(setup.service.engine.drain()), setup.service.in_flight.none())
        await asyncio.wait_for(drained, WAIT_SECONDS)  # although the step is still in progress
        await turns()
        assert setup.waits.seconds == [RESTART_SECONDS]  # The answer 503 is not the answer of the line.
        answering.cancel()
        gate.released.set()

    run(check, FakeRunner(on_step=gate))


def test_drain_does_not_wait_for_lines_that_use_clip() -> None:
    endpoint, body = "/generate", {**WORK, "clip_guidance_scale": 1, "clip_prompt": "held"}
    clip, runner = HeldClip(), FakeRunner()
    runner.clip = clip

    async def check(setup: Setup) -> None:
        setup.waits.meanwhile = asyncio.Event().wait
        answering = setup.answering(line(body, endpoint))
        await entered(clip.entered)
        await asyncio.wait_for(setup.service.in_flight.none(), WAIT_SECONDS)
        setup.service.engine.drain()
        clip.released.set()
        if endpoint == "/generate":  # Its prompt is embedded, but its images are not admitted any more.
            await until(lambda: setup.waits.seconds != [])
            assert runner.calls == []
        answering.cancel()

    run(check, runner)


# Shared resources


def test_request_precedes_the_prompts_of_all_lines_but_one() -> None:
    clip = HeldClip()

    def guided(prompt: str) -> dict[str, Any]:
        return {**WORK, "clip_guidance_scale": 1, "clip_prompt": prompt}

    async def check(setup: Setup) -> None:
        answering = [setup.answering(line(guided("held")))]
        await entered(clip.entered)
        answering += [setup.answering(line(guided(f"line {number}"), number=number)) for number in (2, 3)]
        await turns()
        assert len(setup.service.clip._prompts) == 1
        interactive = asyncio.create_task(setup.client.post("/generate", json=guided("request")))
        await until(lambda: len(setup.service.clip._prompts) == 2)
        clip.released.set()
        assert (await interactive).status_code == 200
        assert {answer.status for answer in await asyncio.gather(*answering)} == {200}
        assert clip.prompts[:2] == ["held", "request"]
        assert sorted(clip.prompts[2:]) == ["line 2", "line 3"]

    run(check, FakeRunner(clip=clip))


def test_request_precedes_the_pictures_of_all_lines_but_those_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    begun, released = threading.Semaphore(0), threading.Event()

    def read_when_released(checked: Any, data: bytes) -> Any:
        begun.release()
        assert released.wait(WAIT_SECONDS)
        read.append(checked[0].num_pairs)
        return read_drawing(checked, data)

    monkeypatch.setattr("app.api.native.recognize.read_drawing", read_when_released)

    async def check(setup: Setup) -> None:
        def of_line(number: int) -> Line:
            return line({"image": PICTURE, "num_pairs": 2}, "/recognize", number)

        answering = [setup.answering(of_line(number)) for number in range(10 * NUM_WORKERS)]
        for _ in range(NUM_WORKERS):
            assert await asyncio.to_thread(begun.acquire, timeout=WAIT_SECONDS)
        interactive = asyncio.create_task(setup.client.post("/recognize", json={"image": PICTURE, "num_pairs": 3}))
        queue = setup.service.pictures._queue
        await until(lambda: sum(len(lane.requests) for lane in queue._lanes) == NUM_WORKERS + 1)
        released.set()
        assert (await interactive).status_code == 200
        assert {answer.status for answer in await asyncio.gather(*answering)} == {200}

    run(check)
    # The bodies and the pictures are separate turns. NUM_WORKERS lines can be before the request in each of them.
    assert read.index(3) <= 3 * NUM_WORKERS
    assert len(read) == 10 * NUM_WORKERS + 1
