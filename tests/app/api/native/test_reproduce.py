"""Tests of POST /reproduce with a fake runner, whose images have 1 x 4 pixels."""

import asyncio
import base64
import io
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.main import create_app
from app.settings import Settings
from model.png import SOFTWARE
from tests.app.application import run
from tests.app.fakes import INFO, WAIT_SECONDS, FakeRunner, Gate, wait_until

TINY = replace(INFO, image_shape=(1, 1, 4))
FAST = replace(TINY, name="fast", sha256="f" * 64, steps=(4,), samplers=("ddim",), guidable=False)
BODY = {"digit": 3, "num_steps": 3, "seed": 1}
PNG = {"accept": "image/png"}
KEY = "a-key-for-this-test"


def runner(**fields: Any) -> FakeRunner:
    return FakeRunner(models={"default": TINY, "fast": FAST}, **fields)


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Starts the application, and does not wait until it is ready."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client


def check_with(check: Callable[[httpx.AsyncClient], Awaitable[None]], **settings: Any) -> None:
    run(check, runner(), **settings)


async def generate(client: httpx.AsyncClient, **body: Any) -> bytes:
    response = await client.post("/generate", json={**BODY, **body}, headers=PNG)
    assert response.status_code == 200, response.text
    return response.content


async def reproduce(
    client: httpx.AsyncClient, png: bytes, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    body = {"image": base64.b64encode(png).decode(), **fields}
    return await client.post("/reproduce", json=body, headers=headers)


def altered(png: bytes, pixel: tuple[int, int] | None = None, **chunks: str) -> bytes:
    """Returns the picture with another value of one pixel and with other text chunks."""
    with Image.open(io.BytesIO(png)) as image:
        pixels, text = np.array(image), {**image.text, **chunks}  # type: ignore[attr-defined]
    if pixel:
        pixels[pixel] ^= 0x80
    info, buffer = PngInfo(), io.BytesIO()
    for name, value in text.items():
        info.add_text(name, value)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"scale": 16, "seed": 77, "sampler": "dpmpp", "guidance_scale": 1.7},
        {"count": 9},
        {"count": 64, "scale": 2},
        {"model": "fast", "num_steps": 4, "count": 2},
    ],
    ids=str,
)
def test_picture_generated_again_has_the_same_bytes(body: dict[str, Any]) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = await generate(client, **body)
        again = await reproduce(client, png, PNG)
        assert (again.status_code, again.headers["content-type"]) == (200, "image/png")
        assert again.headers["x-identical"] == "true"
        assert again.content == png

    check_with(check)


def test_each_image_of_an_archive_is_generated_again_with_its_index() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/generate", json={**BODY, "count": 5}, headers={"accept": "application/zip"})
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            pngs = [archive.read(name) for name in archive.namelist()]
        for index, png in enumerate(pngs):
            assert (await reproduce(client, png, PNG)).content == png
            answer = (await reproduce(client, png)).json()
            assert (answer["identical"], answer["count"], answer["seed"]) == (True, 1, BODY["seed"])
            assert answer["images"] == [{"index": index, "png": base64.b64encode(png).decode()}]

    check_with(check)


def test_json_has_the_fields_of_generate_and_the_comparison() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**BODY, "count": 3, "guidance_scale": 2, "sampler": "ddim", "scale": 4}
        generated = (await client.post("/generate", json=body)).json()
        response = await reproduce(client, await generate(client, **body))
        again = response.json()
        assert response.headers["x-identical"] == "true"
        assert response.headers["x-seed"] == str(BODY["seed"])
        assert "denoise" in response.headers["server-timing"]
        for answer in (generated, again):
            del answer["timing"]
        comparison = {"identical": True, "reason": None, "different_pixels": 0, "largest_difference": 0}
        assert again == {**generated, **comparison}

    check_with(check)


def test_picture_can_be_a_file_in_multipart() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = await generate(client)
        response = await client.post("/reproduce", files={"image": png}, data={"timeout_seconds": "5"})
        assert response.json()["identical"] is True

    check_with(check)


@pytest.mark.parametrize("accept", ["application/json", "image/png"])
@pytest.mark.parametrize("count", [1, 9])
def test_altered_pixel_is_found(count: int, accept: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = await generate(client, count=count, scale=4)
        response = await reproduce(client, altered(png, pixel=(2, 5)), {"accept": accept})
        assert response.headers["x-identical"] == "false"
        if accept == "image/png":
            assert response.content == png
        else:
            facts = {"identical": False, "reason": "other_pixels", "different_pixels": 1, "largest_difference": 128}
            assert facts.items() <= response.json().items()

    check_with(check)


@pytest.mark.parametrize(("name", "value"), [("Seed", "2"), ("Index", "7"), ("Steps", "4")])
def test_altered_chunk_gives_other_pixels(name: str, value: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = altered(await generate(client), **{name: value})
        answer = (await reproduce(client, png)).json()
        assert (answer["identical"], answer["reason"]) == (False, "other_pixels")
        assert answer["different_pixels"] >= 1

    check_with(check)


def test_other_release_is_the_reason_only_if_the_pixels_differ() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = altered(await generate(client), Software=f"{SOFTWARE}.1")
        same = await reproduce(client, png, PNG)
        assert same.headers["x-identical"] == "true"
        assert same.content == await generate(client)  # The newly generated picture names this release.
        assert (await reproduce(client, png)).json()["reason"] is None
        other = (await reproduce(client, altered(png, pixel=(0, 0)))).json()
        assert (other["identical"], other["reason"]) == (False, "other_release")

    check_with(check)


@pytest.mark.parametrize("accept", ["application/zip", "text/event-stream", "image/jpeg"])
def test_other_formats_are_refused(accept: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await reproduce(client, await generate(client), {"accept": accept})
        assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")

    check_with(check)


def test_picture_that_cannot_be_generated_again_is_an_invalid_image() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = await generate(client)
        refused = [
            (b"text", "not a PNG"),
            (altered(png, Seed="-1"), "Seed must be an integer"),
            (altered(png, Task="edit"), "was made from another picture"),
            (altered(png, **{"Model-SHA256": "e" * 64}), f"{TINY.sha256}"),
            (altered(png, Index="0-8"), "pixels"),
            (altered(png, Index="0-64"), "At most 64 are permitted"),
        ]
        for file, message in refused:
            response = await reproduce(client, file)
            problem = response.json()
            assert (response.status_code, problem["code"]) == (422, "invalid_image")
            assert problem["errors"][0]["loc"] == ["body", "image"]
            assert message in problem["detail"]
            assert "x-identical" not in response.headers

    check_with(check)


def test_count_is_limited_by_the_settings() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        sheet = await generate(client, count=4)
        assert (await reproduce(client, sheet)).status_code == 200
        response = await reproduce(client, altered(sheet, Index="0-4"))
        assert "has 5 images. At most 4 are permitted" in response.json()["detail"]

    check_with(check, max_count=4)


@pytest.mark.parametrize(
    ("fields", "location"),
    [
        ({"model": "default"}, "model"),
        ({"seed": 1}, "seed"),
        ({"timeout_seconds": 601}, "timeout_seconds"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"image": 7}, "image"),
    ],
)
def test_invalid_field_is_an_invalid_request(fields: dict[str, Any], location: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await reproduce(client, await generate(client), **fields)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
        assert response.json()["errors"][0]["loc"] == ["body", location]

    check_with(check)


def test_deadline_applies_and_is_counted() -> None:
    async def main() -> None:
        gate = Gate()
        app = create_app(Settings(), lambda: runner(on_step=lambda rows: gate(rows) if rows[0].noise_key[1] else None))
        async with client_of(app) as client:
            await asyncio.wrap_future(app.state.service.engine.ready)
            png = altered(await generate(client), Index="7")
            try:
                response = await reproduce(client, png, timeout_seconds=0.05)
            finally:
                gate.released.set()
            assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
            text = (await client.get("/metrics")).text
            assert 'unfog_requests_total{code="504",route="/reproduce"} 1.0' in text
            assert 'unfog_rejected_total{reason="deadline"} 1.0' in text

    asyncio.run(main())


def test_full_queue_is_429() -> None:
    async def main() -> None:
        gate = Gate()
        app = create_app(Settings(queue_capacity=1), lambda: runner(on_step=gate))
        engine = app.state.service.engine
        async with client_of(app) as client:
            await asyncio.wrap_future(engine.ready)
            gate.released.set()
            png = await generate(client)
            gate.entered.clear()
            gate.released.clear()
            first = asyncio.ensure_future(reproduce(client, png))
            await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
            second = asyncio.ensure_future(reproduce(client, png))
            try:
                await asyncio.to_thread(wait_until, lambda: engine.count_images().waiting == 1)
                response = await reproduce(client, png)
            finally:
                gate.released.set()
            assert (response.status_code, response.json()["code"]) == (429, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
            assert [(await each).status_code for each in (first, second)] == [200, 200]

    asyncio.run(main())


def test_key_is_required_and_the_rate_is_limited() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        client.headers["x-api-key"] = KEY
        png = await generate(client)
        assert [(await reproduce(client, png)).status_code for _ in range(3)] == [200, 200, 429]
        assert (await reproduce(client, png, {"x-api-key": "wrong-key-of-some-length"})).status_code == 403
        del client.headers["x-api-key"]
        assert (await reproduce(client, png)).status_code == 401

    check_with(check, api_keys=KEY, rate_limit="3/hour")


def test_images_and_requests_are_counted() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        png = await generate(client, count=4)
        await reproduce(client, png)
        await reproduce(client, b"broken")
        text = (await client.get("/metrics")).text
        assert 'unfog_images_total{digit="3",label="3"} 8.0' in text
        for code in (200, 422):
            assert f'unfog_requests_total{{code="{code}",route="/reproduce"}} 1.0' in text

    check_with(check)


def test_page_of_another_origin_may_read_whether_the_picture_is_identical() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await reproduce(client, await generate(client), {"origin": "https://example.com"})
        assert "X-Identical" in response.headers["access-control-expose-headers"].split(", ")

    check_with(check, cors_origins="https://example.com")


def test_request_before_the_models_are_loaded_is_503() -> None:
    async def main() -> None:
        gate = Gate()

        def load() -> FakeRunner:
            gate([])
            return runner()

        picture = io.BytesIO()
        Image.new("L", (28, 28)).save(picture, "PNG")
        app = create_app(Settings(), load)
        async with client_of(app) as client:
            response = await reproduce(client, picture.getvalue())
            gate.released.set()
            assert (response.status_code, response.json()["code"]) == (503, "starting")

    asyncio.run(main())
