"""Animations are decoded with Pillow and compared with the frames, and with the other formats of the same request."""

import asyncio
import io
import json
import threading
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image

from app.api import task_examples
from app.api.animations import (
    FRAME_MS,
    LAST_MS,
    MAX_FRAME_PIXELS,
    MAX_PIXELS,
    FrameCollector,
    check_size,
    encode_animation,
    num_frames_of,
)
from app.api.responses import ANIMATIONS, GIF, PNG, WEBP
from app.engine.job import Frame, Pixels
from app.errors import InvalidRequest
from model.png import Provenance
from tests.app.api.test_events import STREAMED, open_all, progress_in
from tests.app.application import WORK, client_of, run
from tests.app.fakes import FakeRunner, image, same

TEXT = Provenance(
    digit=7, seed=2**53 - 1, sampler="ddim", num_steps=20, guidance_scale=1.5, model_sha256="ab" * 32
).text("0-3")
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
        assert np.abs(frame[::3, ::3].astype(int) - sheet).mean() < 8


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


@pytest.mark.parametrize("media_type", ANIMATIONS)
def test_encoded_bytes_do_not_depend_on_the_time(media_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = encode_animation(media_type, random_sheets(5, 28, 28), TEXT, 2)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert encode_animation(media_type, random_sheets(5, 28, 28), TEXT, 2) == before


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)], ids=["grey", "colour"])
def test_collector_keeps_a_copy_of_the_frames_and_nothing_else(shape: tuple[int, ...]) -> None:
    collector, read = FrameCollector(3, 5), np.stack(random_sheets(100, *shape))  # also images of other requests
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
        ((1, 2000, 2001), 1, 1, 1, ["body", "scale"]),
    ],
)
def test_size_up_to_the_limits_is_permitted(
    shape: tuple[int, int, int], count: int, scale: int, num_frames: int, location: list[str] | None
) -> None:
    if location is None:
        check_size(shape, count, scale, num_frames)
        return
    with pytest.raises(InvalidRequest) as refused:
        check_size(shape, count, scale, num_frames)
    (error,) = refused.value.errors
    assert error["loc"] == location
    assert "educe" in error["msg"]


def test_recommended_number_of_previews_is_the_largest_that_is_permitted() -> None:
    with pytest.raises(InvalidRequest, match=r"Reduce previews to 79\b"):
        check_size((1, 28, 28), 4, 8, 100)
    check_size((1, 28, 28), 4, 8, 79)
    with pytest.raises(InvalidRequest):
        check_size((1, 28, 28), 4, 8, 80)


# Responses


REQUESTS = [*STREAMED, ("/generate", {**WORK, "num_steps": 20})]
IDS = ["generate", "inpaint", "edit", "denoise", "generate in 20 steps"]
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
            "digit": provenance.digit,
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

    monkeypatch.setattr("app.api.generation.encode_animation", encode)

    async def check(client: httpx.AsyncClient) -> None:
        await animation_of(client, media_type, WORK)
        assert len(threads) == 1
        assert threads[0] is not threading.current_thread()
        assert "unfog_encode_duration_seconds_count 1.0" in (await client.get("/metrics")).text

    run(check, FakeRunner())


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
        body = next(iter(task_examples.REQUESTS[path].values()))[1]
        response = await client.post(path, json=body, headers={"Accept": media_type})
        assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")

    run(check, FakeRunner())


def test_error_for_other_formats_names_the_animations() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/generate", json=WORK, headers={"Accept": "image/jpeg"})
        assert response.status_code == 406
        assert all(media_type in response.json()["detail"] for media_type in ANIMATIONS)

    run(check, FakeRunner())
