"""Streams of the OpenAI Images API, without a socket and with a fake runner."""

import base64
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app import errors
from app.api.openai.events import OpenAIEvents
from app.engine.job import ImageDone, Pixels, Progress
from app.tasks.images import encode_image
from model.png import Provenance
from tests.app.api.openai.samples import EDITS, PATHS, error_of, events_of, send
from tests.app.application import run
from tests.app.fakes import FakeRunner, Gate, image
from tests.e2e.service import open_png

PROVENANCE = Provenance(labels=("7",), seed=3, sampler="ddpm", num_steps=100, guidance_scale=1.0, model_sha256="")
FACTS = {"quality": "high", "size": "56x56", "seed": 3}
both_paths = pytest.mark.parametrize("path", PATHS)


def kind_of(path: str) -> str:
    return "image_edit" if path == EDITS else "image_generation"


@pytest.mark.parametrize(("size", "is_in_loop"), [("56x56", True), ("84x84", False)])
def test_only_small_partial_images_are_encoded_in_the_event_loop(
    size: str, is_in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, found = threading.get_ident(), set[bool]()

    def record(pixels: Pixels, *options: Any) -> bytes:
        if len(options) == 1:  # without text chunks
            found.add(threading.get_ident() == thread)
        return encode_image(pixels, *options)

    async def check(client: httpx.AsyncClient) -> None:
        response = await send(client, PATHS[0], stream=True, partial_images=2, n=1, size=size, quality="medium")
        assert len(events_of(response)) == 3

    monkeypatch.setattr("app.api.openai.events.encode_image", record)
    run(check, FakeRunner())
    assert found == {is_in_loop}


@both_paths
def test_stream_has_partial_images_and_one_completed_event_of_each_image(path: str) -> None:
    kind = kind_of(path)
    common = {"b64_json", "created_at", "size", "quality", "background", "output_format", "type", "index", "seed"}

    async def check(client: httpx.AsyncClient) -> None:
        response = await send(client, path, stream=True, partial_images=2, n=2, size="56x56", quality="medium")
        finished = (await send(client, path, n=2, size="56x56", quality="medium")).json()["data"]
        assert response.headers["x-seed"] == "3"
        assert "[DONE]" not in response.text
        events = events_of(response)
        assert Counter(name for name, _ in events) == {f"{kind}.partial_image": 4, f"{kind}.completed": 2}
        completed: set[int] = set()
        partial: Counter[int] = Counter()
        for name, data in events:
            assert data["type"] == name
            assert (data["size"], data["quality"], data["seed"]) == ("56x56", "medium", 3)
            assert (data["background"], data["output_format"]) == ("opaque", "png")
            assert abs(data["created_at"] - time.time()) < 60
            index = data["index"]
            assert index not in completed
            pixels, chunks, _ = open_png(base64.b64decode(data["b64_json"], validate=True))
            assert pixels.shape == (2, 8)  # an image of the fake runner has 1 x 4 pixels
            if name.endswith("completed"):
                assert set(data) == common | {"usage"}
                assert data["b64_json"] == finished[index]["b64_json"]
                completed.add(index)
            else:
                assert set(data) == common | {"partial_image_index"}
                assert data["partial_image_index"] == partial[index]
                assert not chunks
                partial[index] += 1
        assert completed == {0, 1}

    run(check, FakeRunner())


@pytest.mark.parametrize(("partial_images", "steps"), [(1, [50]), (2, [34, 67]), (3, [25, 50, 75])])
def test_partial_images_are_evenly_spread(partial_images: int, steps: list[int]) -> None:
    """The last pixel of the fake runner's image is the number of finished steps."""

    async def check(client: httpx.AsyncClient) -> None:
        response = await send(client, PATHS[0], stream=True, partial_images=partial_images)
        drawn = [open_png(base64.b64decode(data["b64_json"]))[0][0, -1] for _, data in events_of(response)]
        assert drawn == [*steps, 100]

    run(check, FakeRunner())


@both_paths
@pytest.mark.parametrize("fields", [{}, {"partial_images": 0}, {"partial_images": None}], ids=str)
def test_stream_without_partial_images_has_only_completed_events(path: str, fields: dict[str, Any]) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        events = events_of(await send(client, path, stream=True, n=3, **fields))
        assert [name for name, _ in events] == [f"{kind_of(path)}.completed"] * 3
        assert {data["index"] for _, data in events} == {0, 1, 2}

    run(check, FakeRunner())


@both_paths
def test_stream_false_ignores_partial_images_and_accept(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        client.headers["Accept"] = "text/event-stream"
        for stream in (False, None):
            response = await send(client, path, stream=stream, partial_images=3)
            assert response.headers["content-type"] == "application/json"

    run(check, FakeRunner())


@both_paths
def test_error_before_the_stream_is_a_response(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert error_of(await send(client, path, stream=True, n=0), 400, "invalid_request")["param"] == "n"

    run(check, FakeRunner())


@both_paths
def test_error_in_the_stream_is_the_last_event(path: str) -> None:
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        events = events_of(await send(client, path, stream=True, partial_images=1))
        gate.released.set()
        ((name, data),) = events
        assert (name, list(data)) == ("error", ["error"])
        assert data["error"] == {
            "message": errors.DeadlineExceeded.detail,
            "type": "server_error",
            "param": None,
            "code": "deadline_exceeded",
        }
        assert 'unfog_rejected_total{reason="deadline"} 1.0' in (await client.get("/metrics")).text

    run(check, FakeRunner(on_step=gate), request_timeout=0.2)


def new_format(max_partial: int = 3) -> OpenAIEvents:
    return OpenAIEvents("image_edit", FACTS, 2, max_partial, lambda: PROVENANCE)


def progress(step: int, *started: bool) -> Progress:
    return Progress(step, 100, [image(int(is_started), 0, 0) for is_started in started])


def indexes(text: str) -> Iterator[tuple[int, int]]:
    """Returns the index and the number of each partial image."""
    for _, data in events_of(httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})):
        yield data["index"], data["partial_image_index"]


def test_finished_image_has_no_further_partial_image() -> None:
    events = new_format()
    assert list(indexes(events.progress(progress(25, True, True)))) == [(0, 0), (1, 0)]
    assert "image_edit.completed" in events.image(ImageDone(0, image(1, 0, 100)))
    assert list(indexes(events.progress(progress(50, True, True)))) == [(1, 1)]


def test_image_that_has_not_started_has_no_partial_image() -> None:
    events = new_format()
    assert list(indexes(events.progress(progress(25, True, False)))) == [(0, 0)]
    assert list(indexes(events.progress(progress(50, True, True)))) == [(0, 1), (1, 0)]


def test_number_of_partial_images_is_limited() -> None:
    events = new_format(max_partial=1)
    assert list(indexes(events.progress(progress(50, True)))) == [(0, 0)]
    assert events.progress(progress(60, True)) == ""


def test_preview_of_the_last_step_is_not_a_partial_image() -> None:
    assert new_format().progress(progress(100, True)) == ""


def test_event_stream_knows_the_scales_of_images_and_previews() -> None:
    """It encodes an event in a thread if one of them is large."""
    events = new_format()
    assert (events.image_scale, events.preview_scale) == (2, 2)
