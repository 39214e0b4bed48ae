"""Tests of POST /score within the process: with the shipped CLIP model, and with a fake model that blocks or fails."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from app import errors
from app.api.native.score import LATE
from app.api.service import CLIP_OFF
from app.engine import clip_worker
from app.main import create_app
from app.runner.clip import ClipModel
from app.settings import Settings
from app.tasks import score as score_task
from model.clip import EMBEDDED, INSTALL
from model.prompts import digit_prompt
from scripts.common.mnist import load_mnist
from scripts.train_clip import save_real_digits
from tests.app.application import client_of, run
from tests.app.clip_fakes import FakeClip, LocalClip
from tests.app.fakes import WAIT_SECONDS, FakeRunner, Gate, wait_until
from tests.app.picture_samples import animation, png, zeros

PROMPTS = ["a handwritten digit seven", "a cat", "a cat"]
Check = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture(scope="module")
def embedded() -> LocalClip:
    return LocalClip()


def digit(seed: int = 0) -> np.ndarray:
    """Returns a random image with a dark border, so that it is not inverted."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[4:24, 4:24] = np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)
    return pixels


def encoded(pixels: np.ndarray, scale: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def text_of(*files: bytes) -> list[str]:
    return [base64.b64encode(file).decode() for file in files]


PNG = encoded(digit())
BODY: dict[str, Any] = {"images": text_of(PNG), "prompts": ["a"]}


def similarities_of_open_clip(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """Computes the similarities (N, P) as in the README of open_clip: transform, encode, normalise, multiply."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{EMBEDDED}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{EMBEDDED}")
    with torch.inference_mode():
        x = torch.stack([transform(image.convert("RGB")) for image in images])
        of_images = model.eval().encode_image(x, normalize=True)
        of_prompts = model.encode_text(tokenizer(prompts), normalize=True)
    found: np.ndarray = (of_images @ of_prompts.T).numpy()
    return found


def test_similarities_equal_those_of_open_clip_and_default_fit_keeps_every_pixel(embedded: LocalClip) -> None:
    images = [digit(seed) for seed in range(11)]
    files = [encoded(image, scale) for image, scale in zip(images, [1, 2, 16, *[1] * 8], strict=True)]

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/score", json={"images": text_of(*files), "prompts": PROMPTS})
        assert response.status_code == 200, response.text
        answer = response.json()
        expected = similarities_of_open_clip([Image.fromarray(image) for image in images], PROMPTS)
        np.testing.assert_allclose(answer["similarities"], expected, atol=2e-6)
        assert answer["prompts"] == PROMPTS
        assert answer["images"] == [{"fit": "resize", "inverted": False}] * len(files)
        assert answer["clip"] == {"name": "embedded", "sha256": embedded.info.sha256}
        assert answer["clip"] == (await client.get("/models")).json()["clip"]
        assert answer["timing"].keys() == {"queue_seconds", "embed_seconds", "total_seconds"}
        assert response.headers["server-timing"].startswith("queue;dur=")

    run(check, FakeRunner(clip=embedded))


def test_pictures_that_no_prompt_describes_and_unknown_words_get_a_warning(embedded: LocalClip) -> None:
    pixels = np.array(Image.open(EMBEDDED / "digits.png"))
    seven, noise = pixels[28 * 7 : 28 * 8, :28], np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)

    async def check(client: httpx.AsyncClient) -> None:
        body = {"images": text_of(encoded(seven), encoded(noise)), "prompts": [*map(digit_prompt, range(10))]}
        warning = (await client.post("/score", json=body)).json()["warning"]
        assert warning.startswith("None of the prompts describes these images (by position, from 0): 1. Their highest")
        body = {"images": text_of(encoded(seven)), "prompts": ["a thick seven", "a cat riding a bicycle"]}
        warning = (await client.post("/score", json=body)).json()["warning"]
        assert warning == "The CLIP model has not learned these words: cat, riding, bicycle"
        body = {"images": text_of(encoded(seven)), "prompts": ["a thick seven", "a handwritten digit three"]}
        assert (await client.post("/score", json=body)).json()["warning"] is None

    run(check, FakeRunner(clip=embedded))


def test_real_digits_have_the_mean_similarities_that_open_clip_computes(embedded: LocalClip) -> None:
    with Image.open(EMBEDDED / "digits.png") as sheet:
        corners = [(28 * place, 28 * row) for row in range(10) for place in range(10)]
        digits = [sheet.crop((x, y, x + 28, y + 28)) for x, y in corners]
    prompts = [*map(digit_prompt, range(10)), "a cat"]
    expected = similarities_of_open_clip(digits, prompts).reshape(10, 10, -1).mean(axis=1).T

    async def check(client: httpx.AsyncClient) -> None:
        found = (await client.post("/score", json={**BODY, "prompts": prompts})).json()["real_digits"]
        assert found["count"] == 100
        np.testing.assert_allclose(found["similarities"], expected, atol=2e-6)
        assert np.array(found["similarities"])[:10].argmax(axis=1).tolist() == [*range(10)]

    run(check, FakeRunner(clip=embedded))


def test_shipped_real_digits_are_the_first_ten_of_each_class_of_the_test_split(mnist_dir: Any, tmp_path: Any) -> None:
    save_real_digits(tmp_path, mnist_dir)
    assert (tmp_path / "digits.png").read_bytes() == (EMBEDDED / "digits.png").read_bytes()
    images, labels = load_mnist("test", mnist_dir)
    first = next(i for i, label in enumerate(labels) if label == 7)
    with Image.open(EMBEDDED / "digits.png") as sheet:
        assert np.array_equal(np.asarray(sheet)[7 * 28 : 8 * 28, :28], images[first, 0].numpy())


def test_multipart_body_has_the_same_answer_as_json(embedded: LocalClip) -> None:
    files = [encoded(digit(seed)) for seed in range(64)]
    prompts = [f"a handwritten digit {i}" for i in range(16)]

    async def check(client: httpx.AsyncClient) -> None:
        fields = {"fit": "resize", "invert": True, "timeout_seconds": 200}
        in_json = await client.post("/score", json={"images": text_of(*files), "prompts": prompts, **fields})
        parts: list[tuple[str, Any]] = [("images", ("x.png", file, "image/png")) for file in files]
        parts += [("prompts", (None, prompt.encode())) for prompt in prompts]
        parts += [(name, (None, json.dumps(value).strip('"').encode())) for name, value in fields.items()]
        in_form = await client.post("/score", files=parts)
        assert (in_json.status_code, in_form.status_code) == (200, 200), in_form.text
        answers = [response.json() for response in (in_json, in_form)]
        for answer in answers:
            del answer["timing"]
        assert answers[0] == answers[1]
        assert answers[0]["images"] == [{"fit": "resize", "inverted": True}] * 64

    run(check, FakeRunner(clip=embedded), request_timeout=300)


def test_fit_and_invert_change_the_image_as_in_the_other_routes(embedded: LocalClip) -> None:
    drawing = np.full((100, 80), 255, np.uint8)
    drawing[20:80, 30:40] = 0  # dark stroke on white paper

    async def check(client: httpx.AsyncClient) -> None:
        for fields in ({}, {"fit": "resize"}, {"fit": "digit", "invert": False}):
            own = (await client.post("/score", json={**BODY, "images": text_of(encoded(drawing)), **fields})).json()
            recognised = (
                await client.post("/recognize", json={"image": text_of(encoded(drawing))[0], **fields})
            ).json()
            assert own["images"] == [{"fit": recognised["fit"], "inverted": recognised["invert"]}]

    run(check, FakeRunner(clip=embedded))


# Invalid requests

TRUNCATED = PNG[:-30]
APNG = animation("PNG", 2)
BOMB = png(30_000, 30_000, zeros(1000))
LARGE = png(4096, 4096, zeros(4096 * 4097))
INVALID: dict[str, tuple[dict[str, Any], str, list[Any]]] = {  # name -> changes, code, location
    "images that are not a list": ({"images": text_of(PNG)[0]}, "invalid_request", ["images"]),
    "no image": ({"images": []}, "invalid_request", ["images"]),
    "65 images": ({"images": text_of(*[PNG] * 65)}, "invalid_request", ["images"]),
    "null instead of images": ({"images": None}, "invalid_request", ["images"]),
    "an image that is a number": ({"images": [*text_of(PNG), 1]}, "invalid_request", ["images", 1]),
    "an image that is null": ({"images": [*text_of(PNG), None]}, "invalid_request", ["images", 1]),
    "prompts that are a text": ({"prompts": "a"}, "invalid_request", ["prompts"]),
    "no prompt": ({"prompts": []}, "invalid_request", ["prompts"]),
    "17 prompts": ({"prompts": ["a"] * 17}, "invalid_request", ["prompts"]),
    "a prompt of 201 characters": ({"prompts": ["a", "b" * 201]}, "invalid_request", ["prompts", 1]),
    "an empty prompt": ({"prompts": ["a", "a", ""]}, "invalid_request", ["prompts", 2]),
    "a blank prompt": ({"prompts": [" \t\n\u3000"]}, "invalid_request", ["prompts", 0]),
    "a prompt that is a number": ({"prompts": ["a", 7]}, "invalid_request", ["prompts", 1]),
    "a prompt that is null": ({"prompts": [None]}, "invalid_request", ["prompts", 0]),
    "a lone surrogate": ({"prompts": ["a", "\ud800"]}, "invalid_request", ["prompts", 1]),
    "an unknown field": ({"seed": 1}, "invalid_request", ["seed"]),
    "a model": ({"model": "default"}, "invalid_request", ["model"]),
    "an unknown fit": ({"fit": "stretch"}, "invalid_request", ["fit"]),
    "a timeout above the limit": ({"timeout_seconds": 601}, "invalid_request", ["timeout_seconds"]),
    "a truncated picture": ({"images": text_of(PNG, PNG, PNG, TRUNCATED)}, "invalid_image", ["images", 3]),
    "an animation": ({"images": text_of(PNG, animation("GIF", 2))}, "invalid_image", ["images", 1]),
    "an animated PNG": ({"images": text_of(APNG)}, "invalid_image", ["images", 0]),
    "a bomb": ({"images": text_of(PNG, BOMB)}, "invalid_image", ["images", 1]),
    "text": ({"images": [*text_of(PNG), "no picture"]}, "invalid_image", ["images", 1]),
    "no file": ({"images": [*text_of(PNG), ""]}, "invalid_image", ["images", 1]),
    "too many pixels together": ({"images": text_of(PNG, LARGE)}, "invalid_image", ["images", 1]),
}


def test_invalid_request_is_refused_with_the_location_of_the_wrong_element() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for name, (changes, code, location) in INVALID.items():
            response = await client.post("/score", content=json.dumps({**BODY, **changes}), headers=IN_JSON)
            problem = response.json()
            assert (response.status_code, problem["code"]) == (422, code), (name, response.text)
            assert problem["errors"][0]["loc"] == ["body", *location], name
        for missing in BODY:
            response = await client.post("/score", json={name: BODY[name] for name in BODY if name != missing})
            assert response.json()["errors"][0]["loc"] == ["body", missing]

    clip = FakeClip()
    run(check, FakeRunner(clip=clip))
    assert clip.prompts == []


IN_JSON = {"content-type": "application/json"}


def test_invalid_multipart_body_is_refused_with_the_location_of_the_wrong_element() -> None:
    image = ("images", ("x.png", PNG, "image/png"))
    cases: list[tuple[list[Any], list[Any]]] = [
        ([image], ["prompts"]),
        ([("prompts", (None, b"a"))], ["images"]),
        ([image, ("prompts", (None, b"a")), ("prompts", (None, b"\xff"))], ["prompts", 1]),
        ([image, ("prompts", (None, b"  "))], ["prompts", 0]),
        ([image, image, ("images", ("x", b"", "image/png")), ("prompts", (None, b"a"))], ["images", 2]),
        ([image] * 65 + [("prompts", (None, b"a"))], ["images"]),
        ([image] * 150, []),
    ]

    async def check(client: httpx.AsyncClient) -> None:
        for parts, location in cases:
            response = await client.post("/score", files=parts)
            assert response.status_code == 422, response.text
            assert response.json()["errors"][0]["loc"] == ["body", *location]

    run(check, FakeRunner(clip=FakeClip()))


def test_pictures_within_the_limit_of_total_pixels_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_task, "MAX_PIXELS", 2 * 28 * 28)

    async def check(client: httpx.AsyncClient) -> None:
        statuses = [
            (await client.post("/score", json={**BODY, "images": text_of(*[PNG] * count)})).status_code
            for count in (2, 3, 2)
        ]
        assert statuses == [200, 422, 200]

    run(check, FakeRunner(clip=FakeClip()))


def test_other_content_types_and_formats_are_refused() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/score", content=b"{}")).status_code == 415
        assert (await client.post("/score", content=b"{", headers=IN_JSON)).status_code == 400
        assert (await client.post("/score", json=BODY, headers={"accept": "image/png"})).status_code == 406
        assert (await client.get("/score")).status_code == 405

    run(check, FakeRunner(clip=FakeClip()))


def test_body_over_the_limit_is_refused() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post("/score", json={**BODY, "images": text_of(*[PNG] * 20)})
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")

    run(check, FakeRunner(clip=FakeClip()), max_image_bytes=5000)


# States of the service


def test_service_without_clip_answers_501_with_what_to_do() -> None:
    async def refused(client: httpx.AsyncClient) -> str:
        response = await client.post("/score", json=BODY)
        assert (response.status_code, response.json()["code"]) == (501, "not_available")
        return str(response.json()["detail"])

    async def check(client: httpx.AsyncClient) -> None:
        assert INSTALL in await refused(client)

    async def check_off(client: httpx.AsyncClient) -> None:
        assert await refused(client) == CLIP_OFF

    run(check, FakeRunner())
    run(check_off, FakeRunner(), clip="off")


def test_runner_without_open_clip_makes_a_service_without_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.clip.is_installed", lambda: False)

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/score", json=BODY)).status_code == 501
        assert (await client.get("/readyz")).status_code == 200

    run(check, FakeRunner(clip=ClipModel.load("auto", torch.device("cpu"))))


def test_request_before_the_model_is_loaded_is_503_starting() -> None:
    async def main() -> None:
        gate = Gate()

        def load() -> FakeRunner:
            gate([])
            return FakeRunner(clip=FakeClip())

        app = create_app(Settings(), load)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            response = await client.post("/score", json=BODY)
            gate.released.set()
            assert (response.status_code, response.json()["code"]) == (503, "starting")

    asyncio.run(main())


class Busy:
    """An `on_call` function of a fake model that blocks calls with images while `is_on` is true."""

    def __init__(self) -> None:
        self.is_on, self.entered, self.released = False, threading.Event(), threading.Event()

    def __call__(self, batch: Any) -> None:
        if self.is_on and not isinstance(batch[0], str):
            self.entered.set()
            assert self.released.wait(WAIT_SECONDS)


def check_busy(check: Callable[[httpx.AsyncClient, Busy, Any], Awaitable[None]], **settings: Any) -> None:
    """Runs a check whose requests for scores block after the first one until the check sets `released`."""

    async def main() -> None:
        busy = Busy()
        async with client_of(FakeRunner(clip=FakeClip(on_call=busy)), **settings) as client:
            assert (await client.post("/score", json=BODY)).status_code == 200
            busy.is_on = True
            service = client._transport.app.state.service  # type: ignore[attr-defined]
            try:
                await check(client, busy, service)
            finally:
                busy.released.set()

    asyncio.run(main())


def test_request_past_its_deadline_is_504_and_leaves_the_queue() -> None:
    async def check(client: httpx.AsyncClient, busy: Busy, service: Any) -> None:
        response = await client.post("/score", json={**BODY, "timeout_seconds": 0.2})
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert response.json()["detail"] == LATE
        assert service.clip._images == {}
        text = (await client.get("/metrics")).text
        assert 'unfog_requests_total{code="504",route="/score"} 1.0' in text
        assert 'unfog_rejected_total{reason="deadline"} 1.0' in text

    check_busy(check)


def test_request_of_a_client_that_left_is_dropped() -> None:
    async def check(client: httpx.AsyncClient, busy: Busy, service: Any) -> None:
        messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.to_thread(busy.entered.wait, WAIT_SECONDS)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass  # the server ignores what is sent to a client that has left

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/score", "raw_path": b"/score", "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("test", 80)}
        await client._transport.app(scope, receive, send)  # type: ignore[attr-defined]
        assert busy.entered.is_set()
        assert service.clip._images == {}
        assert 'unfog_requests_total{code="499",route="/score"} 1.0' in (await client.get("/metrics")).text

    check_busy(check)


def test_drain_waits_for_an_admitted_request_and_refuses_others() -> None:
    async def check(client: httpx.AsyncClient, busy: Busy, service: Any) -> None:
        admitted = asyncio.ensure_future(client.post("/score", json=BODY))
        await asyncio.to_thread(busy.entered.wait, WAIT_SECONDS)
        service.engine.drain()
        refused = await client.post("/score", json=BODY)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        drained = asyncio.ensure_future(service.in_flight.none())
        await asyncio.sleep(0)
        assert not drained.done()
        busy.released.set()
        assert (await admitted).status_code == 200
        await drained

    check_busy(check)


def test_end_of_the_drain_answers_the_remaining_requests_with_503() -> None:
    async def check(client: httpx.AsyncClient, busy: Busy, service: Any) -> None:
        requests = [asyncio.ensure_future(client.post("/score", json=BODY)) for _ in range(2)]
        await asyncio.to_thread(busy.entered.wait, WAIT_SECONDS)
        await asyncio.to_thread(wait_until, lambda: len(service.clip._images) == 2)
        service.give_up(errors.Draining(1))
        for response in await asyncio.gather(*requests):
            assert (response.status_code, response.json()["code"]) == (503, "draining")

    check_busy(check)


def test_more_images_than_may_wait_are_429_with_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_worker, "MAX_WAITING_IMAGES", 3)

    async def check(client: httpx.AsyncClient, busy: Busy, service: Any) -> None:
        admitted = asyncio.ensure_future(client.post("/score", json=BODY))
        await asyncio.to_thread(busy.entered.wait, WAIT_SECONDS)
        response = await client.post("/score", json={**BODY, "images": text_of(*[PNG] * 3)})
        assert (response.status_code, response.json()["code"]) == (429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        damaged = await client.post("/score", json={**BODY, "images": text_of(b"no picture", PNG, PNG)})
        assert damaged.status_code == 429  # the pictures of a refused request are not decoded
        busy.released.set()
        assert (await admitted).status_code == 200

    check_busy(check)


def test_failure_of_the_model_is_500_for_one_request_and_details_are_not_sent() -> None:
    def fail(batch: Any) -> None:
        if "bad" in batch:
            raise KeyError("secret")

    async def check(client: httpx.AsyncClient) -> None:
        bad, good = await asyncio.gather(
            client.post("/score", json={**BODY, "prompts": ["bad"]}), client.post("/score", json=BODY)
        )
        assert (bad.status_code, bad.json()["code"], good.status_code) == (500, "internal_error", 200)
        assert "secret" not in bad.text

    run(check, FakeRunner(clip=FakeClip(on_call=lambda batch: fail(batch) if isinstance(batch[0], str) else None)))


def test_service_is_ready_before_the_clip_thread_has_finished_its_first_work() -> None:
    started, released = threading.Event(), threading.Event()

    def block(batch: Any) -> None:
        started.set()
        assert released.wait(WAIT_SECONDS)

    async def check(client: httpx.AsyncClient) -> None:
        await asyncio.to_thread(started.wait, WAIT_SECONDS)
        assert (await client.get("/readyz")).status_code == 200
        released.set()
        assert (await client.post("/score", json=BODY)).status_code == 200

    run(check, FakeRunner(clip=FakeClip(on_call=block)))


def test_application_closes_the_clip_thread() -> None:
    before, own = set(threading.enumerate()), set[threading.Thread]()

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/score", json=BODY)).status_code == 200
        own.update(thread for thread in threading.enumerate() if thread.name == "clip" and thread not in before)

    run(check, FakeRunner(clip=FakeClip()))
    assert len(own) == 1
    assert not own & set(threading.enumerate())
