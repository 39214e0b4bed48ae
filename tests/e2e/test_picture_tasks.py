"""The tasks with pictures of a running service."""

import base64
import io
import json
import random
import re
import signal
import socket
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.app.picture_samples import animation, png, zeros
from tests.e2e.conftest import Start, start_service
from tests.e2e.hostile_requests import BOMBS
from tests.e2e.picture_requests import (
    BOTH,
    DENOISE,
    EDIT,
    IMAGE,
    INPAINT,
    MASK,
    RECOGNIZE,
    TASKS,
    Ask,
    drawing,
    encode,
    mask,
    without_times,
)
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import GIF, JSON, PNG, WEBP, ZIP, Service, assert_problem, open_animation, open_png, pngs

IMAGE_TASKS = {name: ask for name, ask in TASKS.items() if name != "recognize"}
PATHS = {ask.path: ask for ask in reversed(TASKS.values())}
MAX_IMAGE_BYTES, CAPACITY = 20_000, 12
Result = dict[str, Any]
MARKED = np.pad(np.full((1, 1), 255, np.uint8), (0, 19))  # one white pixel of 20 x 20


@pytest.fixture(scope="module")
def alone(service: Service) -> dict[str, Result]:
    """Returns the result of each request while the service has no other request."""
    return {name: ask.result(service) for name, ask in TASKS.items()}


@pytest.fixture(scope="module")
def limited(checkpoint: Path, fast_checkpoint: Path) -> Iterator[Service]:
    """A service with the model `fast` and with low limits."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_FAST_CHECKPOINT=str(fast_checkpoint),
            UNFOG_MAX_IMAGE_BYTES=str(MAX_IMAGE_BYTES),
            UNFOG_QUEUE_CAPACITY=str(CAPACITY),
        )


# Results


def test_result_contains_the_options_of_the_request(alone: dict[str, Result]) -> None:
    for name, ask in TASKS.items():
        assert {field: alone[name][field] for field in ask.fields} == ask.fields, name
        assert (alone[name]["fit"], alone[name]["invert"]) == ("resize", False), name
    assert [len(alone[name]["images"]) for name in ("denoise", "mean", "inpaint", "edit")] == [2, 1, 2, 2]
    assert alone["mean"]["digit"] is None
    for name in ("denoise", "inpaint an unknown digit", "edit an unknown digit"):
        assert alone[name]["digit"] in range(10)


def test_recognition_returns_probabilities_of_all_digits(alone: dict[str, Result]) -> None:
    result = alone["recognize"]
    assert len(result["probabilities"]) == 10
    assert sum(result["probabilities"]) == pytest.approx(1)
    assert result["digit"] == int(np.argmax(result["probabilities"]))
    assert 0 < result["evaluations"] <= 4 * 10


def test_denoise_returns_probabilities_only_after_a_search(alone: dict[str, Result]) -> None:
    result = alone["denoise"]
    assert len(result["probabilities"]) == 10
    assert sum(result["probabilities"]) == pytest.approx(1, abs=10 * 5e-5)  # each is rounded to 4 decimals
    assert result["probabilities"][result["digit"]] == max(result["probabilities"])
    for name in ("denoise a digit", "mean"):
        assert alone[name]["probabilities"] is None, name


def test_recognition_and_edit_of_an_unknown_digit_agree(service: Service, alone: dict[str, Result]) -> None:
    """/edit recognises the sketch in the same way, with the default number of pairs."""
    recognised = Ask("/recognize").result(service)
    assert alone["edit an unknown digit"]["digit"] == recognised["digit"]


@pytest.mark.parametrize("name", TASKS)
def test_json_and_multipart_give_the_same_response(service: Service, alone: dict[str, Result], name: str) -> None:
    response = TASKS[name].send_form(service)
    assert response.status_code == 200, response.text
    assert without_times(response) == alone[name]


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_every_format_contains_the_same_images(service: Service, alone: dict[str, Result], name: str) -> None:
    ask, images = IMAGE_TASKS[name], [base64.b64decode(image["png"]) for image in alone[name]["images"]]
    with zipfile.ZipFile(io.BytesIO(ask.send(service, ZIP).content)) as archive:
        assert [archive.read(file) for file in archive.namelist()] == images
    assert ask.having(count=1).send(service, PNG).content == images[0]
    for accept in (WEBP, GIF):
        animation = open_animation(ask.having(count=1).send(service, accept).content)
        assert np.array_equal(animation[-1], open_png(images[0])[0])
    with ask.events(service, "?previews=3") as stream:
        events = list(stream)
    names = " ".join(name for name, _ in events)
    assert re.fullmatch(rf"accepted (progress )*(image ){{{len(images)}}}done", names), names
    sent = {data["index"]: base64.b64decode(data["png"]) for name, data in events if name == "image"}
    assert [sent[index] for index in range(len(images))] == images
    for image in images:
        chunks = open_png(image)[1]
        assert chunks["Task"] == ask.path[1:]
        assert chunks["Digit"] == ("none" if alone[name]["digit"] is None else str(alone[name]["digit"]))
        assert re.fullmatch("[0-9a-f]{64}", chunks["Input-SHA256"])
        assert ("Mask-SHA256" in chunks) == (ask.path == "/inpaint")


def test_recognition_answers_with_json_or_a_chart(service: Service) -> None:
    response = RECOGNIZE.send(service, PNG)
    assert (response.status_code, response.headers["content-type"]) == (200, PNG)
    with Image.open(io.BytesIO(response.content)) as chart:
        chart.load()
    result = RECOGNIZE.result(service)
    expected = {"Task": "recognize", "Digit": str(result["digit"]), "Num-Pairs": "4", "Fit": "resize"}
    assert chart.text.items() >= expected.items()  # type: ignore[attr-defined] # of PNG images
    assert response.content == RECOGNIZE.send(service, PNG).content
    for accept in (ZIP, "text/event-stream", WEBP, GIF):
        assert_problem(RECOGNIZE.send(service, accept), 406, "not_acceptable")


@pytest.mark.parametrize("name", ["PNG", "GIF", "WEBP"])
def test_lossless_formats_give_the_same_result(service: Service, alone: dict[str, Result], name: str) -> None:
    options = {"lossless": True} if name == "WEBP" else {}
    file = encode(drawing(), name, **options)
    assert EDIT.having(image=file).result(service) == alone["edit"]
    url = f"data:image/{name.lower()};base64,{base64.b64encode(file).decode()}"
    response = service.client.post("/edit", json={**EDIT.document, "image": url})
    assert without_times(response) == alone["edit"]


def test_results_are_the_same_under_a_mixed_load_of_all_tasks(service: Service, alone: dict[str, Result]) -> None:
    choose = random.Random(3)
    others = [
        choose.choice(list(TASKS.values())).with_drawing(seed)
        if seed % 3
        else Ask("/generate", {"digit": seed % 10, "count": 4, "num_steps": choose.randint(5, 30)}, {})
        for seed in range(1, 41)
    ]
    asks = [*others[::2], *TASKS.values(), *others[1::2]]
    service.wait_until_idle()
    before = service.metrics()
    with ThreadPoolExecutor(len(asks)) as pool:
        results = list(pool.map(lambda ask: ask.result(service), asks))
    assert service.mean_rows_since(before) > 3
    own = results[len(others[::2]) :][: len(TASKS)]
    assert dict(zip(TASKS, own, strict=True)) == alone


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("known_digit", [True, False])
def test_pixels_outside_of_the_mask_are_kept(service: Service, sampler: str, known_digit: bool) -> None:
    ask = INPAINT if known_digit else TASKS["inpaint an unknown digit"]
    response = ask.having(sampler=sampler, count=3).send(service)
    images = [open_png(image)[0] for image in pngs(response)]
    redrawn = mask() > 0
    for image in images:
        assert (image[~redrawn] == drawing()[~redrawn]).all()
        assert (image[redrawn] != drawing()[redrawn]).mean() > 0.5
    assert len({image.tobytes() for image in images}) == 3


def test_pixels_under_the_mask_do_not_change_the_result(service: Service, alone: dict[str, Result]) -> None:
    """Otherwise the result would contain traces of the pixels that the client wants to replace."""
    changed = drawing()
    changed[mask() > 0] = 255 - changed[mask() > 0]
    images = pngs(INPAINT.having(image=encode(changed)).send(service))
    expected = [base64.b64decode(image["png"]) for image in alone["inpaint"]["images"]]
    for image, other in zip(images, expected, strict=True):
        assert (open_png(image)[0] == open_png(other)[0]).all()


@pytest.mark.parametrize("size", [(90, 90), (90, 70), (40, 120)])
@pytest.mark.parametrize("rows", [0.25, 0.6], ids=["part of the border", "most of the border"])
def test_pixels_under_the_mask_of_a_large_picture_do_not_change_the_result(
    service: Service, size: tuple[int, int], rows: float
) -> None:
    """The masked pixels could also change the background and the value `auto` of `invert`."""
    large = np.array(Image.fromarray(drawing()).resize(size))
    hole = np.zeros_like(large)
    hole[: round(rows * len(hole))] = 255
    changed = np.where(hole > 127, 255, large).astype(np.uint8)
    results = [INPAINT.having(image=encode(picture), mask=encode(hole)).send(service) for picture in (large, changed)]
    assert len({response.json()["invert"] for response in results}) == 1
    for image, other in zip(*map(pngs, results), strict=True):
        assert (open_png(image)[0] == open_png(other)[0]).all()


@pytest.mark.parametrize(
    "ask",
    [EDIT.having(strength=0), TASKS["edit an unknown digit"].having(strength=0), DENOISE.having(noise_std=0)],
    ids=["strength 0", "strength 0 of an unknown digit", "noise_std 0"],
)
def test_request_that_changes_nothing_returns_the_input(service: Service, ask: Ask) -> None:
    response = ask.having(count=2).send(service)
    assert response.status_code == 200, response.text
    for image in pngs(response):
        assert (open_png(image)[0] == drawing()).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_strength_1_gives_the_images_of_generate(service: Service, sampler: str) -> None:
    edited = EDIT.having(strength=1, sampler=sampler).send(service)
    fields = {name: value for name, value in EDIT.fields.items() if name != "strength"} | {"sampler": sampler}
    generated = Ask("/generate", fields, {}).send(service)
    for image, other in zip(pngs(edited), pngs(generated), strict=True):
        assert (open_png(image)[0] == open_png(other)[0]).all()


# Deadlines, disconnects and drain


@pytest.mark.parametrize("name", TASKS)
def test_missed_deadline_is_504(service: Service, name: str) -> None:
    service.wait_until_idle()
    ask = TASKS[name].having(timeout_seconds=1e-6)
    assert_problem(ask.send(service), 504, "deadline_exceeded")
    service.wait_until_idle()


@pytest.mark.parametrize("name", ["inpaint an unknown digit", "edit an unknown digit", "denoise"])
def test_client_that_disconnects_frees_its_rows(service: Service, name: str) -> None:
    service.wait_until_idle()
    before = service.metrics()
    body = json.dumps(TASKS[name].having(count=64, num_steps=100).document).encode()
    head = f"POST {TASKS[name].path} HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(service.address, timeout=TIMEOUT) as connection:
        connection.sendall(head.encode() + body)
        service.wait_until_running()
    service.wait_until_idle()
    after = service.metrics()
    cancelled = [
        sum(scrape.value("cancelled_total", stage=stage) for stage in ("waiting", "running"))
        for scrape in (before, after)
    ]
    assert 0 < cancelled[1] - cancelled[0] <= 64


def test_client_that_disconnects_while_its_picture_is_decoded_is_no_error(service: Service) -> None:
    large = png(4096, 4096, zeros(4096 * 4097))
    body = json.dumps(RECOGNIZE.having(image=large).document).encode()
    head = f"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
    for number in range(6):
        with socket.create_connection(service.address, timeout=TIMEOUT) as connection:
            connection.sendall(f"{head}X-Request-ID: leaves-{number}\r\n\r\n".encode() + body)

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in service.process.lines if "leaves-" in line]
        return [line for line in found if "outcome" in line]

    wait_until(lambda: len(lines()) == 6, "all requests are logged")
    assert {(line["status"], line["outcome"]) for line in lines()} == {(499, "client_gone")}
    assert not [line for line in service.process.lines if '"level": "error"' in line]
    assert RECOGNIZE.send(service).status_code == 200


def test_sigterm_completes_admitted_requests_and_refuses_new_ones(start: Start, alone: dict[str, Result]) -> None:
    draining = start(UNFOG_MAX_BATCH="1", UNFOG_DRAIN_TIMEOUT="1000", UNFOG_REQUEST_TIMEOUT="1000")
    long = TASKS["inpaint an unknown digit"].having(num_steps=100, count=1)
    with ThreadPoolExecutor() as pool, long.events(draining) as events:
        assert next(events)[0] == "accepted"
        admitted = pool.submit(TASKS["edit an unknown digit"].send, draining)

        def images() -> float:
            return sum(draining.metrics().value(name) for name in ("queue_depth_images", "running_images"))

        wait_until(lambda: images() >= 2, "both requests are admitted")
        draining.process.signal(signal.SIGTERM)
        wait_until(lambda: draining.client.get("/readyz").status_code == 503, "the service is not ready")
        for ask in PATHS.values():
            assert_problem(ask.send(draining), 503, "draining")
        response = admitted.result(TIMEOUT)
        assert without_times(response) == alone["edit an unknown digit"]
        assert [name for name, _ in events][-1] == "done"
    assert draining.process.wait() == 0
    assert "Traceback" not in "".join(draining.process.lines)


# Refusals


def half(pixels: np.ndarray) -> np.ndarray:
    return pixels[::2, ::2].copy()


TRUNCATED = encode(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))[:2000]
REFUSED: dict[str, tuple[Ask, str, str]] = {  # request, field, a part of the message
    "mask of another size": (INPAINT.having(mask=encode(half(mask()))), "mask", "28x28 pixels, but has 14x14"),
    "black mask": (INPAINT.having(mask=encode(np.zeros_like(mask()))), "mask", "no white pixels"),
    "white mask": (INPAINT.having(mask=encode(np.full_like(mask(), 255))), "mask", "white everywhere"),
    "oblong white mask": (
        INPAINT.having(image=encode(np.zeros((60, 40), np.uint8)), mask=encode(np.full((60, 40), 255, np.uint8))),
        "mask",
        "white everywhere",
    ),
    "mask with a fine pattern": (
        INPAINT.having(image=encode(np.zeros((560, 560), np.uint8)), mask=encode(np.tile(MARKED, (28, 28)))),
        "mask",
        "cover every pixel",
    ),
    "fit digit": (INPAINT.having(fit="digit"), "fit", "'auto' or 'resize'"),
    "mean with steps": (DENOISE.having(mode="mean"), "num_steps", "Input should be 1"),
    "digit 10": (EDIT.having(digit=10), "digit", "less than or equal to 9"),
    "digit -1": (INPAINT.having(digit=-1), "digit", "greater than or equal to 0"),
    "digit null": (Ask("/denoise", {"digit": None}), "digit", "valid integer"),
    "count 65": (EDIT.having(count=65), "count", "less than or equal to 64"),
    "strength 1.5": (EDIT.having(strength=1.5), "strength", "less than or equal to 1"),
    "strength NaN": (EDIT.having(strength=float("nan")), "strength", "finite"),
    "noise_std -1": (DENOISE.having(noise_std=-1), "noise_std", "greater than or equal to 0"),
    "num_pairs 0": (RECOGNIZE.having(num_pairs=0), "num_pairs", "greater than or equal to 1"),
    "num_pairs 101": (RECOGNIZE.having(num_pairs=101), "num_pairs", "less than or equal to 100"),
    "unknown model": (EDIT.having(model="slow"), "model", "'default'"),
    "timeout": (EDIT.having(timeout_seconds=301), "timeout_seconds", "less than or equal to 300"),
    "unknown field": (RECOGNIZE.having(digit=1), "digit", "Unknown field"),
}
BROKEN: dict[str, tuple[bytes, str]] = {  # picture, a part of the message
    "animated GIF": (animation("GIF", 2), "animated"),
    "animated PNG": (animation("PNG", 3), "animated"),
    "60,000 x 60,000 pixels": (png(60_000, 60_000, b""), "60000 x 60000 pixels"),
    "truncated PNG": (TRUNCATED, "Save it again"),
    "text": (b"hello", "not a PNG, JPEG, WebP or GIF picture"),
    "PDF": (b"%PDF-1.7", "not a PNG, JPEG, WebP or GIF picture"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG, WebP or GIF picture"),
    "nothing": (b"", "empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_request_with_wrong_fields_is_refused_with_a_message(service: Service, name: str) -> None:
    ask, field, message = REFUSED[name]
    content = json.dumps(ask.document).encode()
    response = service.client.post(ask.path, content=content, headers={"content-type": JSON})
    problem = assert_problem(response, 422, "invalid_request")
    assert problem["errors"][0]["loc"] == ["body", field]
    assert message in problem["errors"][0]["msg"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_picture_is_refused_by_every_route(service: Service, name: str) -> None:
    picture, message = BROKEN[name]
    for ask in PATHS.values():
        for field in ask.files:
            wrong = ask.having(**{field: picture})
            for response in (wrong.send(service), wrong.send_form(service)):
                problem = assert_problem(response, 422, "invalid_image")
                assert problem["errors"][0]["loc"] == ["body", field]
                assert message in problem["errors"][0]["msg"]
    assert RECOGNIZE.send(service).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_error_names_the_missing_picture(service: Service, path: str) -> None:
    for response in (
        service.client.post(path, json={}),
        service.client.post(path, data={"fit": "auto"}, files={"other": b""}),
        service.client.post(path, json={"image": 7, "mask": MASK.hex()}),
    ):
        problem = assert_problem(response, 422, "invalid_request")
        assert ["body", "image"] in [error["loc"] for error in problem["errors"]]


def test_model_fast_supports_only_generate(limited: Service) -> None:
    for ask in PATHS.values():
        problem = assert_problem(ask.having(model="fast").send(limited), 422, "invalid_request")
        assert problem["errors"] == [{"loc": ["body", "model"], "msg": "The model 'fast' supports only /generate"}]


def test_images_of_a_search_need_no_more_room_in_the_queue_than_others(limited: Service) -> None:
    limited.wait_until_idle()
    assert TASKS["inpaint an unknown digit"].having(count=CAPACITY).send(limited).status_code == 200
    assert_problem(INPAINT.having(count=CAPACITY + 1).send(limited), 422, "invalid_request")


@pytest.mark.parametrize("path", PATHS)
def test_body_above_the_limit_is_413(limited: Service, path: str) -> None:
    ask = PATHS[path].having(image=IMAGE + bytes(MAX_IMAGE_BYTES))
    for response in (ask.send(limited), ask.send_form(limited)):
        problem = assert_problem(response, 413, "body_too_large")
        assert str(MAX_IMAGE_BYTES) in problem["detail"]
    assert PATHS[path].send(limited).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("content_type", ["text/plain", "image/png", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_415(service: Service, path: str, content_type: str) -> None:
    response = service.client.post(path, content=IMAGE, headers={"content-type": content_type})
    problem = assert_problem(response, 415, "unsupported_media_type")
    assert "multipart/form-data" in problem["detail"]


@pytest.mark.parametrize("name", BOMBS)
def test_json_bomb_of_4_mib_is_refused(service: Service, name: str) -> None:
    bomb = BOMBS[name](4 * 2**20)
    response = service.client.post("/edit", content=bomb, headers={"content-type": JSON})
    assert response.status_code in (400, 422), response.text[:500]
    assert len(response.content) < 10_000
    assert_problem(response, response.status_code, response.json()["code"])


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"".join(b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n1\r\n' % i for i in range(1000)), "x"),
        (b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n1\r\n--x--\r\n", "x"),
        (b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + IMAGE, "x"),
        (b"--y--\r\n" * 1000, "x"),
        (b"", "x"),
        (b"--x--\r\n", "x"),
        (b"\r\n" * 100_000, "x"),
        (bytes(range(256)) * 1000, "x"),
        (b"--x--\r\n", "x" * 100),
        (b"--x--\r\n", ""),
    ],
    ids=[
        *("a thousand parts", "a thousand part headers", "no end", "another boundary", "empty", "only the end"),
        *("empty lines", "random bytes", "a long boundary", "no boundary"),
    ],
)
def test_hostile_multipart_body_is_refused(service: Service, body: bytes, content_type: str) -> None:
    for path in PATHS:
        headers = {"content-type": f"multipart/form-data; boundary={content_type}"}
        response = service.client.post(path, content=body, headers=headers)
        assert response.status_code in (400, 422), response.text
        assert_problem(response, response.status_code, response.json()["code"])
    assert RECOGNIZE.send_form(service).status_code == 200


def test_random_damage_of_a_request_is_never_a_server_error(service: Service) -> None:
    choose = random.Random(5)
    for ask in (RECOGNIZE, INPAINT):
        request = service.client.build_request("POST", ask.path, data=ask.fields, files=ask.files)
        whole = {
            request.headers["content-type"]: request.read(),
            JSON: json.dumps(ask.document).encode(),
        }
        for content_type, body in whole.items():
            for _ in range(25):
                damaged = bytearray(body)
                for _ in range(choose.randint(1, 4)):
                    damaged[choose.randrange(len(damaged))] = choose.randrange(256)
                response = service.client.post(ask.path, content=bytes(damaged), headers={"content-type": content_type})
                assert response.status_code in (200, 400, 422), response.text
    assert not [line for line in service.process.lines if '"level": "error"' in line]


# Authentication, limits, metrics and log


def test_keys_and_rate_limits_apply_to_every_route(start: Start) -> None:
    protected = start(UNFOG_API_KEYS="a-key-of-some-length", UNFOG_RATE_LIMIT=f"{len(PATHS) + 2}/hour")
    key = {"x-api-key": "a-key-of-some-length"}
    for ask in PATHS.values():
        assert_problem(ask.send(protected), 401, "unauthorized")
        assert ask.send(protected, headers=key).status_code == 200
    assert [RECOGNIZE.send(protected, headers=key).status_code for _ in range(3)] == [200, 200, 429]
    assert_problem(EDIT.send(protected, headers=key), 429, "rate_limited")


@pytest.mark.parametrize("path", PATHS)
def test_metrics_and_log_have_the_route(service: Service, path: str) -> None:
    service.wait_until_idle()
    before = service.metrics()
    request_id = f"logged-{path[1:]}"
    assert PATHS[path].send(service, headers={"x-request-id": request_id}).status_code == 200
    assert PATHS[path].having(image=b"broken").send(service).status_code == 422

    def count(code: str) -> float:
        return service.metrics().value("requests_total", route=path, code=code) - before.value(
            "requests_total", route=path, code=code
        )

    wait_until(lambda: (count("200"), count("422")) == (1, 1), "both requests are counted")
    after = service.metrics()
    name = "request_duration_seconds_count"
    assert after.value(name, route=path) - before.value(name, route=path) == 2
    assert not after.value("requests_total", route="other", code="200")
    wait_until(lambda: any(request_id in line for line in service.process.lines), "the request is logged")
    (line,) = [json.loads(line) for line in service.process.lines if request_id in line]
    fields = {name: line[name] for name in ("route", "status", "outcome", "count", "model")}
    count_of = PATHS[path].fields.get("count", 1)
    assert fields == {"route": path, "status": 200, "outcome": "ok", "count": count_of, "model": "default"}


def test_images_are_counted_by_the_digit_that_was_found(service: Service, alone: dict[str, Result]) -> None:
    service.wait_until_idle()
    digit = str(alone["inpaint an unknown digit"]["digit"])
    before = service.metrics().value("images_total", digit=digit)
    TASKS["inpaint an unknown digit"].result(service)
    assert service.metrics().value("images_total", digit=digit) == before + 2


def test_log_of_a_search_contains_the_digit_that_was_found(service: Service, alone: dict[str, Result]) -> None:
    TASKS["edit an unknown digit"].send(service, headers={"x-request-id": "found-digit"})
    wait_until(lambda: any("found-digit" in line for line in service.process.lines), "the request is logged")
    (line,) = [json.loads(line) for line in service.process.lines if "found-digit" in line]
    assert line["digit"] == alone["edit an unknown digit"]["digit"]


def test_every_kind_of_request_was_answered_without_a_server_error(service: Service) -> None:
    assert BOTH.keys() == INPAINT.files.keys()
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    requests = {
        dict(labels).get("code")
        for (name, labels), value in service.metrics().items()
        if value and name == "unfog_requests_total"
    }
    assert "500" not in requests
