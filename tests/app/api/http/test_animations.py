"""Animations are decoded with Pillow and compared with the frames, and with the other formats of the same request."""

import asyncio
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from fastapi import Request
from PIL import Image
from starlette.types import Message

from app.api.http.animations import (
    FIRST_SECONDS,
    FRAME_MS,
    LAST_MS,
    MAX_FRAME_PIXELS,
    MAX_PENDING_PIXELS,
    MAX_PIXELS,
    AnimationEncoder,
    FrameCollector,
    encode_animation,
    num_frames_of,
    num_pixels_of,
)
from app.api.http.media_types import ANIMATIONS, GIF, PNG, WEBP
from app.api.http.thread_priority import NICENESS
from app.engine.job import Frame, Pixels
from app.errors import InvalidRequest, Overloaded
from model.png import Provenance, sheet_shape
from tests.app.api.examples import REQUESTS as EXAMPLES
from tests.app.api.http.test_events import STREAMED, open_all, progress_in
from tests.app.application import WORK, client_of, run
from tests.app.fakes import INFO, WAIT_SECONDS, FakeRunner, Gate, Rows, image, same, wait_until
from tests.model.test_png import PROVENANCE

TEXT = PROVENANCE.text("0-3")
IMAGE_DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF 2.3, section 4.6.4


class Decoded(NamedTuple):
    """The content of an animation."""

    frames: list[Pixels]
    durations: list[int]
    num_repeats: int  # 0: it repeats forever
    text: dict[str, str]


def decode(content: bytes, media_type: str) -> Decoded:
    with Image.open(io.BytesIO(content)) as opened:
        assert Image.MIME[opened.format or ""] == media_type
        text = opened.info["comment"] if media_type == GIF else opened.getexif()[IMAGE_DESCRIPTION]
        num_repeats, frames, durations = opened.info["loop"], [], []
        for number in range(opened.n_frames):  # type: ignore[attr-defined] # of animations
            opened.seek(number)
            frames.append(np.asarray(opened.convert("RGB")))
            durations.append(opened.info["duration"])
    if all((frame[..., :1] == frame).all() for frame in frames):
        frames = [frame[..., 0] for frame in frames]
    return Decoded(frames, durations, num_repeats, json.loads(text))


def random_sheets(count: int, *shape: int) -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


def enlarged(sheet: Pixels, scale: int) -> Pixels:
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def sheet_of(images: list[Pixels], columns: int) -> Pixels:
    """Returns a contact sheet. Empty cells are black."""
    cells = [*images, *[np.zeros_like(images[0])] * (-len(images) % columns)]
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize(
    ("count", "shape", "scale"), [(7, (28, 28), 1), (2, (84, 56), 2), (5, (5, 3), 1), (3, (1, 4), 16), (4, (256, 1), 1)]
)
def test_grey_animation_has_the_exact_pixels(media_type: str, count: int, shape: tuple[int, ...], scale: int) -> None:
    sheets = random_sheets(count, *shape)
    decoded = decode(encode_animation(media_type, sheets, TEXT, scale), media_type)
    assert same(decoded.frames, [enlarged(sheet, scale) for sheet in sheets])


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_grey_animation_keeps_all_levels_and_pixels_that_do_not_change(media_type: str) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    changed = ramp.copy()
    changed[3:5, 7] = 0
    sheets = [ramp, changed, np.zeros_like(ramp), ramp, 255 - ramp, np.full_like(ramp, 255)]
    assert same(
        decode(encode_animation(media_type, sheets, TEXT, 3), media_type).frames, [enlarged(s, 3) for s in sheets]
    )


def test_webp_animation_has_the_exact_colours() -> None:
    sheets = random_sheets(3, 8, 8, 3)
    decoded = decode(encode_animation(WEBP, sheets, TEXT, 2), WEBP)
    assert same(decoded.frames, [enlarged(sheet, 2) for sheet in sheets])


def test_gif_animation_has_similar_colours_and_enlarges_them_exactly() -> None:
    gradient = np.indices((32, 32)).transpose(1, 2, 0).astype(np.uint8) * 8
    sheets = [np.dstack([gradient, np.full((32, 32, 1), blue, np.uint8)]) for blue in (0, 100, 200)]
    frames = decode(encode_animation(GIF, sheets, TEXT, 3), GIF).frames
    assert len(frames) == 3
    for frame, sheet in zip(frames, sheets, strict=True):
        assert np.array_equal(frame, enlarged(frame[::3, ::3], 3))
        # Pillow's own choice of colours, for which it needs several times as long, differs by up to 16 levels.
        assert np.abs(frame[::3, ::3].astype(int) - sheet).max() <= 8


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_animation_repeats_forever_and_shows_the_last_frame_longer(media_type: str) -> None:
    decoded = decode(encode_animation(media_type, random_sheets(50, 4, 4), TEXT, 1), media_type)
    assert decoded.durations == [60] * 49 + [2000]  # 50 frames of 60 ms take 3 s
    assert decoded.num_repeats == 0


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_joining_equal_frames_keeps_the_total_time(media_type: str) -> None:
    first, second = random_sheets(2, 4, 4)
    decoded = decode(encode_animation(media_type, [first, first, second, second, second], TEXT, 1), media_type)
    assert same(decoded.frames, [first, second])
    assert decoded.durations == [2 * FRAME_MS, 2 * FRAME_MS + LAST_MS]


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize("further", [{}, {"CLIP-Prompt": json.dumps("é" * 400)}], ids=["short", "long"])
def test_provenance_is_a_json_object_in_ascii(media_type: str, further: dict[str, str]) -> None:
    content = encode_animation(media_type, random_sheets(2, 4, 4), TEXT | further, 1)
    assert decode(content, media_type).text == TEXT | further
    assert json.dumps(TEXT | further)[:200].encode("ascii") in content
    if media_type == WEBP:
        with Image.open(io.BytesIO(content)) as opened:
            assert opened.getexif()[SOFTWARE] == TEXT["Software"]
        tiff = content.index(b"EXIF") + 8  # after the name and the size of the chunk
        assert content[tiff : tiff + 4] in (b"II*\0", b"MM\0*")


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_encoded_bytes_do_not_depend_on_the_time(media_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = encode_animation(media_type, random_sheets(5, 28, 28), TEXT, 2)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert encode_animation(media_type, random_sheets(5, 28, 28), TEXT, 2) == before


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)], ids=["grey", "colour"])
def test_collector_keeps_a_copy_of_the_frames_and_nothing_else(shape: tuple[int, ...]) -> None:
    collector, read = (
        FrameCollector(3, 5, sheet_shape(5)),
        np.stack(random_sheets(100, *shape)),
    )  # also images of other requests
    for number in (1, 0):
        for index in (4, 0, 2, 3, 1):
            collector.add(Frame(index, number, read[10 * number + index]))
    expected = [sheet_of(list(read[start : start + 5]), 3) for start in (0, 10, 20)]
    kept = [value for value in vars(collector).values() if isinstance(value, np.ndarray)]
    assert [array.size for array in kept] == [2 * 5 * read[0].size]
    read_before = read[20:25].copy()
    read[:] = 0
    assert same(collector.sheets(list(read_before)), expected)


@pytest.mark.parametrize(
    ("num_previews", "num_steps", "expected"),
    [(0, 5, 1), (1, 5, 1), (4, 5, 4), (5, 5, 5), (100, 5, 5), (100, 100, 100)],
)
def test_number_of_frames_is_between_1_and_the_number_of_steps(
    num_previews: int, num_steps: int, expected: int
) -> None:
    assert num_frames_of(num_previews, num_steps) == expected


@pytest.mark.parametrize(
    ("shape", "count", "scale", "num_frames", "location"),
    [
        ((1, 28, 28), 64, 8, 4, None),  # 1792 x 1792 pixels each
        ((1, 28, 28), 64, 8, 5, ["query", "previews"]),
        ((1, 28, 28), 64, 9, 1, ["body", "scale"]),
        ((3, 28, 28), 5, 16, 13, None),  # 3 x 2 images
        ((3, 28, 28), 5, 16, 14, ["query", "previews"]),
        ((1, 28, 28), 1, 16, 79, None),
        ((1, 28, 28), 1, 16, 80, ["query", "previews"]),
        ((1, 28, 28), 1, 1, 100, None),
        ((1, 2000, 2000), 1, 1, MAX_PIXELS // MAX_FRAME_PIXELS, None),  # both limits
        ((1, 2000, 2001), 1, 1, 1, ["body", "count"]),
    ],
)
def test_size_up_to_the_limits_is_permitted(
    shape: tuple[int, int, int], count: int, scale: int, num_frames: int, location: list[str] | None
) -> None:
    if location is None:
        assert 0 < num_pixels_of(shape, sheet_shape(count), scale, num_frames) <= MAX_PIXELS
        return
    with pytest.raises(InvalidRequest) as refused:
        num_pixels_of(shape, sheet_shape(count), scale, num_frames)
    (error,) = refused.value.errors
    assert error["loc"] == location
    assert "educe" in error["msg"]


def test_recommended_number_of_previews_is_the_largest_that_is_permitted() -> None:
    with pytest.raises(InvalidRequest, match=r"Reduce previews to 79\b"):
        num_pixels_of((1, 28, 28), sheet_shape(4), 8, 100)
    num_pixels_of((1, 28, 28), sheet_shape(4), 8, 79)
    with pytest.raises(InvalidRequest):
        num_pixels_of((1, 28, 28), sheet_shape(4), 8, 80)


# Responses


REQUESTS = [*STREAMED, ("/generate", {**WORK, "num_steps": 20})]
IDS = [*(path for path, _ in STREAMED), "/generate in 20 steps"]
COLUMNS = {1: 1, 2: 2, 4: 2, 5: 3}  # count -> columns of the contact sheet


async def animation_of(
    client: httpx.AsyncClient, media_type: str, body: dict[str, Any], path: str = "/generate", query: str = ""
) -> Decoded:
    response = await client.post(f"{path}{query}", json=body, headers={"Accept": media_type})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == media_type
    assert response.headers["x-seed"] == str(body["seed"])
    assert response.headers["server-timing"].startswith("queue;dur=")
    return decode(response.content, media_type)


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize("count", [2, 4, 5])
@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=IDS)
def test_frames_equal_x_t_of_the_event_stream_and_the_last_frame_equals_the_png(
    path: str, body: dict[str, Any], count: int, media_type: str
) -> None:
    body = {**body, "count": count}

    async def check(client: httpx.AsyncClient) -> None:
        query = "?previews=6&include=x_t"
        stream = progress_in(await client.post(f"{path}{query}", json=body, headers={"Accept": "text/event-stream"}))
        png = await client.post(path, json=body, headers={"Accept": PNG})
        with Image.open(io.BytesIO(png.content)) as opened:
            finished, chunks = np.asarray(opened), opened.text  # type: ignore[attr-defined] # of PNG images
        expected = [sheet_of(open_all(event["x_t"]), COLUMNS[count]) for event in stream[:-1]]
        decoded = await animation_of(client, media_type, body, path, query)
        assert len(stream) > 1
        assert same(decoded.frames, [*expected, finished])
        assert decoded.durations == [FRAME_MS] * len(expected) + [LAST_MS]
        assert decoded.text == chunks

    run(check, FakeRunner())


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_animation_of_one_image_is_not_arranged_and_has_its_index(media_type: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        decoded = await animation_of(client, media_type, {**WORK, "seed": 300, "scale": 3})
        frames = [255 - image(300, 0, 1), 255 - image(300, 0, 2), image(300, 0, 3)]
        assert same(decoded.frames, [enlarged(frame, 3) for frame in frames])
        assert decoded.text["Index"] == "0"

    run(check, FakeRunner())


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_images_can_be_generated_again_from_the_provenance(media_type: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**WORK, "count": 5, "seed": 77, "num_steps": 9, "sampler": "ddim", "guidance_scale": 2.5}
        decoded = await animation_of(client, media_type, body)
        provenance, indices = Provenance.parse(decoded.text)
        again = {
            "label": provenance.labels[0],
            "count": len(indices),
            "seed": provenance.seed,
            "num_steps": provenance.num_steps,
            "sampler": provenance.sampler,
            "guidance_scale": provenance.guidance_scale,
        }
        png = await client.post("/generate", json=again, headers={"Accept": PNG})
        with Image.open(io.BytesIO(png.content)) as opened:
            assert np.array_equal(np.asarray(opened), decoded.frames[-1])

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("query", "num_steps", "expected"),
    [("", 30, 10), ("", 4, 4), ("?previews=4", 30, 4), ("?previews=100", 100, 100), ("?previews=2", 1, 1)],
)
def test_animation_has_about_as_many_frames_as_previews(query: str, num_steps: int, expected: int) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for media_type in ANIMATIONS:
            response = await client.post(
                f"/generate{query}", json={**WORK, "num_steps": num_steps}, headers={"Accept": media_type}
            )
            with Image.open(io.BytesIO(response.content)) as opened:
                assert opened.n_frames == expected  # type: ignore[attr-defined]

    run(check, FakeRunner())


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize("previews", [0, 1])
def test_animation_without_previews_is_the_finished_images(media_type: str, previews: int) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(f"/generate?previews={previews}", json=WORK, headers={"Accept": media_type})
        with Image.open(io.BytesIO(response.content)) as opened:
            assert Image.MIME[opened.format or ""] == media_type
            assert opened.n_frames == 1  # type: ignore[attr-defined]
            assert np.array_equal(np.asarray(opened.convert("L")), image(1, 0, 3))
            assert Provenance.parse(json.loads(opened.info.get("comment") or opened.getexif()[IMAGE_DESCRIPTION]))

    run(check, FakeRunner())


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize("previews", ["-1", "101", "x", ""])
def test_previews_out_of_range_are_422(media_type: str, previews: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(f"/generate?previews={previews}", json=WORK, headers={"Accept": media_type})
        assert (response.status_code, response.json()["errors"][0]["loc"]) == (422, ["query", "previews"])

    run(check, FakeRunner())


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize(
    ("query", "changes", "location"),
    [
        ("?previews=100", {"num_steps": 100, "scale": 16}, ["query", "previews"]),
        ("?previews=1", {"count": 64, "scale": 16}, ["body", "scale"]),
    ],
)
def test_animation_that_is_too_large_is_422_and_does_not_reach_the_engine(
    media_type: str, query: str, changes: dict[str, Any], location: list[str]
) -> None:
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        for path, body in STREAMED[:2]:
            sent = {**body, **changes} if path == "/generate" else {**body, "count": 64, "scale": 16}
            response = await client.post(f"{path}{query}", json=sent, headers={"Accept": media_type})
            assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
            assert path != "/generate" or response.json()["errors"][0]["loc"] == location
        assert "unfog_queue_wait_seconds_count 0.0" in (await client.get("/metrics")).text
        assert (await client.post(f"/generate{query}", json={**WORK, **changes})).status_code == 200  # in JSON

    run(check, runner)


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_animation_is_encoded_in_a_thread_and_its_time_is_measured(
    media_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def encode(*arguments: Any) -> bytes:
        threads.append(threading.current_thread())
        return encode_animation(*arguments)

    monkeypatch.setattr("app.api.service.encode_animation", encode)

    async def check(client: httpx.AsyncClient) -> None:
        await animation_of(client, media_type, WORK)
        assert len(threads) == 1
        assert threads[0] is not threading.current_thread()
        assert "unfog_encode_duration_seconds_count 1.0" in (await client.get("/metrics")).text

    run(check, FakeRunner())


MESSAGE = "Too many animations are being made"


class Encoding:
    """A function that blocks like a slow encoding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()
        self.num_calls, self.fails = 0, False
        monkeypatch.setattr("app.api.service.encode_animation", self)

    def __call__(self, *arguments: Any) -> bytes:
        self.num_calls += 1
        self.begun.release()
        assert self.may_end.wait(WAIT_SECONDS)
        if self.fails:
            raise ValueError
        return b"animation"


def limit_to(monkeypatch: pytest.MonkeyPatch, num_animations: int) -> None:
    """Limits the pending pixels to this number of animations of WORK."""
    num_pixels = num_pixels_of(INFO.image_shape, sheet_shape(1), 1, WORK["num_steps"])
    monkeypatch.setattr("app.api.http.animations.MAX_PENDING_PIXELS", num_animations * num_pixels)


def start(client: httpx.AsyncClient, num_requests: int, **fields: Any) -> list[asyncio.Task[httpx.Response]]:
    """Sends requests for an animation."""
    body, headers = {**WORK, **fields}, {"Accept": WEBP}
    return [asyncio.ensure_future(client.post("/generate", json=body, headers=headers)) for _ in range(num_requests)]


async def statuses(tasks: list[asyncio.Task[httpx.Response]]) -> list[int]:
    return [response.status_code for response in await asyncio.gather(*tasks)]


def test_too_many_pending_animations_are_429_and_counted_and_encoded_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_to(monkeypatch, 3)
    monkeypatch.setattr("app.api.http.animations.FIRST_SECONDS", 1e-3)
    encoding = Encoding(monkeypatch)

    async def check(client: httpx.AsyncClient) -> None:
        admitted = start(client, 3)
        await asyncio.to_thread(encoding.begun.acquire)
        (refused,) = await asyncio.gather(*start(client, 1))
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert MESSAGE in refused.json()["detail"]
        assert refused.headers["retry-after"] == "3"  # one animation has 2,352 pixels
        assert (await client.post("/generate", json=WORK)).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert 'unfog_rejected_total{reason="overloaded"} 1.0' in metrics
        assert encoding.num_calls == 1  # the others wait
        encoding.may_end.set()
        assert await statuses(admitted) == [200] * 3
        assert await statuses(start(client, 3)) == [200] * 3

    run(check, FakeRunner())


def test_animation_is_admitted_if_no_other_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(monkeypatch, 0)

    async def check(client: httpx.AsyncClient) -> None:
        assert await statuses(start(client, 1)) == [200]
        assert sorted(await statuses(start(client, 2))) == [200, 429]
        assert await statuses(start(client, 1)) == [200]

    run(check, FakeRunner())


def test_other_errors_precede_the_limit_of_pending_animations(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(monkeypatch, 1)
    encoding = Encoding(monkeypatch)

    async def check(client: httpx.AsyncClient) -> None:
        admitted = start(client, 1)
        await asyncio.to_thread(encoding.begun.acquire)
        assert await statuses([*start(client, 1, count=3), *start(client, 1, timeout_seconds=9e5)]) == [422, 422]
        encoding.may_end.set()
        assert await statuses(admitted) == [200]

    run(check, FakeRunner(), max_count=2)


def _fail(rows: Rows) -> None:
    raise ValueError


@pytest.mark.parametrize(("end", "status"), [("engine error", 500), ("encoding error", 500), ("deadline", 504)])
def test_animation_that_fails_is_no_longer_pending(end: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(monkeypatch, 1)
    encoding, gate = Encoding(monkeypatch), Gate()
    encoding.may_end.set()
    encoding.fails = end == "encoding error"
    runner = FakeRunner()
    if end == "engine error":
        runner.on_step = _fail
    elif end == "deadline":
        runner.on_step = gate

    async def check(client: httpx.AsyncClient) -> None:
        fields = {"timeout_seconds": 0.2} if end == "deadline" else {}
        assert await statuses(start(client, 1, **fields)) == [status]
        gate.released.set()
        runner.on_step, encoding.fails = lambda rows: None, False
        assert await statuses(start(client, 1)) == [200]

    run(check, runner)


def test_animation_that_the_engine_refuses_is_not_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(monkeypatch, 1)
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        engine = client._transport.app.state.service.engine  # type: ignore[attr-defined]
        running = asyncio.ensure_future(client.post("/generate", json=WORK))
        await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
        waiting = asyncio.ensure_future(client.post("/generate", json={**WORK, "count": 2}))
        await asyncio.to_thread(wait_until, lambda: engine.count_images().waiting == 2)
        (refused,) = await asyncio.gather(*start(client, 1))
        assert (refused.status_code, "no room" in refused.json()["detail"]) == (429, True)
        gate.released.set()
        assert await statuses([running, waiting]) == [200, 200]
        assert await statuses(start(client, 1)) == [200]

    run(check, FakeRunner(on_step=gate), queue_capacity=2)


async def leave(client: httpx.AsyncClient, when: Callable[[], Awaitable[object]]) -> None:
    """Requests an animation, and disconnects when `when` has returned."""
    messages = iter([{"type": "http.request", "body": json.dumps(WORK).encode()}])

    async def receive() -> Message:
        if message := next(messages, None):
            return message
        await when()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        assert message.get("status", 499) == 499

    headers = [(b"content-type", b"application/json"), (b"accept", b"image/webp")]
    scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b""}
    await client._transport.app({**scope, "headers": headers}, receive, send)  # type: ignore[attr-defined]


def test_animation_whose_client_disconnects_during_the_steps_is_no_longer_pending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_to(monkeypatch, 1)
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        async def refuse_others() -> None:
            await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
            assert await statuses(start(client, 1)) == [429]

        await leave(client, refuse_others)
        gate.released.set()
        assert await statuses(start(client, 1)) == [200]

    run(check, FakeRunner(on_step=gate))


def test_animation_whose_client_disconnects_before_its_encoding_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(monkeypatch, 2)
    encoding = Encoding(monkeypatch)

    async def check(client: httpx.AsyncClient) -> None:
        service = client._transport.app.state.service  # type: ignore[attr-defined]
        first = start(client, 1)
        await asyncio.to_thread(encoding.begun.acquire)

        async def wait_for_encoder() -> None:
            await asyncio.to_thread(wait_until, lambda: not service.animations._worker._work_queue.empty())

        await leave(client, wait_for_encoder)
        second = start(client, 1)
        assert (await asyncio.wait(second, timeout=0.1))[0] == set()  # It is admitted and waits.
        encoding.may_end.set()
        assert await statuses([*first, *second]) == [200, 200]
        assert encoding.num_calls == 2

    run(check, FakeRunner())


def test_close_cancels_the_animations_that_wait_for_their_encoding() -> None:
    async def main() -> None:
        encoder, begun, may_end = AnimationEncoder(), threading.Event(), threading.Event()

        def encode() -> bool:
            begun.set()
            return may_end.wait(WAIT_SECONDS)

        request = Request({"type": "http"}, asyncio.Event().wait)
        calls = [asyncio.ensure_future(encoder.run(request, encode, 1)) for _ in range(2)]
        await asyncio.to_thread(begun.wait, WAIT_SECONDS)
        encoder.close()
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
        may_end.set()
        assert await calls[0]

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for each thread")
def test_animations_are_encoded_with_a_lower_priority() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def main() -> None:
        encoder = AnimationEncoder()
        request = Request({"type": "http"}, asyncio.Event().wait)
        assert await encoder.run(request, niceness, 1) == min(19, niceness() + NICENESS)
        encoder.close()

    asyncio.run(main())


def test_retry_after_follows_the_measured_time() -> None:
    async def main() -> None:
        encoder, request = AnimationEncoder(), Request({"type": "http"}, asyncio.Event().wait)

        def retry_after() -> int:
            with encoder.admit(MAX_PENDING_PIXELS), pytest.raises(Overloaded) as refused, encoder.admit(MAX_PIXELS):
                pass
            return refused.value.retry_after

        assert retry_after() == math.ceil(MAX_PIXELS * FIRST_SECONDS)
        await encoder.run(request, lambda: time.sleep(0.01), 1)  # a small animation hardly counts
        assert retry_after() == math.ceil(MAX_PIXELS * FIRST_SECONDS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.api.http.animations.time", SimpleNamespace(monotonic=iter([0.0, 3.5]).__next__))
            await encoder.run(request, lambda: None, MAX_PIXELS)
        assert retry_after() == 4
        encoder.close()

    asyncio.run(main())


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_bytes_do_not_depend_on_the_load(media_type: str) -> None:
    """With two rows a step, the images of a request are at different steps, and some of them wait."""
    bodies = [{**WORK, "count": 5, "num_steps": 9, "seed": seed} for seed in range(4)]

    async def contents(max_batch: str, *, at_once: bool) -> list[bytes]:
        async with client_of(FakeRunner(), max_batch=max_batch) as client:
            calls = [client.post("/generate", json=body, headers={"Accept": media_type}) for body in bodies]
            responses = await asyncio.gather(*calls) if at_once else [await call for call in calls]
        return [response.content for response in responses]

    async def main() -> None:
        alone = await contents("64", at_once=False)
        assert len(set(alone)) == 4
        assert await contents("2", at_once=True) == alone

    asyncio.run(main())


@pytest.mark.parametrize("media_type", ANIMATIONS)
@pytest.mark.parametrize("path", ["/recognize", "/reproduce"])
def test_routes_with_one_result_have_no_animation(path: str, media_type: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = next(iter(EXAMPLES[path].values()))
        response = await client.post(path, json=body, headers={"Accept": media_type})
        assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")

    run(check, FakeRunner())


def test_error_for_other_formats_names_the_animations() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/generate", json=WORK, headers={"Accept": "image/jpeg"})
        assert response.status_code == 406
        assert all(media_type in response.json()["detail"] for media_type in ANIMATIONS)

    run(check, FakeRunner())
